"""Baselines that go by place: pooling, rows, and a known box."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_prune_decoder import chosen, view

import vlmattn
from vlmattn.errors import CallError, SpecError
from vlmattn.methods.prune.oraclebox import OracleBox
from vlmattn.methods.prune.pool import Pool, centres, pooled
from vlmattn.methods.prune.rows import Rows

pytestmark = pytest.mark.usefixtures("no_grad")


def made(method: Pool, height: int, width: int) -> tuple[list[int], list[float]]:
    """Where pooled tokens stand, and their values, on a grid of 0, 1, 2, ..."""
    total = height * width
    seen = view(total, grid=(1, height, width), hidden=torch.arange(float(total)).view(1, total, 1))
    keep = method.select(seen)
    assert keep.rows is not None and int(keep.mask.sum()) == method.left(total, (1, height, width))
    return seen.index[keep.mask].tolist(), keep.rows[keep.mask][:, 0].tolist()


def test_pooling_worked_examples():
    assert made(Pool(size=2), 4, 4) == ([0, 2, 8, 10], [2.5, 4.5, 10.5, 12.5])
    assert made(Pool(keep=4, mode="bilinear"), 4, 4) == ([0, 2, 8, 10], [2.5, 4.5, 10.5, 12.5])
    assert made(Pool(keep=4), 5, 5)[1] == [6.0, 8.0, 16.0, 18.0]
    assert made(Pool(keep=4, mode="max"), 4, 4)[1] == [5.0, 7.0, 13.0, 15.0]
    assert centres(5, 2) == [1, 3] and centres(3, 2) == [0, 1] and centres(4, 4) == [0, 1, 2, 3]


def test_squares_that_do_not_fill_the_grid_end_in_smaller_ones():
    """As torch's pooling with ceil_mode: the cells at the edges are of the tokens that they have."""
    places = [0, 2, 4, 10, 12, 14, 20, 22, 24]
    assert made(Pool(size=2), 5, 5) == (places, [3.0, 5.0, 6.5, 13.0, 15.0, 16.5, 20.5, 22.5, 24.0])
    assert made(Pool(size=2, mode="max"), 5, 5) == (places, [6.0, 8.0, 9.0, 16.0, 18.0, 19.0, 21.0, 23.0, 24.0])
    assert made(Pool(size=2, mode="bilinear"), 5, 5)[0] == places
    assert made(Pool(size=3), 4, 4) == ([5, 7, 13, 15], [5.0, 7.0, 13.0, 15.0])
    assert made(Pool(size=9), 2, 3) == ([1], [2.5])
    assert Pool(size=2).left(35, (1, 5, 7)) == 12 and Pool(size=2).left(27 * 27, (1, 27, 27)) == 196


@pytest.mark.parametrize("mode", ["average", "max", "bilinear"])
def test_pooling_keeps_what_is_constant_and_what_is_not_pooled(mode):
    grid = torch.randn(2, 5, 7, 3)
    assert torch.equal(pooled(grid, 5, 7, mode), grid)
    assert torch.allclose(pooled(torch.full_like(grid, 2.5), 2, 3, mode), torch.tensor(2.5))
    assert pooled(grid[:, :4, :6], 2, 3, "average").sum() * 4 == pytest.approx(float(grid[:, :4, :6].sum()), abs=1e-4)
    for size, count in ((2, 144), (3, 64), (4, 36)):
        assert Pool(size=size, mode=mode).left(576) == count
    for total in (5, 16, 24, 35, 576):
        counts = [Pool(keep=n, mode=mode).left(total) for n in range(1, total + 1)]
        assert counts[-1] == total and all(1 <= count <= n for n, count in enumerate(counts, 1))


def test_pooling_can_give_norms_back():
    x = torch.randn(1, 16, 8)
    seen = view(16, grid=(1, 4, 4), hidden=x)
    plain, scaled = (Pool(size=2, rescale=rescale).select(seen) for rescale in (False, True))
    assert plain.rows is not None and scaled.rows is not None
    norms = pooled(x.norm(dim=-1).view(1, 4, 4, 1), 2, 2, "average").flatten()
    assert torch.allclose(scaled.rows[scaled.mask].norm(dim=-1), norms, atol=1e-5)
    assert (plain.rows[plain.mask].norm(dim=-1) < norms).all()
    with pytest.raises(CallError, match="whole grid"):
        Pool().select(view(16, kept=[1, 2, 3], grid=(1, 4, 4), hidden=x[:, :3]))
    for bad in ({"mode": "median"}, {"size": 0}, {"rescale": 1}, {"budget_scope": "sample"}):
        with pytest.raises(SpecError):
            Pool(**bad)


def test_pooling_in_a_model_is_the_mean_of_its_features(family, model, batch):
    """What enters the first layer at the middle of a cell is the mean of the cell."""
    seen = []
    layer = model.model.language_model.layers[0]
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**batch)
    with vlmattn.wrap(model, "pool(size=2)") as session:
        model(**batch)
        kept = session.report().stages[0].kept
    handle.remove()
    visual = batch["input_ids"] == tiny.IMAGE
    for row, width in enumerate((4, 4 if family == "llava" else 6)):
        grid = seen[0][row, visual[row]].view(4, width, -1)
        cells = grid.unfold(0, 2, 2).unfold(1, 2, 2).mean((-1, -2)).flatten(0, 1)
        assert kept[row][0] == [r * width + c for r in (0, 2) for c in range(0, width, 2)]
        behind = int((~visual[row]).flip(0).long().cumsum(0).eq(torch.arange(1, visual.shape[1] + 1)).sum())
        count = len(cells)
        assert torch.allclose(seen[1][row, -behind - count : -behind], cells, atol=1e-5)


def test_rows():
    seen = view(12, grid=(1, 3, 4))
    assert chosen(Rows(keep=6), seen) == [6, 7, 8, 9, 10, 11]
    assert chosen(Rows(keep=6, side="top"), seen) == [0, 1, 2, 3, 4, 5]
    assert chosen(Rows(keep=4, side="top"), view(16, grid=(2, 2, 4))) == [0, 1, 8, 9]
    with pytest.raises(SpecError, match="side"):
        Rows(side="left")


def test_a_box():
    seen = view(12, grid=(1, 3, 4))
    assert chosen(OracleBox(box=(0.5, 0.0, 1.0, 0.5)), seen) == [2, 3, 6, 7]
    assert chosen(OracleBox(box=(0.25, 0.4, 0.5, 0.6)), seen) == [5]
    assert chosen(OracleBox(box=(0.3, 0.34, 0.31, 0.35)), view(24, grid=(2, 3, 4))) == [5, 17]
    assert OracleBox(box=(0.0, 0.0, 0.5, 1.0)).left(12, (1, 3, 4)) == 6 and OracleBox().is_noop
    for bad in ((0, 0, 1), (0.5, 0, 0.5, 1), (0, 0, 1, 2), "box"):
        with pytest.raises(SpecError, match="box"):
            OracleBox(box=bad)  # type: ignore[arg-type]


def test_a_box_changes_with_the_question(model, batch):
    one = tiny.single(batch, 0)
    with vlmattn.wrap(model, "oraclebox(box=(0.0, 0.0, 0.5, 0.5))") as session:
        model(**one)
        assert session.report().stages[0].kept == [[[0, 1, 4, 5]]]
        session.set("oraclebox.box", (0.5, 0.5, 1.0, 1.0))
        model(**one)
        assert session.report().stages[0].kept == [[[10, 11, 14, 15]]]
