"""What a report says about the choosing itself: how long it took, and how high in the image the kept tokens stand."""

from __future__ import annotations

import time

import pytest
import tiny
import torch

import vlmattn
from vlmattn.methods.base import Keep, View
from vlmattn.methods.prune.fastv import FastV
from vlmattn.methods.prune.hired import HiRED
from vlmattn.patches import attention, tower

pytestmark = pytest.mark.usefixtures("no_grad")
SLEEP = 0.3


def slow(call):
    def slower(*args, **kwargs):
        time.sleep(SLEEP)
        return call(*args, **kwargs)

    return slower


@pytest.mark.parametrize("what", ["decision", "score", "look"])
def test_the_time_of_choosing_is_measured_where_it_is_spent(monkeypatch, what):
    model, batch = tiny.llava(), tiny.prompts("llava")
    spec = "hired(keep=4)" if what == "look" else "fastv(keep=4, before_layer=1)"
    if what == "decision":
        monkeypatch.setattr(FastV, "select", slow(FastV.select))
    elif what == "score":
        monkeypatch.setattr(attention, "attention_received", slow(attention.attention_received))
    else:
        monkeypatch.setattr(tower, "attention_given", slow(tower.attention_given))
    with vlmattn.wrap(model, spec) as session:
        model(**batch)
        assert session.report().selection_ms is None
        session.time_selection()
        for _ in range(2):  # every prefill by itself
            start = time.perf_counter()
            model(**batch)
            whole = 1e3 * (time.perf_counter() - start)
            assert 1e3 * SLEEP <= session.report().selection_ms < whole
            assert session.report().selection_ms < 2e3 * SLEEP
        assert "choosing tokens" in str(session.report())
        session.time_selection(False)
        model(**batch)
        assert session.report().selection_ms is None


def test_what_is_not_choosing_takes_no_time(monkeypatch):
    model, batch = tiny.llava(), tiny.prompts("llava")
    monkeypatch.setattr(type(model.model.vision_tower), "forward", slow(type(model.model.vision_tower).forward))
    with vlmattn.wrap(model, "hired(keep=4)") as session:
        session.time_selection()
        model(**batch)
        assert 0 < session.report().selection_ms < 1e3 * SLEEP


def test_timing_changes_nothing():
    model, batch = tiny.llava(), tiny.prompts("llava")
    with vlmattn.wrap(model, "sparsevlm(keep=0.4)") as session:
        before = model(**batch).logits
        session.time_selection()
        assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize(("kept", "row"), [([0, 1], 0.125), ([15], 0.875), ([0, 13], 0.5), (range(16), 0.5)])
def test_where_kept_tokens_stand_in_the_height(monkeypatch, kept, row):
    def select(self, view: View) -> Keep:
        mask = torch.zeros_like(view.image, dtype=torch.bool)
        mask[:, list(kept)] = True
        return Keep(mask)

    monkeypatch.setattr(HiRED, "select", select)
    model, batch = tiny.llava(), tiny.prompts("llava")
    with vlmattn.wrap(model, "hired(keep=4) + fastv(keep=1.0)") as session:
        model(**batch)
        report = session.report()
    assert [stage.mean_row for stage in report.stages] == ([] if len(kept) == 16 else [pytest.approx(row)])
    if report.stages:
        assert f"{row:.2f} of the height (hired; even is 0.50)" in str(report)


def test_rows_are_those_of_a_frame():
    """Two images of different grids; nothing left has no place."""
    model, batch = tiny.qwen2_5_vl(), tiny.prompts("qwen2_5_vl")
    with vlmattn.wrap(model, "rows(keep=0.25, side=top) + noimage(before_layer=2)") as session:
        model(**batch)
        top, none = session.report().stages
    assert top.mean_row == pytest.approx(0.125) and none.mean_row is None
