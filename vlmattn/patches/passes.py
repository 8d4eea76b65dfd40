"""One forward pass of the text model: which tokens each layer gets, and the masks and rotary tables to match."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmattn.errors import CallError, SpecError
from vlmattn.methods.base import Pruner, View
from vlmattn.patches import cache as caches
from vlmattn.patches.attention import PRIVATE, Collector
from vlmattn.patches.families.base import Family
from vlmattn.patches.vision import content_key
from vlmattn.plan import Plan, Stage, compact, decode_mask, gather_rows, prefill_mask
from vlmattn.spans import Span, find_spans, image_index

if TYPE_CHECKING:
    from vlmattn.patches.engine import Engine

SCORE_NEEDS = ("last_row_scores", "text_row_scores", "all_row_scores")


def read_prompt(
    family: Family, config: Any, ids: Tensor, ahead: int, arguments: Mapping[str, Any], keys: Mapping[int, list[int]]
) -> Plan | None:
    """A fresh plan with the visual tokens of `ids` `(B, N)`; None if there are none.

    Args:
        family, config: of the wrapped model.
        ids: the prompt, padded, and `ahead` guessed tokens after it.
        ahead: how many of the last columns are guesses (assisted decoding verifies some together with the prompt).
        arguments: the text model's arguments.
        keys: content keys of the images, in batch order, by feature method.
    """
    placeholders = family.placeholders(config)
    visual = functools.reduce(torch.logical_or, [ids == token for token in placeholders])
    if not bool(visual.any()):
        return None
    mask = arguments.get("attention_mask")
    real = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else torch.ones_like(visual)
    positions = arguments.get("position_ids")
    spans = [
        tuple(dataclasses.replace(span, grid=_grid(family, config, positions, row, span)) for span in row_spans)
        for row, row_spans in enumerate(find_spans(visual, family.tokens_per_image(config)))
    ]
    plan = Plan(real, visual, image_index(spans, ids.shape[1], ids.device), spans, ahead)
    if keys:
        end = ids.shape[1] - ahead
        plan.keys = _assign_keys(ids[:, :end], real[:, :end], placeholders, spans, keys)
    return plan


def _grid(family: Family, config: Any, positions: Tensor | None, row: int, span: Span) -> tuple[int, int, int] | None:
    rows = None
    if family.rope == "mrope" and positions is not None and positions.ndim == 3:
        axes = positions[-3:]
        rows = axes[:, row if axes.shape[1] > 1 else 0, span.start : span.start + span.length]
    return family.grid(config, span.length, rows)


def _assign_keys(
    ids: Tensor, real: Tensor, placeholders: list[int], spans: list[tuple[Span, ...]], keys: Mapping[int, list[int]]
) -> tuple[tuple[int, ...], ...]:
    """One key per sample and image from text and pixels; beams repeat the images of their sample."""
    first = [
        [placeholders.index(int(ids[row, span.start])) for span in row_spans] for row, row_spans in enumerate(spans)
    ]
    shown = {place: sum(kind == place for row in first for kind in row) for place in keys}
    copies = max((shown[place] // max(len(keys[place]), 1) for place in keys), default=1) or 1
    if any(shown[place] != copies * len(keys[place]) for place in keys):
        raise CallError(
            f"{shown} images in the prompts, but { ({p: len(k) for p, k in keys.items()}) } went to the tower"
        )
    cursor = dict.fromkeys(keys, 0)
    result: list[tuple[int, ...]] = []
    for row, kinds in enumerate(first):
        if row % copies:
            result.append(result[-1])
            continue
        text = ids[row][real[row]]
        mine = []
        for kind in kinds:
            mine.append(content_key(text, keys[kind][cursor[kind]]))
            cursor[kind] += 1
        result.append(tuple(mine))
    return tuple(result)


@dataclass
class Pass:
    """State of one pass through the decoder layers.

    Attributes:
        plan: the plan of the generation.
        schedule: layers that prune in this pass (empty after the prefill).
        prefill: whether the prompt goes through now.
        new: keys after the prompt, this pass's tokens included.
    """

    plan: Plan
    schedule: dict[int, Pruner]
    prefill: bool
    new: int = 0
    memo: dict[tuple[str, int], Any] = field(default_factory=dict)

    @property
    def busy(self) -> bool:
        """Whether any layer needs attention of ours."""
        return bool(self.schedule or self.plan.stages)

    def enter(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Arguments of decoder layer `index`, or None to leave them as they are."""
        stage = self.plan.stage(index)
        pruner = self.schedule.get(index) if index else None
        follower = self.schedule.get(index + 1)
        rows = [need for need in SCORE_NEEDS if follower is not None and need in follower.needs]
        if stage is None and pruner is None and not rows:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        changed = dict(kwargs)
        if pruner is not None:
            stage, hidden = self._prune(pruner, index, hidden)
        if stage is not None:
            self._swap(changed, stage.to(hidden.device), hidden)
        if rows:
            rows_wanted = query_rows(rows[0], self.plan, stage)
            changed[PRIVATE] = Collector(functools.partial(self.plan.scores.__setitem__, index), rows_wanted)
        if args:
            return (hidden, *args[1:]), changed
        return (), changed | {"hidden_states": hidden}

    def _prune(self, pruner: Pruner, index: int, hidden: Tensor) -> tuple[Stage | None, Tensor]:
        before = self.plan.stage(index)
        chosen = choose(pruner, index, hidden, self.plan)
        if chosen is None:
            return before, hidden
        stage, slots = chosen
        self.plan.stages.append(stage)
        return stage, gather_rows(hidden, slots.to(hidden.device))

    def _swap(self, kwargs: dict[str, Any], stage: Stage, hidden: Tensor) -> None:
        # cos and sin carry the positions; gapped ids would make flash attention believe in packed sequences
        kwargs["position_ids"] = None
        if stage.layer == 0:
            return
        key = (str(hidden.device), stage.layer)
        if key not in self.memo:
            mask = kwargs.get("attention_mask")
            if not self.prefill:
                self.memo[key] = decode_mask(mask, stage, self.plan.base_length, self.new, hidden.shape[0])
            else:
                cos, sin = kwargs["position_embeddings"]
                tables = (gather_rows(cos, stage.base), gather_rows(sin, stage.base))
                self.memo[key] = tables, prefill_mask(mask, stage)
        if self.prefill:
            kwargs["position_embeddings"], kwargs["attention_mask"] = self.memo[key]
        else:
            kwargs["attention_mask"] = self.memo[key]


def query_rows(need: str, plan: Plan, stage: Stage | None) -> Tensor:
    """`(B, M)` bool, the query rows of a layer whose attention a need is about; guessed tokens never count."""
    _, real, visual = frame(plan, stage)
    prompt = real.clone()
    if plan.ahead:
        prompt[:, -plan.ahead :] = False
    if need == "last_row_scores":
        last = torch.zeros_like(real)
        last[:, -1 - plan.ahead] = True
        return last
    return prompt if need == "all_row_scores" else prompt & ~visual


def frame(plan: Plan, stage: Stage | None) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt columns `(B, M)`, real and visual flags `(B, M)` of the slots that a stage (or the whole prompt) has."""
    if stage is None:
        columns = torch.arange(plan.length, device=plan.visual.device).expand_as(plan.visual)
        return columns, plan.real, plan.visual & plan.real
    columns = stage.positions
    real = plan.real.gather(1, columns)
    if stage.valid is not None:
        real = real & stage.valid
    return columns, real, plan.visual.gather(1, columns) & real


def choose(pruner: Pruner, layer: int, hidden: Tensor, plan: Plan) -> tuple[Stage, Tensor] | None:
    """Ask a pruner which visual tokens stay before `layer`.

    Args:
        hidden: `(B, M, C)` the layer's input.

    Returns:
        The new stage and the slots `(B, M')` of `hidden` that stay, or None if everything stays.

    Raises:
        SpecError: the method returned something that is not a decision about these tokens.
    """
    before = plan.stage(layer)
    columns, real, visual = frame(plan, before)
    width = int(visual.sum(1).max())
    order = torch.argsort((~visual).long(), dim=1, stable=True)[:, :width]
    shown = visual.gather(1, order)
    keep = pruner.select(_view(pruner, layer, hidden, plan, columns, order, shown)).mask
    if keep.shape != shown.shape or keep.dtype != torch.bool:
        raise SpecError(
            f"{pruner}: select() must give a bool mask of shape {tuple(shown.shape)}, "
            f"got {keep.dtype} {tuple(keep.shape)}"
        )
    stays = keep & shown
    if bool((stays == shown).all()):
        return None
    kept = (real & ~visual).scatter(1, order, stays | (real & ~visual).gather(1, order))
    slots, valid = compact(kept)
    if layer == 0:
        base = torch.arange(slots.shape[1], device=slots.device).expand_as(slots)
    else:
        base = slots if before is None or before.layer == 0 else before.base.gather(1, slots)
    return Stage(layer, str(pruner), columns.gather(1, slots), base, valid), slots


def _view(
    pruner: Pruner, layer: int, hidden: Tensor, plan: Plan, columns: Tensor, order: Tensor, shown: Tensor
) -> View:
    if "content_key" in pruner.needs and plan.keys is None:
        raise CallError(f"{pruner} draws by the image's pixels: pass pixel_values, not precomputed features")
    where = columns.gather(1, order)
    image = torch.where(shown, plan.image.gather(1, where), -1)
    images = max(len(spans) for spans in plan.spans)
    counts = torch.stack([(image == i).sum(1) for i in range(images)], 1)
    start = torch.zeros_like(counts)
    for row, spans in enumerate(plan.spans):
        for span in spans:
            start[row, span.image] = span.start
    scores = plan.scores.pop(layer - 1, None)
    return View(
        layer=layer,
        image=image,
        counts=counts,
        spans=tuple(tuple(spans) for spans in plan.spans),
        index=torch.where(shown, where - start.gather(1, image.clamp_min(0)), -1),
        hidden=gather_rows(hidden, order.to(hidden.device)) if "layer_input" in pruner.needs else None,
        scores=None if scores is None else scores.to(order.device).gather(1, order),
        keys=plan.keys,
    )


def begin_prefill(engine: Engine, plan: Plan, arguments: dict[str, Any]) -> tuple[Pass, dict[str, Any]]:
    """Start a prefill with images: check the call, prune at the entry, put the plan on the cache.

    Returns:
        The pass and the text model's arguments.

    Raises:
        CallError: the call cannot be served.
    """
    live = Pass(plan, engine.schedule, prefill=True)
    if not engine.schedule:
        return live, arguments
    cache = _cache_for(engine, arguments)
    if cache is not None:
        if not caches.is_empty(cache):
            raise CallError(
                "an image arrived while the cache already holds a conversation: pruning needs the images in the first "
                "prefill; start with a fresh cache and pass the whole conversation"
            )
        caches.adopt(cache, plan)
        arguments["past_key_values"] = cache
    _check_mask(arguments.get("attention_mask"))
    entry = engine.schedule.get(0)
    chosen = None if entry is None else choose(entry, 0, arguments["inputs_embeds"], plan)
    if chosen is not None:
        stage, slots = chosen
        plan.stages.append(stage)
        _cut_inputs(arguments, plan, stage, slots)
    if cache is not None:
        caches.set_dropped(cache, plan.dropped_at_entry)
    return live, arguments


def _check_mask(mask: Any) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise CallError("pruning needs the plain (batch, length) attention_mask of the processor, not a prepared one")
    if bool((mask[:, 1:].bool() < mask[:, :-1].bool()).any()):
        raise CallError("attention_mask is right-padded: use processor.tokenizer.padding_side = 'left'")


def _cache_for(engine: Engine, arguments: dict[str, Any]) -> Any:
    """The call's cache; one is made here where the text model would make it, so that the plan has a place to live."""
    from transformers import DynamicCache

    cache = arguments.get("past_key_values")
    use_cache = arguments.get("use_cache")
    config = engine.text_model.config
    if use_cache is None:
        use_cache = getattr(config, "use_cache", True)
    return DynamicCache(config=config) if cache is None and use_cache else cache


def _cut_inputs(arguments: dict[str, Any], plan: Plan, stage: Stage, slots: Tensor) -> None:
    """Prune at the entry of the text model: rows, their original positions, and a mask that names filler slots."""
    embeds = arguments["inputs_embeds"]
    positions = arguments.get("position_ids")
    if positions is None:
        positions = torch.arange(plan.length, device=embeds.device)[None]
    valid = torch.ones_like(slots, dtype=torch.bool) if stage.valid is None else stage.valid
    arguments["inputs_embeds"] = gather_rows(embeds, slots)
    arguments["position_ids"] = gather_rows(positions, slots, dim=-1)
    arguments["attention_mask"] = valid.to(torch.long)


def begin_decode(plan: Plan, arguments: dict[str, Any]) -> tuple[Pass, dict[str, Any]]:
    """Start a pass after the prefill: decoding, verification, or a second turn."""
    cache = arguments["past_key_values"]
    step = arguments.get("inputs_embeds")
    step = arguments.get("input_ids") if step is None else step
    assert step is not None
    batch, queries = step.shape[:2]
    logical = int(cache.get_seq_length())
    entry = plan.stages[0] if plan.stages[0].layer == 0 else None
    if entry is not None:
        mask = arguments.get("attention_mask")
        arguments["attention_mask"] = decode_entry_mask(mask, entry, plan.length, logical + queries, batch)
        if arguments.get("position_ids") is None:
            arguments["position_ids"] = torch.arange(logical, logical + queries, device=step.device)[None]
    return Pass(plan, {}, prefill=False, new=logical + queries - plan.length), arguments


def decode_entry_mask(mask: Tensor | None, entry: Stage, length: int, total: int, batch: int) -> Tensor | None:
    """The 2-D mask over what layer 0 holds, from the one over everything that was said.

    Args:
        mask: `(B, total)` of the caller, or None.
        entry: the stage at the entry.
        length: prompt columns.
        total: prompt columns plus everything after.
        batch: rows of the call.
    """
    if mask is None:
        if entry.valid is None:
            return None
        return torch.cat([entry.valid, entry.valid.new_ones(batch, total - length)], 1).to(torch.long)
    head = mask.gather(1, entry.positions)
    if entry.valid is not None:
        head = head * entry.valid.to(head.dtype)
    return torch.cat([head, mask[:, length:]], 1)
