"""What a run did: tokens per layer, KV bytes, multiply-accumulates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmattn.cost import Dims, kv_bytes, prefill_macs
from vlmattn.plan import Plan, Stage


@dataclass(frozen=True)
class StageReport:
    """One pruning stage.

    Attributes:
        method: text of the method.
        before_layer: decoder layer whose input is already pruned.
        kept: per sample and image the indices (within the image, raster order) of the visual tokens that are left.
        positions: per sample the prompt columns (padding counted) of all tokens that are left.
        mean_row: where they stand in the height of the grid, mean over tokens: 0 is the top edge, 1 the bottom edge,
            and tokens spread evenly have 0.5. None where no grid is known or nothing is left.
    """

    method: str
    before_layer: int
    kept: list[list[list[int]]]
    positions: list[list[int]]
    mean_row: float | None = None


@dataclass(frozen=True)
class CacheReport:
    """What the cache of one layer holds after the prefill, where that is less than the layer saw.

    Attributes:
        method: text of the method.
        layer: the decoder layer.
        kept: per sample and image the indices of the visual tokens that are left.
        positions: per sample the prompt columns (padding counted) that are left, text included.
    """

    method: str
    layer: int
    kept: list[list[list[int]]]
    positions: list[list[int]]


@dataclass(frozen=True)
class Report:
    """The last prefill with images that went through a session.

    Attributes:
        spec: canonical text of the methods.
        family: name of the model family.
        num_layers: decoder layers.
        prompt_tokens: per sample, without padding.
        visual_tokens: per sample, without newline tokens, which count as text.
        visual_per_layer: per sample, visual tokens in each decoder layer during the prefill.
        cached_per_layer: per sample, visual tokens in the cache of each decoder layer after it.
        kv_bytes: keys and values held after the prefill over all samples, without padding; of both branches where a
            method contrasts two.
        kv_bytes_full: the same without methods.
        prefill_macs, prefill_macs_full: multiply-accumulates of the decoder layers over all samples, likewise; without
            a text-only stream beside the prompt (`vhr`), and without a first answer (`ilvad`).
        stages: pruning stages in order of layer.
        caches: layers whose caches were cut after the prefill, in order.
        positions: per sample the prompt columns (padding counted) that the last layer held; logits of a bare forward
            are right-aligned to these.
        visual_mass: per layer the share of the last prompt token's attention that falls on visual tokens, mean over
            heads and samples, None in a layer that was left out; None unless the session records.
        second_tokens: per sample, without padding, tokens that enter the second branch; None if there is none.
        skipped_layers: decoder layers that were left out; they hold nothing and cost nothing.
        selection_ms: milliseconds that choosing tokens took, `Session.time_selection`; None unless it is measured.
    """

    spec: str
    family: str
    num_layers: int
    prompt_tokens: list[int]
    visual_tokens: list[int]
    visual_per_layer: list[list[int]]
    cached_per_layer: list[list[int]]
    kv_bytes: int
    kv_bytes_full: int
    prefill_macs: int
    prefill_macs_full: int
    stages: list[StageReport]
    caches: list[CacheReport]
    positions: list[list[int]]
    visual_mass: list[float | None] | None = None
    skipped_layers: list[int] = dataclasses.field(default_factory=list)
    second_tokens: list[int] | None = None
    selection_ms: float | None = None

    @property
    def average_visual_tokens(self) -> float:
        """Visual tokens per layer, mean over layers and samples."""
        return sum(map(sum, self.visual_per_layer)) / (self.num_layers * len(self.visual_per_layer))

    @property
    def speedup(self) -> float:
        """Theoretical speed-up of the decoder's prefill: full over pruned multiply-accumulates."""
        return self.prefill_macs_full / self.prefill_macs

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, with the derived numbers."""
        derived = {"average_visual_tokens": self.average_visual_tokens, "speedup": self.speedup}
        return dataclasses.asdict(self) | derived

    def __str__(self) -> str:
        samples = len(self.visual_tokens)
        lines = [f"{self.spec} on {self.family}, {self.num_layers} layers, {samples} sample{'s' * (samples > 1)}"]
        for row, counts in enumerate(self.visual_per_layer):
            runs: list[list[int]] = []
            for layer, count in enumerate(counts):
                if runs and runs[-1][2] == count:
                    runs[-1][1] = layer
                else:
                    runs.append([layer, layer, count])
            shown = ", ".join(f"{n} in layer{'s' * (b > a)} {a if a == b else f'{a}-{b}'}" for a, b, n in runs)
            lines.append(f"  sample {row}: {self.prompt_tokens[row]} prompt tokens, visual: {shown}")
        if self.second_tokens is not None:
            lines.append(f"  second branch            {', '.join(map(str, self.second_tokens))} prompt tokens")
        if self.skipped_layers:
            lines.append(f"  layers left out          {', '.join(map(str, self.skipped_layers))}")
        for stage in self.stages:
            if stage.mean_row is not None:
                name = stage.method.partition("(")[0]
                where = f"before layer {stage.before_layer}"
                lines.append(f"  mean row kept {where:<16} {stage.mean_row:.2f} of the height ({name}; even is 0.50)")
        share = self.kv_bytes / self.kv_bytes_full
        lines.append(f"  visual tokens per layer  {self.average_visual_tokens:.1f}")
        lines.append(f"  KV after prefill         {self.kv_bytes:,} B of {self.kv_bytes_full:,} B ({share:.0%})")
        lines.append(
            f"  prefill MACs (decoder)   {self.prefill_macs:.4g} of {self.prefill_macs_full:.4g} "
            f"(theoretical speed-up {self.speedup:.2f}x)"
        )
        if self.visual_mass is not None:
            shown = " ".join("-" if mass is None else f"{mass:.2f}" for mass in self.visual_mass)
            lines.append(f"  visual attention by layer {shown}")
        if self.selection_ms is not None:
            lines.append(f"  choosing tokens          {self.selection_ms:.3g} ms")
        return "\n".join(lines)


def build(plan: Plan, spec: str, family: str, dims: Dims, bytes_per_value: int, second: Plan | None = None) -> Report:
    """A report of one plan.

    Args:
        plan: the finished prefill.
        spec: canonical text of the session's methods.
        family: name of the model family.
        dims: sizes of the decoder.
        bytes_per_value: of the cache's dtype.
        second: the finished prefill of a second branch.
    """
    prompt = plan.real.sum(1).tolist()
    visual = plan.visual.sum(1).tolist()
    stages = [plan.stage(layer) for layer in range(dims.num_layers)]
    holding = [plan.holding(layer) for layer in range(dims.num_layers)]
    per_layer = _per_sample(stages, plan.visual, plan)
    held = _per_sample(holding, plan.visual, plan)
    tokens, cached = _tokens(plan, dims.num_layers)
    for counts in (*per_layer, *held):
        for layer in plan.skipped:
            counts[layer] = 0
    entering = None
    if second is not None:
        more = _tokens(second, dims.num_layers)
        entering = [counts[0] for counts in more[0]]
        tokens, cached = tokens + more[0], cached + more[1]
    full = [[prompt[row]] * dims.num_layers for row in range(len(prompt))]
    return Report(
        spec=spec,
        family=family,
        num_layers=dims.num_layers,
        prompt_tokens=prompt,
        visual_tokens=visual,
        visual_per_layer=per_layer,
        cached_per_layer=held,
        kv_bytes=sum(kv_bytes(dims, row, bytes_per_value) for row in cached),
        kv_bytes_full=sum(kv_bytes(dims, row, bytes_per_value) for row in full),
        prefill_macs=sum(prefill_macs(dims, row) for row in tokens),
        prefill_macs_full=sum(prefill_macs(dims, row) for row in full),
        stages=[_stage_report(plan, stage) for stage in plan.stages],
        caches=[_cache(plan, layer, stage) for layer, stage in enumerate(holding) if _is_cut(plan, layer)],
        positions=_positions(plan, plan.stage(dims.num_layers - 1)),
        skipped_layers=sorted(plan.skipped),
        second_tokens=entering,
    )


def _tokens(plan: Plan, num_layers: int) -> tuple[list[list[int]], list[list[int]]]:
    """Per sample and layer the tokens that went through it, and those that its cache holds."""
    tables = []
    for of in (plan.stage, plan.holding):
        counted = _per_sample([of(layer) for layer in range(num_layers)], plan.real, plan)
        tables.append([[0 if n in plan.skipped else count for n, count in enumerate(row)] for row in counted])
    return tables[0], tables[1]


def _stage_report(plan: Plan, stage: Stage) -> StageReport:
    kept = _kept(plan, stage)
    places = []
    for spans, images in zip(plan.spans, kept, strict=True):
        for span, tokens in zip(spans, images, strict=True):
            heights = [
                (row + 0.5) / h for t, h, w in span.grids for _ in range(t) for row in range(h) for _ in range(w)
            ]
            places += [heights[token] for token in tokens if heights]
    mean = sum(places) / len(places) if places else None
    return StageReport(stage.method, stage.layer, kept, _positions(plan, stage), mean)


def _positions(plan: Plan, stage: Stage | None) -> list[list[int]]:
    if stage is None:
        return [row.nonzero()[:, 0].tolist() for row in plan.real]
    columns = stage.positions.tolist()
    if stage.valid is None:
        return columns
    return [
        [c for c, ok in zip(row, oks, strict=True) if ok]
        for row, oks in zip(columns, stage.valid.tolist(), strict=True)
    ]


def _is_cut(plan: Plan, layer: int) -> bool:
    """Whether the cache of a layer was cut after the prefill."""
    saw, holds = plan.stage(layer) or plan.whole(layer), plan.holding(layer) or plan.whole(layer)
    return not (torch.equal(saw.positions, holds.positions) and torch.equal(saw.present, holds.present))


def _cache(plan: Plan, layer: int, stage: Stage | None) -> CacheReport:
    assert stage is not None
    return CacheReport(stage.method, layer, _kept(plan, stage), _positions(plan, stage))


def _per_sample(stages: Sequence[Stage | None], flags: Tensor, plan: Plan) -> list[list[int]]:
    """Per sample how many tokens with true `flags` `(B, N)` the stage of every layer has."""
    wanted: Sequence[Sequence[bool]] = flags.tolist()
    counts: dict[int, list[int]] = {}
    for stage in stages:
        if id(stage) not in counts:
            columns = _positions(plan, stage)
            counts[id(stage)] = [sum(wanted[row][c] for c in mine) for row, mine in enumerate(columns)]
    return [[counts[id(stage)][row] for stage in stages] for row in range(len(wanted))]


def _kept(plan: Plan, stage: Stage) -> list[list[list[int]]]:
    result = []
    visual = plan.visual.tolist()
    for row, columns in enumerate(_positions(plan, stage)):
        there = set(columns)
        images = []
        for span in plan.spans[row]:
            own = [column for column in range(span.start, span.start + span.columns) if visual[row][column]]
            images.append([index for index, column in enumerate(own) if column in there])
        result.append(images)
    return result
