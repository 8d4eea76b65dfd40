"""Conversations as model inputs: the first token once, whoever asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlmattn import chat, scenes
from vlmattn import discover as finder


class Spy:
    """A processor that notes how it is called."""

    def __init__(self, processor: Any) -> None:
        self.processor, self.calls = processor, list[dict[str, Any]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __call__(self, **kwargs: Any) -> Any:
        self.calls.append(kwargs)
        return self.processor(**kwargs)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return scenes.load("scenes-llava")


def test_a_batch_is_its_conversations_padded_on_the_left(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    data = scenes.benchmark("val", ("loc", "color"), 2)
    asked = [(data.image(row["image"]), row["text"]) for row in data.rows[:3]]
    batch = chat.encode_batch(
        model, processor, [[picture] for picture, _ in asked], [[chat.turn("user", text, 1)] for _, text in asked]
    )
    for row, (picture, text) in enumerate(asked):
        alone = chat.encode(model, processor, [picture], [chat.turn("user", text, 1)])
        real = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row, real], alone["input_ids"][0])
        assert torch.equal(batch["pixel_values"][row], alone["pixel_values"][0])
        assert real.tolist() == sorted(real.tolist())


def test_a_first_token_that_the_template_writes_comes_once(loaded: tuple[Any, Any]) -> None:
    """For `discover`, too, which takes the first tokens for anchors."""
    model, processor = loaded
    assert chat.render(processor, [chat.turn("user", "hi")]).startswith(processor.tokenizer.bos_token)
    spy = Spy(processor)
    finder.discover(model, spy, images=finder.scene_pictures(2))
    assert spy.calls and all(call.get("add_special_tokens") is False for call in spy.calls)
