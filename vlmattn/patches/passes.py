"""One forward pass of the text model: which tokens each layer gets, and the masks and rotary tables to match."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmattn.edits import NOT_A_KEY, TEXT, VISUAL, Tags
from vlmattn.errors import CallError
from vlmattn.kernels.rows import Request
from vlmattn.methods.base import Editor, HeadGain, LayerView, Selector
from vlmattn.patches import cache as caches
from vlmattn.patches import streams
from vlmattn.patches.attention import PRIVATE, Work
from vlmattn.patches.selection import choose, frame, query_rows
from vlmattn.patches.vision import INSIDE
from vlmattn.plan import Plan, Stage, decode_mask, gather_rows, prefill_mask

if TYPE_CHECKING:
    from vlmattn.patches.engine import Engine

SCORE_NEEDS = ("last_row_scores", "text_row_scores", "all_row_scores")


@dataclass(frozen=True)
class Program:
    """The methods of a session as the layers of one model need them.

    Attributes:
        pruners: by the layer they prune before.
        editors: by edited layer.
        heads: by reinforced layer.
        sink_dims: hidden dimensions of the checkpoint's sinks, if an editor needs them.
        record: whether statistics are kept.
        backend: attention backend; None: the fastest.
    """

    pruners: dict[int, Selector] = field(default_factory=dict)
    editors: dict[int, Editor] = field(default_factory=dict)
    heads: dict[int, HeadGain] = field(default_factory=dict)
    sink_dims: tuple[int, ...] | None = None
    record: bool = False
    backend: str | None = None

    @property
    def changes(self) -> bool:
        """Whether anything of the model's computation changes."""
        return bool(self.pruners or self.editors or self.heads)

    @property
    def acts(self) -> bool:
        """Whether there is anything to do in a generation with images."""
        return self.changes or self.record

    @property
    def needs(self) -> frozenset[str]:
        """Union of what the methods need."""
        methods = [*self.pruners.values(), *self.editors.values(), *self.heads.values()]
        return frozenset(need for method in methods for need in method.needs)

    @property
    def looks_inside_tower(self) -> bool:
        """Whether a method sees what happens inside the vision tower, so that it must run for every prompt."""
        return any(need.startswith(INSIDE) for need in self.needs)


@dataclass
class Pass:
    """State of one pass through the decoder layers.

    Attributes:
        plan: the plan of the generation.
        program: what the layers do.
        prefill: whether the prompt goes through now.
        new: keys after the prompt, this pass's tokens included.
        statistics: per layer what was recorded in this pass.
    """

    plan: Plan
    program: Program
    prefill: bool
    new: int = 0
    memo: dict[tuple[str, int], Any] = field(default_factory=dict)
    statistics: dict[int, Tensor] = field(default_factory=dict)

    @property
    def busy(self) -> bool:
        """Whether any layer needs attention of ours."""
        return self.program.acts or bool(self.plan.stages)

    def enter(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Arguments of decoder layer `index`, or None to leave them as they are."""
        hidden = args[0] if args else kwargs["hidden_states"]
        changed = dict(kwargs)
        stage = self.plan.stage(index)
        pruner = self.program.pruners.get(index) if self.prefill and index else None
        if pruner is not None:
            stage, hidden = self._prune(pruner, index, hidden)
        if stage is not None:
            self._swap(changed, stage.to(hidden.device), hidden)
        work = self._work(index, stage, hidden)
        if work is not None:
            changed[PRIVATE] = work
        elif stage is None and pruner is None:
            return None
        if args:
            return (hidden, *args[1:]), changed
        return (), changed | {"hidden_states": hidden}

    def leave_heads(self, index: int, joined: Tensor) -> Tensor | None:
        """Scale the joined head outputs `(rows, N, H * D)` of layer `index`; None to leave them."""
        method = self.program.heads.get(index)
        if method is None:
            return None
        rows, length, width = joined.shape
        gain = self.plan.gains.get(index)
        if self.prefill and gain is None:
            heads = self.memo["heads", 0]
            last = joined[:, -1 - self.plan.ahead].view(rows, heads, width // heads).float()
            half = self.plan.samples
            gain, divergence = method.gain(last[:half], last[half:])
            # without an image both streams say the same, and what differs is rounding, or the gap the image left
            _, _, visual = frame(self.plan, self.plan.stage(0))
            seen = visual[:half].any(1, keepdim=True).to(gain.device)
            gain, divergence = torch.where(seen, gain, 1.0), torch.where(seen, divergence, 0.0)
            self.plan.gains[index], self.plan.divergences[index] = gain, divergence
        if gain is None:
            return None
        factor = gain.repeat(rows // gain.shape[0], 1).to(joined.device, joined.dtype)
        return (joined.view(rows, length, factor.shape[1], -1) * factor[:, None, :, None]).view_as(joined)

    def _prune(self, pruner: Selector, index: int, hidden: Tensor) -> tuple[Stage | None, Tensor]:
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

    def _work(self, index: int, stage: Stage | None, hidden: Tensor) -> Work | None:
        """What the attention of layer `index` does beside attending."""
        follower = self.program.pruners.get(index + 1) if self.prefill else None
        need = next((n for n in SCORE_NEEDS if follower is not None and n in follower.needs), None)
        request = self._request(index, stage, hidden)
        if need is None and request is None:
            return None
        return Work(
            score_rows=None if need is None else query_rows(need, self.plan, stage).to(hidden.device),
            put_scores=None if need is None else functools.partial(self.plan.scores.__setitem__, index),
            request=request,
            put_statistics=functools.partial(self.statistics.__setitem__, index) if self.program.record else None,
            backend=self.program.backend,
        )

    def _request(self, index: int, stage: Stage | None, hidden: Tensor) -> Request | None:
        editor = self.program.editors.get(index)
        if editor is None and not self.program.record:
            return None
        if self.prefill:
            _, real, visual = (x.to(hidden.device) for x in frame(self.plan, stage))
            fresh = _tags(editor, hidden, real, visual, self.program.sink_dims)
            if self.plan.ahead:
                fresh.tag[:, -self.plan.ahead :] = TEXT  # tokens after the prompt are text, whatever they look like
            self.plan.tags[index] = fresh
        tags = self.plan.tags.get(index)
        if tags is None or not (tags.acts or self.program.record):
            return None
        editor = editor if tags.acts else None
        tag, active = tags.tag.to(hidden.device), tags.active.to(hidden.device)
        if self.prefill:
            rows = _edited_rows(editor, self.plan, stage).to(hidden.device)
        else:
            tag = torch.nn.functional.pad(tag, (0, self.new), value=TEXT)
            rows = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        last = -1 - self.plan.ahead if self.program.record else None
        return Request(tag, active, rows, None if editor is None else editor.edit(), last)


def _tags(
    editor: Editor | None, hidden: Tensor, real: Tensor, visual: Tensor, sink_dims: tuple[int, ...] | None
) -> Tags:
    if editor is not None:
        tags = editor.tags(LayerView(hidden, visual, real, sink_dims))
        # one look from the host per layer and prompt spares every later step of a layer that is left alone
        return Tags(tags.tag, tags.active, bool(tags.active.any()))
    tag = torch.where(real, visual.to(torch.uint8) * VISUAL, NOT_A_KEY).to(torch.uint8)
    return Tags(tag, torch.zeros_like(real[:, 0]))


def _edited_rows(editor: Editor | None, plan: Plan, stage: Stage | None) -> Tensor:
    """`(B, M)` bool, the rows of the prompt that an editor changes: text behind the first image, or the last row."""
    _, real, visual = frame(plan, stage)
    if editor is None:
        return torch.zeros_like(real)
    if editor.edit().rows == "last":
        return query_rows("last_row_scores", plan, stage) & visual.any(1, keepdim=True)
    return real & ~visual & (visual.cumsum(1) > 0)


def begin_prefill(engine: Engine, plan: Plan, arguments: dict[str, Any]) -> tuple[Pass, dict[str, Any]]:
    """Start a prefill with images: check the call, prune at the entry, put the plan on the cache.

    Returns:
        The pass and the text model's arguments.

    Raises:
        CallError: the call cannot be served.
    """
    program = engine.program
    given = arguments.get("past_key_values")
    if given is not None and caches.is_empty(given):
        caches.forget(given)
    if not program.acts and caches.plan_of(given) is None:
        return Pass(plan, program, prefill=True), arguments
    cache = _cache_for(engine, arguments)
    if cache is not None:
        caches.check_plain(cache)
    if cache is not None and not caches.is_empty(cache):
        raise CallError(
            "an image arrived while the cache already holds a conversation: the methods need the images in the first "
            "prefill; start with a fresh cache and pass the whole conversation"
        )
    _check_mask(arguments.get("attention_mask"))
    if "text_stream" in program.needs:
        plan = streams.double(plan, arguments)
    live = Pass(plan, program, prefill=True)
    live.memo["heads", 0] = engine.dims.heads
    if cache is not None:
        caches.adopt(cache, plan)
        arguments["past_key_values"] = cache
    entry = program.pruners.get(0)
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


def begin_decode(plan: Plan, program: Program, arguments: dict[str, Any]) -> tuple[Pass, dict[str, Any]]:
    """Start a pass after the prefill: decoding, verification, or a second turn."""
    cache = arguments["past_key_values"]
    step = arguments.get("inputs_embeds")
    step = arguments.get("input_ids") if step is None else step
    assert step is not None
    batch, queries = step.shape[:2]
    logical = int(cache.get_seq_length())
    entry = plan.stages[0] if plan.stages and plan.stages[0].layer == 0 else None
    if entry is not None:
        mask = arguments.get("attention_mask")
        arguments["attention_mask"] = decode_entry_mask(mask, entry, plan.length, logical + queries, batch)
        if arguments.get("position_ids") is None:
            arguments["position_ids"] = torch.arange(logical, logical + queries, device=step.device)[None]
    return Pass(plan, program, prefill=False, new=logical + queries - plan.length), arguments


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
