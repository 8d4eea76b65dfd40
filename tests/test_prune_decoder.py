"""Pruners that rank inside the decoder: the cards' worked examples, and their scores against the oracle's softmax."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import tiny
import torch
from torch import Tensor

import vlmattn
from vlmattn import spec
from vlmattn.errors import LayerError, SpecError
from vlmattn.methods.prune.dart import DART, least_like
from vlmattn.methods.prune.feather import Feather
from vlmattn.methods.prune.pyramiddrop import PyramidDrop
from vlmattn.methods.views import Text, View
from vlmattn.spans import Raster, Span

pytestmark = pytest.mark.usefixtures("no_grad")


def view(total: int, *, kept: list[int] | None = None, grid: tuple[int, int, int] | None = None, **more: Any) -> View:
    """One sample with one image of `total` tokens, of which those in `kept` arrive."""
    index = torch.arange(total)[None] if kept is None else torch.tensor([kept])
    return View(
        layer=2,
        image=torch.zeros_like(index),
        counts=torch.tensor([[index.shape[1]]]),
        spans=((Span(0, total, 0, () if grid is None else (Raster(grid),)),),),
        index=index,
        **more,
    )


def chosen(method: Any, seen: View) -> list[int]:
    """Original indices of the tokens that stay."""
    return seen.index[method.select(seen).mask].tolist()


# FEATHER


def test_feather_worked_example():
    scores = torch.tensor([[0.02, 0.05, 0.20, 0.03, 0.30, 0.04, 0.10, 0.16, 0.10]])
    method = Feather(keep=0.4, stride=2)
    first = view(9, grid=(1, 3, 3), scores=scores)
    assert chosen(method, first) == [0, 2, 4, 6, 7, 8]
    assert chosen(Feather(keep=0.4, stride=None), first) == [2, 4, 7]
    late = torch.tensor([[0.1, 0.2, 0.4, 0.1, 0.15, 0.05]])
    assert chosen(method, view(9, kept=[0, 2, 4, 6, 7, 8], grid=(1, 3, 3), scores=late, stage=1)) == [4]


def test_feather_counts():
    """729 tokens on 27 x 27: 218 ranked and 81 of the grid, 275 to be expected; then 24."""
    counts = Feather().expected_tokens(729, 32, (1, 27, 27))
    assert counts == [729] * 8 + [275] * 8 + [24] * 16
    assert sum(counts) / 32 / 729 == pytest.approx(0.361, abs=5e-4)
    plain = Feather(keep=0.25, stride=None, before_layer=3).expected_tokens(729, 32)
    assert sum(plain) / 32 / 729 == pytest.approx(0.320, abs=5e-4)
    assert Feather(stride=1).left(729, (1, 27, 27)) == 729 and Feather(keep=1.0).is_noop
    assert Feather().stages(28) == (7, 14) and Feather().stages(4) == (1, 2)
    with pytest.raises(LayerError, match="2 stages from layer 1 on do not fit a model of 2 layers"):
        Feather().stages(2)
    with pytest.raises(SpecError, match="stride"):
        Feather(stride=0)


def test_feathers_softmax_is_over_visual_keys():
    """Two visual and a text key, logits (2, 0, 4) and (1, 3, 9): heads that look at text count as much as others."""
    from vlmattn.kernels.reference import attention_received

    key = torch.tensor([[[[2.0], [0.0], [4.0]], [[1.0], [3.0], [9.0]]]])
    query, rows = torch.ones(1, 2, 3, 1), torch.tensor([[False, False, True]])
    over = torch.tensor([[True, True, False]])
    full = attention_received(query, key, None, 1.0, rows)
    assert torch.allclose(full[0, :2], torch.tensor([0.0588, 0.0092]), atol=5e-5)
    assert torch.allclose(attention_received(query, key, None, 1.0, rows, over=over)[0, :2], torch.full((2,), 0.5))
    apart = attention_received(query, key, None, 1.0, rows, heads=True)
    assert apart.shape == (1, 2, 3) and torch.allclose(apart.mean(1), full)
    last = attention_received(query[:, :, 2:], key, None, 1.0, rows)
    assert torch.equal(last, full)


def test_feather_ranks_without_rotation(family, model, batch):
    """Against queries and keys of the oracle's own, without rotation, over visual keys."""
    prompts = oracle.read_prompts(model, batch, tiny.IMAGE)
    with vlmattn.wrap(model, "feather(keep=0.4, stride=None, before_layer=2)") as session:
        model(**batch)
        kept = session.report().stages[0].kept
    text = model.model.language_model
    for row, prompt in enumerate(prompts):
        cos, sin = oracle._tables(text, prompt.embeds, prompt.positions)
        hidden, _ = oracle.layer_forward(text.layers[0], prompt.embeds, cos, sin)
        hidden = oracle.behind(prompt, 0, hidden, range(len(hidden)))
        attention = text.layers[1].self_attn
        entering = text.layers[1].input_layernorm(hidden)
        query, key = (
            oracle.heads(attention, "q", entering[-1:])[0],
            oracle.heads(attention, "k", entering[prompt.visual]),
        )
        key = key.repeat_interleave(len(query) // key.shape[1], 1)
        score = (torch.einsum("hd,nhd->hn", query, key) * attention.head_dim**-0.5).softmax(-1).mean(0).tolist()
        best = sorted(range(len(score)), key=lambda i: (-score[i], i))[: int(len(score) * 0.4 + 1e-9)]
        assert kept[row][0] == sorted(best)


def test_feathers_first_stage_holds_grid_and_ranking(model, batch):
    """And positions play no part in the criterion: a shift of all of them changes nothing."""
    with vlmattn.wrap(model, "feather(keep=0.4, before_layer=(1, 2))") as session:
        model(**batch)
        kept = session.report().stages[0].kept
    with vlmattn.wrap(model, "feather(keep=0.4, stride=None, before_layer=1)") as session:
        model(**batch)
        ranked = session.report().stages[0].kept
    for both, best, width in zip(kept, ranked, (4, 6 if "image_grid_thw" in batch else 4), strict=True):
        grid = {r * width + c for r in (0, 3) for c in range(0, width, 3)}
        assert set(both[0]) == grid | set(best[0])


# PyramidDrop


def test_pyramiddrop_worked_example():
    method = PyramidDrop(ratios=(0.5, 0.25), before_layer=(1, 2))
    assert chosen(method, view(4, scores=torch.tensor([[0.10, 0.30, 0.05, 0.20]]))) == [1, 3]
    assert chosen(method, view(4, kept=[1, 3], scores=torch.tensor([[0.2, 0.1]]), stage=1)) == [1]


def test_pyramiddrop_counts():
    method = PyramidDrop()
    assert method.expected_tokens(576, 32) == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert sum(method.expected_tokens(576, 32)) / 32 == 270
    for layers, ratios, average in (
        ((8, 16, 24), (0.25, 0.0625, 0.02), 191.8),
        ((2, 8, 16), (0.37, 0.18, 0.09), 127.2),
        ((2, 8, 16), (0.12, 0.06, 0.025), 64.4),
    ):
        tokens = PyramidDrop(ratios=ratios, before_layer=layers).expected_tokens(576, 32)
        assert sum(tokens) / 32 == pytest.approx(average, abs=0.06)
    assert PyramidDrop(ratios=(1.0, 1.0, 1.0)).is_noop and PyramidDrop(keep=1).left(576, None, 2) == 1
    for bad in ((0.5, 0.25), (0.25, 0.5, 0.1), (1, 1, 1), "half"):
        with pytest.raises(SpecError, match="ratios"):
            PyramidDrop(ratios=bad)  # type: ignore[arg-type]
    (parsed,) = spec.parse("pyramiddrop(ratios=[0.5, 0.1], before_layer=[2, 3])")
    assert spec.parse(str(parsed)) == (parsed,)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pyramiddrop_ranks_in_the_layer_to_come(family, attention):
    """The row computed beforehand is what that layer's attention would be on what arrives, at every stage."""
    model, batch = tiny.MODELS[family](attention=attention), tiny.prompts(family)
    prompts = oracle.read_prompts(model, batch, tiny.IMAGE)
    with vlmattn.wrap(model, "pyramiddrop(before_layer=(1, 3), keep=0.6)") as session:
        model(**batch)
        stages = session.report().stages
    for row, prompt in enumerate(prompts):
        start, before = prompt.visual.tolist().index(True), {}
        total = int(prompt.visual.sum())
        for place, stage in enumerate(stages):
            probabilities, present = _upcoming(model, prompt, stage.before_layer, before)
            score = {
                c - start: probabilities[:, -1, i].mean().item() for i, c in enumerate(present) if prompt.visual[c]
            }
            best = sorted(score, key=lambda i: (-score[i], i))[: int(total * 0.6 ** (place + 1) + 1e-9)]
            assert stage.kept[row][0] == sorted(best)
            before[stage.before_layer] = [
                c for c in range(len(prompt.visual)) if not prompt.visual[c] or c - start in best
            ]


def _upcoming(model: Any, prompt: oracle.Prompt, layer: int, stages: dict[int, list[int]]) -> tuple[Tensor, list[int]]:
    """Probabilities of `layer` on what arrives there, and the prompt columns."""
    text, hidden = model.model.language_model, prompt.embeds
    cos, sin = oracle._tables(text, prompt.embeds, prompt.positions)
    present = list(range(len(prompt.embeds)))
    for index in range(layer + 1):
        if index in stages and index < layer:
            slots = torch.tensor([present.index(c) for c in stages[index]])
            hidden, cos, sin, present = hidden[slots], cos[slots], sin[slots], stages[index]
        hidden, probabilities = oracle.layer_forward(text.layers[index], hidden, cos, sin)
        hidden = oracle.behind(prompt, index, hidden, present)
    return probabilities, present


# DART


def test_dart_worked_example():
    hidden = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.5, 0.5]]])
    there = torch.ones(1, 1, dtype=torch.bool)
    text = Text(there, there, torch.tensor([[[1.0, 0.0]]]), torch.ones(1, 1, 1, 1))
    sizes = torch.tensor([3.0, 9.0, 2.0, 5.0])
    seen = view(4, hidden=hidden, layer_keys=sizes.view(1, 4, 1, 1), text=text)
    method = DART(keep=3, image_pivots=1, text_pivots=1, norm=None)
    assert chosen(method, seen) == [1, 2, 3]
    unit = torch.nn.functional.normalize(hidden[0], dim=-1)
    assert torch.allclose((unit @ unit[1])[[0, 2, 3]], torch.tensor([0.9939, 0.1104, 0.7809]), atol=5e-5)
    first = least_like(
        hidden, torch.tensor([[True, False, True, True]]), hidden[:, 1:2], there, torch.ones(1, 1).long()
    )
    assert first.tolist() == [[False, False, True, False]]


@pytest.mark.parametrize(
    ("keep", "pivots", "count"),
    [(0.222, (4, 4), 124), (0.111, (4, 4), 60), (0.333, (4, 4), 188), (0.222, (10, 5), 130)],
)
def test_dart_counts_of_the_code(keep, pivots, count):
    method = DART(keep=keep, image_pivots=pivots[0], text_pivots=pivots[1], exact_budget=False)
    assert method.left(576) == count
    there = torch.ones(1, 20, dtype=torch.bool)
    text = Text(there, there, torch.randn(1, 20, 8), torch.randn(1, 20, 2, 4))
    seen = view(576, hidden=torch.randn(1, 576, 8), layer_keys=torch.randn(1, 576, 2, 4), text=text, norms=NORMS)
    assert len(chosen(method, seen)) == count
    exact = DART(keep=keep, image_pivots=pivots[0], text_pivots=pivots[1])
    assert len(chosen(exact, seen)) == exact.left(576) == round(576 * keep)


NORMS = {"final": lambda x: x, "layer": lambda x: x}


def test_dart_with_little_to_choose_from():
    """Fewer tokens than pivots, no text behind the image, and more turns than tokens."""
    there = torch.zeros(1, 3, dtype=torch.bool)
    text = Text(~there, there, torch.randn(1, 3, 8), torch.randn(1, 3, 2, 4))
    for total, keep in ((3, 2), (9, 9), (9, 8), (40, 30), (5, 1)):
        seen = view(
            total, hidden=torch.randn(1, total, 8), layer_keys=torch.randn(1, total, 2, 4), text=text, norms=NORMS
        )
        assert len(chosen(DART(keep=keep), seen)) == keep
        assert 1 <= len(chosen(DART(keep=keep, exact_budget=False), seen)) <= total
    scaled = View(**(vars(seen) | {"hidden": seen.hidden * torch.rand(1, 5, 1).add(0.5)}))  # type: ignore[operator]
    assert chosen(DART(keep=3), scaled) == chosen(DART(keep=3), seen)


def test_dart_sees_the_keys_of_the_layer_before(family, model, batch):
    """The visual pivots, alone, are the tokens with the largest keys in the cache of that layer."""
    one = tiny.single(batch, 1)
    with vlmattn.wrap(model, "dart(keep=4, before_layer=2)") as session:
        cache = model(**one, use_cache=True).past_key_values
        kept = session.report().stages[0].kept[0][0]
    visual = (one["input_ids"][0] == tiny.IMAGE).nonzero()[:, 0]
    size = cache.layers[1].keys[0].abs().sum((0, 2))[visual]
    assert kept == sorted(size.topk(4).indices.tolist())
