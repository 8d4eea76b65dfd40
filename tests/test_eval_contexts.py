"""Questions behind compressed contexts: the same answers as by hand, one description an image."""

from __future__ import annotations

from typing import Any

import pytest

import vlmattn
from vlmattn import scenes
from vlmattn.eval import models
from vlmattn.eval.answer import Asker
from vlmattn.eval.contexts import ContextAsker, asker_of
from vlmattn.scenes import names

SPEC = "context(keep=0.1, new_tokens=6)"


@pytest.fixture(scope="module")
def loaded() -> Any:
    return models.load(names()[0])


def test_every_image_is_read_once(loaded, monkeypatch):
    chosen = scenes.benchmark("val", ("caption",), 2, world=models.world(loaded.name))
    first, second = (chosen.image(name) for name in chosen.names)
    asked = [(first, "Is there a red circle in the image?"), (second, "Describe the image."), (first, "What is there?")]
    with vlmattn.wrap(loaded.model, SPEC, processor=loaded.processor) as session:
        by_hand = [session.compress(i).answer(q, max_new_tokens=4, do_sample=False, num_beams=1) for i, q in asked]
        compressed: list[Any] = []
        compress = session.compress
        monkeypatch.setattr(session, "compress", lambda image: compressed.append(image) or compress(image))
        asker = asker_of(loaded, session, max_new_tokens=4)
        assert isinstance(asker, ContextAsker)
        told = asker([image for image, _ in asked], [question for _, question in asked])
        again = asker([first], [asked[0][1]])
    assert [text.strip() for text in told.texts] == by_hand and again.texts == told.texts[:1]
    assert len(compressed) == 2
    assert again.margins == pytest.approx(told.margins[:1]) and again.costs == told.costs[:1]
    assert len(told.margins) == len(told.truncated) == len(told.seen) == len(told.costs) == 3
    assert again.times["prefill_ms"] < told.times["prefill_ms"] and told.times["new_tokens"] >= 1
    visual = told.report.visual_tokens[0]
    kept = session.methods[0].expected_tokens(visual, told.report.num_layers)
    assert told.report.cached_per_layer == [kept] * 3 and told.report.visual_tokens == [visual] * 3
    assert [len(cache.kept) for cache in told.report.caches] == [3] * told.report.num_layers
    assert told.report.kv_bytes == sum(cost["kv_bytes"] for cost in told.costs)


def test_other_sessions_are_asked_as_before(loaded):
    with vlmattn.wrap(loaded.model, "none", processor=loaded.processor) as session:
        assert type(asker_of(loaded, session, max_new_tokens=2)) is Asker
