"""Calibration of logits: what the engine does behind the prefill of a prompt, and behind the model's head."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from vlmattn.errors import CallError
from vlmattn.methods.calibrate import Calibration, Step
from vlmattn.patches import branches
from vlmattn.patches import cache as caches
from vlmattn.patches.branches import Prompt, Shown
from vlmattn.patches.families.base import PIXEL_MEAN, PIXEL_STD, Visible
from vlmattn.patches.passes import Pass, begin_prefill
from vlmattn.plan import Plan

if TYPE_CHECKING:
    from vlmattn.patches.engine import Engine


@dataclass(frozen=True)
class Pending:
    """The logits of one pass that wait for their calibration.

    Attributes:
        samples: rows of the caller.
        seen: `(samples,)` bool, rows with an image.
        number: `(q,)` long, which tokens of the answer the last `q` columns choose.
        lens: the rows `(samples, q, C)` of layer inputs that the head is to read as well.
    """

    samples: int
    seen: Tensor
    number: Tensor
    lens: tuple[Tensor, ...]

    @classmethod
    def of(cls, live: Pass, start: int | None) -> Pending:
        """Behind a pass; `start`: columns of what `generate` was given, None if it does not run."""
        plan = live.plan
        first = 1
        if not live.prefill:
            first = live.new - live.queries + 2 + (0 if start is None else plan.said - start)
        number = torch.arange(first, first + live.answering, device=plan.visual.device).clamp_min(1)
        lens = tuple(live.lens[layer][: plan.samples] for layer in live.program.lens)
        return cls(plan.samples, plan.visual[: plan.samples].any(1), number, lens)

    def calibrate(self, method: Calibration, logits: Tensor, lens: Tensor | None) -> Tensor:
        """The logits `(B, k, W)` of the caller's rows; fp32, of which the last columns are calibrated.

        Args:
            method: the calibration.
            logits: `(B or 2B, k, W)` raw.
            lens: see `Step`.
        """
        columns = min(len(self.number), logits.shape[1])
        last = logits[:, -columns:].float()
        own = last[: self.samples]
        other = last[self.samples :] if len(last) > self.samples else None
        number = self.number[-columns:].to(logits.device)
        new = method.calibrated(Step(own, other, number, None if lens is None else lens[:, :, -columns:]))
        new = torch.where(self.seen.to(new.device)[:, None, None], new, own)
        before = logits[: self.samples, :-columns]
        return new if before.shape[1] == 0 else torch.cat([before.float(), new], 1)


def prompt(engine: Engine, plan: Plan, arguments: Mapping[str, Any], shown: Mapping[int, Shown]) -> Prompt:
    """A prompt for the second branch, before anything has changed it."""
    embeddings = cast(Any, engine.model).get_input_embeddings()
    return Prompt(
        plan.copy(),
        dict(arguments),
        shown,
        looked=engine.looked,
        blacken=functools.partial(_blacken, engine),
        deepstack=engine.family.deepstack,
        read=functools.partial(_read, engine),
        embed=embeddings,
    )


def _read(engine: Engine, text: str) -> list[int]:
    """The token ids of an instruction."""
    tokenizer = getattr(engine.owner.processor, "tokenizer", None)
    if tokenizer is None:
        raise CallError(
            f"{engine.program.calibration} writes a text into the prompt: wrap the model with processor=processor, "
            "or give the instruction as token ids"
        )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _blacken(engine: Engine, values: Tensor, grid: tuple[int, int, int], visible: Visible) -> Tensor:
    """Pixels of one image of which some stay visible; black is what the processor makes of it, or CLIP's."""
    assert engine.family.blacken is not None
    processor = getattr(engine.owner.processor, "image_processor", None)
    mean = torch.tensor(getattr(processor, "image_mean", None) or PIXEL_MEAN)
    std = torch.tensor(getattr(processor, "image_std", None) or PIXEL_STD)
    return engine.family.blacken(engine.config, values, grid, visible, (-mean / std).to(values))


def prefill_second(engine: Engine, prompt: Prompt, first: Plan, cache: Any, output: Any) -> tuple[Plan, Plan, Any]:
    """Run the second branch behind the first one's prefill, and let it join.

    Args:
        engine: with a calibration that has a branch.
        prompt: as it came to the text model.
        first: the plan of the first branch after its prefill.
        cache: its cache, or None.
        output: of the text model, for the first branch.

    Returns:
        The plan of both, the second branch's own, and the output of both.
    """
    program = engine.program.branch
    assert program is not None and engine.program.calibration is not None
    program = dataclasses.replace(program, record=engine.program.record, backend=engine.program.backend)
    branch = engine.program.calibration.branch
    assert branch is not None
    attended, first.attended = first.attended, {}
    plan, arguments = branches.second(branch, prompt, engine.multimodal, attended)
    shift = branches.next_positions(plan, arguments.get("position_ids")) - branches.next_positions(
        prompt.plan, prompt.arguments.get("position_ids")
    )
    arguments["use_cache"] = cache is not None
    live, arguments = begin_prefill(engine, plan, arguments, program)
    own, other = engine.run_prefill(live, arguments)
    joined = branches.join(first, own, shift)
    if cache is not None:
        caches.join(cache, arguments["past_key_values"])
        caches.adopt(cache, joined)
        caches.set_dropped(cache, joined.dropped_at_entry)
    return joined, own, branches.join_output(output, other)


def calibrated(engine: Engine, pending: Pending, output: Any) -> Any:
    """The model's output with calibrated logits of the caller's rows."""
    method, model = engine.program.calibration, engine.model
    assert method is not None
    lens = None
    if pending.lens:
        norm, head = engine.decoder.norms(0)["final"], cast(Any, model).lm_head
        device = next(head.parameters()).device
        lens = head(norm(torch.stack([rows.to(device) for rows in pending.lens]))).float()
    if isinstance(output, tuple):
        return (pending.calibrate(method, output[0], lens), *output[1:])
    output.logits = pending.calibrate(method, output.logits, lens)
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(state[: pending.samples] for state in output.hidden_states)
    return output


def refuse_without_head(program: Any) -> None:
    """Raise for a call of the model below its head."""
    raise CallError(
        f"{program.calibration} changes logits: call the whole model, which has them, not the part below its head"
    )
