"""Asking a pruner: the view of a layer's visual tokens, the decision, and the stage it becomes."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmattn.errors import CallError, SpecError
from vlmattn.methods.base import Selector, View
from vlmattn.plan import Plan, Stage, compact, gather_rows


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


def choose(pruner: Selector, layer: int, hidden: Tensor, plan: Plan) -> tuple[Stage, Tensor] | None:
    """Ask a pruner which visual tokens stay before `layer`.

    Args:
        hidden: `(B, M, C)` the layer's input.

    Returns:
        The new stage and the slots `(B, M')` of `hidden` that stay, or None if everything stays.

    Raises:
        SpecError: the method returned something that is not a decision about these tokens.
        CallError: nothing would be left of a prompt.
    """
    before = plan.stage(layer)
    columns, real, visual = frame(plan, before)
    width = int(visual.sum(1).max())
    if width == 0:  # an earlier stage left nothing to choose from
        return None
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
    if bool((real.any(1) & ~kept.any(1)).any()):
        raise CallError(f"{pruner}: a prompt without text would be left empty: add text to it, or keep a visual token")
    slots, valid = compact(kept)
    if layer == 0:
        base = torch.arange(slots.shape[1], device=slots.device).expand_as(slots)
    else:
        base = slots if before is None or before.layer == 0 else before.base.gather(1, slots)
    return Stage(layer, str(pruner), columns.gather(1, slots), base, valid), slots


def _view(
    pruner: Selector, layer: int, hidden: Tensor, plan: Plan, columns: Tensor, order: Tensor, shown: Tensor
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
