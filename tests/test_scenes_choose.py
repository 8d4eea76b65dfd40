"""Choosing a run and its share of the last stage, on the split val, and packaging it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_scenes_training import TINY, run

from vlmattn.errors import DataError
from vlmattn.scenes import choose, runs
from vlmattn.scenes.export import export, trained_model
from vlmattn.scenes.measure import FLOORS
from vlmattn.scenes.train import WEIGHTS

GROUPED = replace(TINY, model=TINY.model | {"kv_heads": 1, "decoder_layers": 3})
GAP, CHAIR, RANDOM = "false yes, adversarial minus random", "caption CHAIR_s", "existence no, random"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    run(out, GROUPED)
    return out


def floors(**values: float) -> list[dict[str, Any]]:
    names = {"gap": GAP, "chair": CHAIR, "random": RANDOM, "color": "color"}
    lines = ((names[name], value) for name, value in values.items())
    return [
        {"name": name, "value": value, "floor": FLOORS["2"][name], "met": value >= FLOORS["2"][name]}
        for name, value in lines
    ]


def test_weights_lie_between_those_before_and_after_the_last_stage(finished: Path) -> None:
    before, middle, after = (runs.weights(finished, share) for share in (0.0, 0.4, 1.0))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    for name in before:
        assert torch.allclose(middle[name], before[name] + 0.4 * (after[name] - before[name]), atol=1e-7)
    assert trained_model(finished).state_dict()[changed[0]].equal(after[changed[0]])
    assert trained_model(finished, 0.0).state_dict()[changed[0]].equal(before[changed[0]])


def test_a_share_outside_and_an_unfinished_run_are_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"habit_share=1.2 is outside"):
        runs.weights(finished, 1.2)
    run(tmp_path, GROUPED, stop_after=3)
    with pytest.raises(DataError, match="not finished"):
        runs.weights(tmp_path, 1.0)
    (tmp_path / WEIGHTS).touch()
    with pytest.raises(DataError, match=r"no joint.safetensors"):
        runs.weights(tmp_path, 1.0)


def test_choose_measures_on_val_and_export_follows_it(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []
    real = choose.measure

    def measure(*arguments: Any) -> dict[str, Any]:
        seen.append(arguments[5])
        return real(*arguments)

    monkeypatch.setattr(choose, "measure", measure)
    monkeypatch.setattr(choose, "SHARES", (0.0, 0.3))
    choose.main([str(finished), "--questions", "2"])
    assert set(seen) == {"val"} and len(seen) >= 2
    found = runs.choice(finished)
    assert found["split"] == "val" and found["habit_share"] in (0.0, 0.3) and not found["good_share"]
    assert [line["share"] for line in found["tried"]] == [0.3]
    assert [floor["name"] for floor in found["floors"]] == list(FLOORS["2"])
    told = capsys.readouterr().out
    assert "none is good" in told and f"1. {finished}" in told
    for asked, share in ((None, found["habit_share"]), (0.6, 0.6)):
        out = tmp_path / str(asked)
        export(finished, out, asked)
        record = json.loads((out / "training.json").read_text())
        assert (record["habit_share"], record["choice"]) == (share, found)
        assert record["abandoned"] == {} and record["curve"]


def test_the_smallest_good_share_is_found_by_bisection(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def measured(run: Path, share: float, questions: int, seed: int, only: tuple[str, ...]) -> dict[str, Any]:
        if "caption" in only:
            return {"floors": floors(chair=0.3 if share > 0.35 else 0.1)}
        asked.append(share)
        return {"floors": floors(gap=share / 5, random=0.99 - share / 20)}

    monkeypatch.setattr(choose, "measured", measured)
    share, tried = choose.habit_share(Path(), 2, 0)
    assert share == 0.4 and asked == [0.5, 0.2, 0.4, 0.3]
    assert [line["share"] for line in tried] == sorted(asked)
    assert [(CHAIR in line, line["enough"]) for line in tried] == [(False, False), (True, False), *[(True, True)] * 2]
    assert tried[2][GAP] == pytest.approx(0.08) and tried[2]["slack"] >= 0


def random_costs(slope: float, monkeypatch: pytest.MonkeyPatch) -> tuple[float, list[dict[str, Any]]]:
    """The share, where adversarial false yes are rare, and those at random the more frequent the larger it is."""

    def measured(run: Path, share: float, questions: int, seed: int, only: tuple[str, ...]) -> dict[str, Any]:
        if "caption" in only:
            return {"floors": floors(chair=0.3)}
        return {"floors": floors(gap=share / 10, random=0.98 - slope * share)}

    monkeypatch.setattr(choose, "measured", measured)
    return choose.habit_share(Path(), 2, 0)


def test_without_a_good_share_the_floors_come_before_their_margins(monkeypatch: pytest.MonkeyPatch) -> None:
    share, tried = random_costs(0.04, monkeypatch)
    assert share == 0.5 and max(line["slack"] for line in tried if line["enough"]) < 0
    assert [line["share"] for line in tried] == [0.5, 0.6, 0.7, 0.8]
    share, tried = random_costs(0.1, monkeypatch)
    assert share == 0.5 and max(line["slack without margins"] for line in tried) == pytest.approx(-0.03)


def test_runs_are_ranked_by_their_shortfall_then_by_accuracy() -> None:
    def result(accuracy: float, **values: float) -> dict[str, Any]:
        return {"floors": floors(**values), "tasks": {"a": {"accuracy": accuracy}, "b": {"accuracy": 0.5}}}

    short, good, better = result(0.9, color=0.73, chair=0.2), result(0.5, color=0.93), result(0.7, color=0.95)
    assert choose.rating(short) == (pytest.approx(-0.1), pytest.approx(0.7))
    assert sorted((choose.rating(x) for x in (better, short, good)), reverse=True) == [
        choose.rating(better),
        choose.rating(good),
        choose.rating(short),
    ]


def test_a_version_without_floors_is_refused(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FLOORS, "2")
    with pytest.raises(DataError, match="version 2, which has no floors"):
        choose.choose(finished, 2, 0)


def test_a_folder_that_is_no_run_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "choose", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit):
        choose.main([str(tmp_path)])
    assert "has no settings.json" in capsys.readouterr().err
