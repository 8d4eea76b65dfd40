"""Asking a pruner: the view of a layer's visual tokens, the decision, and the stage it becomes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmattn.edits import Keep
from vlmattn.errors import CallError, SpecError
from vlmattn.methods.base import Editor, Selector
from vlmattn.methods.views import Attention, LayerView, Text, View
from vlmattn.patches import deepstack
from vlmattn.patches.decoder import Decoder
from vlmattn.plan import Plan, Stage, compact, gather_rows
from vlmattn.spans import Raster


@dataclass(frozen=True)
class Turn:
    """One stage of a pruner.

    Attributes:
        pruner: the method.
        stage: which of its stages, counting from 0.
    """

    pruner: Selector
    stage: int

    def __str__(self) -> str:
        return str(self.pruner)


@dataclass(frozen=True)
class Chosen:
    """What a pruner made of a layer's input.

    Attributes:
        stage: the tokens that are left.
        slots: `(B, M')` long, where they stood in the layer's input.
        hidden: `(B, M', C)` the new input.
    """

    stage: Stage
    slots: Tensor
    hidden: Tensor


def score_options(attention: Attention, text: str, plan: Plan, stage: Stage | None, device: Any) -> dict[str, Any]:
    """`rows`, `over` and `heads` of `attention_received` for what the pruner with that text wants to see."""
    visual = frame(plan, stage).visual
    rows = query_rows(attention.rows, text, plan, stage)
    over = None if attention.over == "all" else visual.to(device)
    return {"rows": rows.to(device), "over": over, "heads": attention.heads}


def query_rows(rows: str, text: str, plan: Plan, stage: Stage | None) -> Tensor:
    """`(B, M)` bool, the query rows of a layer that `Attention.rows` names; guessed tokens never count."""
    columns, real, visual, newline = frame(plan, stage)
    prompt = real.clone()
    if plan.ahead:
        prompt[:, -plan.ahead :] = False
    last = torch.zeros_like(real)
    last[:, -1 - plan.ahead] = True
    if rows == "last":
        return last
    if rows == "own":
        chosen = plan.query_rows[text].to(columns.device).gather(1, columns) & prompt
    else:
        chosen = prompt if rows == "all" else prompt & ~visual & ~newline
        if rows == "after":
            chosen = chosen & _after(plan).gather(1, columns)
    return torch.where(chosen.any(1, keepdim=True), chosen, last)


def choose_query_rows(pruner: Selector, embeds: Tensor, plan: Plan) -> None:
    """Let a pruner choose its own query rows from the input of the text model, `(B, N, C)`.

    Raises:
        SpecError: it returned something else.
    """
    attention = pruner.attention
    if attention is None or attention.rows != "own":
        return
    visual, real = (x.to(embeds.device) for x in (plan.visual & plan.real, plan.real.clone()))
    if plan.ahead:
        real[:, -plan.ahead :] = False
    rows = pruner.query_rows(LayerView(embeds, visual, real))
    if rows.shape != plan.visual.shape or rows.dtype != torch.bool:
        raise SpecError(
            f"{pruner}: query_rows() must give a bool mask of shape {tuple(plan.visual.shape)}, "
            f"got {rows.dtype} {tuple(rows.shape)}"
        )
    plan.query_rows[str(pruner)] = rows.to(plan.visual.device)


class Frame(NamedTuple):
    """The slots that a layer holds of the prompt.

    Attributes:
        columns: `(B, M)` long, their prompt columns.
        real: `(B, M)` bool, False at padding and filler.
        visual, newline: `(B, M)` bool, what they hold; both False at text.
    """

    columns: Tensor
    real: Tensor
    visual: Tensor
    newline: Tensor

    @property
    def imagery(self) -> Tensor:
        """`(B, M)` bool, what is visual for edits of attention: newline tokens count."""
        return self.visual | self.newline


def frame(plan: Plan, stage: Stage | None) -> Frame:
    """The slots of a stage, or of the whole prompt."""
    if stage is None:
        columns = torch.arange(plan.length, device=plan.visual.device).expand_as(plan.visual)
        return Frame(columns, plan.real, plan.visual & plan.real, (plan.newline > 0) & plan.real)
    columns = stage.positions
    real = plan.real.gather(1, columns)
    if stage.valid is not None:
        real = real & stage.valid
    visual, newline = (flags.gather(1, columns) & real for flags in (plan.visual, plan.newline > 0))
    return Frame(columns, real, visual, newline)


def choose(turn: Turn, layer: int, hidden: Tensor, plan: Plan, decoder: Decoder) -> Chosen | None:
    """Ask a pruner which visual tokens stay before `layer`.

    Args:
        hidden: `(B, M, C)` the layer's input.

    Returns:
        What is left, or None if everything stays as it is.

    Raises:
        SpecError: the method returned something that is not a decision about these tokens.
        CallError: nothing would be left of a prompt.
    """
    pruner, before = turn.pruner, plan.stage(layer)
    columns, real, visual, newline = frame(plan, before)
    order, shown = front(visual)
    if order.shape[1] == 0:  # an earlier stage left nothing to choose from
        return None
    view = _view(turn, layer, hidden, plan, decoder, order, shown)
    keep = _checked(pruner, pruner.select(view), view)
    stays = keep.mask & shown
    if keep.rows is None and bool((stays == shown).all()):
        return None
    text = real & ~visual
    kept = text.scatter(1, order, stays | text.gather(1, order))
    if pruner.newlines != "all":
        kept = kept & ~newline | _line_ends(plan, columns, kept & visual, pruner.newlines) & newline
    if bool((real.any(1) & ~kept.any(1)).any()):
        raise CallError(f"{pruner}: a prompt without text would be left empty: add text to it, or keep a visual token")
    slots, valid = compact(kept)
    if layer == 0:
        base = torch.arange(slots.shape[1], device=slots.device).expand_as(slots)
    else:
        base = slots if before is None or before.layer == 0 else before.base.gather(1, slots)
    stage = Stage(layer, str(pruner), columns.gather(1, slots), base, valid, shrinks=pruner.shrink_early_layers)
    stage = _placed(stage, before, slots, plan, renumber=pruner.positions == "compact")
    if keep.rows is not None:
        hidden = _rewritten(hidden, order, stays, keep.rows)
        if keep.merge is not None:
            deepstack.merge(plan, layer, columns.gather(1, order), stays, keep.merge)
    return Chosen(stage, slots, gather_rows(hidden, slots.to(hidden.device)))


def _checked(pruner: Selector, keep: Keep, view: View) -> Keep:
    shape = tuple(view.image.shape)
    if tuple(keep.mask.shape) != shape or keep.mask.dtype != torch.bool:
        raise SpecError(
            f"{pruner}: select() must give a bool mask of shape {shape}, got {keep.mask.dtype} {tuple(keep.mask.shape)}"
        )
    if keep.rows is not None and tuple(keep.rows.shape[:2]) != shape:
        raise SpecError(f"{pruner}: the rows of a Keep must be {shape} and a width, got {tuple(keep.rows.shape)}")
    return keep


def _line_ends(plan: Plan, columns: Tensor, kept: Tensor, which: str) -> Tensor:
    """`(B, M)` bool, true at the newline tokens that stay: those of lines with a `kept` token, or none."""
    if which == "none":
        return torch.zeros_like(kept)
    there = torch.zeros_like(plan.visual).scatter(1, columns, kept)
    before = torch.nn.functional.pad(there.long().cumsum(1), (1, 0))
    line = plan.newline.gather(1, columns)
    return before.gather(1, columns) > before.gather(1, columns - line)


def _rewritten(hidden: Tensor, order: Tensor, stays: Tensor, rows: Tensor) -> Tensor:
    """`hidden` with the rows of the visual tokens that stay replaced."""
    order, stays = order.to(hidden.device), stays.to(hidden.device)[..., None]
    values = torch.where(stays, rows.to(hidden), gather_rows(hidden, order))
    return hidden.scatter(1, order[..., None].expand_as(values), values)


def _placed(stage: Stage, before: Stage | None, slots: Tensor, plan: Plan, renumber: bool) -> Stage:
    """The stage with the rotary positions of its tokens, as they arrived or counted without gaps."""
    if not renumber:
        if before is None or before.layer == 0 or before.rotary is None:
            return stage
        return dataclasses.replace(stage, rotary=before.rotary.gather(1, slots), shift=before.shift)
    entry = plan.entry if stage.layer else None
    whole = plan.real if entry is None else entry.present
    own = stage.present
    first = whole.shape[1] - whole.sum(1, keepdim=True)
    rank = (own.long().cumsum(1) - 1).clamp_min(0)
    return dataclasses.replace(stage, rotary=first + rank, shift=whole.sum(1) - own.sum(1))


def front(flags: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of True flags of every row in order, padded at the end: `(B, n)` long, and `(B, n)` bool validity."""
    width = int(flags.sum(1).max())
    order = torch.argsort((~flags).long(), dim=1, stable=True)[:, :width]
    return order, flags.gather(1, order)


def _after(plan: Plan) -> Tensor:
    """`(B, N)` bool, columns behind the last visual token and its newline."""
    visual = frame(plan, None).imagery
    return (visual.flip(1).cumsum(1) == 0).flip(1)


def _view(turn: Turn, layer: int, hidden: Tensor, plan: Plan, decoder: Decoder, order: Tensor, shown: Tensor) -> View:
    pruner, needs = turn.pruner, turn.pruner.needs
    if "content_key" in needs and plan.keys is None:
        raise CallError(f"{pruner} draws by the image's pixels: pass pixel_values, not precomputed features")
    columns, real, visual, newline = frame(plan, plan.stage(layer))
    where = columns.gather(1, order)
    image = torch.where(shown, plan.image.gather(1, where), -1)
    images = max(len(spans) for spans in plan.spans)
    counts = torch.stack([(image == i).sum(1) for i in range(images)], 1)
    lengths = [[span.length for span in spans] + [0] * (images - len(spans)) for spans in plan.spans]
    total = torch.tensor(lengths, device=counts.device)
    first = (total.cumsum(1) - total).gather(1, image.clamp_min(0))
    rank = _rank(plan, where)
    scores, layer_keys = _scores(turn, layer, plan, columns), plan.layer_keys.pop(layer, None)
    text = None
    if "text_rows" in needs:
        written = real & ~visual & ~newline
        if plan.ahead:
            written[:, -plan.ahead :] = False
        places, there = front(written)
        after = there & _after(plan).gather(1, columns.gather(1, places))
        text = Text(there, after, _rows(hidden, places), None if layer_keys is None else _keys(layer_keys, places))
    return View(
        layer=layer,
        image=image,
        counts=counts,
        spans=tuple(tuple(spans) for spans in plan.spans),
        index=torch.where(shown, rank - first, -1),
        stage=turn.stage,
        num_layers=decoder.num_layers,
        hidden=_rows(hidden, order) if "layer_input" in needs else None,
        scores=None if scores is None else _at(scores.to(order.device), order, shown),
        layer_keys=None if layer_keys is None else _keys(layer_keys, order),
        text=text,
        vision=_looks(pruner, plan, rank, shown),
        paired=plan.paired,
        project=decoder.project if "projector" in needs else None,
        norms=decoder.norms(layer) if "norms" in needs else {},
        attended=_attended(plan, where, shown),
        keys=plan.keys,
    )


def wants_scores(turn: Turn, plan: Plan) -> bool:
    """Whether a stage still needs scores of its own."""
    attention = turn.pruner.attention
    return attention is not None and not (attention.once and str(turn) in plan.ranking)


def _scores(turn: Turn, layer: int, plan: Plan, columns: Tensor) -> Tensor | None:
    """The scores for a stage, of every slot of the layer's input; `columns` `(B, M)` are their prompt columns."""
    scores, attention = plan.scores.pop(layer, None), turn.pruner.attention
    if attention is None or not attention.once:
        return scores
    if scores is not None:
        where = columns.to(scores.device)
        where = where[:, None].expand_as(scores) if attention.heads else where
        blank = scores.new_zeros(*scores.shape[:-1], plan.length)
        plan.ranking[str(turn)] = blank.scatter(-1, where, scores)
    ranking = plan.ranking.get(str(turn))
    return None if ranking is None else _at(ranking, columns.to(ranking.device))


def _at(scores: Tensor, places: Tensor, there: Tensor | None = None) -> Tensor:
    """Scores `(B, N)` or `(B, H, N)` of some places `(B, M)`, 0 where there is none."""
    if scores.ndim == 3:
        places = places[:, None].expand(-1, scores.shape[1], -1)
        there = None if there is None else there[:, None]
    found = scores.gather(-1, places)
    return found if there is None else found * there


def _attended(plan: Plan, where: Tensor, shown: Tensor) -> Tensor | None:
    """What the first branch's last token pays to the visual tokens in columns `where` `(B, V)`, by layer."""
    if not plan.attended:
        return None
    layers = [plan.attended[layer].to(where.device) for layer in sorted(plan.attended)]
    return _at(torch.stack(layers, 1), where, shown)


def _rows(hidden: Tensor, places: Tensor) -> Tensor:
    return gather_rows(hidden, places.to(hidden.device))


def _keys(keys: Tensor, places: Tensor) -> Tensor:
    """`(B, n, Hkv, D)` from `(B, Hkv, N, D)`."""
    places = places.to(keys.device)[:, None, :, None]
    return keys.gather(2, places.expand(-1, keys.shape[1], -1, keys.shape[3])).transpose(1, 2)


def looked(editor: Editor, view: LayerView, slots: Frame, plan: Plan) -> LayerView:
    """The view of a layer with these slots of the prompt, with what the editor looks at in the tower.

    Raises:
        CallError: the tower did not run.
    """
    if not editor.looks:
        return view
    if not plan.vision:
        raise CallError(f"{editor} looks into the vision tower: pass pixel_values, not precomputed features")
    device = view.visual.device
    vision = {name: plan.vision[look].to(device) for name, look in editor.looks.items()}
    grid = torch.full(next(iter(vision.values())).shape[:2], -1, dtype=torch.long)
    for row, spans in enumerate(plan.spans):
        lengths = [raster.length for span in spans for raster in span.rasters or (Raster((1, 1, span.length)),)]
        numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
        grid[row, : len(numbers)] = numbers
    token = torch.where(slots.visual, _rank(plan, slots.columns), -1).to(device)
    return dataclasses.replace(view, vision=vision, grid=grid.to(device), token=token)


def _rank(plan: Plan, where: Tensor) -> Tensor:
    """`(B, V)` long, the places of the visual tokens in columns `where` among those of their prompt."""
    return ((plan.visual & plan.real).long().cumsum(1) - 1).clamp_min(0).gather(1, where)


def _looks(pruner: Selector, plan: Plan, rank: Tensor, shown: Tensor) -> dict[str, Tensor]:
    """What the pruner looks at in the tower, for the visual tokens at the places `rank` `(B, V)`."""
    if not pruner.looks:
        return {}
    if not plan.vision:
        raise CallError(f"{pruner} looks into the vision tower: pass pixel_values, not precomputed features")
    found = {}
    for name, look in pruner.looks.items():
        if look.tiled and look not in plan.vision:
            continue
        values = plan.vision[look]
        index = rank.to(values.device).view(*rank.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
        there = shown.to(values.device).view(*shown.shape, *[1] * (values.ndim - 2))
        found[name] = values.gather(1, index) * there
    return found
