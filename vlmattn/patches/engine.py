"""The engine: installs methods on one model and carries their decisions out.

It uses forward pre-hooks, one registered attention name and instance attributes, nothing else; everything is undone
by an `ExitStack`. See `passes.py` for what happens inside a forward pass.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from vlmattn.cost import Dims
from vlmattn.errors import CallError, VlmattnWarning
from vlmattn.methods.base import Method
from vlmattn.methods.views import Paired
from vlmattn.patches import cache as caches
from vlmattn.patches import calibration, families, memory, rehearsal, streams
from vlmattn.patches.attention import Registration, is_living
from vlmattn.patches.branches import Prompt, Shown
from vlmattn.patches.calibration import Pending
from vlmattn.patches.clock import Clock
from vlmattn.patches.decoder import Decoder
from vlmattn.patches.eviction import decide
from vlmattn.patches.options import check_options
from vlmattn.patches.passes import Pass, begin_decode, begin_prefill
from vlmattn.patches.program import Program, compile_program
from vlmattn.patches.prompt import Seen, read_prompt
from vlmattn.patches.text_tower import TextTower, read_questions
from vlmattn.patches.tower import Normal, looking, normal_of
from vlmattn.patches.vision import VisionStore, content_keys, outermost, shared, tapped
from vlmattn.plan import Plan

SEEN = ("keys", "looks", "layouts", "shown")
"""What is noted at the vision tower, the fields of `Seen` in order, and what it was shown."""

IMAGES = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")


@dataclass
class _Call:
    """What the multimodal model was called with, for the text model's hook."""

    ids: Tensor | None
    images: bool


class Engine:
    """Methods installed on one model.

    Args:
        model: a supported vision-language model with its language-model head.
        methods: what to install.
        text_tower: the text half of the vision tower's CLIP model, for methods that compare patches with the question.

    Raises:
        UnsupportedModelError: no family describes the model, its attention implementation cannot be served, it lacks
            what a method requires, or the text tower is not its vision tower's.
        LayerError, SpecError: a method does not fit this model, or two methods collide.
    """

    def __init__(self, model: nn.Module, methods: Sequence[Method], text_tower: TextTower | None = None) -> None:
        self.model = model
        self.family = families.find(model)
        self.config: Any = model.config
        self.multimodal = self.family.part(model, "multimodal")
        self.text_model = self.family.part(model, "text_model")
        self.layers = list(getattr(self.text_model, self.family.layers))
        self.dims = Dims.from_config(self.text_model.config)
        self.decoder = Decoder(model, self.family, self.dims.heads)
        self.text_tower = text_tower
        self.capabilities = self.family.capabilities | ({"text_tower"} if text_tower else set())
        if text_tower is not None:
            text_tower.check(self.family.part(model, "vision_tower"))
        self.last: Plan | None = None
        self.last_second: Plan | None = None
        self.owner: Any = None
        self.store: VisionStore | None = None
        self._local = threading.local()
        self._signatures = {
            module: inspect.signature(module.forward) for module in (model, self.multimodal, self.text_model)
        }
        self._setup = ExitStack()
        self._stack = ExitStack()
        self.methods: tuple[Method, ...] = tuple(methods)
        self.program = self._compile(methods)
        self._told: set[str] = set()
        self._tell()

    # Installing and undoing

    def install(self) -> None:
        """Hook the model. On any error everything is undone."""
        with ExitStack() as stack:
            hooks: list[tuple[nn.Module, Callable[..., Any]]] = [
                (self.model, self._on_model),
                (self.multimodal, self._on_multimodal),
                (self.text_model, self._on_text),
                *((layer, functools.partial(self._on_layer, i)) for i, layer in enumerate(self.layers)),
            ]
            for module, hook in hooks:
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.callback(self.text_model.register_forward_hook(self._after_text, always_call=True).remove)
            stack.callback(self.multimodal.register_forward_hook(self._after_multimodal, always_call=True).remove)
            stack.callback(self.model.register_forward_hook(self._after_model, always_call=True).remove)
            self._replace(stack, self.model, "generate", self._guarded_generate(self.model.generate))
            self._configure()
            self._stack = stack.pop_all()

    def configure(
        self,
        methods: Sequence[Method],
        *,
        record: bool | None = None,
        backend: str | None = None,
        timed: bool | None = None,
        divergence: bool | None = None,
    ) -> None:
        """Exchange the methods of an installed engine, or how it works; if they do not fit, the old ones stay.

        Args:
            methods: the new methods.
            record: whether statistics are kept; None: as before.
            backend: attention backend; None: as before.
            timed: whether the time that choosing takes is added up; None: as before.
            divergence: whether all heads are compared with a text-only stream; None: as before.
        """
        program = dataclasses.replace(
            self._compile(methods),
            record=self.program.record if record is None else record,
            backend=self.program.backend if backend is None else backend,
            clock=self.program.clock if timed is None else Clock() if timed else None,
            divergence=self.program.divergence if divergence is None else divergence,
        )
        before = self.methods, self.program
        self.methods, self.program = tuple(methods), program
        try:
            self._tell()
        except VlmattnWarning:  # warnings may be errors
            self.methods, self.program = before
            raise
        self._configure()

    def _compile(self, methods: Sequence[Method]) -> Program:
        return compile_program(methods, self.config, self.dims, self.family, self.capabilities)

    def share(self, store: VisionStore | None) -> None:
        """Take vision features from a store, or None: compute them.

        Raises:
            CallError: the store belongs to another model.
        """
        if store is not None:
            store.bind(self.model)
        self.store = store
        self._configure()

    def _configure(self) -> None:
        """Install what depends on the methods: a fresh attention name, shared features, and the taps they need."""
        registration = Registration(self.text_model.config)
        self._setup.close()
        plain = {name: getattr(self.multimodal, name) for name in self.family.feature_methods}
        with ExitStack() as stack:
            stack.callback(registration.remove)
            for index in self.program.skipped:
                self._replace(stack, self.layers[index], "forward", _pass_through)
            for index in range(len(self.layers)) if self.program.divergence else self.program.heads:
                projection = operator.attrgetter(self.family.output_projection)(self.layers[index])
                hook = functools.partial(self._on_heads, index)
                stack.callback(projection.register_forward_pre_hook(hook).remove)
            for index in self.program.retracing:
                network = operator.attrgetter(self.family.feed_forward)(self.layers[index])
                stack.callback(network.register_forward_hook(functools.partial(self._after_network, index)).remove)
            # what only images of several grids are looked at for is left out where there are none
            looks = frozenset(look for look in self.program.looks if self.family.layouts or not look.tiled)
            if self.store is not None and not looks:
                for name in self.family.feature_methods:
                    original = getattr(self.multimodal, name)
                    behind = shared(original, self.store, self.model, self.multimodal, self.text_model)
                    self._replace(stack, self.multimodal, name, behind)
            for place, (name, split) in enumerate(self.family.feature_methods.items()):
                layout = functools.partial(self.family.layouts[name], self.config) if self.family.layouts else None
                reads: dict[str, Any] = {"layouts": layout} if layout else {}
                if self.program.shows:
                    reads["shown"] = functools.partial(Shown.of, name, split)
                if "content_key" in self.program.needs:
                    reads["keys"] = functools.partial(content_keys, split)
                for what, read in reads.items():  # around the shared methods, so whether they run or not
                    behind = tapped(getattr(self.multimodal, name), read, functools.partial(self._put, what, place))
                    self._replace(stack, self.multimodal, name, behind)
                if looks:
                    put = functools.partial(self._put, "looks", place)
                    original, parts = getattr(self.multimodal, name), self.family.tower(self.model)
                    behind = looking(original, parts, looks, put, layout, self._normal, self.program.timed)
                    self._replace(stack, self.multimodal, name, behind)
            for name, original in plain.items():
                if (behind := getattr(self.multimodal, name)) != original:
                    self._replace(stack, self.multimodal, name, outermost(original, behind, self._local))
            self._setup = stack.pop_all()

    def _tell(self) -> None:
        """Say what users of these methods should know: cautions, and that the checkpoint has no sinks to work on."""
        for method in self.methods:
            if method.caution and not method.is_noop:
                self._warn(method.name, f"{method} {method.caution}")
        if self.program.sink_dims == ():
            idle = ", ".join(str(method) for method in self.methods if "sink_dims" in method.needs)
            name = getattr(self.config, "_name_or_path", "") or "this model"
            name = Path(name).name if Path(name).is_dir() else name
            self._warn(
                "sinks", f"{idle} does nothing on {name!r}: this checkpoint has no visual sinks, says its preset"
            )

    def _warn(self, about: str, said: str) -> None:
        """A warning, once a session; where warnings are errors it counts as said."""
        if about not in self._told:
            self._told.add(about)
            warnings.warn(said, VlmattnWarning, stacklevel=5)

    def remove(self) -> None:
        """Undo everything; the model is bit for bit what it was."""
        self._setup.close()
        self._stack.close()
        self.store = None

    @staticmethod
    def _replace(stack: ExitStack, owner: nn.Module, name: str, value: Any) -> None:
        """Put an attribute on an instance, and what was there back on exit."""
        had, before = name in owner.__dict__, owner.__dict__.get(name)
        setattr(owner, name, value)

        def undo() -> None:
            owner.__dict__.pop(name, None)
            if had:
                owner.__dict__[name] = before

        stack.callback(undo)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse copies: a copied hook would act for the wrong model."""
        raise CallError("a wrapped model cannot be copied or pickled: call session.remove() first, then wrap the copy")

    # Hooks

    def _arguments(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name, however they were passed."""
        return dict(self._signatures[module].bind_partial(*args, **kwargs).arguments)

    def _on_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._local.head = True
        if not self.program.changes:
            return
        if module.training:
            raise CallError("methods are for inference: call model.eval() first, or session.remove() to train")
        arguments = self._arguments(module, args, kwargs)
        moves = self.program.pruners or self.program.calibration is not None
        if moves and isinstance(arguments.get("logits_to_keep"), Tensor):
            raise CallError(
                "logits_to_keep as a tensor would index a sequence that methods change: give a number of last columns, "
                "or read session.report().positions"
            )
        if arguments.get("labels") is not None:
            raise CallError("labels do not fit changed logits: call without labels, or remove the session for a loss")

    def _on_multimodal(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = self._arguments(module, args, kwargs)
        given = (arguments.get(name) for name in IMAGES)
        images = any(any(v is not None for v in x.values()) if isinstance(x, dict) else x is not None for x in given)
        self._local.call = _Call(arguments.get("input_ids"), images)
        if images and self.program.clock is not None:
            self.program.clock.seconds = 0.0

    def _after_multimodal(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Whatever happened, the next call starts from nothing."""
        for name in ("call", *SEEN):
            self._local.__dict__.pop(name, None)

    def _on_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call: _Call | None = self._local.__dict__.pop("call", None)
        keys, looks, layouts, shown = (self._local.__dict__.pop(name, {}) for name in SEEN)
        seen = Seen(keys, looks, layouts, {place: len(call.images) for place, call in shown.items()})
        config: Any = self.text_model.config
        if self.program.acts and not is_living(config):
            raise CallError(
                f"the attention implementation was set to {config._attn_implementation!r} while the "
                "session was installed: call session.remove(), set it, and wrap again"
            )
        arguments = self._arguments(module, args, kwargs)
        extra = arguments.pop("kwargs", {})
        arguments |= extra
        for name in ("live", "prompt", "pending"):
            self._local.__dict__.pop(name, None)
        if call is not None and call.images:
            if call.ids is None:
                if self.program.acts:
                    raise CallError("visual tokens are found by their ids: pass input_ids, not inputs_embeds")
                return None
            if self.family.layouts and not seen.layouts:
                if self.program.acts:
                    raise CallError("features do not tell how the tokens of an image lie: pass pixel_values instead")
                return None
            if self.program.resizer is not None and not self.told("resized"):
                raise CallError(
                    f"{self.program.resizer} changes images before the processor sees them, and these inputs were made "
                    "without it: use session.answer(image, text), or make the inputs and call the model inside "
                    "`with session.images(pictures) as smaller`"
                )
            ahead = max(call.ids.shape[1] - (self._local.__dict__.get("prompt_length") or call.ids.shape[1]), 0)
            plan = read_prompt(self.family, self.config, call.ids, ahead, arguments, seen)
            if plan is not None:
                self._check_through()
                if self.program.compares:
                    plan.paired = self._pair(call.ids, plan)
                if self.program.calibration is not None:
                    self._expect_logits(calibration.prompt(self, plan, arguments, shown))
                live, changed = begin_prefill(self, plan, arguments, self.program)
                self.last = live.plan
                return self._enter(live, changed)
        plan = caches.plan_of(arguments.get("past_key_values"))
        if self.program.changes or plan is not None:
            caches.check_layers(arguments.get("past_key_values"), self.program.skipped)
        if plan is None and self.program.acts and call is not None and call.ids is None:
            self._warn(
                "embeddings",
                "a prompt came as inputs_embeds without pixels: visual tokens are found by their ids, so that the "
                "methods do nothing for it; pass input_ids and pixel_values",
            )
        if plan is not None:
            self._expect_logits(None)
            return self._enter(*begin_decode(plan, self.program, self.decoder, arguments))
        return None

    def _check_through(self) -> None:
        """Refuse a plain prompt with an image where a method acts through a call of the session only."""
        method = next((method for method in self.program.methods if method.through), None)
        if method is not None and not self._local.__dict__.get("inside_call"):
            raise CallError(
                f"{method} cannot act in a plain forward or generate: call {method.through}, or session.remove() first"
            )

    @contextmanager
    def inside_call(self) -> Iterator[None]:
        """Inside, methods that act through a call of the session are in it, in this thread."""
        self._local.inside_call = True
        try:
            yield
        finally:
            self._local.inside_call = False

    def _expect_logits(self, prompt: Prompt | None) -> None:
        """Remember a prompt for its second branch, and that logits will come to be calibrated."""
        if self.program.calibration is not None and not self._local.__dict__.get("head", False):
            calibration.refuse_without_head(self.program)
        if self.program.branch is not None:
            self._local.prompt = prompt

    def _pair(self, ids: Tensor, plan: Plan) -> Paired:
        """The question of every row of `ids`, embedded by the text tower."""
        assert self.text_tower is not None
        asked: tuple[str, ...] = self.told("questions") or ()
        tokenizer = getattr(self.owner.processor, "tokenizer", None)
        if not asked and tokenizer is None:
            raise CallError(
                f"{self.program.compares[0]} compares patches with the question: wrap the model with "
                "processor=processor, so that it can be read, or say it in `with session.question(...)`"
            )
        return self.text_tower.pair(asked or read_questions(ids, plan, tokenizer), len(ids))

    @contextmanager
    def during(self, name: str, value: Any) -> Iterator[None]:
        """Inside, `told(name)` gives this for the prompts of this thread: `questions`, one for all rows or one a row;
        `segments`, see `segments.Ranges`; `rehearsal`, see `rehearsal.begin`; `resized`, whether the images went
        through the installed resizer."""
        before = self.told(name)
        setattr(self._local, name, value)
        try:
            yield
        finally:
            setattr(self._local, name, before)

    def told(self, name: str) -> Any:
        """What `during` said last; None: nothing."""
        return self._local.__dict__.get(name)

    def _enter(self, live: Pass, changed: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        if live.busy:
            self._local.live = live
        self._local.cache = changed.get("past_key_values")
        return (), changed

    def _after_text(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        cache = self._local.__dict__.pop("cache", None)
        if (known := caches.plan_of(cache)) is not None and known.extra:
            caches.set_dropped(cache, known.dropped_at_entry)
        live: Pass | None = self._local.__dict__.pop("live", None)
        prompt: Prompt | None = self._local.__dict__.pop("prompt", None)
        if live is None or output is None:
            return None
        plan, output = self._finish(live, cache, output)
        if live.prefill:
            self.last, self.last_second = plan, None
            if prompt is not None:
                plan, self.last_second, output = calibration.prefill_second(self, prompt, plan, cache, output)
        if plan.branches > 1 and self.program.branch is None:  # the calibration left in the middle of a generation
            return streams.first_rows(output, plan.samples)
        if self.program.calibration is not None and (self.program.branch is None or plan.branches > 1):
            self._local.pending = Pending.of(live, self._local.__dict__.get("prompt_length"))
        return output

    def run_prefill(self, live: Pass, arguments: dict[str, Any]) -> tuple[Plan, Any]:
        """A prefill inside another pass, to the plan it leaves and the text model's output."""
        _, arguments = self._enter(live, arguments)
        cache = arguments.get("past_key_values")
        try:
            output = self.text_model.forward(**arguments)
        finally:
            for name in ("live", "cache"):
                self._local.__dict__.pop(name, None)
        return self._finish(live, cache, output)

    def looked(self) -> Any:
        """Give and forget what was looked at inside the tower, by feature method."""
        return self._local.__dict__.pop("looks", {})

    @staticmethod
    def _finish(live: Pass, cache: Any, output: Any) -> tuple[Plan, Any]:
        """End a pass: the plan it leaves, and the text model's output without a stream that ran beside."""
        plan = live.plan
        if live.prefill:
            if cache is not None:
                caches.shrink(cache, plan)
            plan.settle()
        rehearsal.settle(live)
        if live.statistics:
            plan.steps.append({layer: rows[: plan.samples] for layer, rows in live.statistics.items()})
        if plan.visual.shape[0] != plan.samples and live.prefill:
            first = torch.arange(plan.samples, device=plan.visual.device)
            if cache is None:
                plan = plan.rows(first)
            else:
                cache.take(first)
                plan = cache.plan
            output = streams.first_rows(output, plan.samples)
        if live.watching is not None and live.watching.evictors:
            with live.program.timed(plan.visual.device):
                decide(live.watching, cache)
        return plan, output

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Calibrate the logits."""
        self._local.__dict__.pop("head", None)
        pending: Pending | None = self._local.__dict__.pop("pending", None)
        if pending is None or output is None:
            return None
        return calibration.calibrated(self, pending, output)

    def _on_heads(self, index: int, module: nn.Module, args: tuple[Any, ...]) -> Any:
        live: Pass | None = self._local.__dict__.get("live")
        scaled = None if live is None else live.leave_heads(index, args[0])
        return None if scaled is None else (scaled, *args[1:])

    def _after_network(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        live: Pass | None = self._local.__dict__.get("live")
        return None if live is None else memory.mix(live, self.program.retracing[index], index, args[0], output)

    def _on_layer(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        live: Pass | None = self._local.__dict__.get("live")
        return None if live is None else live.enter(index, args, kwargs)

    def _normal(self) -> Normal | None:
        """How this session's processor normalises pixels, if it is known."""
        return normal_of(getattr(self.owner, "processor", None))

    def _put(self, name: str, place: int, seen: Any) -> None:
        """Note what was seen at a feature method for the pass that follows, by a name of `SEEN`."""
        self._local.__dict__.setdefault(name, {})[place] = seen

    @contextmanager
    def prompt_ends(self, length: int | None) -> Iterator[None]:
        """Inside, columns from `length` on are tokens after the prompt, for this thread.

        Raises:
            CallError: `length` is not a positive number.
        """
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise CallError(f"prompt({length!r}): give the number of columns of the prompt, at least 1")
        before = self._local.__dict__.get("prompt_length")
        self._local.prompt_length = length
        try:
            yield
        finally:
            self._local.prompt_length = before

    def _guarded_generate(self, original: Any) -> Callable[..., Any]:
        """`generate` as it is, after refusing options under which pruning would silently go wrong.

        It also notes where the prompt ends: assisted decoding sends guessed tokens through the prefill.
        """

        signature = inspect.signature(original)

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            for name in SEEN:
                self._local.__dict__.pop(name, None)
            if self.program.changes:
                given = signature.bind(*args, **kwargs).arguments
                options = given.get("kwargs", {}) | {k: v for k, v in given.items() if k != "kwargs"}
                config = options.get("generation_config") or getattr(self.model, "generation_config", None)
                check_options(options, config, self.program.evictors.values())
                ids = options.get("input_ids", options.get("inputs"))
                length = ids.shape[1] if isinstance(ids, Tensor) and ids.ndim == 2 else None
                with self.prompt_ends(length), rehearsal.rehearsed(self, original, options):
                    return original(*args, **kwargs)
            return original(*args, **kwargs)

        return generate


def _pass_through(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A decoder layer that is left out."""
    return hidden_states
