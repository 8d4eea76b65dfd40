"""MemVR: its formulas by hand, and whole generations against recomputation without a cache."""

from __future__ import annotations

import math
from typing import Any

import contrast
import oracle
import pytest
import tiny
import torch
from contrast import gap, generate
from torch import Tensor

import vlmattn
from vlmattn import spec
from vlmattn.errors import LayerError, SpecError
from vlmattn.methods.decode.memvr import MemVR, uncertainty

pytestmark = pytest.mark.usefixtures("no_grad")

STEPS = 5
TEXT = "memvr(ratio=0.4, theta=0.9, first_layer=1, last_layer=3)"
ALWAYS = "memvr(ratio=0.3, theta=-1.0)"


def test_uncertainty():
    assert float(uncertainty(torch.zeros(50))) == pytest.approx(1.0)
    assert float(uncertainty(torch.zeros(50).index_fill(0, torch.tensor([3]), 99.0))) == pytest.approx(0.0, abs=1e-6)
    two = torch.full((50,), -99.0).index_fill(0, torch.tensor([3, 9]), 1.0)
    assert float(uncertainty(two)) == pytest.approx(math.log(2) / math.log(10), abs=1e-5)


def test_what_is_retraced_has_the_size_of_the_network():
    g = torch.Generator().manual_seed(0)
    x, out, z = (torch.randn(2, n, 8, generator=g) for n in (5, 5, 3))
    together = torch.tensor([[True, True, True, False, False], [False, True, True, True, False]])
    pure = MemVR(ratio=1.0).mixed(x, out, z, together)
    for row in range(2):
        mine = together[row]
        assert pure[row, mine].abs().mean() == pytest.approx(float(out[row, mine].abs().mean()), rel=1e-5)
        for alone in (~mine).nonzero()[:, 0].tolist():
            assert pure[row, alone].abs().mean() == pytest.approx(float(out[row, alone].abs().mean()), rel=1e-5)
        found = x[row] @ z[row].T @ z[row]
        assert torch.allclose(
            found / found.norm(dim=-1, keepdim=True), pure[row] / pure[row].norm(dim=-1, keepdim=True), atol=1e-5
        )
    half = MemVR(ratio=0.5).mixed(x, out, z, together)
    assert torch.allclose(half, (pure + out) / 2, atol=1e-5)
    assert torch.equal(MemVR(ratio=0.5).mixed(x, out, torch.zeros(2, 3, 8), together), out)


def test_layers():
    assert MemVR().layers(32) == range(7, 17) and MemVR().layers(4) == range(1, 3)
    with pytest.raises(LayerError, match="layers 3 to 2"):
        MemVR(first_layer=3).layers(4)
    for bad in ("memvr(ratio=1.5)", "memvr(theta=x)"):
        with pytest.raises(SpecError):
            spec.parse(bad)
    with pytest.raises(LayerError, match="int >= 1"):
        spec.parse("memvr(first_layer=0)")


def recomputed(model: Any, method: MemVR, prompt: oracle.Prompt, answer: list[int]) -> tuple[Tensor, list[int]]:
    """Logits `(n, W)`, and the layer that was mixed for the last prompt token and each of the answer, -1 for none."""
    text, length = model.model.language_model, len(prompt.visual)
    embeds = torch.cat([prompt.embeds, text.embed_tokens(torch.tensor(answer, dtype=torch.long))])
    behind = prompt.positions.amax() + 1 + torch.arange(len(answer))
    positions = torch.cat([prompt.positions, behind.expand(len(prompt.positions), -1)], 1)
    cos, sin = oracle._tables(text, embeds, positions)
    hidden, z = embeds, prompt.embeds[prompt.visual]
    mixed = [-1] * (1 + len(answer))
    for index, layer in enumerate(text.layers):
        entering = hidden
        hidden, _ = oracle.layer_forward(layer, entering, cos, sin)
        if index not in method.layers(tiny.LAYERS):
            continue
        # the attention half of the layer, from the whole of it: its feed-forward network is taken off again
        captured: list[Tensor] = []
        handle = layer.mlp.register_forward_hook(lambda m, a, o, c=captured: c.extend([a[0], o]))
        oracle.layer_forward(layer, entering, cos, sin)
        handle.remove()
        x, out = captured
        for place in range(1 + len(answer)):
            row = length - 1 + place
            u = uncertainty(model.lm_head(text.norm(entering[row])))
            if mixed[place] >= 0 or not float(u) > method.theta:
                continue
            mixed[place] = index
            rows = slice(0, length) if place == 0 else slice(row, row + 1)
            found = x[rows] @ z.T @ z
            found = found * out[rows].abs().mean() / found.abs().mean()
            hidden[rows] += method.ratio * (found - out[rows])
    return model.lm_head(text.norm(hidden)), mixed


@pytest.mark.parametrize("family", sorted(tiny.CORE))
@pytest.mark.parametrize("text", [TEXT, ALWAYS])
def test_generation_equals_recomputation(family, model, batch, text):
    (method,) = spec.parse(text)
    prompts = oracle.read_prompts(model, batch, tiny.IMAGE)
    plain = generate(model, batch, STEPS)
    with vlmattn.wrap(model, text):
        out = generate(model, batch, STEPS)
        alone = [generate(model, tiny.single(batch, row), STEPS) for row in range(2)]
    assert max(gap(a, b) for a, b in zip(out.logits, plain.logits, strict=True)) > 1e-2
    where = []
    for row, prompt in enumerate(prompts):
        logits, mixed = recomputed(model, method, prompt, out.sequences[row, -STEPS:].tolist())
        where += mixed
        for step in range(STEPS):
            assert gap(out.logits[step][row], logits[len(prompt.visual) - 1 + step]) < 1e-4
            assert gap(out.logits[step][row], alone[row].logits[step][0]) < 1e-4
    assert set(where) == {1} if text == ALWAYS else len(set(where)) > 1


@pytest.mark.parametrize("rest", ["fastv(keep=0.5, before_layer=2)", "uniform(keep=0.5, before_layer=0)", "vhr",
                                  "vcd", "textbranch(gamma=2.0)"])  # fmt: skip
def test_with_other_methods(family, model, batch, rest):
    """A batch equals its rows, and one pass over prompt and answer gives the logits of a generation."""
    one = tiny.single(batch, 1)
    length = one["input_ids"].shape[1]
    with vlmattn.wrap(model, f"{rest} + {TEXT}") as session:
        together, alone = generate(model, batch, STEPS), generate(model, one, STEPS)
        assert max(gap(a[1], b[0]) for a, b in zip(together.logits, alone.logits, strict=True)) < 1e-4
        with session.prompt(length):
            longer = contrast.extended(one, alone.sequences[0, length:].tolist())
            again = model(**longer, use_cache=False).logits[0, -STEPS - 1 : -1]
        assert max(gap(a[0], b) for a, b in zip(alone.logits, again, strict=True)) < 1e-4


def test_lookup_beams_and_undo(family, model, batch):
    plain = generate(model, batch, STEPS)
    one = tiny.single(batch, 0)
    one["input_ids"][:, -4:] = torch.tensor([[5, 6, 5, 6]])
    with vlmattn.wrap(model, TEXT):
        greedy, lookup = generate(model, one, 12), generate(model, one, 12, prompt_lookup_num_tokens=3)
        assert torch.equal(greedy.sequences, lookup.sequences[:, : greedy.sequences.shape[1]])
        beams = generate(model, batch, STEPS, num_beams=2).sequences[:, -STEPS:]
        single = [
            generate(model, tiny.single(batch, row), STEPS, num_beams=2).sequences[:, -STEPS:] for row in range(2)
        ]
        assert torch.equal(beams, torch.cat(single))
        text = tiny.prompts(family, images=(0, 0))
        expected = model(**text).logits
    assert torch.equal(model(**text).logits, expected)
    for nothing in ("memvr(ratio=0.0)", "memvr(theta=1.0)"):
        with vlmattn.wrap(model, nothing):
            out = generate(model, batch, STEPS)
        assert all(torch.equal(a, b) for a, b in zip(out.logits, plain.logits, strict=True))
    after = generate(model, batch, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(after.logits, plain.logits, strict=True))
