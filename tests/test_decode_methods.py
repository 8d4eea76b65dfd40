"""Methods of calibrated decoding: the worked examples of their papers and released code, without a model."""

from __future__ import annotations

import math

import pytest
import torch

from vlmattn.errors import LayerError
from vlmattn.methods.calibrate import Pixels, Step
from vlmattn.methods.decode.agla import AGLA, scaled, visible
from vlmattn.methods.decode.avisc import blind, chosen_layers
from vlmattn.methods.decode.damro import outliers
from vlmattn.methods.decode.deco import DeCo
from vlmattn.methods.decode.dola import DoLa, divergence
from vlmattn.methods.decode.icd import ICD
from vlmattn.methods.decode.m3id import M3ID
from vlmattn.methods.decode.sid import SID, LeastAttended
from vlmattn.methods.decode.textbranch import TextBranch
from vlmattn.methods.decode.vcd import VCD, schedule
from vlmattn.patches import tower

WITH, WITHOUT = [2.0, 1.0, 0.0, -3.0], [1.0, 2.0, 0.0, -3.0]


def step(number: int = 1, other: list[float] | None = WITHOUT) -> Step:
    rows = None if other is None else torch.tensor(other)[None, None]
    return Step(torch.tensor(WITH)[None, None], rows, torch.tensor([number]))


def near(*values: float) -> object:
    return pytest.approx(list(values), abs=1e-4)


def test_contrast_worked_example():
    out = VCD(alpha=1.0, beta=0.1).calibrated(step())[0, 0]
    assert out.tolist() == near(3.0, 0.0, 0.0, -math.inf)
    assert out.softmax(-1).tolist() == near(0.9094, 0.0453, 0.0453, 0.0)
    assert torch.tensor(WITH).softmax(-1).tolist() == near(0.6623, 0.2436, 0.0896, 0.0045)
    assert ICD(alpha=1.0, beta=0.1).calibrated(step())[0, 0].tolist() == out.tolist()


def test_cutoff_is_taken_on_the_first_branch():
    assert VCD(beta=0.1).plausible(torch.tensor([2.0, -0.3025, -0.3027, -3.0])).tolist() == [True, True, False, False]
    assert VCD(beta=0.0).plausible(torch.tensor(WITH)).all()
    assert VCD(beta=1.0).plausible(torch.tensor(WITH)).tolist() == [True, False, False, False]
    low = VCD(alpha=1.0, beta=0.1).calibrated(step(other=[2.0, 1.0, 0.0, -90.0]))[0, 0]
    assert low.tolist() == near(2.0, 1.0, 0.0, -math.inf)  # however much the contrast wants the last


def test_equal_branches():
    assert VCD(beta=0.0).calibrated(step(other=WITH))[0, 0].tolist() == near(*WITH)
    lc = torch.tensor(WITH).log_softmax(-1).tolist()
    assert TextBranch(gamma=1.7, beta=0.0).calibrated(step(other=WITH))[0, 0].tolist() == near(*lc)
    for number in (1, 30, 500):
        assert M3ID(beta=0.0, max_weight=math.inf).calibrated(step(number, WITH))[0, 0].tolist() == near(*lc)


@pytest.mark.parametrize(
    ("t", "image", "noise"),
    [(0, 1.000, 0.005), (100, 0.998, 0.058), (300, 0.981, 0.194), (500, 0.863, 0.505), (700, 0.593, 0.805),
     (900, 0.365, 0.931), (999, 0.285, 0.958)],
)  # fmt: skip
def test_vcd_schedule(t, image, noise):
    factors = [float(x[t]) for x in schedule()]
    assert factors == pytest.approx([image, noise], abs=6e-4)
    assert factors[0] ** 2 + factors[1] ** 2 == pytest.approx(1.0)


def test_vcd_noise():
    pixels = Pixels(torch.linspace(-1, 1, 3 * 64 * 64).view(3, 64, 64), key=7)
    out = VCD(noise_step=500).noised(pixels)
    drawn = (out - 0.863 * pixels.values) / 0.505
    assert float(drawn.mean()) == pytest.approx(0.0, abs=0.03) and float(drawn.std()) == pytest.approx(1.0, abs=0.03)
    assert torch.equal(out, VCD(noise_step=500).noised(pixels))
    assert not torch.equal(out, VCD(noise_step=500, seed=1).noised(pixels))
    assert not torch.equal(out, VCD(noise_step=500).noised(Pixels(pixels.values, key=8)))
    half = VCD(noise_step=500).noised(Pixels(pixels.values.bfloat16(), key=7))
    assert half.dtype == torch.bfloat16 and (half.float() - out).abs().max() < 0.05
    assert (VCD(noise_step=0).noised(pixels) - pixels.values).abs().max() < 0.03


def test_m3id_worked_example():
    out = M3ID(lam=0.02, beta=0.0).calibrated(step(10))[0, 0]
    assert torch.tensor(WITH).log_softmax(-1).tolist() == near(-0.4121, -1.4121, -2.4121, -5.4121)
    assert out.tolist() == near(-0.1907, -1.6335, -2.4121, -5.4121)


@pytest.mark.parametrize(("t", "weight"), [(1, 0.020), (10, 0.221), (50, 1.718), (54, 1.945), (55, 2.0), (100, 2.0)])
def test_m3id_weight(t, weight):
    def found(method: M3ID) -> float:
        lc, lu = torch.tensor(WITH).log_softmax(-1), torch.tensor(WITHOUT).log_softmax(-1)
        out = method.combine(step(t))[0, 0]
        return float((out - lc)[0] / (lc - lu)[0])

    assert found(M3ID()) == pytest.approx(weight, abs=1e-3)
    free = M3ID(max_weight=math.inf)
    assert found(free) == pytest.approx(math.exp(0.02 * t) - 1, rel=1e-3)
    assert torch.isfinite(free.combine(step(100_000))).all()


def test_text_branch_worked_example():
    out = TextBranch(gamma=1.1, beta=0.1).calibrated(step())[0, 0]
    assert out.tolist() == near(-0.3121, -1.5121, -2.4121, -math.inf)
    whole = TextBranch(gamma=1.1, beta=0.0).calibrated(step())[0, 0]
    assert whole.tolist() == near(-0.3121, -1.5121, -2.4121, -5.4121)


# AvisC


@pytest.mark.parametrize(("share", "layers"), [(0.5, [1, 3]), (1.0, [0, 1, 2, 3]), (0.0, [1]), (0.71, [1, 2, 3])])
def test_avisc_layers(share, layers):
    attended = torch.tensor([0.1, 0.4, 0.2, 0.3])[None, :, None] * torch.tensor([0.25, 0.75])
    assert chosen_layers(attended, share)[0].nonzero()[:, 0].tolist() == layers


def test_avisc_threshold():
    weight = torch.tensor([[0.05] * 7 + [0.65]])
    present = torch.ones(1, 8, dtype=torch.bool)
    assert float(weight.mean()) == pytest.approx(0.125) and float(weight.std()) == pytest.approx(0.2121, abs=1e-4)
    assert blind(weight, present, 1.0)[0].tolist() == [False] * 7 + [True]
    assert blind(weight, present, -1e9).all()
    for lam, last in ((2.47, True), (2.48, False)):  # (.65 - .125) / .2121 = 2.475
        assert blind(weight, present, lam)[0].tolist() == [False] * 7 + [last]
    padded = torch.nn.functional.pad(weight, (0, 3))
    there = torch.nn.functional.pad(present, (0, 3))
    assert blind(padded, there, 1.0)[0].tolist() == [False] * 7 + [True] + [False] * 3


# DAMRO


def test_damro_pooled_attention_is_not_the_mean_of_heads():
    """The worked keys of one CLS query, through the look that DAMRO takes."""
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[None, :, None]
    keys = torch.tensor([[[2.0, 0.0], [0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 3.0], [0.0, 1.0]]])[None]
    token = torch.tensor([[0, 1, 2]])
    there = torch.ones(1, 3, dtype=torch.bool)
    rows = tower.Rows(query, keys, keys, 2**-0.5, token, there, (3,))
    look = tower.Look("joined")
    (pooled,) = tower._at_layer(rows, look, has_cls=True)
    assert pooled.tolist() == pytest.approx([0.274, 0.452, 0.274], abs=1e-3)
    (heads,) = tower._at_layer(rows, tower.Look("attention"), has_cls=True)
    assert heads.mean(1).tolist() == pytest.approx([0.332, 0.437, 0.231], abs=1e-3)


def test_damro_outliers_stand_by_score():
    score = torch.tensor([[0.1, 0.5, 0.3, 0.5, 0.0]])
    there = torch.tensor([[True, True, True, True, False]])
    assert outliers(score, there, 3).tolist() == [[1, 3, 2]]
    assert outliers(score, there, 9).tolist() == [[1, 3, 2, 0, 4]]


# SID


def test_sid_hides_all_but_the_least_attended():
    method = LeastAttended(keep=2)
    visual = torch.tensor([[False, True, True, True, True, False], [False] * 6])
    given = torch.tensor([[0.2, 0.1, 0.3, 0.1, 0.05, 0.25], [0.2, 0.1, 0.3, 0.1, 0.05, 0.25]])[:, None]
    hidden = method.hidden(given, visual)
    assert hidden[0, 0].tolist() == [False, False, True, True, False, False]  # of equals the lower index stays
    assert not hidden[1].any()
    assert not LeastAttended(keep=1.0).hidden(given, visual).any()
    several = torch.cat([given[:1], given[:1].flip(2)], 1)
    assert method.hidden(several, visual[:1])[0, 1].tolist() == [False, False, False, True, True, False]
    assert LeastAttended(keep=SID().keep).quota(576, 576, 0) == 100
    assert [SID().branch.hide.before_layer(depth) for depth in (4, 24, 32, 80)] == [1, 2, 2, 5]


# DoLa and DeCo


def lens_step(last: list[float], *early: list[float]) -> Step:
    rows = torch.tensor(last).log()[None, None]
    return Step(rows, None, torch.tensor([1]), torch.stack([torch.tensor(e).log()[None, None] for e in early]))


def test_dola_takes_the_farthest_layer():
    last, near_by, far = [0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]
    out = DoLa(beta=0.2).calibrated(lens_step(last, near_by, far))[0, 0]
    assert out.tolist() == near(math.log(7), math.log(2), -math.inf)
    assert DoLa(beta=0.0).calibrated(lens_step(last, last))[0, 0].tolist() == near(0.0, 0.0, 0.0)
    assert DoLa(beta=1.0).calibrated(lens_step(last, far))[0, 0].argmax() == 0
    one, other = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 1e-30]).log()
    assert float(divergence(one, other)) == pytest.approx(0.2158, abs=1e-4)  # (ln(2/3) + ln 2) / 4 + ln(4/3) / 2


def test_dola_layers_and_samples_are_apart():
    assert DoLa().lens(32) == tuple(range(16, 32, 2)) and DoLa(layers="low").lens(32) == tuple(range(0, 16, 2))
    assert DoLa(layers=[3, 1]).lens(4) == (1, 3) and DoLa().lens(4) == (2,)
    with pytest.raises(LayerError, match="inputs of 4 decoder layers"):
        DoLa(layers=[4]).lens(4)
    a = lens_step([0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8])
    b = lens_step([0.3, 0.3, 0.4], [0.9, 0.05, 0.05], [0.3, 0.3, 0.4])
    both = Step(torch.cat([a.logits, b.logits]), None, a.number, torch.cat([a.lens, b.lens], 1))
    alone = torch.cat([DoLa().combine(a), DoLa().combine(b)])
    assert torch.allclose(DoLa().combine(both), alone)


def test_deco_worked_example():
    method = DeCo()
    step = lens_step([0.5, 0.3, 0.15, 0.05], [0.2, 0.6, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1])
    assert method.plausible(step.logits)[0, 0].tolist() == [True, True, True, False]
    out = method.calibrated(step)[0, 0]
    assert out.tolist() == near(-1.2725, -1.3879, -2.7261, -math.inf)
    assert out.softmax(-1).tolist() == near(0.4706, 0.4194, 0.1100, 0.0)


def test_deco_candidates_and_layers():
    one = lens_step([0.95, 0.03, 0.02], [0.1, 0.8, 0.1])
    assert DeCo().calibrated(one)[0, 0].isfinite().tolist() == [True, False, False]  # one candidate: nothing to change
    assert DeCo(top_p=1.0, top_k=2).plausible(one.logits)[0, 0].tolist() == [True, True, False]
    assert DeCo().lens(32) == tuple(range(20, 29)) and DeCo(layer_stride=2).lens(32) == (20, 22, 24, 26, 28)
    assert DeCo().lens(4) == (3,) and DeCo(first_layer=1, last_layer=2).lens(4) == (1, 2)
    with pytest.raises(LayerError, match="layers 3 to 1"):
        DeCo(first_layer=3, last_layer=1).lens(4)
    same = lens_step([0.5, 0.3, 0.2], [0.5, 0.3, 0.2])  # a layer that says what the last says
    out = DeCo(alpha=0.6).calibrated(same)[0, 0, :2]
    assert torch.allclose(out, (1 + 0.6 * 0.5) * same.logits[0, 0, :2])


# AGLA


def test_agla_worked_example():
    """With the strict cutoff only token 0 survives, although the sum would choose token 1."""
    assert AGLA(alpha=2.0, beta=0.5).combine(step())[0, 0].tolist() == near(4.0, 5.0, 0.0, -9.0)
    assert AGLA(alpha=2.0, beta=0.5).calibrated(step())[0, 0].isfinite().tolist() == [True, False, False, False]
    assert AGLA(alpha=2.0, beta=0.1).calibrated(step())[0, 0].argmax() == 1
    assert AGLA(beta=0.0).calibrated(step(other=WITH))[0, 0].tolist() == near(*(3 * x for x in WITH))


def test_agla_quirk_sharpens_from_the_second_token_on():
    quirk = AGLA(beta=0.0, official_quirk=True)
    assert quirk.combine(step(1))[0, 0].tolist() == near(4.0, 5.0, 0.0, -9.0)
    assert quirk.combine(step(2))[0, 0].tolist() == near(*(3 * x for x in WITH))


@pytest.mark.parametrize(("similarity", "rank"), [(0.3, 125337), (0.5, 110592), (0.0, 147454)])
def test_agla_keeps_the_pixels_up_to_a_rank(similarity, rank):
    """The paper's share at a similarity of image and prompt is 1 - sim / 2; never quite all."""
    relevance = torch.randperm(384 * 384).float().view(384, 384)
    assert int(visible(relevance, 1 - similarity / 2).sum()) == rank + 1


def test_agla_mask():
    ramp = torch.arange(100.0).view(10, 10)
    assert int(visible(ramp, 0.25).sum()) == 26 and visible(ramp, 0.25)[-2:].all()
    assert visible(ramp, 1.0).sum() == 100 and visible(ramp, 0.01).sum() == 2
    assert visible(torch.zeros(4, 4), 0.5).all()
    assert torch.equal(scaled(torch.full((3, 4), 0.2), 30, 40), torch.ones(30, 40))
    spot = torch.zeros(4, 6)
    spot[1, 4] = 1.0
    wide = scaled(spot, 64, 96)
    assert wide.shape == (64, 96) and float(wide.min()) == 0.0 and float(wide.max()) == 1.0
    top = divmod(int(wide.argmax()), 96)
    assert abs(top[0] - 23.5) < 3 and abs(top[1] - 71.5) < 3
    sharp = torch.nn.functional.interpolate(spot[None, None], size=(64, 96), mode="bicubic")[0, 0]
    assert wide.diff(dim=1).abs().max() < sharp.diff(dim=1).abs().max()
