"""Schedules and SparseVLM: worked examples, counts, and what a model does with them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import oracle
import pytest
import tiny
import torch
from test_prune_decoder import chosen, view
from torch import Tensor

import vlmattn
from vlmattn import spec
from vlmattn.errors import BudgetError, LayerError, SpecError
from vlmattn.methods.prune.schedule import Schedule, middle_of, repaired, sigmoid_shares
from vlmattn.methods.prune.sparsevlm import SparseVLM, density_peaks, raters

pytestmark = pytest.mark.usefixtures("no_grad")


# Schedules


def test_sigmoid_worked_examples():
    first = sigmoid_shares(range(8), 1.0, 2.0)
    assert first == pytest.approx([0.881, 0.731, 0.5, 0.269, 0.119, 0.047, 0.018, 0.007], abs=5e-4)
    assert sum(first) / 8 == pytest.approx(0.3215, abs=5e-5)
    middle = middle_of(range(8), 0.25, 1.5)
    assert middle == pytest.approx(1.4690, abs=5e-5)
    second = sigmoid_shares(range(8), 1.5, middle)
    assert second == pytest.approx([0.9006, 0.6690, 0.3108, 0.0914, 0.0220, 0.0050, 0.0011, 0.0002], abs=5e-5)
    assert [max(math.floor(16 * share + 0.5), 1) for share in second] == [14, 11, 5, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(("visual", "layers"), [(576, 32), (144, 6), (1000, 28), (16, 4)])
@pytest.mark.parametrize("group", [1, 2, 3])
def test_a_schedule_spends_its_budget(visual, layers, group):
    """Falling, whole, and within half a group of tokens of the average."""
    for keep in (0.35, 0.5, 0.75, 0.9):
        counts = Schedule(keep=keep, group=group).expected_tokens(visual, layers)
        assert counts[0] == visual and counts == sorted(counts, reverse=True) and counts[-1] >= 1
        least = visual + layers - 1
        assert abs(sum(counts) - max(keep * visual * layers, least)) <= group / 2 + 0.5
        changes = [layer for layer in range(1, layers) if counts[layer] != counts[layer - 1]]
        assert all((layer - 1) % group == 0 for layer in changes)
    assert repaired([5, 3, 1], [1, 1, 1], 7, 8) == [5, 1, 1] and repaired([5, 3, 1], [1, 1, 1], 11, 8) == [5, 3, 3]


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("schedule(keep=0.3, floor=0.5)", "0.5625", "1"),
        ("schedule(keep=0.5, ceiling=0.25)", "0.1272", "0.3438"),
        ("schedule(keep=0.05)", "0.1272", "1"),
        ("schedule(keep=20, floor=0.5)", "0.5625", "1"),
    ],
)
def test_an_average_that_no_curve_has_is_refused(text, low, high):
    """8 layers, of which the first sees all 400 tokens: between floor and ceiling, and a token a layer."""
    (method,) = spec.parse(text)
    with pytest.raises(BudgetError, match=rf"between {low} and {high} of the visual tokens"):
        method.expected_tokens(400, 8)


def test_the_ends_of_what_a_schedule_can_reach_are_reached():
    for keep, counts in ((0.5625, [400, *[200] * 7]), (1.0 - 1e-12, [400] * 8)):
        assert Schedule(keep=keep, floor=0.5).expected_tokens(400, 8) == counts


def test_shares_are_a_schedule():
    method = Schedule(shares=(1.0, 0.5, 0.5, 0.25))
    assert method.expected_tokens(16, 4) == [16, 8, 8, 4] and method.stages(4) == (1, 3)
    assert Schedule(shares=(1.0, 1.0)).is_noop and method.disabled().is_noop
    with pytest.raises(LayerError, match="4 shares do not fit a model of 5"):
        method.stages(5)
    with pytest.raises(LayerError, match="layer 0 has a share below 1"):
        Schedule(shares=(0.5, 0.5)).stages(2)
    with pytest.raises(BudgetError, match="grows"):
        Schedule(shares=(1.0, 0.5, 0.6))
    with pytest.raises(SpecError, match="steepness"):
        Schedule(steepness=0.0)
    (parsed,) = spec.parse("schedule(shares=[1.0, 0.5, 0.25, 0.25])")
    assert spec.parse(str(parsed)) == (parsed,)


@pytest.mark.parametrize("once", [False, True])
def test_a_schedule_ranks_by_the_text_behind_the_image(family, model, batch, once):
    """At every stage by the layer before, or always by what the first stage saw."""
    prompts = oracle.read_prompts(model, batch, tiny.IMAGE)
    with vlmattn.wrap(model, f"schedule(shares=[1.0, 0.75, 0.5, 0.25], rank_once={once})") as session:
        model(**batch)
        stages = session.report().stages
    for row, prompt in enumerate(prompts):
        flags = prompt.visual.tolist()
        start, total = flags.index(True), sum(flags)
        ranking: dict[int, float] = {}

        def rank(probabilities: Tensor, present: list[int], share: float) -> list[int]:
            rows = [i for i, c in enumerate(present) if c >= start + total]  # noqa: B023
            score = probabilities[:, rows].mean((0, 1))
            if not ranking or not once:  # noqa: B023
                ranking.clear()  # noqa: B023
                ranking.update({c: score[i].item() for i, c in enumerate(present) if flags[c]})  # noqa: B023
            mine = [c for c in present if flags[c]]  # noqa: B023
            best = sorted(mine, key=lambda c: (-ranking[c], c))[: math.floor(total * share + 0.5)]  # noqa: B023
            return sorted([*(c for c in present if not flags[c]), *best])  # noqa: B023

        wanted = {
            layer: (lambda p, present, share=share: rank(p, present, share))
            for layer, share in ((1, 0.75), (2, 0.5), (3, 0.25))
        }
        run = oracle.generate(model, prompt, wanted, 1)
        for stage in stages:
            expected = [c - start for c in run.kept[stage.before_layer] if flags[c]]
            assert stage.kept[row][0] == expected


# SparseVLM


def test_sparsevlm_worked_example():
    there = torch.ones(1, 3, dtype=torch.bool)
    visual = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    text = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [0.1, 0.1]]])
    shares = (visual[0] @ text[0].T).softmax(-1).mean(0)
    assert shares.tolist() == pytest.approx([0.4418, 0.4418, 0.1164], abs=5e-5)
    assert raters(visual, text, there[:, :2], there).tolist() == [[True, True, False]]
    assert raters(visual, 0.01 * text, there[:, :2], there).sum() <= 2  # no normalisation: the scale matters
    rows = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.3, 0.1, 0.5, 0.1]])
    scores = rows.mean(0, keepdim=True)
    assert scores[0].tolist() == pytest.approx([0.20, 0.25, 0.35, 0.20])

    class Two(SparseVLM):
        def quota(self, arriving: int, length: int, stage: int) -> int:
            return 2

    assert chosen(Two(heads=1.0), view(4, scores=scores)) == [1, 2]


@pytest.mark.parametrize(
    ("table", "budget", "counts", "average"),
    [
        ("v1", 192, (300, 200, 110), 202.8),
        ("v1", 128, (303, 110, 36), 140.8),
        ("v1", 96, (238, 48, 26), 110.3),
        ("v1", 64, (66, 30, 17), 79.2),
        ("v2", 192, (300, 200, 118), 206.8),
        ("v2", 64, (66, 34, 20), 81.8),
    ],
)
def test_sparsevlm_counts(table, budget, counts, average):
    method = SparseVLM(keep=budget, table=table)
    tokens = method.expected_tokens(576, 32)
    assert tokens == [576] * 3 + [counts[0]] * 4 + [counts[1]] * 9 + [counts[2]] * 16
    assert sum(tokens) / 32 == pytest.approx(average, abs=0.06)


def test_sparsevlm_budgets():
    assert SparseVLM().expected_tokens(576, 32) == SparseVLM(keep=192).expected_tokens(576, 32)
    assert SparseVLM(keep=576).left(576, None, 2) == 576 and SparseVLM(keep=1.0).is_noop
    last = [SparseVLM(keep=n).left(576, None, 2) for n in range(1, 577, 5)]
    assert last == sorted(last) and min(last) == 1
    assert [SparseVLM().stages(depth) for depth in (32, 28, 12)] == [(3, 7, 16), (3, 6, 14), (2, 3, 7)]
    assert SparseVLM().stages(4) == (1, 2, 3)
    # 276 dropped, of these 83 in 9 clusters; then 309 - 200 dropped, 33 in 4
    recycled = SparseVLM(keep=192, table="v1", recycle=True)
    assert [recycled.left(576, None, stage) for stage in range(2)] == [309, 204]
    for bad in (0.0, 1.5, 1, True):
        with pytest.raises(SpecError, match="heads"):
            SparseVLM(heads=bad)


def peaks_of(x: Tensor, clusters: int) -> tuple[set[int], list[int]]:
    """The same clustering with plain loops."""
    n = len(x)
    distance = [[math.dist(a, b) / math.sqrt(x.shape[1]) for b in x.tolist()] for a in x.tolist()]
    density = [math.exp(-sum(d * d for d in sorted(row)[:clusters]) / clusters) for row in distance]
    weight = []
    for i in range(n):
        denser = [j for j in range(n) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        ahead = min((distance[i][j] for j in denser), default=max(map(max, distance)))
        weight.append(density[i] * ahead)
    centres = sorted(sorted(range(n), key=lambda i: (-weight[i], i))[:clusters])
    return set(centres), [i if i in centres else min(centres, key=lambda c: (distance[i][c], c)) for i in range(n)]


def test_density_peaks_are_those_of_plain_loops():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 23, 8, generator=generator)
    present = torch.rand(6, 23, generator=generator) < 0.8
    clusters = torch.tensor([1, 2, 3, 4, 5, 2])
    peak, member = density_peaks(x, present, clusters)
    for pool in range(6):
        slots = present[pool].nonzero()[:, 0]
        centres, belongs = peaks_of(x[pool, slots].double(), int(clusters[pool]))
        assert set(peak[pool].nonzero()[:, 0].tolist()) == {int(slots[i]) for i in centres}
        assert member[pool, slots].tolist() == [int(slots[i]) for i in belongs]


def test_mutual_neighbours_make_one_peak():
    """With k = 2 the two have exactly equal densities: the lower index is the denser."""
    x = torch.tensor([[[0.0], [1.0], [10.0], [10.5], [30.0]]])
    peak, _ = density_peaks(x, torch.ones(1, 5, dtype=torch.bool), torch.tensor([2]))
    assert peak[0].tolist() == [False, False, True, False, True] or peak[0].sum() == 2
    assert not (peak[0, 2] and peak[0, 3]) and not (peak[0, 0] and peak[0, 1])


def test_recycled_tokens_are_means_at_their_peaks():
    hidden = torch.randn(1, 40, 8)
    seen = view(40, scores=torch.rand(1, 40), hidden=hidden)
    method = SparseVLM(keep=0.2, table="v1", heads=1.0, recycle=True)
    keep = method.select(seen)
    assert keep.rows is not None and int(keep.mask.sum()) == method.left(40)
    changed = (keep.rows != hidden).any(-1) & keep.mask
    quota = method.quota(40, 40, 0)
    best = seen.scores[0].argsort(descending=True, stable=True)[:quota]  # type: ignore[index]
    assert not changed[0, best].any()
    spare = int(0.3 * (40 - quota)) + 1
    assert int(keep.mask.sum()) - quota == spare // 10 + 1
    members = seen.scores[0].argsort(descending=True, stable=True)[quota : quota + spare]  # type: ignore[index]
    peaks = [i for i in keep.mask[0].nonzero()[:, 0].tolist() if i not in best.tolist()]
    total = sum(keep.rows[0, i] * sum(_nearest(hidden[0], j, peaks) == i for j in members.tolist()) for i in peaks)
    assert torch.allclose(total, hidden[0, members].sum(0), atol=1e-4)


def _nearest(x: Tensor, token: int, peaks: list[int]) -> int:
    return token if token in peaks else min(peaks, key=lambda i: float((x[token] - x[i]).norm()))


@pytest.mark.parametrize("heads", [1.0, 0.5])
def test_sparsevlm_lets_the_matching_words_rate(family, model, batch, heads):
    """Against raters and probabilities of the oracle's own."""
    prompts = oracle.read_prompts(model, batch, tiny.IMAGE)
    with vlmattn.wrap(model, f"sparsevlm(keep=0.25, heads={heads})") as session:
        model(**batch)
        first = session.report().stages[0]
    for row, prompt in enumerate(prompts):
        columns = prompt.visual.nonzero()[:, 0]
        behind = int(columns[-1]) + 1
        shares = (prompt.embeds[columns] @ prompt.embeds[behind:].T).softmax(-1).mean(0)
        raters_ = (shares > shares.mean()).nonzero()[:, 0] + behind
        seen: list[Any] = []

        def look(probabilities: Tensor, present: list[int], seen: list[Any] = seen) -> list[int]:
            seen.append(probabilities)
            return present

        oracle.generate(model, prompt, {first.before_layer: look}, 1)
        score = seen[0][:, raters_].mean(1)[:, columns]
        most = score.sum(1).topk(int(4 * heads)).indices
        ranked = score[most].mean(0).tolist()
        count = SparseVLM(keep=0.25).left(len(ranked))
        best = sorted(range(len(ranked)), key=lambda i: (-ranked[i], i))[:count]
        assert first.kept[row][0] == sorted(best)


def test_tables_lie_between_their_budgets():
    for table in ("v1", "v2"):
        for stage, (low, high) in itertools.product(range(3), ((64, 96), (96, 128), (128, 192))):
            ends = sorted(SparseVLM(keep=n, table=table).quota(576, 576, stage) for n in (low, high))
            middle = SparseVLM(keep=(low + high) // 2, table=table).quota(576, 576, stage)
            assert ends[0] <= middle <= ends[1]
