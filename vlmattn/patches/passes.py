"""One forward pass of the text model: which tokens each layer gets, and the masks and rotary tables to match."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmattn.edits import TEXT, AttnEdit, Tags
from vlmattn.errors import CallError
from vlmattn.kernels.rows import Request
from vlmattn.methods.base import Editor, LayerView
from vlmattn.patches import branches, deepstack, hiding, memory, rehearsal, segments, streams
from vlmattn.patches import cache as caches
from vlmattn.patches.attention import PRIVATE, Scoring, Work
from vlmattn.patches.decoder import Decoder
from vlmattn.patches.eviction import Core, Watching
from vlmattn.patches.program import Program
from vlmattn.patches.selection import (
    Chosen,
    Turn,
    choose,
    choose_query_rows,
    frame,
    looked,
    score_options,
    wants_scores,
)
from vlmattn.plan import Plan, Stage, decode_mask, gather_rows, prefill_mask

if TYPE_CHECKING:
    from vlmattn.patches.engine import Engine


@dataclass
class Pass:
    """State of one pass through the decoder layers.

    Attributes:
        plan: the plan of the generation.
        program: what the layers do.
        decoder: of the model.
        prefill: whether the prompt goes through now.
        new: keys after the prompt, this pass's tokens included.
        watching: what methods that evict from the cache see of this pass; None without them, or without a cache.
        queries: tokens of this pass after the prompt.
        ahead: guessed tokens that go through with the prompt.
        statistics: per layer what was recorded in this pass.
        observed: per layer what the last row saw of the visual tokens, in an answer that is only looked at.
        placed: whether the keys of this pass have their positions, where segments stand side by side.
        grounded: `(B, N)` fp32, how much the rows of this pass look at the evidence, summed over layers.
        lens: per layer the last rows of its input, those that choose tokens of the answer, if the head is to read them.
        mixing: per layer that may be mixed `(rows, q)` bool, the tokens for which it is.
        hidden: `(rows, q, N)` bool, columns of the prompt that rows do not see, once a second branch has chosen them.
    """

    plan: Plan
    program: Program
    decoder: Decoder
    prefill: bool
    new: int = 0
    watching: Watching | None = None
    queries: int = 0
    ahead: int = 0
    memo: dict[tuple[str, int], Any] = field(default_factory=dict)
    statistics: dict[int, Tensor] = field(default_factory=dict)
    observed: dict[int, Tensor] = field(default_factory=dict)
    placed: bool = False
    grounded: Tensor | None = None
    lens: dict[int, Tensor] = field(default_factory=dict)
    mixing: dict[int, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None

    @property
    def answering(self) -> int:
        """How many of the last rows choose tokens of the answer."""
        return 1 + self.ahead if self.prefill else self.queries

    @property
    def busy(self) -> bool:
        """Whether any layer needs attention of ours."""
        return self.program.acts or bool(self.plan.stages) or self.plan.branches > 1

    def enter(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Arguments of decoder layer `index`, or None to leave them as they are."""
        hidden = args[0] if args else kwargs["hidden_states"]
        changed = dict(kwargs)
        stage = self.plan.stage(index) if self.prefill else self.plan.holding(index)
        turn = self.program.pruners.get(index) if self.prefill and index else None
        hidden = deepstack.add(self.plan, index, stage, hidden) if self.prefill else hidden
        if turn is not None:
            stage, hidden = self._prune(turn, index, stage, hidden, kwargs)
        if stage is not None:
            self._swap(changed, stage.to(hidden.device), hidden)
        core = self._core(index, stage, hidden, changed.get("attention_mask"))
        if core is not None:
            changed["attention_mask"] = core.mask
        if self.hidden is not None:
            changed["attention_mask"] = hiding.cover(self, self.hidden, stage, changed.get("attention_mask"), hidden)
        if index in self.program.retracing:
            memory.look(self, self.program.retracing[index], index, hidden)
        if index in self.program.lens:
            self.lens[index] = hidden[:, -self.answering :]
        work = None if index in self.program.skipped else self._work(index, stage, hidden, changed, core)
        same = stage is None and turn is None and core is None and self.hidden is None
        if work is not None:
            changed[PRIVATE] = work
        elif same and index not in self.plan.added:
            return None
        if args:
            return (hidden, *args[1:]), changed
        return (), changed | {"hidden_states": hidden}

    def leave_heads(self, index: int, joined: Tensor) -> Tensor | None:
        """Scale the joined head outputs `(rows, N, H * D)` of layer `index`; None to leave them."""
        method = self.program.heads.get(index)
        rows, length, width = joined.shape
        if self.program.divergence and self.prefill:
            later = joined[:, -1 - self.plan.ahead :].unflatten(-1, (self.decoder.heads, -1)).float()
            image, text = later.split(self.plan.samples)
            self.plan.token_divergences[index] = (image - text).norm(dim=-1)
        if method is None:
            return None
        gain = self.plan.gains.get(index)
        if self.prefill and gain is None:
            heads = self.decoder.heads
            last = joined[:, -1 - self.plan.ahead].view(rows, heads, width // heads).float()
            half = self.plan.samples
            gain, divergence = method.gain(last[:half], last[half:])
            # without an image both streams say the same, and what differs is rounding, or the gap the image left
            seen = frame(self.plan, self.plan.stage(0)).imagery[:half].any(1, keepdim=True).to(gain.device)
            gain, divergence = torch.where(seen, gain, 1.0), torch.where(seen, divergence, 0.0)
            self.plan.gains[index], self.plan.divergences[index] = gain, divergence
        if gain is None:
            return None
        factor = gain.repeat(rows // gain.shape[0], 1).to(joined.device, joined.dtype)
        return (joined.view(rows, length, factor.shape[1], -1) * factor[:, None, :, None]).view_as(joined)

    def _prune(
        self, turn: Turn, index: int, stage: Stage | None, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Stage | None, Tensor]:
        attention = turn.pruner.attention
        if attention is not None and attention.layer == "upcoming":
            arriving = dict(kwargs)
            if stage is not None:
                self._swap(arriving, stage.to(hidden.device), hidden)
            self._score(turn, index, stage, hidden, arriving, before=index)
        with self.program.timed(hidden.device):
            chosen = choose(turn, index, hidden, self.plan, self.decoder)
        if chosen is None:
            return stage, hidden
        self.plan.stages.append(chosen.stage)
        return chosen.stage, chosen.hidden

    def _swap(self, kwargs: dict[str, Any], stage: Stage, hidden: Tensor) -> None:
        """Masks and rotary tables of a stage in place of those of the base frame."""
        # cos and sin carry the positions; gapped ids would make flash attention believe in packed sequences
        positions = kwargs["position_ids"]
        kwargs["position_ids"] = None
        if self.prefill and stage.layer == 0:
            return
        key = (str(hidden.device), stage.layer)
        if key not in self.memo:
            mask, (cos, sin) = kwargs.get("attention_mask"), kwargs["position_embeddings"]
            if self.prefill:
                taken = stage.base if stage.rotary is None else stage.rotary
                tables = gather_rows(cos, taken), gather_rows(sin, taken)
                self.memo[key] = tables, prefill_mask(mask, stage)
            else:
                tables = (cos, sin)
                if stage.layer and stage.shift is not None:  # at the entry positions are shifted already
                    tables = self.decoder.tables(hidden, positions.to(hidden.device) - stage.shift[:, None])
                self.memo[key] = tables, decode_mask(mask, stage, self.plan.length, self.new, hidden.shape[0])
        kwargs["position_embeddings"], kwargs["attention_mask"] = self.memo[key]

    def _score(
        self, turn: Turn, index: int, stage: Stage | None, hidden: Tensor, kwargs: dict[str, Any], before: int
    ) -> None:
        """Note the attention a pruner wants to see before layer `before`, if `hidden` enters layer `index`."""
        attention = turn.pruner.attention
        visual = frame(self.plan, stage).visual
        if attention is None or not wants_scores(turn, self.plan) or not bool(visual.any()):
            return
        tables = kwargs["position_embeddings"] if attention.rotary else None
        with self.program.timed(hidden.device):
            score = score_options(attention, str(turn), self.plan, stage, hidden.device)
            scores = self.decoder.scores(index, hidden, tables, kwargs.get("attention_mask"), score)
        self.plan.scores[before] = scores

    def _core(self, index: int, stage: Stage | None, hidden: Tensor, mask: Tensor | None) -> Core | None:
        """The keys of layer `index` that this pass computes, if a method hides others."""
        core = self.plan.core.get(index)
        if core is None or self.watching is None or not self.watching.hides(index):
            return None
        size = self.plan.length if stage is None else stage.size
        return Core.of(core, self.new, size, mask, hidden.shape[0], hidden.device)

    def _work(
        self, index: int, stage: Stage | None, hidden: Tensor, kwargs: dict[str, Any], core: Core | None
    ) -> Work | None:
        """What the attention of layer `index` does beside attending."""
        request = self._request(index, stage, hidden, core)
        tag = request.tag if request is not None and request.last is not None else None
        attend = segments.attention(self, index, hidden, kwargs, tag)
        if attend is not None:
            return Work(attend=attend)
        follower = self.program.pruners.get(index + 1) if self.prefill else None
        attention = None if follower is None else follower.pruner.attention
        taken = None if core is None else core.taken
        put_keys = None
        scorings = [] if self.watching is None else self._watched(self.watching, index, stage, hidden, core)
        if follower is not None and attention is not None and attention.layer == "before":
            if attention.is_free and wants_scores(follower, self.plan):
                score = score_options(attention, str(follower), self.plan, stage, hidden.device)
                scorings.append(Scoring(score, functools.partial(self.plan.scores.__setitem__, index + 1)))
            elif not attention.is_free:
                self._score(follower, index, stage, hidden, kwargs, before=index + 1)
        if follower is not None and "layer_keys" in follower.pruner.needs:
            put_keys = functools.partial(self.plan.layer_keys.__setitem__, index + 1)
        look = rehearsal.look(self, index)
        given, put_given = hiding.wanted(self, index, stage)
        wanted = (taken, put_keys, put_given, request, look)
        if not scorings and all(part is None for part in wanted):
            return None
        return Work(
            taken=taken,
            scorings=tuple(scorings),
            given=given,
            put_given=put_given,
            put_keys=put_keys,
            request=request,
            put_statistics=functools.partial(self.statistics.__setitem__, index) if self.program.record else None,
            backend=self.program.backend,
            timed=self.program.timed,
            look=look,
        )

    def _watched(
        self, watching: Watching, index: int, stage: Stage | None, hidden: Tensor, core: Core | None
    ) -> list[Scoring]:
        """What methods that evict from the cache watch in layer `index`."""
        if not watching.decides(index):
            return []
        found = []
        for name, watch in watching.evictors[index].watched.items():
            options = watching.options(index, watch, self.plan, stage, hidden.device)
            put = functools.partial(watching.put, index, name, options, core)
            rows = options["rows"] if core is None else core.rows(options["rows"])
            found.append(Scoring(options | {"rows": rows}, put))
        return found

    def _request(self, index: int, stage: Stage | None, hidden: Tensor, core: Core | None) -> Request | None:
        editor = self.program.editors.get(index)
        if editor is None and not self.program.record:
            return None
        if self.prefill:
            fresh = _tags(editor, hidden, self.plan, stage, self.program.sink_dims)
            if self.plan.ahead:
                fresh.tag[:, -self.plan.ahead :] = TEXT  # tokens after the prompt are text, whatever they look like
            self.plan.tags[index] = fresh
        tags = self.plan.tags.get(index)
        if tags is None or not (tags.acts or self.program.record):
            return None
        edit = editor.edit(index) if editor is not None and tags.acts else None
        tag, active = tags.tag.to(hidden.device), tags.active.to(hidden.device)
        if self.prefill:
            rows = _edited_rows(edit, self.plan, stage).to(hidden.device)
            edit = rehearsal.equipped(self, editor, edit, tag)
        else:
            tag = torch.nn.functional.pad(tag, (0, self.new), value=TEXT)
            tag = tag if core is None else core.tags(tag)
            edited = edit is None or edit.generated
            edit = rehearsal.equipped(self, editor, edit, tag)
            rows = torch.full(hidden.shape[:2], edited, dtype=torch.bool, device=hidden.device)
        last = -1 - self.plan.ahead if self.program.record else None
        return Request(tag, active, rows, edit, last)


def _tags(
    editor: Editor | None, hidden: Tensor, plan: Plan, stage: Stage | None, sink_dims: tuple[int, ...] | None
) -> Tags:
    slots = frame(plan, stage)
    view = LayerView(hidden, slots.imagery.to(hidden.device), slots.real.to(hidden.device), sink_dims)
    if editor is None:
        return Tags(view.tag, torch.zeros_like(view.real[:, 0]))
    tags = editor.tags(looked(editor, view, slots, plan))
    # one look from the host per layer and prompt spares every later step of a layer that is left alone
    return Tags(tags.tag, tags.active, bool(tags.active.any()))


def _edited_rows(edit: AttnEdit | None, plan: Plan, stage: Stage | None) -> Tensor:
    """`(B, M)` bool, rows that an edit changes: of the prompt, see `AttnEdit.rows`, and of tokens guessed behind it."""
    slots = frame(plan, stage)
    real, visual = slots.real, slots.imagery
    if edit is None:
        return torch.zeros_like(real)
    behind = (visual.flip(1).cumsum(1) == 0).flip(1)
    guess = torch.arange(real.shape[1], device=real.device) - (real.shape[1] - plan.ahead)
    prompt = {"text": ~visual, "after": behind, "last": guess == -1, "generated": torch.zeros_like(real)}[edit.rows]
    return real & (visual.cumsum(1) > 0) & torch.where(guess >= 0, edit.generated, prompt)


def begin_prefill(
    engine: Engine, plan: Plan, arguments: dict[str, Any], program: Program
) -> tuple[Pass, dict[str, Any]]:
    """Start a prefill with images: check the call, prune at the entry, put the plan on the cache.

    Returns:
        The pass and the text model's arguments.

    Raises:
        CallError: the call cannot be served.
    """
    given = arguments.get("past_key_values")
    if given is not None and caches.is_empty(given):
        caches.forget(given)
    if not program.acts and caches.plan_of(given) is None:
        return Pass(plan, program, engine.decoder, prefill=True), arguments
    cache = _cache_for(engine, arguments)
    if cache is not None:
        caches.check_plain(cache)
    if cache is not None and not caches.is_empty(cache):
        raise CallError(
            "an image arrived while the cache already holds a conversation: the methods need the images in the first "
            "prefill; start with a fresh cache and pass the whole conversation"
        )
    _check_mask(arguments.get("attention_mask"))
    plan.skipped = frozenset(program.skipped)
    rehearsal.begin(engine, plan)
    if program.segmenter is not None:
        segments.find(plan, engine.told("segments") or ())
    if "text_stream" in program.needs:
        plan = streams.double(plan, arguments)
    if program.segmenter is not None and plan.segment is not None:
        segments.place(program.segmenter, plan, arguments.get("position_ids"))
    live = Pass(plan, program, engine.decoder, prefill=True, ahead=plan.ahead)
    deepstack.take_over(engine.family, arguments, plan, engine.decoder.num_layers)
    if cache is not None:
        live.watching = Watching(program.evictors, 0, plan.length)
        caches.adopt(cache, plan)
        arguments["past_key_values"] = cache
    embeds = arguments["inputs_embeds"]
    if program.retracing:
        memory.remember(plan, embeds)
    entry = program.pruners.get(0)
    with program.timed(embeds.device):
        for pruner in {str(turn): turn.pruner for turn in program.pruners.values()}.values():
            choose_query_rows(pruner, embeds, plan)
        chosen = None if entry is None else choose(entry, 0, embeds, plan, engine.decoder)
    if chosen is not None:
        plan.stages.append(chosen.stage)
        _cut_inputs(arguments, plan, chosen)
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


def _cut_inputs(arguments: dict[str, Any], plan: Plan, chosen: Chosen) -> None:
    """Prune at the entry of the text model: rows, their positions, and a mask that names filler slots."""
    stage = chosen.stage
    positions = arguments.get("position_ids")
    if positions is None:
        positions = torch.arange(plan.length, device=chosen.hidden.device)[None]
    valid = torch.ones_like(chosen.slots, dtype=torch.bool) if stage.valid is None else stage.valid
    taken = chosen.slots if stage.rotary is None else stage.rotary
    arguments["inputs_embeds"] = chosen.hidden
    arguments["position_ids"] = gather_rows(positions, taken.to(positions.device), dim=-1)
    arguments["attention_mask"] = valid.to(torch.long)


def begin_decode(
    plan: Plan, program: Program, decoder: Decoder, arguments: dict[str, Any]
) -> tuple[Pass, dict[str, Any]]:
    """Start a pass after the prefill: decoding, verification, or a second turn.

    Raises:
        CallError: the cache is of a method that is no longer installed.
    """
    segments.check(plan, program.segmenter)
    cache = arguments["past_key_values"]
    step = arguments.get("inputs_embeds")
    step = arguments.get("input_ids") if step is None else step
    assert step is not None
    queries = step.shape[1]
    logical = int(cache.get_seq_length())
    new = logical + queries - plan.said
    if plan.branches > 1:
        branches.widen(plan, arguments, logical)
    entry = plan.entry
    if entry is not None:
        positions = arguments.get("position_ids")
        if positions is None:
            positions = torch.arange(logical, logical + queries, device=step.device)[None]
        if entry.shift is not None:
            positions = positions - entry.shift.to(positions.device)[:, None]
        arguments["position_ids"] = positions
    watching = Watching({} if plan.closed else program.evictors, logical + queries - plan.prompt, queries)
    return Pass(plan, program, decoder, prefill=False, new=new, queries=queries, watching=watching), arguments
