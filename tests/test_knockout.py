"""Attention knock-out: exact zeros, equal to a run with masked keys, and nothing where the window is empty."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import tiny
import torch

import vlmattn
from vlmattn import spec
from vlmattn.edits import AttnEdit
from vlmattn.errors import LayerError, SpecError
from vlmattn.kernels import naive, rows
from vlmattn.kernels.rows import Request
from vlmattn.methods.window import window_layers

pytestmark = pytest.mark.usefixtures("no_grad")
STEPS = 6
both = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def generate(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> Any:
    more = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True} | options
    return model.generate(**batch, max_new_tokens=STEPS, **more)


def gap(a: Any, b: Any) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def masked(model: Any, batch: dict[str, torch.Tensor], layers: range, rows: str, prompt: int) -> torch.Tensor:
    """Logits of a pass over `batch` in which, in `layers`, text rows do not see the image.

    Args:
        rows: as in the method; prompt: columns of it, what follows was generated.
    """
    visual, length = batch["input_ids"] == tiny.IMAGE, batch["input_ids"].shape[1]
    behind, generated = (visual.cumsum(1) > 0) & ~visual, torch.arange(length) >= prompt
    last = torch.arange(length) == prompt - 1
    cut = {"text": behind, "query": behind & ~generated, "generated": generated, "last": generated | last}[rows]
    pairs = cut.expand_as(visual)[:, :, None] & visual[:, None, :]
    return oracle.cut_forward(model, batch, dict.fromkeys(layers, pairs))


@both
@pytest.mark.parametrize("window", [(0.0, 1.0), (1, 3), (0.25, 0.5)])
@pytest.mark.parametrize("rows", ["text", "query", "generated", "last"])
def test_it_equals_masked_attention(family, attention, window, rows):
    """In the prefill and in every step, with the cache, in a padded batch."""
    model, batch = tiny.MODELS[family](attention=attention), tiny.prompts(family)
    prompt = batch["input_ids"].shape[1]
    with vlmattn.wrap(model, f"knockout(window={window}, rows={rows})"):
        out = generate(model, batch, suppress_tokens=[tiny.IMAGE, tiny.VIDEO, 92, 93])
    whole = oracle.longer(batch, out.sequences, flat=family == "llava")
    layers = window_layers(window, tiny.LAYERS, "")
    expected = masked(model, whole, layers, rows, prompt)[:, prompt - 1 : -1]
    assert gap(out.logits, expected.transpose(0, 1)) < 1e-5 * expected.abs().max().item()
    plain = model(**whole, use_cache=False).logits[:, prompt - 1 : -1]
    assert gap(out.logits, plain.transpose(0, 1)) > 1e-3


def test_an_empty_window_and_undo_are_bit_identical(family, model, batch):
    plain, logits = generate(model, batch), model(**batch).logits
    for text in ("knockout(window=(2, 2))", "knockout(window=(0.5, 0.5), rows=last)"):
        with vlmattn.wrap(model, text) as session:
            assert not session._engine.program.acts
            assert torch.equal(model(**batch).logits, logits)
            assert gap(generate(model, batch).logits, plain.logits) == 0.0
    with vlmattn.wrap(model, "knockout"):
        assert not torch.equal(model(**batch).logits, logits)
    assert torch.equal(model(**batch).logits, logits)


def test_rows_of_other_layers_and_of_the_image_are_untouched(model, batch):
    one = tiny.single(batch, 1)
    states = model(**one, output_hidden_states=True).hidden_states
    with vlmattn.wrap(model, "knockout(window=(2, 3))"):
        changed = model(**one, output_hidden_states=True).hidden_states
    last = int((one["input_ids"][0] == tiny.IMAGE).nonzero()[-1]) + 1
    assert all(torch.equal(states[i], changed[i]) for i in range(3))
    assert torch.equal(states[3][:, :last], changed[3][:, :last])
    assert not torch.equal(states[3][:, last:], changed[3][:, last:])


@both
def test_all_rows_in_all_layers_is_no_image(family, attention):
    """Where no text row behind the image sees it anywhere, the answer does not depend on its pixels."""
    model, batch = tiny.MODELS[family](attention=attention), tiny.prompts(family)
    other = batch | {"pixel_values": batch["pixel_values"].flip(-1)}
    with vlmattn.wrap(model, "knockout"):
        assert gap(generate(model, batch).logits, generate(model, other).logits) == 0.0
    with vlmattn.wrap(model, "noimage"):
        blind = generate(model, batch)
    with vlmattn.wrap(model, "knockout"):
        assert gap(generate(model, batch).logits, blind.logits) < 1e-4
    with vlmattn.wrap(model, "knockout(rows=generated)"):
        assert gap(generate(model, batch).logits, generate(model, other).logits) > 1e-3


def test_hidden_probabilities_are_exactly_zero():
    """Two text keys with scores 0 and log 3 behind two visual ones: 1/4 and 3/4, whatever the visual scores are."""
    tag = torch.tensor([[2, 2, 0, 0]], dtype=torch.uint8)
    query = torch.ones(1, 1, 4, 1)
    key = torch.tensor([5.0, 80.0, 0.0, 3.0]).log1p().view(1, 1, 4, 1)
    key[..., 3, :] = torch.tensor(3.0).log()
    seen = torch.tensor([[False, False, True, True]])
    request = Request(tag, torch.tensor([True]), seen, AttnEdit(hide=(2, 3)), None)
    p = rows.probabilities(query, key, None, 1.0, torch.arange(4), request)
    assert p[0, 0, 3].tolist() == pytest.approx([0.0, 0.0, 0.25, 0.75], abs=1e-7) and p[0, 0, 3, :2].sum() == 0
    assert p[0, 0, 2].tolist() == [0.0, 0.0, 1.0, 0.0]
    assert p[0, 0, 1, 1] > 0.9  # a visual row, which is not cut
    own = Request(tag, torch.tensor([True]), seen, AttnEdit(hide=(0, 2)), None)
    assert rows.probabilities(query, key, None, 1.0, torch.arange(4), own)[0, 0, 3].tolist() == [0.0, 0.0, 0.0, 1.0]
    value = torch.randn(1, 1, 4, 2)
    out = torch.zeros(1, 4, 1, 2)
    quick, slow = (backend.apply(query, key, value, None, 1.0, out, own)[0] for backend in (rows, naive))
    assert torch.allclose(quick[:, 2:], slow[:, 2:])


def test_visual_mass_is_zero_in_the_window(model, batch):
    with vlmattn.wrap(model, "knockout(window=(1, 3))") as session:
        session.record()
        generate(model, batch)
        mass = session.stats()["visual_mass"].mean("step", "sample", "head").values
    assert mass[1] == mass[2] == 0 and mass[0] > 0.01 and mass[3] > 0.01


def test_text_keys_can_be_hidden_instead(model, batch):
    with vlmattn.wrap(model, "knockout(keys=text)") as session:
        session.record()
        logits = generate(model, batch).logits
        session.use_backend("reference")
        assert gap(generate(model, batch).logits, logits) < 1e-4
        assert float(session.stats()["visual_mass"].values.min()) > 0


@pytest.mark.parametrize("rows", ["text", "generated", "last"])
def test_batches_beams_and_lookup(family, model, batch, rows):
    with vlmattn.wrap(model, f"fastv(keep=0.5, before_layer=1) + knockout(window=(2, 4), rows={rows})"):
        together = generate(model, batch)
        beams = model.generate(**batch, max_new_tokens=STEPS, do_sample=False, num_beams=3, num_return_sequences=2)
        for row in (0, 1):
            one = tiny.single(batch, row)
            alone = generate(model, one)
            assert gap([x[row] for x in together.logits], [x[0] for x in alone.logits]) < 1e-4
            own = model.generate(**one, max_new_tokens=STEPS, do_sample=False, num_beams=3, num_return_sequences=2)
            assert torch.equal(own[:, -STEPS:], beams[2 * row : 2 * row + 2, -STEPS:])
        one["input_ids"][:, -4:] = torch.tensor([[5, 6, 5, 6]])
        lookup = generate(model, one, prompt_lookup_num_tokens=3)
        assert torch.equal(generate(model, one).sequences, lookup.sequences)


def test_windows():
    """The shares of the paper's middle quarter, and what is refused."""
    assert window_layers((0.25, 0.5), 32, "") == range(8, 16)
    assert window_layers((0.25, 0.5), 28, "") == range(7, 14)
    assert window_layers((0.25, 0.5), 80, "") == range(20, 40)
    assert window_layers((0.0, 0.3), 10, "") == range(3) and window_layers((3, 1.0), 5, "") == range(3, 5)
    assert window_layers((0.3, 0.3), 4, "") == range(0)
    for bad in ("3", "(1,)", "(2, 1)", "(-1, 2)", "(0.0, 1.5)", "(True, 2)", "('a', 2)", "(0.5, 0.25)"):
        with pytest.raises(LayerError, match=r"knockout\.window=.*(expected two bounds|lower one)"):
            spec.parse(f"knockout(window={bad})")
    with pytest.raises(LayerError, match="not a window in a model of 4"):
        vlmattn.wrap(tiny.llava(), "knockout(window=(2, 9))")
    with pytest.raises(SpecError, match=r"knockout\.rows='all': expected one of text, query"):
        spec.parse("knockout(rows=all)")
    with pytest.raises(SpecError, match=r"knockout\.keys='sinks': expected one of visual, text"):
        spec.parse("knockout(keys=sinks)")


def test_two_edits_of_a_layer_are_refused_and_other_layers_compose(model, batch):
    with pytest.raises(SpecError, match="both edit attention in layer 1"):
        vlmattn.wrap(model, "var(sinks=[1], first_layer=1) + knockout(window=(1, 2))")
    with vlmattn.wrap(model, "knockout(window=(0, 1)) + knockout(window=(3, 4))"):
        first = model(**batch).logits
    layers = range(0, 4, 3)
    prompt = batch["input_ids"].shape[1]
    real = batch["attention_mask"].bool()
    assert (first - masked(model, batch, layers, "text", prompt))[real].abs().max() < 1e-4
