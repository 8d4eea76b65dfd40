"""The second branch of calibrated decoding: its prompt, and how it joins the rows of the first.

It is prefilled by itself, so that it pays for its own tokens only, on a cache of its own. Then its rows are put behind
those of the first, in the cache and in the plan, and every later step runs both as one batch. The vision tower runs
again only where pixels differ.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmattn.edits import NOT_A_KEY, Tags
from vlmattn.errors import CallError
from vlmattn.methods.calibrate import Branch, Pixels
from vlmattn.patches import cache as caches
from vlmattn.patches import streams
from vlmattn.patches.prompt import spread
from vlmattn.patches.vision import content_key
from vlmattn.plan import Plan, Stage, gather_rows

PIXELS = ("pixel_values", "pixel_values_videos")


@dataclass(frozen=True)
class Shown:
    """What one call of a feature method was given.

    Attributes:
        name: of the method.
        arguments: by name.
        images: the pixels of every image.
    """

    name: str
    arguments: Mapping[str, Any]
    images: Sequence[Tensor]

    @classmethod
    def of(cls, name: str, split: Callable[[Mapping[str, Any]], Sequence[Tensor]], given: Mapping[str, Any]) -> Shown:
        """From the arguments as they are bound."""
        arguments = dict(given)
        images = split(arguments)
        return cls(name, arguments | arguments.pop("kwargs", {}), images)


@dataclass(frozen=True)
class Prompt:
    """A prompt on its way into the text model, before any method has changed it.

    Attributes:
        plan: with its visual tokens.
        arguments: of the text model.
        shown: what the vision tower was shown, by feature method, if the branch has other pixels.
        looked: gives and forgets what was looked at inside the tower, by feature method.
        blacken: see `Pixels.blacken`, of given pixels with a grid.
        deepstack: argument of the text model with features that it adds in later layers; "" without.
        read: from a text to its token ids.
        embed: from token ids `(n,)` to rows `(n, C)`.
    """

    plan: Plan
    arguments: Mapping[str, Any]
    shown: Mapping[int, Shown]
    looked: Callable[[], Mapping[int, Any]]
    blacken: Callable[..., Tensor]
    deepstack: str
    read: Callable[[str], Sequence[int]]
    embed: Callable[[Tensor], Tensor]


def second(
    branch: Branch, prompt: Prompt, multimodal: nn.Module, attended: dict[int, Tensor]
) -> tuple[Plan, dict[str, Any]]:
    """The prompt of the second branch: its plan and the text model's arguments, without a cache.

    Args:
        branch, prompt: what it is made of.
        multimodal: the model with the feature methods.
        attended: see `Plan.attended`, of the first branch.

    Raises:
        CallError: there are no pixels to change, or no tokenizer to read an instruction with.
    """
    plan, arguments = prompt.plan.copy(), dict(prompt.arguments)
    plan.attended = attended
    arguments["past_key_values"] = None
    if branch.text_only:
        return _text_only(plan, arguments)
    if branch.pixels is not None:
        _with_pixels(branch.pixels, prompt, plan, arguments, multimodal)
    if branch.insert:
        return _with_insert(branch, prompt, plan, arguments)
    return plan, arguments


def _text_only(plan: Plan, arguments: dict[str, Any]) -> tuple[Plan, dict[str, Any]]:
    embeds, real = streams.text_alone(plan, arguments["inputs_embeds"])
    given, counted = arguments.get("position_ids"), streams.counted_positions(real.to(embeds.device))
    if given is not None:
        counted = counted.expand(*given.shape[:-2], *counted.shape)
    arguments |= {"inputs_embeds": embeds, "attention_mask": real.long().to(embeds.device), "position_ids": counted}
    rows = len(real)
    blank = torch.zeros_like(real)
    alone = Plan(real, blank, blank.long() - 1, blank.long(), [()] * rows, plan.ahead, samples=rows)
    return alone, arguments


def _with_pixels(
    change: Callable[[Pixels], Tensor], prompt: Prompt, plan: Plan, arguments: dict[str, Any], multimodal: nn.Module
) -> None:
    """Put the features of other pixels into `arguments`, and what is seen of them in the tower into `plan`.

    What identifies the content stays that of the prompt, so that draws by it are the same in both branches.
    """
    if not prompt.shown or prompt.plan.sources is None:
        raise CallError("the second branch changes the image's pixels: pass pixel_values, not precomputed features")
    sources = prompt.plan.sources
    lengths = {
        source: span.length
        for row, spans in zip(sources, prompt.plan.spans, strict=True)
        for source, span in zip(row, spans, strict=True)
    }
    features: dict[int, dict[Any, list[Tensor]]] = {}
    for place, shown in prompt.shown.items():
        name = next(name for name in PIXELS if shown.arguments.get(name) is not None)
        before = shown.arguments[name]
        changed = [change(_pixels(prompt, plan, place, n, image)) for n, image in enumerate(shown.images)]
        output = getattr(multimodal, shown.name)(**{**shown.arguments, name: _rebuilt(before, changed)})
        sizes = [lengths[place, number] for number in range(len(changed))]
        added = getattr(output, "deepstack_features", None) or ()
        features[place] = {"features": _by_image(output.pooler_output, sizes)}
        features[place] |= {layer: _by_image(rows, sizes) for layer, rows in enumerate(added)}
    if looks := prompt.looked():
        plan.vision.update(spread(sources, looks))
    found = spread(sources, features)
    visual = (prompt.plan.image >= 0).sum(1)
    later = [found[layer] for layer in range(len(found) - 1)]
    if later:  # DeepStack: the same rows in one run, sample by sample
        arguments[prompt.deepstack] = [
            torch.cat([rows[:n] for rows, n in zip(layer, visual.tolist(), strict=True)]) for layer in later
        ]
    arguments["inputs_embeds"] = _with_features(prompt.arguments["inputs_embeds"], prompt.plan, found["features"])


def _by_image(rows: Tensor | Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Rows of all images, however they were put together, as one `(n_i, C)` an image."""
    flat = torch.cat([part.flatten(0, -2) for part in rows])
    return list(flat.split(list(sizes)))


def _rebuilt(before: Tensor, images: Sequence[Tensor]) -> Tensor:
    """All images in one tensor like `before`, in which those with fewer tiles may be padded."""
    if sum(image.numel() for image in images) == before.numel():
        return torch.cat([image.reshape(-1) for image in images]).view_as(before)
    new = before.clone()
    for place, image in zip(new, images, strict=True):
        place[: len(image)] = image
    return new


def _pixels(prompt: Prompt, plan: Plan, place: int, number: int, values: Tensor) -> Pixels:
    """The pixels of image `number` of a feature method, with what the first branch made of them."""
    sources = plan.sources or ()
    span = row = None
    for row, places in enumerate(sources):
        if (place, number) in places:
            span = plan.spans[row][places.index((place, number))]
            break
    if span is None or row is None:
        return Pixels(values, content_key(values))
    attended = None
    if plan.attended:
        columns = slice(span.start, span.start + span.length)
        attended = torch.stack(
            [plan.attended[layer][row, columns].to(values.device) for layer in sorted(plan.attended)]
        )
    grid = span.rasters[0].grid if len(span.rasters) == 1 else None
    blacken = None if grid is None else functools.partial(prompt.blacken, values, grid)
    return Pixels(values, content_key(values), grid, attended, blacken)


def _with_features(embeds: Tensor, plan: Plan, features: Tensor) -> Tensor:
    """`embeds` `(B, N, C)` with `features` `(B, V, C)`, padded at the end, in place of its visual rows."""
    visual = (plan.image >= 0).to(embeds.device)  # newline tokens too: they are among the features
    counts = visual.sum(1, keepdim=True).to(features.device)
    there = torch.arange(features.shape[1], device=features.device) < counts
    return embeds.masked_scatter(visual[..., None], features[there].to(embeds))


def _with_insert(branch: Branch, prompt: Prompt, plan: Plan, arguments: dict[str, Any]) -> tuple[Plan, dict[str, Any]]:
    """The prompt with an instruction beside the first image of every row."""
    embeds: Tensor = arguments["inputs_embeds"]
    ids = prompt.read(branch.insert) if isinstance(branch.insert, str) else branch.insert
    written = prompt.embed(torch.tensor(list(ids), device=embeds.device)).to(embeds)
    size, (rows, length) = len(written), plan.visual.shape
    start = _beside(plan, branch.where)[:, None]
    column = torch.arange(length + size, device=start.device).expand(rows, -1)
    new = (column >= start) & (column < start + size)
    behind = column >= start + size
    source = torch.where(behind, column - size, torch.where(new, start, column)).clamp_max(length - 1)
    place = torch.where(new, column - start, 0)
    device = embeds.device

    given = arguments.get("position_ids")
    given = torch.arange(length, device=device)[None] if given is None else given
    positions = gather_rows(given, source.to(given.device), dim=-1)
    last = new & (start == length)  # nothing stands behind the image
    arguments["position_ids"] = positions + (place + behind * size + last).to(given.device)
    rows_of = gather_rows(embeds, source.to(device))
    arguments["inputs_embeds"] = torch.where(new.to(device)[..., None], written[place.to(device)], rows_of)
    mask = arguments.get("attention_mask")
    if mask is not None:
        arguments["attention_mask"] = mask.gather(1, source.to(mask.device)).masked_fill(new.to(mask.device), 1)

    def moved(flags: Tensor, fill: Any) -> Tensor:
        return flags.gather(1, source).masked_fill(new, fill)

    begins = start[:, 0].tolist()
    spans = [
        tuple(dataclasses.replace(span, start=span.start + size * (span.start >= begin)) for span in row)
        for row, begin in zip(plan.spans, begins, strict=True)
    ]
    longer = dataclasses.replace(
        plan,
        spans=spans,
        real=moved(plan.real, True),
        visual=moved(plan.visual, False),
        image=moved(plan.image, -1),
        newline=moved(plan.newline, 0),
        text=None if plan.text is None else moved(plan.text, True),
    )
    return longer, arguments


def _beside(plan: Plan, where: str) -> Tensor:
    """`(B,)` long, the column before (or behind) the first image and what wraps it; the first real one without."""
    first = plan.image == 0
    if where == "before":
        start = first.long().argmax(1)
        step = -1
    else:
        start = plan.length - first.flip(1).long().argmax(1)
        step = 0
    start = torch.where(first.any(1), start, plan.real.long().argmax(1))
    wraps = torch.zeros_like(plan.real) if plan.text is None else plan.real & (plan.image < 0) & ~plan.text
    neighbour = (start + step).clamp(0, plan.length - 1)[:, None]
    sign = -1 if where == "before" else 1
    return start + sign * (wraps.gather(1, neighbour)[:, 0] & first.any(1)).long()


def next_positions(plan: Plan, position_ids: Tensor | None) -> Tensor:
    """`(B,)` long, the position of the first token behind each prompt; of M-RoPE the axes that rotate count."""
    if position_ids is None:
        return torch.full_like(plan.real[:, 0], plan.length, dtype=torch.long)
    axes = position_ids[-3:] if position_ids.ndim == 3 else position_ids[None]
    axes = axes.expand(-1, len(plan.real), -1)
    return axes.masked_fill(~plan.real.to(axes.device), -1).amax((0, 2)) + 1


def join(first: Plan, other: Plan, shift: Tensor) -> Plan:
    """One plan of the rows of both branches after their prefills, each padded on the left where it is shorter.

    Args:
        first: the caller's; its statistics go on.
        other: of the second branch.
        shift: `(B,)` long, how much higher the positions behind the second branch's prompt are.
    """
    length = max(first.length, other.length)

    def both(a: Tensor, b: Tensor, fill: Any) -> Tensor:
        return torch.cat([_left(x, length - x.shape[1], fill) for x in (a, b)])

    layers = sorted(
        {stage.layer for plan in (first, other) for stage in (plan.stages if plan.held is None else plan.held)}
    )
    joined = Plan(
        real=both(first.real, other.real, False),
        visual=both(first.visual, other.visual, False),
        image=both(first.image, other.image, -1),
        newline=both(first.newline, other.newline, 0),
        spans=[*first.spans, *other.spans],
        prompt=first.prompt,
        samples=first.samples,
        branches=2,
        extra=length - first.length,
        shift=torch.cat([torch.zeros_like(shift), shift]),
        steps=first.steps,
    )
    if first.memory is not None and other.memory is not None:
        size = max(first.memory.shape[1], other.memory.shape[1])
        padded = [torch.nn.functional.pad(x, (0, 0, 0, size - x.shape[1])) for x in (first.memory, other.memory)]
        joined.memory = torch.cat(padded)
    joined.stages = [_join_stages(layer, (first, other), joined) for layer in layers]
    for layer, tags in first.tags.items():
        joined.tags[layer] = _join_tags(tags, other.tags[layer])
    for name in ("gains", "divergences"):
        mine, theirs = getattr(first, name), getattr(other, name)
        getattr(joined, name).update({layer: torch.cat([mine[layer], theirs[layer]]) for layer in mine})
    return joined


def _join_stages(layer: int, plans: Sequence[Plan], joined: Plan) -> Stage:
    """What the caches of `layer` hold of both prompts."""
    stages = [plan.holding(layer) or plan.whole(layer) for plan in plans]
    size = max(stage.size for stage in stages)
    present = [stage.present & plan.real.gather(1, stage.positions) for stage, plan in zip(stages, plans, strict=True)]
    # what moved at the entry has moved the tables of the layers behind already
    shifts = [None if layer and stage.layer == 0 else stage.shift for stage in stages]
    none = joined.real.new_zeros(joined.samples, dtype=torch.long)
    columns = _frames([stage.positions for stage in stages], size, [joined.length - plan.length for plan in plans])
    return Stage(
        layer,
        " and ".join(dict.fromkeys(stage.method for stage in stages if stage.method)),
        positions=columns,
        base=columns,
        valid=torch.cat([_left(there, size - there.shape[1], False) for there in present]),
        shift=None if all(x is None for x in shifts) else torch.cat([none if x is None else x for x in shifts]),
    )


def _frames(columns: Sequence[Tensor], size: int, offsets: Sequence[int]) -> Tensor:
    """Columns of both branches `(2B, size)` in frames that have `offsets` more on the left; fillers stand anywhere."""
    return torch.cat([_left(x + offset, size - x.shape[1], 0) for x, offset in zip(columns, offsets, strict=True)])


def _join_tags(mine: Tags, theirs: Tags) -> Tags:
    size = max(mine.tag.shape[1], theirs.tag.shape[1])
    tag = torch.cat([_left(tags.tag, size - tags.tag.shape[1], NOT_A_KEY) for tags in (mine, theirs)])
    return Tags(tag, torch.cat([mine.active, theirs.active]), mine.acts or theirs.acts)


def _left(x: Tensor, missing: int, fill: Any) -> Tensor:
    """`x` `(B, M)` with `missing` columns of `fill` on the left."""
    return torch.cat([x.new_full((len(x), missing), fill), x], 1) if missing else x


def join_output(output: Any, other: Any) -> Any:
    """The text model's output with the last hidden states of the second branch behind its own, aligned at the end."""
    mine, theirs = _last(output), _last(other)
    missing = mine.shape[1] - theirs.shape[1]
    theirs = torch.nn.functional.pad(theirs, (0, 0, missing, 0)) if missing > 0 else theirs[:, -missing:]
    joined = torch.cat([mine, theirs])
    if isinstance(output, tuple):
        return (joined, *output[1:])
    output.last_hidden_state = joined
    return output


def _last(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.last_hidden_state


def widen(plan: Plan, arguments: dict[str, Any], logical: int) -> None:
    """Make a step of the caller's rows one of both branches: inputs, mask and positions, in place.

    Args:
        plan: of both.
        arguments: the text model's.
        logical: tokens before this step, as the caller counts them.
    """
    for name in ("inputs_embeds", "input_ids"):
        if arguments.get(name) is not None:
            arguments[name] = arguments[name].repeat(plan.branches, *[1] * (arguments[name].ndim - 1))
            queries, device = arguments[name].shape[1], arguments[name].device
    if plan.extra:  # the mask is sized by what the cache says, which outside is what the caller has said
        caches.set_dropped(arguments["past_key_values"], plan.length - plan.base_length)
    mask = arguments.get("attention_mask")
    behind = logical + queries - plan.said
    new = plan.real.new_ones(len(plan.real), behind) if mask is None else mask[:, plan.said :].repeat(plan.branches, 1)
    arguments["attention_mask"] = torch.cat([plan.real.to(device, torch.long), new.to(device, torch.long)], 1)
    positions = arguments.get("position_ids")
    if positions is None:
        positions = torch.arange(logical, logical + queries, device=device)[None]
    positions = positions.expand(*positions.shape[:-2], plan.samples, -1)
    assert plan.shift is not None
    both = torch.cat([positions] * plan.branches, -2)
    arguments["position_ids"] = both + plan.shift.to(both.device)[:, None]
