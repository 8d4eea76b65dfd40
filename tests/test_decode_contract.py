"""What every registered calibration must hold on every family: a new one is covered by being registered."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tiny
import torch
from contrast import gap, generate

import vlmattn
from vlmattn import spec
from vlmattn.methods.calibrate import Calibration

pytestmark = pytest.mark.usefixtures("no_grad")

STEPS = 4
NAMED = {"icd": {"disturbance": (5, 6, 7)}, "damro": {"positions": "original", "k": 4}}
"""What a tiny model needs: no tokenizer is there, and not every family can renumber positions."""
METHODS = [
    dataclasses.replace(info.cls(), **NAMED.get(name, {}))  # type: ignore[type-var]
    for name, info in spec.registry().items()
    if issubclass(info.cls, Calibration)
]
every = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


@every
def test_acts_on_prompts_with_an_image_and_leaves_text_alone(family, model, batch, method):
    plain, text = generate(model, batch, STEPS), tiny.prompts(family, images=(0, 0))
    alone = model(**text).logits
    with vlmattn.wrap(model, [method]) as session:
        changed = generate(model, batch, STEPS)
        assert session.report().visual_tokens == (batch["input_ids"] == tiny.IMAGE).sum(1).tolist()
        assert torch.equal(model(**text).logits, alone)
    assert any(gap(a.nan_to_num(neginf=0.0), b) > 1e-3 for a, b in zip(changed.logits, plain.logits, strict=True))
    again = generate(model, batch, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, plain.logits, strict=True))


@every
def test_strength_zero_is_bit_identical(family, model, batch, method):
    forward, plain = model(**batch).logits, generate(model, batch, STEPS)
    with vlmattn.wrap(model, [method.disabled()]):
        assert torch.equal(model(**batch).logits, forward)
        out = generate(model, batch, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(out.logits, plain.logits, strict=True))


@every
def test_a_bare_forward_calibrates_the_last_column_alone(family, model, batch, method):
    plain = model(**batch).logits
    with vlmattn.wrap(model, [method]):
        logits = model(**batch).logits
        first = generate(model, batch, 1).logits[0]
    assert logits.shape == plain.shape
    assert torch.equal(logits[:, :-1], plain[:, :-1])
    assert gap(logits[:, -1], first) < 1e-4


@every
def test_eager_and_sdpa_agree(family, batch, method):
    results: list[Any] = []
    for attention in ("sdpa", "eager"):
        model = tiny.MODELS[family](attention=attention)
        with vlmattn.wrap(model, [method]):
            results.append(generate(model, batch, STEPS).logits)
    assert max(gap(a, b) for a, b in zip(*results, strict=True)) < 1e-4


@every
@pytest.mark.parametrize("images", [(2, 1), (1, 2)])
def test_several_images_in_a_batch_equal_single_prompts(family, model, method, images):
    batch = tiny.prompts(family, images=images)
    row = images.index(1)
    first = sum(images[:row])
    real = batch["attention_mask"][row].bool()
    one = {n: batch[n][row : row + 1, real] for n in ("input_ids", "attention_mask", "mm_token_type_ids") if n in batch}
    if "image_grid_thw" in batch:
        one["pixel_values"] = batch["pixel_values"].split(batch["image_grid_thw"].prod(-1).tolist())[first]
        one["image_grid_thw"] = batch["image_grid_thw"][first : first + 1]
    else:
        one["pixel_values"] = batch["pixel_values"][first : first + 1]
    with vlmattn.wrap(model, [method]):
        together, alone = generate(model, batch, STEPS), generate(model, one, STEPS)
    assert max(gap(a[row], b[0]) for a, b in zip(together.logits, alone.logits, strict=True)) < 1e-4


@every
@pytest.mark.parametrize("rest", ["fastv(keep=0.5, before_layer=2)", "uniform(keep=0.5, before_layer=0)", "vhr",
                                  "var(sinks=[1, 2, 3], tau=1.5, rho=0.2, min_visual=0.05)"])  # fmt: skip
def test_pairs_compose_or_say_why_not(method, rest):
    model, batch = tiny.llava(), tiny.prompts("llava")
    try:
        session = vlmattn.wrap(model, [rest, method])
    except vlmattn.VlmattnError as error:
        assert "both prune before layer 0" in str(error) and method.name in str(error)
        assert "before_layer=0" in rest and method.branch.selector is not None
        return
    with session:
        together = generate(model, batch, STEPS)
        report = session.report()
        alone = generate(model, tiny.single(batch, 1), STEPS)
        session.use_backend("reference")
        naive = generate(model, batch, STEPS)
    assert max(gap(a, b) for a, b in zip(together.logits, naive.logits, strict=True)) < 1e-4
    assert max(gap(a[1], b[0]) for a, b in zip(together.logits, alone.logits, strict=True)) < 1e-4
    assert (report.second_tokens is None) is (method.branch is None)
    with vlmattn.wrap(model, [rest]):
        without = generate(model, batch, STEPS)
    assert any(gap(a.nan_to_num(neginf=0.0), b) > 1e-3 for a, b in zip(together.logits, without.logits, strict=True))
