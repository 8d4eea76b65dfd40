"""Answering twice: a short greedy answer is watched, then the user's `generate()` starts from scratch with what it saw.

The only custom loop of attention edits. It lives around `generate()`; both answers have caches and plans of their own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmattn.edits import NOT_A_KEY, VISUAL, VISUAL_GROUPS, AttnEdit, Boost
from vlmattn.errors import CallError
from vlmattn.kernels.rows import CHUNK, Request, given, masses, probabilities, top_heads
from vlmattn.methods.base import Editor
from vlmattn.methods.rehearsal import Rehearser
from vlmattn.patches.selection import frame, front

if TYPE_CHECKING:
    from vlmattn.patches.engine import Engine
    from vlmattn.patches.passes import Pass
    from vlmattn.plan import Plan

PIXELS = ("pixel_values", "pixel_values_videos")
OWN = ("streamer", "logits_processor", "stopping_criteria", "past_key_values", "max_length", "min_length",
       "min_new_tokens", "custom_generate", "synced_gpus")  # fmt: skip
"""Arguments of the user's `generate()` that are for the answer itself."""
GUESSING = ("prompt_lookup_num_tokens", "assistant_model", "assistant_early_exit")


@contextmanager
def rehearsed(engine: Engine, original: Callable[..., Any], options: Mapping[str, Any]) -> Iterator[None]:
    """Inside, prompts know what a first answer to them looked at; that answer is given on entry.

    Args:
        engine: with the methods.
        original: the model's `generate`.
        options: what it is called with, by name.

    Raises:
        CallError: tokens are guessed ahead, so that rows would be decided before those they depend on.
    """
    method = engine.program.rehearser
    if method is None or all(options.get(name) is None for name in PIXELS):
        yield
        return
    for name in GUESSING:
        if options.get(name) is not None:
            raise CallError(f"generate({name}={options[name]!r}) does not go with {method}: leave it out")
    plain = {name: value for name, value in options.items() if name not in OWN}
    with engine.during("rehearsal", True):
        sequences = original(
            **plain
            | {
                "max_new_tokens": method.tokens,
                "do_sample": False,
                "num_beams": 1,
                "num_return_sequences": 1,
                "return_dict_in_generate": False,
            }
        )
    plan = engine.last
    watched = plan is not None and plan.rehearsing and plan.observed
    with engine.during("rehearsal", _evidence(engine, method, plan, sequences, options) if plan and watched else False):
        yield


def _evidence(engine: Engine, method: Rehearser, plan: Plan, sequences: Tensor, options: Mapping[str, Any]) -> Tensor:
    """`(B, V)` from the passes that were watched: the tokens that went in are the last but the very last."""
    device, layers = sequences.device, sorted(plan.observed[0])
    seen = torch.stack([torch.stack([step[layer].to(device) for layer in layers]) for step in plan.observed])
    config: Any = options.get("generation_config") or engine.model.generation_config
    ends = options.get("eos_token_id", config.eos_token_id)
    went_in = sequences[:, -1 - len(plan.observed) : -1]
    over = torch.isin(went_in, torch.tensor([] if ends is None else ends, device=device)).cumsum(1) > 0
    slots, whole = frame(plan, plan.stage(0)), frame(plan, None).imagery
    order, shown = (x.to(device) for x in front(slots.imagery))
    found = method.evidence(seen, ~over.T, shown)
    place = _ranks(plan, slots.columns).to(device).gather(1, order)
    return found.new_zeros(len(found), int(whole.sum(1).max())).scatter_add(1, place, found * shown)


def begin(engine: Engine, plan: Plan) -> None:
    """Give a prompt the evidence of the answer before, or have it watched.

    What the engine was told of the `rehearsal`: True, this is the answer that is only looked at; the evidence `(B, V)`;
    False, nothing was seen in it; None, there was none.

    Raises:
        CallError: there was no such answer.
    """
    method, state = engine.program.rehearser, engine.told("rehearsal")
    if method is None:
        return
    if state is None:
        raise CallError(f"{method} looks at an answer of its own first: call model.generate(), not the model alone")
    plan.rehearsing = state is True
    if isinstance(state, Tensor):
        plan.evidence = state.repeat_interleave(len(plan.visual) // len(state), 0)


def look(live: Pass, index: int) -> Callable[..., None] | None:
    """What layer `index` must show beside its attention, or None."""
    method, plan = live.program.rehearser, live.plan
    if method is None:
        return None
    if plan.rehearsing:
        return None if live.prefill else functools.partial(_observe, live, method, index)
    if plan.evidence is None or not method.grounds or live.program.editors.get(index) is not method:
        return None
    return functools.partial(_ground, live, method)


def equipped(live: Pass, editor: Editor | None, edit: AttnEdit | None, tag: Tensor) -> AttnEdit | None:
    """The edit with the boosts of this pass; None while the answer is only looked at, or nothing was seen in it.

    Args:
        tag: `(B, S)` uint8, the groups of the keys.
    """
    if edit is None or not isinstance(editor, Rehearser):
        return edit
    if live.plan.evidence is None:
        return None
    key = (str(tag.device), -1)
    if key not in live.memo:
        image, text = _keys(live, tag.device)
        grounding = live.plan.grounding
        if grounding is not None:
            grounding = grounding[:, : tag.shape[1]].to(tag.device)
            missing = tag.shape[1] - grounding.shape[1]
            grounding = torch.nn.functional.pad(grounding, (0, missing), value=torch.nan)
        live.memo[key] = editor.boosts(image, grounding, text)
    return dataclasses.replace(edit, boosts=live.memo[key])


def settle(live: Pass) -> None:
    """End of a pass: keep what was seen."""
    plan = live.plan
    if live.observed:
        plan.observed.append(live.observed)
    if live.grounded is None:
        return
    grounded = live.grounded
    if live.prefill:
        plan.grounding = grounded
    elif plan.grounding is not None:
        before = plan.grounding[:, : plan.base_length + live.new - grounded.shape[1]]
        plan.grounding = torch.cat([before, grounded.to(before.device)], 1)


def _slots(live: Pass, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt columns `(B, M)`, and real and visual flags `(B, S)` of the keys."""
    slots = frame(live.plan, live.plan.stage(0))
    columns, real, visual = (x.to(device) for x in (slots.columns, slots.real, slots.imagery))
    later = 0 if live.prefill else live.new
    return columns, torch.nn.functional.pad(real, (0, later), value=True), torch.nn.functional.pad(visual, (0, later))


def _ranks(plan: Plan, columns: Tensor) -> Tensor:
    """`(B, M)` long, the places of what stands in these columns among the visual tokens of the prompt, newline tokens
    included."""
    return (frame(plan, None).imagery.long().cumsum(1) - 1).clamp_min(0).gather(1, columns)


def _keys(live: Pass, device: torch.device) -> tuple[Tensor, Tensor]:
    """`(B, S)` fp32 the evidence of every key, 0 where it is not visual, and bool, text behind the image."""
    plan = live.plan
    assert plan.evidence is not None
    columns, real, visual = _slots(live, device)
    order = _ranks(plan, columns.to(plan.visual.device)).to(device)
    image = torch.nn.functional.pad(plan.evidence.to(device).gather(1, order), (0, visual.shape[1] - order.shape[1]))
    return image * visual, real & (visual.flip(1).cumsum(1) == 0).flip(1)


def _plain(real: Tensor, visual: Tensor) -> Request:
    """A request for probabilities as they are."""
    tag = torch.where(real, visual.to(torch.uint8) * VISUAL, NOT_A_KEY).to(torch.uint8)
    return Request(tag, torch.zeros_like(real[:, 0]), torch.zeros_like(real), None, None)


def _observe(
    live: Pass, method: Rehearser, index: int, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float
) -> None:
    """Note what the last row sees of the visual tokens, in the heads that see most of them."""
    _, real, visual = _slots(live, key.device)
    request = _plain(real, visual)
    last = torch.tensor([query.shape[2] - 1], device=query.device)
    p = probabilities(query, key, mask, scaling, last, request)
    chosen = top_heads(masses(p, request.tag)[..., VISUAL], method.share)
    mean = (p * chosen[..., None]).sum(1)[:, 0] / chosen.sum(1)
    columns, there = front(visual)
    live.observed[index] = mean.gather(1, columns) * there


def _ground(live: Pass, method: Rehearser, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
    """Add up how much evidence the text rows of this pass look at in one layer."""
    image, text = _keys(live, key.device)
    _, real, visual = _slots(live, key.device)
    request, boost = _plain(real, visual), Boost(image, image, VISUAL_GROUPS, method.share)
    wanted = text[:, -query.shape[2] :]
    total = torch.full(wanted.shape, torch.nan, dtype=torch.float32, device=key.device)
    for rows in wanted.any(0).nonzero()[:, 0].split(CHUNK):
        p = probabilities(query, key, mask, scaling, rows, request)
        total[:, rows] = torch.where(wanted[:, rows], given(p, request.tag, boost), torch.nan)
    live.grounded = total if live.grounded is None else live.grounded.to(total.device) + total
