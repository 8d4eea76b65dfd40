"""The trained model under the engine: removal equals masking, a batch equals its samples, undo."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch

import vlmattn
from vlmattn import scenes

SPECS = [
    "fastv(keep=0.25, before_layer=2)",
    "fastv(keep=0.5)",
    "random(keep=0.11)",
    "uniform(keep=16, before_layer=3)",
]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return scenes.load("scenes-llava")


@pytest.fixture(scope="module")
def batch(loaded) -> dict[str, torch.Tensor]:
    """Four questions of different length about four scenes."""
    _, processor = loaded
    data = scenes.benchmark(split="val", tasks=("loc", "cell", "digits", "exist-random"), images=6)
    rows = {row["task"]: row for row in data.rows}.values()
    chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["text"]}]}] for row in rows]
    text = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    images = [data.image(row["image"]) for row in rows]
    return dict(processor(images=images, text=text, padding=True, return_tensors="pt"))


def one(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    real = batch["attention_mask"][row].bool()
    cut = {name: batch[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
    return cut | {"pixel_values": batch["pixel_values"][row : row + 1]}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("text", SPECS)
def test_removal_equals_masking(loaded, batch, text):
    model, _ = loaded
    with vlmattn.wrap(model, text) as session:
        pruned = model(**batch).logits
        report = session.report()
    masked = oracle.masked_forward(model, batch, {report.stages[0].before_layer: report.positions})
    assert len({len(columns) for columns in report.positions}) > 1
    for row, columns in enumerate(report.positions):
        assert (pruned[row, -len(columns) :] - masked[row, columns]).abs().max() < 1e-4


@pytest.mark.parametrize("text", [*SPECS, "fastv(keep=0.5, before_layer=2) + vhr"])
def test_a_batch_equals_its_samples(loaded, batch, text):
    model, _ = loaded
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with vlmattn.wrap(model, text):
        together = model.generate(**batch, **options)
        for row in range(len(batch["input_ids"])):
            alone = model.generate(**one(batch, row), **options)
            for a, b in zip(together.logits, alone.logits, strict=False):
                assert (a[row] - b[0]).abs().max() < 1e-3


@pytest.mark.parametrize("text", SPECS)
def test_undo(loaded, batch, text):
    model, _ = loaded
    plain = model(**batch).logits
    with vlmattn.wrap(model, text):
        assert model(**batch).logits.shape != plain.shape
    assert torch.equal(model(**batch).logits, plain)
