"""The shared selection functions against naive references and the methods' worked examples."""

from __future__ import annotations

import math

import pytest
import torch

from vlmattn.methods.prune import _select as s


def all_there(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool)


def naive_farthest(x: torch.Tensor, picks: int) -> list[int]:
    """DivPrune's greedy search as the paper writes it, on the whole matrix."""
    unit = x / x.norm(dim=-1, keepdim=True)
    distance = 1 - unit @ unit.T
    n = len(x)
    chosen = [max(range(n), key=lambda i: min(distance[i, j].item() for j in range(n) if j != i))]
    while len(chosen) < picks:
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(distance[i, j].item() for j in chosen)))
    return chosen


def test_farthest_first_worked_example():
    x = torch.tensor([[(1, 0), (0.98, 0.2), (0, 1), (-1, 0), (0.7, 0.7)]])
    similarity = s.cosine(x)
    alone = (1 - similarity[0]).masked_fill(torch.eye(5, dtype=torch.bool), math.inf).amin(1)
    assert alone.tolist() == pytest.approx([0.0202, 0.0202, 0.2929, 1.0, 0.1658], abs=5e-4)
    assert s.farthest_first(similarity, all_there(x), 3).tolist() == [[3, 0, 2]]


def test_farthest_first_equals_the_naive_search_on_unequal_pools():
    torch.manual_seed(0)
    x = torch.randn(3, 17, 8)
    sizes = [17, 11, 1]
    present = torch.arange(17) < torch.tensor(sizes)[:, None]
    order = s.farthest_first(s.cosine(x), present, 9)
    for row, size in enumerate(sizes[:2]):
        assert order[row].tolist() == naive_farthest(x[row, :size], 9)
    shorter = s.farthest_first(s.cosine(x), present, 4)
    assert torch.equal(shorter, order[:, :4])
    kept = s.first_picks(order, torch.tensor([9, 5, 1]), 17)
    assert kept.sum(1).tolist() == [9, 5, 1] and not (kept & ~present).any()


def test_farthest_first_takes_duplicates_last_and_never_twice():
    x = torch.tensor([[(1.0, 0), (1.0, 0), (0, 1.0), (-1.0, 0)]])
    order = s.farthest_first(s.cosine(x), all_there(x), 4)[0].tolist()
    assert sorted(order) == [0, 1, 2, 3] and order.index(1) == 3


def naive_dpp(kernel: torch.Tensor, picks: int) -> list[int]:
    """Greedy by the determinant itself."""
    chosen: list[int] = []
    for _ in range(picks):
        rest = [i for i in range(len(kernel)) if i not in chosen]
        gains = {i: torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]).item() for i in rest}
        chosen.append(max(rest, key=lambda i: gains[i]))
    return chosen


def test_dpp_worked_example():
    unit = torch.tensor([[(1, 0), (0.95, 0.3122), (0, 1), (0.6, 0.8)]])
    quality = torch.tensor([[0.9, 1.0, 0.3, 0.6]])
    similarity = s.cosine(unit)
    assert s.dpp_greedy(similarity, quality, all_there(unit), 2).tolist() == [[1, 3]]
    kernel = (quality[..., None] * similarity * quality[:, None])[0]
    assert torch.linalg.det(kernel[[1, 3]][:, [1, 3]]).item() == pytest.approx(0.1181, abs=5e-5)
    assert torch.linalg.det(kernel[[0, 3]][:, [0, 3]]).item() == pytest.approx(0.1866, abs=5e-5)
    left = kernel.diagonal() - kernel[1] ** 2 / kernel[1, 1]
    assert left[[0, 2, 3]].tolist() == pytest.approx([0.0790, 0.0812, 0.1181], abs=5e-5)


def test_dpp_equals_the_naive_search_on_unequal_pools():
    torch.manual_seed(1)
    x, quality = torch.randn(2, 12, 20), torch.rand(2, 12) + 0.1
    present = torch.arange(12) < torch.tensor([12, 8])[:, None]
    order = s.dpp_greedy(s.cosine(x), quality, present, 6)
    for row, size in enumerate((12, 8)):
        kernel = (quality[row, :, None] * s.cosine(x)[row] * quality[row])[:size, :size]
        assert order[row].tolist() == naive_dpp(kernel.double(), 6)
    assert torch.equal(s.dpp_greedy(s.cosine(x), quality, present, 3), order[:, :3])


def test_dpp_without_rank_left_fills_up_by_quality():
    x = torch.tensor([[(1.0, 0, 0), (1.0, 0, 0), (0, 1.0, 0), (1.0, 0, 0), (0, 1.0, 0)]])
    quality = torch.tensor([[0.5, 0.9, 0.4, 0.7, 0.8]])
    assert s.dpp_greedy(s.cosine(x), quality, all_there(x), 5).tolist() == [[1, 4, 3, 0, 2]]
    ones = torch.ones(1, 4)
    assert s.dpp_greedy(torch.eye(4)[None], ones, ones.bool(), 3).tolist() == [[0, 1, 2]]


def naive_lof(x: list[float], k: int) -> list[float]:
    k = min(k, len(x) - 1)
    near = [
        sorted((j for j in range(len(x)) if j != i), key=lambda j, i=i: abs(x[i] - x[j]))[:k] for i in range(len(x))
    ]
    reach = [abs(x[i] - x[near[i][-1]]) for i in range(len(x))]
    density = [1 / (sum(max(reach[j], abs(x[i] - x[j])) for j in near[i]) / k + 1e-10) for i in range(len(x))]
    return [sum(density[j] for j in near[i]) / k / density[i] for i in range(len(x))]


def test_local_outlier_factor_worked_examples():
    x = torch.tensor([[0.10, 0.11, 0.12, 0.13, 0.14, 0.40], [0.30, 0.05, 0.06, 0.07, 0.08, 0.02]], dtype=torch.float64)
    there = all_there(x)
    factor = s.local_outlier_factor(x, there, 2)
    assert factor[0].tolist() == pytest.approx([1.25, 1.25, 0.667, 1.25, 1.25, 17.667], abs=1e-3)
    assert factor[1].tolist() == pytest.approx([15, 1, 1, 1, 1, 2.333], abs=1e-3)
    assert s.outliers(x, there, 2).long().tolist() == [[0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize("neighbours", [2, 5, 20])
def test_local_outlier_factor_equals_the_naive_one(neighbours):
    torch.manual_seed(2)
    x = torch.rand(3, 40, dtype=torch.float64) ** 4
    present = torch.rand(3, 40) < torch.tensor([[1.1], [0.6], [0.2]])
    factor = s.local_outlier_factor(x, present, neighbours)
    for row in range(3):
        assert factor[row][present[row]].tolist() == pytest.approx(naive_lof(x[row][present[row]].tolist(), neighbours))
    assert bool((factor[~present] == 1).all())
    lonely = s.local_outlier_factor(x, torch.arange(40) < torch.tensor([[1], [0], [2]]), neighbours)
    assert lonely.tolist() == [[1.0] * 40] * 3


def test_quantiles_and_ranks_ignore_empty_slots():
    x = torch.tensor([[0.10, 0.11, 0.12, 0.13, 0.14, 0.40], [9.0, 1.0, 2.0, 0.0, 0.0, 0.0]])
    present = torch.arange(6) < torch.tensor([[6], [3]])
    assert s.quantile(x, present, 0.25).tolist() == pytest.approx([0.1125, 1.5])
    assert s.quantile(x, present, 0.75).tolist() == pytest.approx([0.1375, 5.5])
    score = torch.tensor([[1.0, 3.0, 3.0, -math.inf], [0.0, 5.0, 9.0, 9.0]])
    there = torch.tensor([[True] * 4, [True, True, False, False]])
    assert s.ranks(score, there).tolist() == [[2, 0, 1, 3], [1, 0, 2, 3]]
