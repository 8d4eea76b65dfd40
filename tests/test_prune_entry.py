"""The methods that act before the language model: every card's worked example, on hand-made views."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmattn import spec
from vlmattn.errors import BudgetError, LayerError, SpecError, VlmattnWarning
from vlmattn.methods.base import View
from vlmattn.methods.prune import _select as s
from vlmattn.methods.prune import hired, visionzip
from vlmattn.methods.views import Paired, Text
from vlmattn.spans import Raster, Span


def view(*rows: list[int], grids: dict[int, tuple[int, int, int]] | None = None, **given: Any) -> View:
    """A view whose samples have images of so many tokens; everything else is `(B, V, ...)`."""
    width, images = max(map(sum, rows)), max(map(len, rows))
    image = torch.full((len(rows), width), -1)
    index, spans = image.clone(), []
    for row, lengths in enumerate(rows):
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            image[row, start : start + length] = number
            index[row, start : start + length] = torch.arange(length)
        places = enumerate(zip(starts, lengths, strict=True))
        rasters = {length: (Raster(grid),) for length, grid in (grids or {}).items()}
        spans.append(tuple(Span(start, length, i, rasters.get(length, ())) for i, (start, length) in places))
    counts = torch.tensor([[*lengths, *[0] * (images - len(lengths))] for lengths in rows])
    return View(layer=0, image=image, counts=counts, spans=tuple(spans), index=index, **given)


def kept(keep: Any, row: int = 0) -> list[int]:
    return keep.mask[row].nonzero()[:, 0].tolist()


def method(text: str) -> Any:
    return spec.parse(text)[0]


def test_divprune_worked_example():
    x = torch.tensor([[(1, 0), (0.98, 0.2), (0, 1), (-1, 0), (0.7, 0.7)]])
    assert kept(method("divprune(keep=3)").select(view([5], hidden=x))) == [0, 2, 3]
    assert kept(method("divprune(keep=1)").select(view([5], hidden=x))) == [3]


def test_divprune_chooses_in_every_image_or_in_all():
    torch.manual_seed(0)
    x = torch.randn(2, 12, 6)
    both, alone = view([5, 7], [4], hidden=x), view([7], hidden=x[:1, 5:])
    chosen = method("divprune(keep=2)").select(both)
    assert kept(chosen)[2:] == [i + 5 for i in kept(method("divprune(keep=2)").select(alone))]
    assert chosen.mask.sum(1).tolist() == [4, 2] and not chosen.mask[1, 4:].any()
    whole = method("divprune(keep=3, budget_scope=sample)").select(both)
    assert kept(whole) == kept(method("divprune(keep=3)").select(view([12], hidden=x[:1])))
    assert torch.equal(method("divprune(keep=2)").select(view([5, 7], [4], hidden=x * 5)).mask, chosen.mask)


def tower(*values: Any) -> Tensor:
    return torch.tensor([values], dtype=torch.float32)


def test_visionzip_worked_example():
    """Dominant {1, 3}, targets {0, 4}; 2 goes to 0 and 5 to 4."""
    x = tower(*[[float(i)] for i in range(1, 7)])
    vision = {
        "attention": tower(0.05, 0.30, 0.08, 0.25, 0.10, 0.22)[..., None],
        "keys": tower((1, 0), (0, 1), (0.9, 0.1), (0, 1), (0, 1), (0.2, 0.8))[:, :, None],
        "features": x,
        "cls": torch.full_like(x, 9.0),
    }
    given = {"hidden": x * 10, "vision": vision, "project": lambda features: features * 10}
    chosen = method("visionzip(keep=4, contextual=0.5)").select(view([6], **given))
    assert kept(chosen) == [0, 1, 3, 4]
    assert chosen.rows[0, kept(chosen), 0].tolist() == [40, 20, 40, 110]
    cosines = s.cosine(vision["keys"].mean(-2))[0]
    assert cosines[2, [0, 4]].tolist() == pytest.approx([0.9939, 0.1104], abs=5e-5)
    assert cosines[5, 4].item() == pytest.approx(0.9701, abs=5e-5)
    code = method("visionzip(keep=5, contextual=0.4, keep_cls=True, order=code)").select(view([6], **given))
    assert kept(code) == [0, 1, 2, 3, 4]  # CLS has the slot of token 2, the first that is free
    assert code.rows[0, :5, 0].tolist() == [90, 20, 40, 40, 110]


@pytest.mark.parametrize(("keep", "contextual"), [(64, 10), (128, 20), (192, 30)])
def test_visionzip_has_the_codes_budgets(keep, contextual):
    torch.manual_seed(0)
    vision = {"attention": torch.rand(1, 576, 2), "keys": torch.randn(1, 576, 2, 4), "features": torch.randn(1, 576, 3)}
    given = view([576], hidden=vision["features"], vision=vision, project=lambda x: x)
    chosen = method(f"visionzip(keep={keep})").select(given)
    assert len(kept(chosen)) == keep
    changed = (chosen.rows != vision["features"]).any(-1)[0]
    assert int(changed.sum()) <= contextual and not changed[~chosen.mask[0]].any()
    best = set(vision["attention"].mean(-1)[0].topk(keep - contextual).indices.tolist())
    assert best <= set(kept(chosen))


def test_visionzip_merges_every_member_once():
    torch.manual_seed(0)
    rest = torch.rand(2, 40) < 0.8
    x = torch.ones(2, 40, 1)
    values, target, changed = visionzip.merge(x, torch.randn(2, 40, 4), rest, torch.tensor([5, 3]))
    assert target.sum(1).tolist() == [5, 3] and not (target & ~rest).any()
    assert torch.equal(values[..., 0], 1 + changed.float())  # a mean of ones is one
    everything = visionzip.merge(x, torch.randn(2, 40, 4), rest, torch.tensor([40, 0]))
    assert torch.equal(everything[1], rest & torch.tensor([[True], [False]])) and not everything[2].any()


def test_hired_keeps_the_best_of_every_frame():
    score = torch.tensor([[5.0, 6, 7, 8, 9, 1, 2, 3, 4, 0]])[..., None].expand(-1, -1, 2)
    whole = view([10], vision={"attention": score})
    assert kept(method("hired(keep=0.45)").select(whole)) == [0, 1, 2, 3, 4]
    assert kept(method("hired(keep=0.45, exact_budget=False)").select(whole)) == [1, 2, 3, 4]
    video = view([10], grids={10: (2, 1, 5)}, vision={"attention": score})
    assert kept(method("hired(keep=5)").select(video)) == [2, 3, 4, 7, 8]
    assert kept(method("hired(keep=5, exact_budget=False)").select(video)) == [3, 4, 7, 8]
    for text, count in (("hired(keep=5)", 5), ("hired(keep=5, exact_budget=False)", 4)):
        assert method(text).left(10, (2, 1, 5)) == count and method(text).left(10) == 5
    little = method("hired(keep=0.1, exact_budget=False)")  # one token for two frames
    assert kept(little.select(video)) == [4] and little.left(10, (2, 1, 5)) == 1
    mixed = view([2, 6], [4], grids={6: (3, 1, 2)}, vision={"attention": torch.arange(16.0).view(2, 8, 1).flip(1)})
    chosen = method("hired(keep=0.5)").select(mixed)
    assert kept(chosen) == [0, 2, 4, 6] and kept(chosen, 1) == [0, 1]


def test_hired_worked_example():
    """5 crops: half of the budget for the whole image, the rest by what early attention picks in each tile."""
    for rate, budgets in ((0.2, [120, 60, 72, 36]), (0.1, [60, 30, 36, 18])):
        total = int(5 * 576 * rate)
        assert hired.tile_budgets([120, 60, 72, 36], total - total // 2, 576) == budgets


@pytest.mark.parametrize(
    ("counts", "total", "cap", "exact", "budgets"),
    [
        ([1, 1, 1], 8, 10, True, [3, 3, 2]),
        ([1, 1, 1], 8, 10, False, [2, 2, 2]),
        ([5, 3, 2], 7, 10, True, [4, 2, 1]),  # 3.5, 2.1, 1.4
        ([98, 1, 1], 100, 50, True, [50, 25, 25]),
        ([98, 1, 1], 100, 50, False, [50, 1, 1]),
        ([1, 1, 1], 2, 10, False, [1, 0, 0]),
        ([0, 0], 3, 4, False, [1, 0]),
        ([1, 0], 9, 4, True, [4, 4]),
        ([0, 0], 3, 4, True, [2, 1]),
    ],
)
def test_hired_budgets_of_tiles(counts, total, cap, exact, budgets):
    assert hired.tile_budgets(counts, total, cap, exact) == budgets


def test_cdpruner_worked_example():
    """First pick 1, then 3: relevances as they are given, through a scale that leaves them alone."""
    x = tower((1, 0), (0.95, 0.3122), (0, 1), (0.6, 0.8))
    quality = tower(0.9, 1.0, 0.3, 0.6)
    assert s.dpp_greedy(s.cosine(x), quality, torch.ones(1, 4, dtype=torch.bool), 2).tolist() == [[1, 3]]
    scaled = method("cdpruner(keep=2, relevance=none)")._quality(quality, torch.ones(1, 4, dtype=torch.bool))
    assert scaled[0].tolist() == pytest.approx([0.6 / 0.7, 1.0, 0.0, 0.3 / 0.7], abs=2e-6)


def test_cdpruner_relevances():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5)
    question = torch.randn(2, 3, 5)
    after = torch.tensor([[False, True, True], [False, False, False]])
    text = Text(torch.ones(2, 3, dtype=torch.bool), after, question)
    given = view([6], [6], hidden=x, text=text)
    relevance = method("cdpruner(relevance=embeddings)")._relevance(given)
    for row, asked in enumerate((question[0, 1:], question[1])):
        expected = torch.nn.functional.cosine_similarity(x[row], asked.mean(0)[None], dim=-1)
        torch.testing.assert_close(relevance[row], expected)
    segments = torch.tensor([[True, False], [True, True]])
    words = torch.randn(2, 2, 4)
    paired = Paired(words, segments, words[:, 0], lambda states, normed: states[..., :4])
    given = view([6], [6], hidden=x, vision={"states": x}, paired=paired)
    relevance = method("cdpruner")._relevance(given)
    for row, there in enumerate((words[0, :1], words[1])):
        cosines = torch.nn.functional.cosine_similarity(x[row, :, None, :4], there[None], dim=-1)
        torch.testing.assert_close(relevance[row], -cosines.mean(1))


def test_cdpruner_does_not_couple_samples_unless_told():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5)
    text = Text(torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool), torch.randn(2, 2, 5))
    both = method("cdpruner(keep=4, relevance=embeddings)").select(view([8], [8], hidden=x, text=text))
    for row in range(2):
        own = Text(text.real[row : row + 1], text.after[row : row + 1], text.hidden[row : row + 1])
        alone = method("cdpruner(keep=4, relevance=embeddings)").select(view([8], hidden=x[row : row + 1], text=own))
        assert kept(alone) == kept(both, row)
    one = method("cdpruner(relevance=none, scale=batch)")._quality(
        torch.tensor([[0.0, 1], [3, 4]]), torch.ones(2, 2).bool()
    )
    assert one[:, 1].tolist() == pytest.approx([0.25, 1.0], abs=1e-5)


def test_cdpruner_weight_of_the_relevance():
    x, quality = torch.eye(4)[None], torch.tensor([[0.2, 0.9, 0.5, 0.1]])
    question = torch.tensor([[[1.0, 0.0]]])
    paired = Paired(question, torch.ones(1, 1).bool(), question[:, 0], lambda states, normed: states)
    angle = torch.stack([-quality, (1 - quality**2).sqrt()], -1)
    given = view([4], hidden=x, vision={"states": angle}, paired=paired)
    for text in ("cdpruner(keep=2)", "cdpruner(keep=2, theta=0.9)"):
        assert kept(method(text).select(given)) == [1, 2]
    assert kept(method("cdpruner(keep=2, relevance=none)").select(given)) == [0, 1]
    with pytest.raises(SpecError, match="expected a float in"):
        method("cdpruner(theta=1.0)")


PRUMERGE = {
    "attention": tower(0.10, 0.11, 0.12, 0.13, 0.14, 0.40),
    # token 5 is nearest to 3 and 4
    "keys": tower((1, 0), (1, 0.1), (0.9, 0), (0.1, 1), (0, 1), (0, 1))[:, :, None],
    "features": tower(*[[float(i)] for i in range(1, 7)]),
}


def prumerge(text: str, **changes: Any) -> Any:
    vision = PRUMERGE | changes
    size = vision["attention"].shape[1]
    return method(text).select(view([size], hidden=vision["features"], vision=vision, project=lambda x: x))


def test_prumerge_worked_example():
    chosen = prumerge("prumerge(neighbours=2)")
    assert kept(chosen) == [4, 5]  # the extra token sits on the best of those that do not stay
    assert chosen.rows[0, [5, 4], 0].tolist() == pytest.approx([7.22, 1.90])
    code = prumerge("prumerge(neighbours=2, order=score)")
    assert code.rows[0, [4, 5], 0].tolist() == pytest.approx([7.22, 1.90])
    there = torch.ones(1, 6, dtype=torch.bool)
    assert s.quantile(PRUMERGE["attention"], there, 0.75).item() == pytest.approx(0.1375)
    assert kept(prumerge("prumerge(neighbours=2, extra=False)")) == [5]
    plain = prumerge("prumerge(neighbours=0, extra=False)")
    assert torch.equal(plain.rows, PRUMERGE["features"])
    doubled = prumerge("prumerge(neighbours=2)", features=2 * PRUMERGE["features"])
    torch.testing.assert_close(doubled.rows[0, [4, 5]], 2 * chosen.rows[0, [4, 5]])


def test_prumerge_without_outliers_keeps_one_token():
    level = torch.full((1, 6), 0.2)
    assert kept(prumerge("prumerge(extra=False)", attention=level)) == [0]
    assert kept(prumerge("prumerge", attention=level)) == [0, 1]
    with_heads = prumerge(
        "prumerge(heads=mean, extra=False)", attention=PRUMERGE["attention"][..., None].expand(1, 6, 2)
    )
    assert kept(with_heads) == [5]


def outliers(share: float, total: int = 576) -> dict[str, Tensor]:
    score = torch.rand(1, total) * 1e-3 + 1.0
    score[:, torch.randperm(total)[: int(share * total)]] += 10
    return {"attention": score, "keys": torch.randn(1, total, 1, 4), "features": torch.randn(1, total, 2)}


@pytest.mark.parametrize(("share", "step", "spread"), [(0.05, 6, 96), (0.10, 3, 192)])
def test_prumerge_plus_spreads_by_the_share_of_outliers(share, step, spread):
    torch.manual_seed(0)
    vision = outliers(share)
    best = set(vision["attention"][0].topk(int(share * 576)).indices.tolist())
    grid = set(range(0, 575, step))
    assert len(grid) == spread
    assert set(kept(prumerge("prumerge(plus=True, extra=False)", **vision))) == best | grid


def test_prumerge_plus_says_when_it_keeps_everything():
    torch.manual_seed(0)
    with pytest.warns(VlmattnWarning, match="keeps every token"):
        chosen = prumerge("prumerge(plus=True, extra=False)", **outliers(0.20))
    assert set(range(575)) <= set(kept(chosen))


@pytest.mark.parametrize(
    "text", ["prumerge(keep=40)", "prumerge(keep=40, plus=True)", "prumerge(keep=40, extra=False)"]
)
def test_prumerge_with_a_budget(text):
    torch.manual_seed(0)
    vision = outliers(0.05)
    chosen = kept(prumerge(text, **vision))
    assert len(chosen) == 40 == method(text).left(576)
    first = {"prumerge(keep=40)": 39, "prumerge(keep=40, plus=True)": 10}.get(text, 40)
    assert set(vision["attention"][0].topk(first).indices.tolist()) <= set(chosen)
    if "plus" in text:
        assert max(b - a for a, b in itertools.pairwise(chosen)) < 40
    assert len(kept(prumerge(text.replace("40", "1"), **vision))) == 1
    assert len(kept(prumerge(text.replace("40", "600"), **vision))) == 576


def test_recoverable_worked_example():
    """Visual outlier 5, text outlier 0; without merging the rows are those of the projector."""
    question, words = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[0.30, 0.05, 0.06, 0.07, 0.08, 0.02]])
    vision = PRUMERGE | {"states": torch.stack([words, (1 - words**2).sqrt()], -1)}
    paired = Paired(question, torch.ones(1, 1).bool(), question[:, 0], lambda states, normed: states)
    given = view([6], hidden=vision["features"], vision=vision, project=lambda x: x, paired=paired)
    text = "recoverable(neighbours=2, min_tokens=1, max_share=1.0, merge_neighbours=2"
    chosen = method(f"{text}, merging=False)").select(given)
    assert kept(chosen) == [0, 5] and chosen.rows is None
    assert kept(method(f"{text})").select(given)) == [0, 5]  # an even rest has no centre, and then no extra token
    assert kept(method(f"{text.replace('1.0', '0.2')})").select(given)) == [5]
    assert kept(method(f"{text.replace('tokens=1', 'tokens=4')})").select(given)) == [0, 3, 4, 5]


def recoverable(text: str, **changes: Any) -> Any:
    torch.manual_seed(3)
    score = 1 + torch.rand(1, 60) * 1e-3
    score[0, [7, 30]], score[0, [11, 40, 41]] = 2.0, torch.tensor([0.2, 0.4, 0.6])  # low ones stay outliers of the rest
    words = torch.rand(1, 60) * 1e-3
    words[0, [20, 50]] = 0.9
    states = torch.stack([words, (1 - words**2).sqrt()], -1)
    question = torch.tensor([[[1.0, 0.0]]])
    paired = Paired(question, torch.ones(1, 1).bool(), -question[:, 0], lambda states, normed: states)
    vision = {"attention": score, "keys": torch.randn(1, 60, 1, 4), "features": torch.randn(1, 60, 3), "states": states}
    given = view([60], hidden=vision["features"], vision=vision | changes, project=lambda x: x, paired=paired)
    return vision, method(f"recoverable(min_tokens=1, max_share=1.0{text})").select(given)


def test_recoverable_merges_what_is_left():
    vision, main = recoverable(", merging=False")
    _, merged = recoverable("")
    first, more = set(kept(main)), set(kept(merged))
    assert {7, 30} <= first < more
    x, a = vision["features"][0], vision["attention"][0]
    rest = [i for i in range(60) if i not in first]
    centres = sorted(rest, key=lambda i: -a[i])[: len(more) - len(first) - 1]
    (extra,) = more - first - set(centres)
    assert extra == max(set(rest) - set(centres), key=lambda i: a[i])
    total = sum(a[j] * x[j] for j in rest if j not in centres)
    torch.testing.assert_close(merged.rows[0, extra], total)
    unit = torch.nn.functional.normalize(vision["keys"][0, :, 0], dim=-1)
    similar = vision["states"][0, :, 0] / 2**0.5
    for i in centres:
        near = sorted(set(rest) - {i}, key=lambda j: -(unit[i] @ unit[j] + 50 * similar[j]))[:32]
        torch.testing.assert_close(merged.rows[0, i], x[i] + sum(a[j] * x[j] for j in near))
    assert torch.equal(merged.rows[0, sorted(first)], x[sorted(first)])
    _, code = recoverable(", order=code")
    assert torch.equal(code.rows[0, sorted(more)][: len(first)], x[sorted(first)])
    torch.testing.assert_close(code.rows[0, max(more)], total)


def test_recoverable_to_the_letter():
    """The question is read at another place, and centres are a share of the features' width."""
    _, fixed = recoverable("")
    _, code = recoverable(", faithful_bugs=True")
    assert kept(code) != kept(fixed)


def test_vflowopt_worked_example_of_importance():
    attention = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1], [0.1, 0.5, 0.3, 0.1], [0.1, 0.2, 0.1, 0.6]])
    received, there = attention.mean(0, keepdim=True), torch.ones(1, 4).bool()
    assert received[0].tolist() == pytest.approx([0.175, 0.4, 0.2, 0.225])
    weight = method("vflowopt(threshold=1.2)").important(received, there)
    assert (weight @ attention)[0].tolist() == pytest.approx([0.1, 0.6, 0.2, 0.1])
    with pytest.warns(
        VlmattnWarning, match=r"more than 2\.5 times the mean .* among 2 tokens or fewer.*lower `threshold`"
    ):
        nobody = method("vflowopt(threshold=2.5)").important(received, there)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        everybody = method("vflowopt(threshold=0)").important(received, there)
    for weight in (nobody, everybody):
        assert (weight @ attention)[0].tolist() == pytest.approx(received[0].tolist())
    entropic = method("vflowopt(threshold=1.2, alpha=0.5)")
    informed = entropic.important(received, there) @ attention
    vision = {"attention": informed, "entropy": entropic.softmax(tower(1, 3, 2, 2), there)}
    expected = [0.1362, 0.8672, 0.2983, 0.1983]
    assert entropic.importance(view([4], vision=vision))[0].tolist() == pytest.approx(expected, abs=5e-5)
    padded = torch.nn.functional.pad(received, (0, 3), value=9.0)
    weight = method("vflowopt(threshold=1.2)").important(padded, torch.arange(7)[None] < 4)
    assert weight.tolist() == [[0, 1, 0, 0, 0, 0, 0]]


IMPORTANCE = tower(0.30, 0.02, 0.04, 0.10, 0.06, 0.03, 0.05, 0.40)


def test_vflowopt_worked_example_of_recycling():
    x = torch.arange(8.0)[None, :, None] * 10
    given = {"hidden": x, "vision": {"attention": IMPORTANCE}, "num_layers": 28}
    text = "vflowopt(entry=0.5, cell=2.0, keep=0.4, middle=0.9)"
    chosen = method(text).select(view([8], grids={8: (1, 2, 4)}, **given))
    assert kept(chosen) == [0, 3, 4, 7]
    assert chosen.rows[0, kept(chosen), 0].tolist() == pytest.approx([0, 35.7895, 37.2727, 70], abs=5e-5)
    assert kept(method(text).select(view([8], grids={8: (2, 2, 2)}, **given))) == [0, 3, 4, 7]  # a video: the best
    assert method(text).select(view([8], grids={8: (2, 2, 2)}, **given)).rows[0, 4] == 40
    plain = method(text.replace("keep", "recycle=False, keep")).select(view([8], grids={8: (1, 2, 4)}, **given))
    assert kept(plain) == [0, 3, 4, 7] and plain.rows is None
    later = dataclasses.replace(view([8], **given), stage=1, layer=9)
    assert kept(method("vflowopt(entry=0.5, middle=0.5, keep=0.3125)").select(later)) == [0, 3, 4, 7]


@pytest.mark.parametrize(
    ("keep", "entry", "middle", "last"),
    [(0.5, 0.7233, 0.7487, 0.487), (0.25, 0.2651, 0.9833, 0.8773), (0.1, 0.1166, 1.0, 0.6011)],
)
def test_vflowopt_shares_at_the_papers_depth(keep, entry, middle, last):
    average = {0.5: 0.5008, 0.25: 0.2507, 0.1: 0.1000}[keep]
    shares = method(f"vflowopt(keep={average}, entry={entry}, middle={middle})").shares(28)
    assert shares == pytest.approx((entry, middle, last), abs=2e-3)
    assert method(f"vflowopt(keep={keep})").shares(28)[:2] == (entry, middle)
    counts = method(f"vflowopt(keep={keep})").expected_tokens(10000, 28)
    assert sum(counts) / 280000 == pytest.approx(keep, abs=1e-3)


def test_vflowopt_budgets_that_cannot_be():
    assert method("vflowopt(keep=0.7)").shares(28)[0] == pytest.approx(0.7233 + 0.2767 * 0.4)
    with pytest.raises(BudgetError, match="would have to leave a share of"):
        method("vflowopt(keep=0.3, entry=0.9)").shares(28)
    with pytest.raises(BudgetError, match="a float in"):
        method("vflowopt(keep=64)")
    with pytest.raises(SpecError, match=r"cell=0\.5: expected a finite number >= 1"):
        method("vflowopt(cell=0.5)")
    with pytest.raises(LayerError, match="too late"):
        method("vflowopt(before_layer=(1, 2, 3))")
