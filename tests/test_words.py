"""The words: budget, spec, spans, edits, cost, plan. Pure functions against worked examples."""

from __future__ import annotations

import math

import pytest
import torch

from vlmattn import budget, cost, spec
from vlmattn.edits import Keep
from vlmattn.errors import BudgetError, CallError, LayerError, SpecError, UnknownMethodError
from vlmattn.methods.base import Method, View, register
from vlmattn.methods.prune.fastv import FastV
from vlmattn.methods.prune.random import Random
from vlmattn.methods.prune.uniform import Uniform, picks, picks_2d
from vlmattn.plan import Stage, compact, decode_mask, gather_rows, prefill_mask
from vlmattn.spans import Geometry, Raster, Span, find_spans, image_index

# budget


@pytest.mark.parametrize(
    ("total", "keep", "expected"),
    [
        (576, 0.5, 288),
        (576, 1.0, 576),
        (144, 0.11, 16),
        (5, 0.5, 3),
        (3, 0.01, 1),
        (10, 64, 10),
        (10, 1, 1),
        (7, 0.5, 4),
    ],
)
def test_count(total, keep, expected):
    assert budget.count(total, keep) == expected


@pytest.mark.parametrize("keep", [0, -3, 0.0, 1.4, -0.1, math.nan, math.inf, True, "0.5", None])
def test_bad_budgets_name_the_value(keep):
    with pytest.raises(BudgetError, match=str(keep).replace("-", r"\-")):
        budget.count(10, keep)


def test_per_layer():
    assert budget.per_layer(576, 0.25, 4, before_layer=2) == [576, 576, 144, 144]
    assert budget.per_layer(100, [1.0, 0.5, 0.5, 10], 4) == [100, 50, 50, 10]
    with pytest.raises(BudgetError, match="grows from 50 to 60 tokens at layer 2"):
        budget.per_layer(100, [1.0, 0.5, 0.6, 0.1], 4)
    with pytest.raises(BudgetError, match="3 values does not fit 4 layers"):
        budget.per_layer(100, [1.0, 0.5, 0.5], 4)


# spec


@pytest.mark.parametrize(
    "text",
    [
        "none",
        "fastv",
        "fastv(keep=0.25, before_layer=3)",
        "fastv(keep=64, query=all_text)",
        "random(before_layer=0, seed=3) + fastv(keep=0.3, before_layer=2)",
        "uniform(mode='2d', exact_budget=True)",
    ],
)
def test_text_round_trips(text):
    methods = spec.parse(text)
    assert spec.text(methods) == text
    assert spec.parse(spec.text(methods)) == methods


def test_one_token_and_everything_are_different_texts():
    assert spec.text(spec.parse("fastv(keep=1)")) == "fastv(keep=1)"
    assert spec.text(spec.parse("fastv(keep=1.0)")) == "fastv(keep=1.0)"


def test_noimage_has_a_layer_and_no_budget():
    (method,) = spec.parse("noimage(before_layer=2)")
    assert str(method) == "noimage(before_layer=2)" and not method.is_noop
    assert method.expected_tokens(576, 4) == [576, 576, 0, 0]
    assert spec.parse([method.disabled(), "fastv"]) == spec.parse("fastv")
    with pytest.raises(UnknownMethodError, match="noimage has no parameter 'keep'"):
        spec.parse("noimage(keep=0.5)")
    for layer in ("-1", "1.5", "True"):
        with pytest.raises(LayerError):
            spec.parse(f"noimage(before_layer={layer})")


def test_every_registered_method_round_trips_and_is_described():
    for name, info in spec.registry().items():
        assert spec.parse(name) == (info.cls(),)
        assert info.summary.endswith(".") and info.title and info.kind
        assert all(field["help"] for field in info.fields)
        assert isinstance(info.as_dict()["fields"], list)


def test_a_name_belongs_to_one_class():
    with pytest.raises(SpecError, match="belongs to"):

        @register("fastv", title="impostor")
        class Impostor(Method):
            pass


@pytest.mark.parametrize("bad", ["fastv+", "fastv - random", "3", "fastv(keep=a.b)", "fastv(*x)", "fastv(keep=1+1)"])
def test_unreadable_specs(bad):
    with pytest.raises(SpecError):
        spec.parse(bad)


def test_the_nearest_name_is_offered():
    with pytest.raises(UnknownMethodError, match="did you mean 'random'"):
        spec.parse("randon")
    with pytest.raises(UnknownMethodError, match=r"known: .*fastv"):
        spec.parse("zzz")


@pytest.mark.parametrize(
    "bad", ["fastv(query=first)", "random(seed=-1)", "random(budget_scope=row)", "uniform(mode='3d')",
            "uniform(exact_budget=1)", "uniform(budget_scope=sample)"]
)  # fmt: skip
def test_bad_values_say_what_is_expected(bad):
    with pytest.raises(SpecError, match=r"expected|only"):
        spec.parse(bad)


# spans and geometry


def test_find_spans():
    visual = torch.tensor([[0, 1, 1, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    assert [(s.start, s.length, s.image) for s in find_spans(visual, None)[0]] == [(1, 4, 0), (6, 2, 1)]
    assert [(s.start, s.length, s.image) for s in find_spans(visual, 2)[0]] == [(1, 2, 0), (3, 2, 1), (6, 2, 2)]
    assert find_spans(visual, 2)[1] == []
    with pytest.raises(CallError, match="run of 2 visual tokens where an image takes 4"):
        find_spans(visual, 4)
    assert image_index(find_spans(visual, 2), 8)[0].tolist() == [-1, 0, 0, 1, 1, -1, 2, 2]


def test_geometry_maps_tokens_to_pixels_and_back():
    geometry = Geometry(grid=(1, 4, 6), size=(60, 40), origin=(0.0, 0.0), cell=(10.0, 10.0))
    assert geometry.rect(7) == (10.0, 10.0, 20.0, 20.0)
    for index in range(24):
        x0, y0, x1, y1 = geometry.rect(index)
        assert geometry.index((x0 + x1) / 2, (y0 + y1) / 2) == index
    assert geometry.index(-1, 5) is None
    padded = Geometry(grid=(1, 2, 2), size=(20, 10), origin=(0.0, -5.0), cell=(10.0, 10.0))
    assert padded.rect(0) == (0.0, 0.0, 10.0, 5.0)
    with pytest.raises(IndexError, match="24"):
        geometry.rect(24)


# edits


def test_ties_go_to_the_lower_index():
    score = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0]])
    group = torch.zeros(1, 5, dtype=torch.long)
    kept = [Keep.top(score, group, torch.tensor([[n]])).mask[0].nonzero()[:, 0].tolist() for n in range(6)]
    assert kept == [[], [1], [1, 2], [1, 2, 4], [0, 1, 2, 4], [0, 1, 2, 3, 4]]


def test_groups_have_budgets_of_their_own():
    score = torch.tensor([[9.0, 8, 7, 1, 2, 3, 0], [1, 2, 3, 4, 5, 6, 7]])
    group = torch.tensor([[0, 0, 0, 1, 1, 1, -1], [1, 0, 1, 0, 1, 0, 1]])
    mask = Keep.top(score, group, torch.tensor([[1, 2], [2, 1]])).mask
    assert mask.tolist() == [
        [True, False, False, False, True, True, False],
        [False, False, False, True, False, True, True],
    ]


# methods on worked examples


def view(visual: int, scores: torch.Tensor | None = None, grid: tuple[int, int, int] | None = None) -> View:
    index = torch.arange(visual)[None]
    return View(
        layer=2,
        image=torch.zeros_like(index),
        counts=torch.tensor([[visual]]),
        spans=((Span(1, visual, 0, () if grid is None else (Raster(grid),)),),),
        index=index,
        scores=scores,
        keys=((12345,),),
    )


def test_fastv_worked_example():
    """Card: mean of two heads' last rows over [sys v0 v1 v2 v3 txt]; R = 0.5 keeps v1 and v3."""
    heads = torch.tensor([[0.10, 0.05, 0.40, 0.15, 0.10, 0.20], [0.20, 0.25, 0.10, 0.05, 0.30, 0.10]])
    mean = heads.mean(0)
    assert mean.tolist() == pytest.approx([0.15, 0.15, 0.25, 0.10, 0.20, 0.15])
    mask = FastV(keep=0.5).select(view(4, mean[None, 1:5])).mask
    assert mask[0].tolist() == [False, True, False, True]


def test_uniform_worked_examples():
    assert picks(10, 4) == [1, 3, 6, 8]
    assert [len(picks_2d(24, 24, n)) for n in (128, 64, 144)] == [121, 64, 144]
    assert all(len(set(picks(v, n))) == n for v in range(1, 40) for n in range(1, v + 1))
    mask = Uniform(keep=4).select(view(10)).mask
    assert mask[0].nonzero()[:, 0].tolist() == [1, 3, 6, 8]
    plane = Uniform(keep=128, mode="2d").select(view(576, grid=(1, 24, 24))).mask
    filled = Uniform(keep=128, mode="2d", exact_budget=True).select(view(576, grid=(1, 24, 24))).mask
    assert (int(plane.sum()), int(filled.sum())) == (121, 128)
    assert bool((plane <= filled).all())
    with pytest.raises(CallError, match="needs the whole grid"):
        Uniform(mode="2d").select(view(10, grid=(1, 4, 4)))


def test_random_is_reproducible_and_uniform():
    first = Random(keep=8).select(view(16)).mask
    assert torch.equal(first, Random(keep=8).select(view(16)).mask)
    assert not torch.equal(first, Random(keep=8, seed=1).select(view(16)).mask)
    counts = sum(Random(keep=4, seed=s).select(view(16)).mask.long() for s in range(2000))
    # 2000 draws of 4 out of 16: each token expects 500, standard deviation 19
    assert counts.sum() == 8000 and int(counts.min()) > 420 and int(counts.max()) < 580


def test_the_papers_layer_scales_with_depth():
    assert [FastV().resolve_layer(n) for n in (32, 40, 64, 6, 4, 2)] == [2, 3, 4, 1, 1, 1]


# cost

LLAVA_7B = cost.Dims(num_layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, mlp=11008)
QWEN_7B = cost.Dims(num_layers=28, hidden=3584, heads=28, kv_heads=4, head_dim=128, mlp=18944)


def test_macs_anchors():
    """Card 00: LLaVA-1.5-7B over 576 visual tokens is the familiar 3.82 T, over 64 it is 0.416 T."""
    assert cost.prefill_macs(LLAVA_7B, [576] * 32) == pytest.approx(3.817e12, rel=5e-4)
    assert cost.prefill_macs(LLAVA_7B, [64] * 32) == pytest.approx(0.416e12, rel=2e-3)


@pytest.mark.parametrize(("layer", "keep", "ratio"), [(2, 0.5, 0.571), (3, 0.5, 0.585), (2, 0.25, 0.361)])
def test_fastv_prefill_ratio(layer, keep, ratio):
    """Card FastV: 7B with 64 text tokens."""
    tokens = [64 + n for n in budget.per_layer(576, keep, 32, layer)]
    full = cost.prefill_macs(LLAVA_7B, [640] * 32)
    assert cost.prefill_macs(LLAVA_7B, tokens) / full == pytest.approx(ratio, abs=5e-3)


def test_kv_bytes_anchors():
    assert cost.kv_bytes(LLAVA_7B, [576] * 32, 2) == 288 * 2**20
    assert cost.kv_bytes(QWEN_7B, [1] * 28, 2) == 56 * 2**10


# plan


def test_compact_right_aligns():
    keep = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]], dtype=torch.bool)
    index, valid = compact(keep)
    assert valid is not None
    assert index[0].tolist() == [0, 2, 3] and index[1, -1] == 2
    assert valid.tolist() == [[True, True, True], [False, False, True]]
    assert compact(keep[:1])[1] is None


def test_gather_rows_broadcasts():
    x = torch.arange(12.0).view(1, 6, 2)
    index = torch.tensor([[0, 3], [1, 5]])
    assert gather_rows(x, index).tolist() == [[[0, 1], [6, 7]], [[2, 3], [10, 11]]]
    positions = torch.arange(18).view(3, 1, 6)
    assert gather_rows(positions, index, dim=-1)[:, 1].tolist() == [[1, 5], [7, 11], [13, 17]]


def ragged_stage() -> Stage:
    columns = torch.tensor([[0, 2, 4], [1, 3, 4]])
    return Stage(2, "x", columns, columns, torch.tensor([[True, True, True], [False, True, True]]))


def test_masks_without_padding_stay_none():
    stage = ragged_stage()
    even = Stage(2, "x", stage.positions, stage.base, None)
    assert prefill_mask(None, even) is None
    assert decode_mask(None, even, 5, 1, 2) is None


@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_prefill_masks_agree(kind):
    stage = ragged_stage()
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    additive = torch.zeros(1, 1, 5, 5).masked_fill(~causal, torch.finfo(torch.float32).min)
    mask = prefill_mask({"none": None, "bool": causal, "additive": additive}[kind], stage)
    assert mask is not None
    seen = mask if mask.dtype == torch.bool else mask == 0
    assert seen[0, 0].tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert seen[1, 0].tolist() == [[True, False, False], [False, True, False], [False, True, True]]


@pytest.mark.parametrize("kind", ["none", "bool", "flash"])
def test_decode_masks_agree(kind):
    stage = ragged_stage()
    given = {
        "none": None,
        "bool": torch.ones(1, 1, 1, 7, dtype=torch.bool),
        "flash": torch.ones(2, 7, dtype=torch.long),
    }[kind]
    mask = decode_mask(given, stage, 5, 2, 2)
    assert mask is not None
    assert mask.view(2, -1).bool().tolist() == [[True] * 5, [False] + [True] * 4]
