"""A-VL and Evict3R: the worked examples of their cards to the digit, and what each promises beyond the contract."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import vlmattn
from vlmattn import spec
from vlmattn.edits import Eviction
from vlmattn.errors import BudgetError, SpecError
from vlmattn.kernels.reference import attention_received
from vlmattn.methods.cache import Evictor
from vlmattn.methods.prune.avl import AVL
from vlmattn.methods.prune.evict3r import Evict3R, Stream, layer_budgets, layer_shares
from vlmattn.methods.views import CacheView
from vlmattn.patches import eviction
from vlmattn.spans import Raster, Span

pytestmark = pytest.mark.usefixtures("no_grad")


def view(visual: str, scores: dict[str, Tensor], **fields: Any) -> CacheView:
    """Of one row without padding, a slot a letter: `v` visual, `t` text; one image from the first `v` to the last."""
    flags = torch.tensor([[letter == "v" for letter in visual]])
    span = Span(visual.index("v"), visual.count("v"), 0)
    index = torch.where(flags, 0, -1)
    given: dict[str, Any] = {
        "layer": 0,
        "num_layers": 1,
        "step": 0,
        "new": len(visual),
        "column": torch.arange(len(visual))[None],
        "real": torch.ones_like(flags),
        "visual": flags,
        "image": index,
        "chunk": index,
        "spans": ((span,),),
        "scores": scores,
    }
    return CacheView(**given | fields)


# A-VL


def test_avl_worked_example():
    """Scores .02 .30 .05 .20 .01 .12, S = 4, C = 2: kept 1 2 3 5, core 1 and 3, masked columns 3 and 5 behind P = 2."""
    last = torch.tensor([[0, 0, 0.02, 0.30, 0.05, 0.20, 0.01, 0.12]])
    method = AVL(keep=4, core=2, refresh=3)
    (found,) = method.evict([view("ttvvvvvv", {"last": last})])
    assert found.keep is not None and found.hide is not None
    assert [c - 2 for c in found.keep[0].nonzero()[:, 0].tolist() if c >= 2] == [1, 2, 3, 5]
    assert [c - 2 for c in found.state["core"][0].nonzero()[:, 0].tolist()] == [1, 3]
    left = found.keep[0].nonzero()[:, 0]
    assert found.hide[0, left].nonzero()[:, 0].tolist() == [3, 5]
    assert method.cached(6) == 4 and AVL(keep=0.5).cached(7) == 3 and AVL(keep=0.7).cached(10) == 7
    assert AVL(keep=0.01).cached(7) == 1


def test_avl_ties_go_to_the_lower_index_and_budgets_hold_per_image():
    flags = view("tvvvvvvt", {"last": torch.full((1, 8), 0.1)})
    spans = ((Span(1, 4, 0), Span(5, 2, 1)),)
    image = torch.tensor([[-1, 0, 0, 0, 0, 1, 1, -1]])
    flags = dataclasses.replace(flags, spans=spans, image=image)
    (found,) = AVL(keep=0.5).evict([flags])
    assert found.keep is not None and found.hide is None
    assert found.keep[0].tolist() == [True, True, True, False, False, True, False, True]
    (found,) = AVL(keep=0.5, budget_scope="sample").evict([flags])
    assert found.keep is not None and found.keep[0].tolist() == [True] * 4 + [False] * 3 + [True]


def test_avl_steps():
    """Refresh step every K tokens; a further turn is one; h2o decides at every step."""
    method = AVL(refresh=3)
    assert [step for step in range(10) if method.decides(step, 1)] == [0, 3, 6, 9]
    assert [step for step in range(1, 10) if not method.hides(step, 1)] == [3, 6, 9]
    assert method.decides(7, 4) and not method.hides(7, 4)
    assert not any(AVL().decides(step, 1) for step in range(1, 9)) and AVL().static
    text = AVL(text_policy="h2o")
    assert all(text.decides(step, 1) for step in range(9)) and not text.static and not method.static


def test_avl_text_keeps_the_newest_and_the_heaviest():
    """Ten tokens behind the image, budget max(round(.6 * 10), 2) = 6: 4 heavy ones outside the 2 newest."""
    received = torch.tensor([[9.0, 9, 9, 0.1, 0.8, 0.2, 0.9, 0.3, 0.8, 0.0, 0.7, 0.0, 9.0]])
    method = AVL(text_policy="h2o", text_keep=0.6, text_floor=2)
    seen = view("tvv" + "t" * 10, {"last": torch.rand(1, 13)})
    assert method.text(seen, received)[0].nonzero()[:, 0].tolist() == [0, 1, 2, 4, 6, 8, 10, 11, 12]
    # nothing goes while no more are held than the budget; n counts what was said, evicted or not
    assert method.text(view("tvv" + "t" * 2, {"last": torch.rand(1, 5)}), received[:, :5]).all()
    column = torch.tensor([[0, 1, 2, *range(23, 33)]])  # thirty were said, of which ten are held: budget 18
    assert method.text(dataclasses.replace(seen, column=column), received).all()
    assert AVL(text_policy="h2o", text_keep=0.6).text(seen, received).all()  # the floor of 20


def test_avl_sums_attention_over_rows_and_heads(family):
    """What H2O adds up is the sum of probabilities over the rows behind the image, mean over heads."""
    model, batch = tiny.MODELS[family](attention="eager"), tiny.single(tiny.prompts(family), 1)
    ids, visual = batch["input_ids"][0], batch["input_ids"][0] == tiny.IMAGE
    plain = model(**batch, output_attentions=True, use_cache=False).attentions
    with vlmattn.wrap(model, "avl(keep=1.0, text_policy=h2o)"):
        plan = model(**batch, use_cache=True).past_key_values.plan
    end = int(visual.nonzero()[-1]) + 1
    for layer, probabilities in enumerate(plain):
        expected = probabilities[0, :, end:].mean(0).sum(0)
        assert (plan.state[layer]["received"][0] - expected).abs().max() < 1e-5
    assert len(plan.state) == tiny.LAYERS and len(ids) == plan.length


def test_avl_gathered_and_masked_cores_agree(family, monkeypatch):
    batch = tiny.prompts(family)
    for attention in ("sdpa", "eager"):
        model, found = tiny.MODELS[family](attention=attention), []
        for share in (0.0, 2.0):
            monkeypatch.setattr(eviction, "GATHER_BELOW", share)
            for text in (
                "avl(keep=0.9, core=0.3, refresh=3)",
                "avl(core=0.2, refresh=2, text_policy=h2o, text_floor=3)",
            ):
                with vlmattn.wrap(model, text):
                    out = model.generate(
                        **batch, max_new_tokens=7, do_sample=False, return_dict_in_generate=True, output_logits=True
                    )
                found.append(torch.stack(out.logits))
        assert (found[0] - found[2]).abs().max() < 1e-4 and (found[1] - found[3]).abs().max() < 1e-4
        assert (found[0] - found[1]).abs().max() > 1e-3


def steps(model: Any, batch: dict[str, Tensor], text: str, count: int = 8) -> Tensor:
    with vlmattn.wrap(model, text):
        out = model.generate(
            **batch, max_new_tokens=count, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    return torch.stack(out.logits)


def test_avl_refreshing_always_is_computing_all(family):
    model, batch = tiny.MODELS[family](), tiny.prompts(family)
    always = steps(model, batch, "avl(core=0.1, refresh=1)")
    assert torch.equal(always, steps(model, batch, "avl"))
    assert torch.equal(steps(model, batch, "avl(core=0.5, refresh=4)"), always)  # the core is all that stays
    assert (steps(model, batch, "avl(core=0.1, refresh=4)")[1:] - always[1:]).abs().max() > 1e-3


def test_avl_hides_what_is_not_core(family):
    """Between refreshes a step is that of a cache without the secondary set; the refresh sees it again."""
    model, batch = tiny.MODELS[family](), tiny.single(tiny.prompts(family), 0)
    hidden = steps(model, batch, "avl(keep=8, core=3, refresh=3)", 4)
    small, large = steps(model, batch, "avl(keep=3)", 3), steps(model, batch, "avl(keep=8)", 2)
    assert (hidden[:2] - small[:2]).abs().max() < 1e-4
    assert (hidden[1] - large[1]).abs().max() > 1e-3
    cache: dict[int, Any] = {}

    def look(watching: Any, held: Any) -> None:
        eviction.decide(watching, held)
        cache[watching.step] = {n: stage.positions.tolist() for n, stage in held.plan.core.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlmattn.patches.engine.decide", look)
        steps(model, batch, "avl(keep=8, core=3, refresh=3)", 5)
    assert cache[1] == cache[0] == cache[2] and cache[3] != cache[2]
    text = int((batch["input_ids"] != tiny.IMAGE).sum())
    assert all(len(row) == text + 3 for row in cache[0][0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("avl(core=0.2)", r"avl.core=0.2 does nothing with refresh=None"),
        ("avl(text_keep=0.2)", r"avl.text_keep=0.2 does nothing with text_policy='none'"),
        ("avl(heavy=0.2)", r"avl.heavy=0.2 does nothing"),
        ("avl(refresh=0)", r"avl.refresh=0: expected an int >= 1"),
        ("avl(refresh=2.0)", r"avl.refresh=2.0"),
        ("avl(text_policy=all)", r"avl.text_policy='all': expected one of none, h2o"),
        ("avl(text_policy=h2o, text_keep=1.5)", r"avl.text_keep=1.5: expected a number in \[0, 1\]"),
        ("avl(text_policy=h2o, text_floor=0)", r"avl.text_floor=0: expected an int >= 1"),
        ("avl(budget_scope=all)", r"avl.budget_scope='all'"),
        ("evict3r(temperature=0)", r"evict3r.temperature=0: expected a number above 0"),
        ("evict3r(temperature=1e999)", r"evict3r.temperature=inf"),
        ("evict3r(anchor=2)", r"evict3r.anchor=2: expected a number in \[0, 1\], or None"),
        ("evict3r(floor=0)", r"evict3r.floor=0"),
        ("evict3r(rows=last)", r"evict3r.rows='last': expected one of chunk, text"),
    ],
)
def test_bad_fields_are_refused(text, message):
    with pytest.raises(SpecError, match=message):
        spec.parse(text)


@pytest.mark.parametrize("text", ["avl(keep=0.0)", "avl(core=1.5, refresh=2)", "evict3r(keep=0)", "evict3r(keep='x')"])
def test_bad_budgets_are_refused(text):
    with pytest.raises(BudgetError):
        spec.parse(text)


def test_strengths_that_do_nothing():
    assert all(m.is_noop for m in spec.parse("avl(keep=1.0) + evict3r(keep=1.0) + avl(keep=1.0, core=1.0, refresh=4)"))
    assert not AVL(keep=1.0, core=0.3, refresh=4).is_noop and AVL(keep=1.0, core=0.3, refresh=1).is_noop
    assert not AVL(keep=1.0, text_policy="h2o").is_noop and AVL(keep=1.0, text_policy="h2o", text_keep=1.0).is_noop
    for method in (AVL(core=0.2, refresh=3, text_policy="h2o"), Evict3R(keep=7)):
        assert method.disabled().is_noop


# Evict3R


def test_evict3r_worked_example():
    """var .0004 .09 .25 at temperature .5; 72 tokens; after 36 tokens 6, 11 and 18 go; of four scores 3 and 2 go."""
    alpha = layer_shares(torch.tensor([[0.0004, 0.09, 0.25]]), 0.5)
    assert [round(x, 4) for x in alpha[0].tolist()] == [0.4093, 0.3422, 0.2485]
    exact = (72 * alpha)[0].tolist()
    assert [round(x, 2) for x in exact] == [29.47, 24.64, 17.89]
    assert [int(36 - x) for x in exact] == [6, 11, 18]
    # whole numbers of the same sum: 29.47 24.64 17.89 -> 29 25 18
    most = torch.full((1, 3), 48)
    assert layer_budgets(alpha, torch.tensor([24]), 1, most).tolist() == [[29, 25, 18]]
    none = torch.zeros(1, 4, dtype=torch.bool)
    stream = Stream(~none, torch.tensor([[9.0, 3, 8, 2]]), torch.tensor([[4.0, 1, 4, 2]]), none)
    assert stream.score.tolist() == [[2.25, 3.0, 2.0, 1.0]]
    stream.evict(torch.tensor([2]))
    assert (~stream.left).nonzero()[:, 1].tolist() == [2, 3]


def test_evict3r_budgets():
    shares = torch.rand(50, 6, dtype=torch.float64).pow(4)
    shares, mean = shares / shares.sum(1, keepdim=True), torch.randint(1, 40, (50,))
    most = torch.full((50, 6), 60)
    found = layer_budgets(shares, mean, 5, most)
    assert torch.equal(found.sum(1), 6 * mean)
    assert (found >= mean.clamp_max(5)[:, None]).all() and (found <= 60).all()
    even = layer_budgets(layer_shares(torch.rand(1, 7) * 9, 1e9), torch.tensor([10]), 1, torch.full((1, 7), 99))
    assert even.tolist() == [[10] * 7]
    nearly = layer_budgets(layer_shares(torch.tensor([[0.0, 1.0, 2.0]]), 1e4), torch.tensor([10]), 1, most[:1, :3])
    assert (nearly - 10).abs().max() <= 1
    # a layer with nearly everything gets no more than there is; what is over goes to the others
    assert layer_budgets(torch.tensor([[0.98, 0.01, 0.01]]), torch.tensor([20]), 1, most[:1, :3]).tolist() == [
        [58, 1, 1]
    ]
    assert layer_budgets(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([60]), 1, most[:1, :3]).tolist() == [[60] * 3]
    assert layer_budgets(torch.tensor([[0.9, 0.1]]), torch.tensor([9]), 1, torch.tensor([[4, 6]])).tolist() == [[4, 6]]


def test_evict3r_exposure_and_protection():
    """A key that was there for m chunks has exposure m; a chunk seen twice changes no score; the anchor never goes."""
    torch.manual_seed(0)
    none = torch.zeros(1, 6, dtype=torch.bool)
    first, later = torch.tensor([[1, 1, 1, 0, 0, 0]]).bool(), torch.tensor([[0, 0, 0, 1, 1, 1]]).bool()
    stream = Stream(none, torch.zeros(1, 6), torch.zeros(1, 6), torch.tensor([[1, 0, 0, 0, 0, 0]]).bool())
    a = torch.tensor([[0.1, 0.5, 0.4, 0, 0, 0]])
    spread = stream.add(first, 7 * a)
    assert spread.item() == pytest.approx(9 * a[0, :3].var(unbiased=False).item(), rel=1e-6)  # K^2 var, free of scale
    once = stream.score
    stream.add(torch.zeros_like(none), a)  # a sample without a fresh chunk stays as it is
    assert torch.equal(stream.score, once) and stream.exposure[0].tolist() == [1, 1, 1, 0, 0, 0]
    stream.add(later, torch.rand(1, 6))
    assert stream.exposure[0].tolist() == [2, 2, 2, 1, 1, 1]
    assert torch.isinf(stream.score[0, 0])
    twice = Stream(first, 2 * stream.received, 2 * stream.exposure, none)
    assert torch.allclose(twice.score[:, 1:], stream.score[:, 1:])
    stream.evict(torch.tensor([0]))  # no more than the unprotected go
    assert stream.left[0].tolist() == [True] + [False] * 5


def streamed(texts: str, received: Tensor, method: Evict3R, grid: tuple[int, int, int] | None = None) -> list[Tensor]:
    """Keys that stay in two layers; digits of `texts` are chunks, `received` `(2, G, S)`."""
    chunk = torch.tensor([[int(c) if c.isdigit() else -1 for c in texts]])
    where = (chunk >= 0).nonzero()[:, 1].tolist()
    spans = ((Span(where[0], len(where), 0, () if grid is None else (Raster(grid),)),),)
    visual = chunk >= 0
    views = [
        CacheView(
            layer=layer,
            num_layers=2,
            step=0,
            new=len(texts),
            column=torch.arange(len(texts))[None],
            real=torch.ones_like(visual),
            visual=visual,
            image=chunk.clamp_max(0),
            chunk=chunk,
            spans=spans,
            scores={"received": received[layer][None]},
        )
        for layer in range(2)
    ]
    found = method.evict(views)
    assert all(x.state["received"].shape == x.state["exposure"].shape == visual.shape for x in found)
    return [x.keep[0] for x in found if x.keep is not None]


def test_evict3r_streams_over_chunks_in_order():
    """What went after the first chunk cannot come back, however much the second looks at it."""
    attention = torch.zeros(2, 2, 7)
    attention[:, 0, 1:4] = torch.tensor([0.6, 0.3, 0.1])
    attention[:, 1, 1:7] = torch.tensor([0.0, 0.1, 0.9, 0.3, 0.1, 0.2])
    kept = streamed("t000111", attention, Evict3R(keep=2, floor=1))
    # chunk 0: 1 and 2 stay. chunk 1 over 1 2 4 5 6: shares 0 1/7 3/7 1/7 2/7, times 5; received per chunk
    # 1: (1.8 + 0) / 2, 2: (.9 + 5/7) / 2, 4: 15/7, 5: 5/7, 6: 10/7 -> 4 and 6 stay
    assert [x.nonzero()[:, 0].tolist() for x in kept] == [[0, 4, 6]] * 2
    whole = streamed("t000111", attention, Evict3R(keep=2, floor=1, anchor=1.0))
    assert [x.nonzero()[:, 0].tolist() for x in whole] == [[0, 1, 2, 3]] * 2
    third = streamed("t000111", attention, Evict3R(keep=2, floor=1, anchor=0.3))
    assert [x.nonzero()[:, 0].tolist() for x in third] == [[0, 1, 4]] * 2
    assert streamed("t000111", attention, Evict3R(keep=2, floor=1), (2, 1, 3))[0].nonzero()[:, 0].tolist() == [
        0,
        1,
        2,
        3,
    ]
    assert all(x.all() for x in streamed("t000111", attention, Evict3R(keep=6)))


def test_evict3r_gives_flat_layers_more():
    attention = torch.zeros(2, 1, 9)
    attention[0, 0, 1:] = 1 / 8
    attention[1, 0, 1:] = torch.tensor([0.9] + [0.1 / 7] * 7)
    kept = streamed("t00000000", attention, Evict3R(keep=4, floor=1, temperature=20.0))
    counts = [int(x.sum()) - 1 for x in kept]
    assert sum(counts) == 8 and counts[0] > counts[1]
    assert [int(x.sum()) - 1 for x in streamed("t00000000", attention, Evict3R(keep=4, temperature=1e9))] == [4, 4]


def test_evict3r_sees_the_rows_of_each_image(family):
    """Against the probabilities of an eager model: the sum over the rows of an image, mean over heads."""
    model, batch = tiny.MODELS[family](attention="eager"), tiny.prompts(family, images=(2, 1))
    plain = model(**batch, output_attentions=True, use_cache=False).attentions
    seen: dict[int, Tensor] = {}

    def look(self: Evict3R, layers: Any) -> Any:
        seen.update({view.layer: view.scores["received"] for view in layers})
        chunks.append(layers[0].chunk)
        return real(self, layers)

    real, chunks = Evict3R.evict, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evict3R, "evict", look)
        with vlmattn.wrap(model, "evict3r(keep=0.5, floor=1)") as session:
            model(**batch, use_cache=True)
            report = session.report()
    assert [len(images) for images in report.caches[0].kept] == [2, 1]
    for layer, probabilities in enumerate(plain):
        for row in range(2):
            for image in range(2 - row):
                rows = chunks[0][row] == image
                expected = probabilities[row, :, rows].mean(0).sum(0)
                assert (seen[layer][row, image] - expected).abs().max() < 1e-5
    assert seen[0][1, 1].abs().max() == 0


def test_a_video_is_a_chunk_a_frame():
    """Two frames of four tokens: the first is the anchor and stays whole."""
    model, generator = tiny.qwen2_5_vl(), torch.Generator().manual_seed(0)
    ids = torch.tensor([[1, 5, 92, *[tiny.VIDEO] * 8, 93, 6, 7, 8]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * (ids == tiny.VIDEO).long(),
        "pixel_values_videos": torch.randn(32, 1176, generator=generator),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }
    with vlmattn.wrap(model, "evict3r(keep=5, floor=1, temperature=1000.0)") as session:
        model.generate(**batch, max_new_tokens=3, do_sample=False)
        kept = [entry.kept[0][0] for entry in session.report().caches]
    assert len(kept) == tiny.LAYERS and all(row[:4] == [0, 1, 2, 3] and len(row) == 5 for row in kept)
    with vlmattn.wrap(model, "evict3r(keep=5, floor=1, temperature=1000.0, anchor=0)") as session:
        model.generate(**batch, max_new_tokens=3, do_sample=False)
        assert any(entry.kept[0][0][:4] != [0, 1, 2, 3] for entry in session.report().caches)


# What both stand on


def test_attention_received_in_sets_of_rows_and_behind_a_prompt():
    """Sets of rows are as many calls, and a mask may have the rows of the queries alone."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    rows = torch.rand(2, 3, 9) > 0.5
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    together = attention_received(query, key, mask, 0.3, rows)
    heads = attention_received(query, key, mask, 0.3, rows, heads=True)
    for group in range(3):
        assert torch.allclose(together[:, group], attention_received(query, key, mask, 0.3, rows[:, group]))
    assert heads.shape == (2, 3, 4, 9) and torch.allclose(heads.mean(2), together)
    last = torch.zeros(2, 9, dtype=torch.bool)
    last[:, 7:] = True
    whole = attention_received(query, key, mask, 0.3, last)
    assert torch.allclose(attention_received(query[:, :, 7:], key, mask[:, :, 7:], 0.3, last), whole)
    assert torch.allclose(attention_received(query[:, :, 7:], key, None, 0.3, last), whole)


@dataclasses.dataclass(frozen=True)
class Wrong(Evictor):
    """Returns what it is told to."""

    what: str = ""

    def disabled(self) -> None:
        """Nothing."""

    def evict(self, layers: Any) -> Any:
        """No decisions about these keys."""
        good = [Eviction()] * len(layers)
        shape = layers[0].real.shape
        bad = {
            "few": good[1:],
            "keep": [dataclasses.replace(x, keep=torch.ones(1, 2, dtype=torch.bool)) for x in good],
            "hide": [dataclasses.replace(x, hide=torch.ones(shape)) for x in good],
            "state": [dataclasses.replace(x, state={"a": torch.ones(shape[0], 1)}) for x in good],
        }
        return bad[self.what]


Wrong.name = "wrong"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("few", "a decision for each of 4 layers, got 3"),
        ("keep", "keep of an Eviction must be a bool mask"),
        ("hide", "hide of an Eviction must be a bool mask of shape .*torch.float32"),
        ("state", r"state 'a' must be \(B, ..., S\)"),
    ],
)
def test_wrong_decisions_are_refused(family, what, message):
    model, batch = tiny.MODELS[family](), tiny.prompts(family)
    with vlmattn.wrap(model, [Wrong(what)]), pytest.raises(SpecError, match=message):
        model(**batch, use_cache=True)


def test_sweeps_match_what_caches_hold():
    """Levels are of cached tokens, and there is no random row: a pruner's prefill sees less."""
    from vlmattn.eval import budgets, controls

    for name in ("avl", "evict3r"):
        found = budgets.match_average_tokens(name, [0.5, 0.25], num_layers=12, visual_tokens=144)
        assert [match.average for match in found] == [72, 36] and [match.floor for match in found] == [1, 1]
        assert [spec.parse(match.spec)[0].cached(144) for match in found if match.spec] == [72, 36]
    assert list(controls.specs_for(["avl", "evict3r(keep=0.3)"], num_layers=12, visual_tokens=144)) == ["noimage"]
    both = list(controls.specs_for(["fastv(keep=0.5) + avl"], num_layers=12, visual_tokens=144))
    assert [text.split("(")[0] for text in both] == ["random", "noimage", "noimage"]
