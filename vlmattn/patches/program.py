"""The methods of a session, sorted by the layers of one model in which they act."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from vlmattn import presets
from vlmattn.cost import Dims
from vlmattn.errors import LayerError, SpecError, UnsupportedModelError
from vlmattn.methods.base import REGISTRY, Editor, HeadGain, Look, Method, Resizer, Selector
from vlmattn.methods.cache import Evictor
from vlmattn.methods.calibrate import Branch, Calibration, Hide
from vlmattn.methods.memory import Retracing
from vlmattn.methods.rehearsal import Rehearser
from vlmattn.methods.segments import Segmenter
from vlmattn.methods.skipper import Skipper
from vlmattn.patches.clock import Clock
from vlmattn.patches.families.base import CAPABILITIES, Family
from vlmattn.patches.selection import Turn

DEEPSTACK_LAYERS = 3
"""Where visual features are added again inside the decoder, it is behind so many first layers."""


@dataclass(frozen=True)
class Program:
    """The methods of a session as the layers of one model need them.

    Attributes:
        pruners: stages of pruners by the layer they prune before.
        editors: by edited layer.
        heads: by reinforced layer.
        evictors: by the layer from whose cache they evict.
        skipped: by layer that is left out.
        resizer: what changes the images before the processor sees them.
        retracing: by layer whose feed-forward network may be mixed with the visual tokens.
        calibration: what changes the logits.
        branch: what the second branch runs, which has a program of its own; None: there is no second branch.
        lens: layers whose inputs go through the head.
        attends: whether the last prompt token's attention is noted in every layer, for a second branch.
        hides: in a second branch the keys that are hidden, with the first layer in which they are.
        sink_dims: hidden dimensions of the checkpoint's sinks, if an editor needs them.
        record: whether statistics are kept.
        divergence: whether the head outputs of all layers are compared with those of a text-only stream.
        backend: attention backend; None: the fastest.
        clock: adds up the time that choosing takes, if it is to be known.
    """

    pruners: dict[int, Turn] = field(default_factory=dict)
    editors: dict[int, Editor] = field(default_factory=dict)
    heads: dict[int, HeadGain] = field(default_factory=dict)
    evictors: dict[int, Evictor] = field(default_factory=dict)
    skipped: dict[int, Skipper] = field(default_factory=dict)
    resizer: Resizer | None = None
    retracing: dict[int, Retracing] = field(default_factory=dict)
    calibration: Calibration | None = None
    branch: Program | None = None
    lens: tuple[int, ...] = ()
    attends: bool = False
    hides: tuple[int, Hide] | None = None
    sink_dims: tuple[int, ...] | None = None
    record: bool = False
    divergence: bool = False
    backend: str | None = None
    clock: Clock | None = None

    def timed(self, device: torch.device) -> AbstractContextManager[None]:
        """Inside, time on `device` counts as that of choosing tokens."""
        return nullcontext() if self.clock is None else self.clock.running(device)

    @property
    def changes(self) -> bool:
        """Whether anything of the model's computation changes."""
        own = (self.pruners, self.editors, self.heads, self.evictors, self.skipped, self.retracing)
        return any(own) or self.calibration is not None

    @property
    def acts(self) -> bool:
        """Whether there is anything to do in a generation with images."""
        return self.changes or self.record or self.divergence

    @property
    def methods(self) -> list[Method]:
        """The installed methods; one with several stages or layers as often."""
        tables = (self.editors, self.heads, self.evictors, self.skipped, self.retracing)
        found = [*(turn.pruner for turn in self.pruners.values()), *(m for table in tables for m in table.values())]
        return [*found, *([] if self.calibration is None else [self.calibration])]

    @property
    def rehearser(self) -> Rehearser | None:
        """The method that answers twice, if any."""
        return next((editor for editor in self.editors.values() if isinstance(editor, Rehearser)), None)

    @property
    def segmenter(self) -> Segmenter | None:
        """The method that orders segments, if any."""
        return next((editor for editor in self.editors.values() if isinstance(editor, Segmenter)), None)

    @property
    def needs(self) -> frozenset[str]:
        """Union of what the methods and the statistics need, in a second branch as well."""
        own = frozenset({"text_stream"} if self.divergence else ())
        own = own.union(*(method.needs for method in self.methods))
        return own if self.branch is None else own | self.branch.needs

    @property
    def shows(self) -> bool:
        """Whether the second branch has other pixels, so that those of the prompt must be kept until it runs."""
        branch = None if self.calibration is None else self.calibration.branch
        return branch is not None and branch.pixels is not None

    @property
    def compares(self) -> list[str]:
        """The methods that compare patches with the question, by the text tower."""
        return [str(turn) for turn in self.pruners.values() if "text_tower" in turn.pruner.requires]

    @property
    def looks(self) -> frozenset[Look]:
        """What methods look at inside the vision tower, so that it must run for every prompt."""
        lookers: list[Selector | Editor] = [*(turn.pruner for turn in self.pruners.values()), *self.editors.values()]
        own = frozenset(look for method in lookers for look in method.looks.values())
        return own if self.branch is None else own | self.branch.looks


def compile_program(methods: Sequence[Method], config: Any, dims: Dims, family: Family, has: frozenset[str]) -> Program:
    """Sort methods by the layers they act in.

    Args:
        methods: in the order of the spec.
        config: of the wrapped model.
        dims: sizes of its decoder.
        family: what is known about it.
        has: its capabilities.

    Raises:
        LayerError: a method does not fit this depth.
        SpecError: two methods do the same thing in the same layer, a kind is unknown, or a preset is missing.
        UnsupportedModelError: a method requires what the model has not.
    """
    program = Program()
    for method in (part for whole in methods for part in whole.parts(dims.num_layers)):
        if "head_list" in method.needs and not method.is_noop:
            known: Any = {"heads": presets.head_list(config, method.name)}
            method = dataclasses.replace(method, **known)
        turns: list[Any]
        if isinstance(method, Resizer):
            program = _with_resizer(program, method, family, has)
            continue
        if isinstance(method, Selector):
            table: dict[int, Any] = program.pruners
            layers, act = list(method.stages(dims.num_layers)), "prune before"
            turns = [Turn(method, stage) for stage in range(len(layers))]
        elif isinstance(method, Editor):
            table, layers, act = program.editors, list(method.layers(dims.num_layers)), "edit attention in"
            _check_heads(method, layers, dims.heads)
            turns = [method] * len(layers)
        elif isinstance(method, HeadGain):
            table, layers, act = program.heads, method.layers(dims.num_layers), "scale heads in"
            turns = [method] * len(layers)
        elif isinstance(method, Evictor):
            table, layers, act = program.evictors, list(method.layers(dims.num_layers)), "evict from the cache of"
            turns = [method] * len(layers)
        elif isinstance(method, Skipper):
            table, layers, act = program.skipped, list(method.skipped(dims.num_layers)), "leave out"
            turns = [method] * len(layers)
        elif isinstance(method, Retracing):
            table, layers, act = program.retracing, list(method.layers(dims.num_layers)), "mix"
            turns = [method] * len(layers)
        elif isinstance(method, Calibration):
            program = _calibrated(program, method, dims, family, has)
            continue
        else:
            raise SpecError(f"{method} is of kind {method.kind!r}, which this version cannot install")
        if method.is_noop:
            continue
        if isinstance(method, Selector):
            _check_capabilities(method, family, has)
        for layer, turn in zip(layers, turns, strict=True):
            if layer in table:
                raise SpecError(f"{table[layer]} and {method} both {act} layer {layer}: give one of them other layers")
            table[layer] = turn
    _check_rehearsal(program)
    _check_segments(program)
    shrinking = [turn.pruner for turn in program.pruners.values() if turn.pruner.shrink_early_layers]
    if shrinking and program.evictors:
        evictor = next(iter(program.evictors.values()))
        raise SpecError(f"{shrinking[0]} and {evictor} both shorten caches: leave shrink_early_layers off")
    _check_whole(program)
    _leave_out(program, family)
    if "sink_dims" in program.needs:
        program = dataclasses.replace(program, sink_dims=presets.sink_dims(config))
    branch = None if program.calibration is None else program.calibration.branch
    if branch is not None:
        alone = [*dict.fromkeys(program.evictors.values()), program.rehearser, program.segmenter]
        for keeper in alone:
            if keeper is not None:
                raise SpecError(
                    f"{keeper} changes what the caches of a prompt hold, or its positions, and the second branch of "
                    f"{program.calibration} does not follow: leave one of them out"
                )
        program = dataclasses.replace(program, branch=_second(program, branch, dims), attends=branch.attention)
    return program


def _check_whole(program: Program) -> None:
    evictors = dict.fromkeys(program.evictors.values())
    for evictor in evictors:
        pruners = [turn.pruner for turn in program.pruners.values()]
        others = [method for method in (*pruners, *evictors) if method is not evictor]
        if evictor.whole and others:
            raise SpecError(
                f"{evictor} chooses among all tokens of the prompt, and {others[0]} drops some of them: leave one of "
                "them out"
            )


def _leave_out(program: Program, family: Family) -> None:
    """Drop what methods would do in layers that are left out.

    Raises:
        LayerError: such a layer must stay, or is all that a method has.
    """
    for layer, skipper in program.skipped.items():
        if layer == 0:
            raise LayerError(f"{skipper}: layer 0 must stay, its cache tells how long the conversation is")
        if family.deepstack and layer < DEEPSTACK_LAYERS:
            raise LayerError(
                f"{skipper}: {family.name} adds visual features behind its first {DEEPSTACK_LAYERS} layers, so that "
                f"layer {layer} must stay: leave out later ones"
            )
    for layer, turn in program.pruners.items():
        _check_source(program, str(turn), layer, _source(turn.pruner, layer))
    tables: tuple[dict[int, Any], ...] = (program.editors, program.heads, program.evictors, program.retracing)
    for table in tables:
        methods = set(map(str, table.values()))
        for layer in program.skipped.keys() & table.keys():
            del table[layer]
        if idle := methods - set(map(str, table.values())):
            raise LayerError(f"{', '.join(idle)} acts only in layers that are left out: give it other layers")


def _check_source(program: Program, method: str, layer: int, source: int | None) -> None:
    if source in program.skipped:
        raise LayerError(
            f"{method} before layer {layer} reads the attention of layer {source}, which {program.skipped[source]} "
            "leaves out: give one of them other layers"
        )


def _source(pruner: Selector, layer: int) -> int | None:
    """The layer whose attention a pruner reads before `layer`, or None."""
    if pruner.attention is not None and pruner.attention.layer == "upcoming":
        return layer
    reads = pruner.attention is not None or "layer_keys" in pruner.needs
    return layer - 1 if reads else None


def _with_resizer(program: Program, method: Resizer, family: Family, has: frozenset[str]) -> Program:
    if method.is_noop:
        return program
    _check_capabilities(method, family, has)
    if program.resizer is not None:
        raise SpecError(f"{program.resizer} and {method} both change the size of images: leave one of them out")
    return dataclasses.replace(program, resizer=method)


def _check_heads(method: Editor, layers: Sequence[int], heads: int) -> None:
    last = max((head for layer in layers for head in method.edit(layer).heads or ()), default=0)
    if last >= heads:
        raise SpecError(f"{method}: there is no head {last}, this model has {heads} query heads in a layer")


def _check_rehearsal(program: Program) -> None:
    """One method may answer twice, and only where all layers hold the same visual tokens."""
    twice = {str(editor) for editor in program.editors.values() if isinstance(editor, Rehearser)}
    if len(twice) > 1:
        raise SpecError(f"{' and '.join(sorted(twice))} both answer twice: install one of them")
    late = [str(turn) for layer, turn in program.pruners.items() if layer] or _evicting(program)
    if twice and late:
        raise SpecError(
            f"{twice.pop()} compares what the layers look at, and {late[0]} takes keys from some of them: prune before "
            "layer 0, or leave one of them out"
        )


def _evicting(program: Program) -> list[str]:
    return [str(method) for method in program.evictors.values()]


def _check_segments(program: Program) -> None:
    """Segments are ordered in all layers, which must hold the same tokens at the positions that this gives them."""
    method = program.segmenter
    if method is not None and (evicting := _evicting(program)):
        raise SpecError(
            f"{method} gives tokens positions of its own in all layers, and {evicting[0]} takes keys from some of "
            "them: leave one of them out"
        )
    for layer, turn in program.pruners.items():
        if method is not None and (layer or turn.pruner.positions == "compact"):
            raise SpecError(
                f"{method} gives tokens positions of its own in all layers, and {turn} "
                + ("takes tokens from some of them" if layer else "renumbers them")
                + ": prune before layer 0 with positions='original', or leave one of them out"
            )


def _calibrated(program: Program, method: Calibration, dims: Dims, family: Family, has: frozenset[str]) -> Program:
    if method.is_noop:
        return program
    if program.calibration is not None:
        raise SpecError(f"{program.calibration} and {method} both change the logits: leave one of them out")
    _check_capabilities(method, family, has)
    return dataclasses.replace(program, calibration=method, lens=method.lens(dims.num_layers))


def _second(program: Program, branch: Branch, dims: Dims) -> Program:
    """What the second branch runs: the same methods, and those of its own."""
    pruners, selector, hides = dict(program.pruners), branch.selector, None
    if branch.hide is not None:
        hides = branch.hide.before_layer(dims.num_layers), branch.hide
        _check_source(program, str(program.calibration), hides[0], hides[0] - 1)
    for stage, layer in enumerate([] if selector is None else selector.stages(dims.num_layers)):
        assert selector is not None
        if layer in pruners:
            raise SpecError(
                f"{pruners[layer]} and the second branch of {program.calibration} both prune before layer {layer}: "
                "give one of them other layers, or leave one out"
            )
        pruners[layer] = Turn(selector, stage)
        _check_source(program, str(program.calibration), layer, _source(selector, layer))
    return dataclasses.replace(program, pruners=pruners, branch=None, hides=hides)


def _check_capabilities(method: Selector | Resizer | Calibration, family: Family, has: frozenset[str]) -> None:
    missing = sorted(method.requires - has)
    if not missing:
        return
    kind = Calibration if isinstance(method, Calibration) else Selector
    fits = [
        name
        for name, cls in sorted(REGISTRY.items())
        if issubclass(cls, kind) and name != method.name and cls().requires <= has
    ]
    wanted = " and ".join(CAPABILITIES[name] for name in missing)
    own = f"{method.name} with positions='original', " if missing == ["flat_positions"] else ""
    raise UnsupportedModelError(f"{method} needs {wanted}; {family.name} has none: use {own}{', '.join(fits)}")
