"""A sweep with the embedded model: shared vision features, what is recorded, resuming, baseline and controls."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlmattn.errors import DataError, VlmattnWarning
from vlmattn.eval import bench as benches
from vlmattn.eval import controls, grid, lineup, models, runner, stats, summary
from vlmattn.eval.answer import yes_no_tokens
from vlmattn.eval.records import kept_tokens, read_records, read_run
from vlmattn.spec import parse

SPECS = {"none": "none", "fastv(keep=0.25, before_layer=2)": "fastv", "uniform(keep=0.25)": "uniform"}
FASTV, UNIFORM = "fastv-keep=0.25,before_layer=2", "uniform-keep=0.25"
TASKS = ("random", "adversarial", "digits", "caption")


@pytest.fixture(scope="module")
def loaded() -> models.Loaded:
    with models.quiet():
        return models.load("scenes-llava")


@pytest.fixture(scope="module")
def scenes() -> Any:
    return benches.load("scenes", embedded=True, scenes_count=4, tasks=TASKS, world=models.world("scenes-llava"))


def settings(**options: Any) -> runner.Settings:
    return runner.Settings(**{"batch_size": 8, "max_new_tokens": 64, **options})


@pytest.fixture(scope="module")
def whole(loaded: models.Loaded, scenes: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep left alone, with the threshold control."""
    out = tmp_path_factory.mktemp("sweep") / "whole"
    runner.sweep(loaded, scenes, SPECS, out, settings(threshold=True))
    return out


def said(folder: Path) -> list[dict]:
    """The records without times."""
    return [{key: value for key, value in record.items() if key != "time"} for record in read_records(folder)]


def numbers(value: Any) -> Any:
    """A summary without times and paths."""
    if isinstance(value, dict):
        return {key: numbers(entry) for key, entry in value.items() if "ms" not in key.split("_") and key != "folder"}
    return [numbers(entry) for entry in value] if isinstance(value, list) else value


def test_a_row_that_equals_the_baseline_leaves_the_baseline_first() -> None:
    specs = {"random": "random", "uniform": "uniform", "random(keep=0.25)": "random(keep=0.25)"}
    found = lineup.line_up(specs, num_layers=6, visual_tokens=144, levels=(0.5,))
    assert [(entry.spec, entry.role) for entry in found] == [("random", "baseline"), ("uniform", "method")]


def test_a_folder_is_named_by_the_budget_even_where_it_is_the_default() -> None:
    assert runner.slug(lineup.written_out("fastv + var")) == "fastv-keep=0.5+var"


def test_runs_of_a_former_sweep_in_the_folder_are_named(tmp_path: Path) -> None:
    for name in ("none", "vhr"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
    (note,) = runner._others(tmp_path, [tmp_path / "none"])
    assert note.startswith("1 other run (vhr: it is in the folder but not in this table")
    assert runner._others(tmp_path, [tmp_path / "none", tmp_path / "vhr"]) == []


def test_sharing_vision_features_changes_no_bit(
    loaded: models.Loaded, scenes: Any, whole: Path, tmp_path: Path
) -> None:
    runner.sweep(loaded, scenes, SPECS, tmp_path, settings(share_vision=False))
    for slug in ("none", FASTV, UNIFORM):
        assert said(tmp_path / slug) == said(whole / slug)
        shared = [record["time"] for record in read_records(whole / slug)]
        assert all(time["prefill_ms"] > time["vision_ms"] for time in shared)
        assert all((time["vision_ms"] > 0) is (slug != "none") for time in shared)  # the store was used
        assert all(record["time"]["vision_ms"] == 0 for record in read_records(tmp_path / slug))


def test_records_say_what_was_kept_and_which_way_the_answer_leans(whole: Path) -> None:
    plain, pruned = read_records(whole / "none"), read_records(whole / FASTV)
    assert all("kept" not in record for record in plain)
    for record in pruned:
        (stage,) = record["kept"]
        assert stage["method"] == "fastv(keep=0.25, before_layer=2)" and stage["before_layer"] == 2
        tokens = kept_tokens(stage)
        assert len(tokens) == record["cost"]["visual_per_layer"][2] == 36 and tokens == sorted(set(tokens))
        assert record["geometry"]["grid"] == [1, 12, 12] and record["geometry"]["size"] == [96, 96]
    asked = [record for record in plain if record["label"] in ("yes", "no")]
    assert asked and all((record["margin"] > 0) is (record["text"] == "yes") for record in asked)
    assert all("margin" not in record for record in plain if record["group"] in ("digits", "caption"))


def test_an_answer_without_an_end_is_truncated(loaded: models.Loaded, scenes: Any, whole: Path, tmp_path: Path) -> None:
    assert not any("truncated" in record for record in read_records(whole / "none"))
    runner.sweep(loaded, scenes, {"none": "none"}, tmp_path, settings(max_new_tokens=2))
    cut = {record["group"] for record in read_records(tmp_path / "none") if record.get("truncated")}
    whole_words = {record["group"] for record in read_records(tmp_path / "none") if not record.get("truncated")}
    assert "caption" in cut and {"random", "adversarial"} <= whole_words - cut


def test_a_sweep_stopped_in_its_second_spec_goes_on_to_the_same_table(
    loaded: models.Loaded, scenes: Any, whole: Path, tmp_path: Path
) -> None:
    told: list[tuple[str, int, int]] = []

    def stop(name: str, done: int, total: int) -> None:
        told.append((name, done, total))
        if name.startswith("fastv") and 8 < done < total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.sweep(loaded, scenes, SPECS, tmp_path, settings(threshold=True), stop)
    count = len(scenes.items)
    assert [name for name, *_ in told[:4]] == [*SPECS, "validation"]  # every run is announced first
    assert told[0] == ("none", 0, count)
    assert 8 < len(read_records(tmp_path / FASTV)) < count and not (tmp_path / UNIFORM).exists()
    runner.sweep(loaded, scenes, SPECS, tmp_path, settings(threshold=True))
    for slug in ("none", FASTV, UNIFORM, "validation/none"):
        assert said(tmp_path / slug) == said(whole / slug)
    first, second = (json.loads((out / "summary.json").read_text()) for out in (whole, tmp_path))
    assert numbers(first) == numbers(second)


def test_the_table_compares_with_the_first_row_and_ends_with_the_threshold(whole: Path) -> None:
    found = json.loads((whole / "summary.json").read_text())["runs"]
    assert [row["role"] for row in found] == ["baseline", "method", "method", "control"]
    assert [row["label"] for row in found][:3] == ["none", "fastv", "uniform"]
    assert found[3]["label"].startswith("threshold(")
    assert not found[0]["versus"] and all("mean_accuracy" in row["versus"] for row in found[1:])
    assert all(row["cost"]["questions"] == len(read_records(whole / "none")) for row in found)
    names = ("summary.json", "table.csv", "table.tex", "accuracy.svg", "index.html")
    assert all((whole / name).stat().st_size for name in names)


def test_the_threshold_is_tuned_on_other_images(whole: Path, scenes: Any) -> None:
    tuned = read_records(whole / "validation" / "none")
    assert tuned and {record["group"] for record in tuned} == {"random", "adversarial"}
    about = read_run(whole / "validation" / "none")
    assert about["info"]["pictures"] == {**scenes.pictures, "scenes": "val"}
    assert about["info"]["questions"] == len(tuned)
    assert about["identity"]["data"]["sha256"] != scenes.sha256


def test_without_margins_the_table_stands_and_says_so(
    loaded: models.Loaded, scenes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmattn.eval.answer.yes_no_tokens", lambda tokenizer: None)
    rows = runner.sweep(loaded, scenes, {"none": "none"}, tmp_path, settings(threshold=True, limit=2))
    assert len(rows) == 1 and "no threshold control" in rows[0].note and "no margin" in rows[0].note


def test_without_a_validation_split_the_table_says_so(loaded: models.Loaded, scenes: Any, tmp_path: Path) -> None:
    bench = dataclasses.replace(scenes, validation=None)
    (row,) = runner.sweep(loaded, bench, {"none": "none"}, tmp_path, settings(threshold=True, limit=2))
    assert "no threshold control" in row.note and "no other images" in row.note


def test_tokens_of_yes_and_no() -> None:
    class Tokenizer:
        """Writes a lone blank as a token, knows no capitals."""

        unk_token_id = 9

        def __init__(self, **words: int) -> None:
            self.words = words

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            blank = [0] if text.startswith(" ") else []
            return {"input_ids": [*blank, self.words.get(text.strip(), 9)]}

    assert yes_no_tokens(Tokenizer(yes=1, Yes=2, no=3, No=4)) == ([1, 2], [3, 4])
    assert yes_no_tokens(Tokenizer(yes=1, Yes=5, no=3, No=5)) == ([1], [3])
    assert yes_no_tokens(Tokenizer(yes=1)) is None


def test_the_baseline_is_first_whatever_was_typed() -> None:
    typed = grid.expand("fastv; none; random(keep=0.25)")
    assert list(lineup.with_baseline(typed)) == ["none", "fastv", "random(keep=0.25)"]
    assert list(lineup.with_baseline(grid.expand("fastv"))) == ["none", "fastv"]
    other = lineup.with_baseline(typed, "random( keep=0.25 )")
    assert next(iter(other.items())) == ("random(keep=0.25)", "random(keep=0.25)")
    assert list(other) == ["random(keep=0.25)", "fastv", "none"]
    with pytest.raises(DataError, match="is 2 specs"):
        lineup.with_baseline(typed, "none; fastv")


def test_matched_levels_and_controls_make_the_rows() -> None:
    specs = lineup.with_baseline(grid.expand("fastv(before_layer=2); uniform; vhr"))
    found = lineup.line_up(specs, num_layers=6, visual_tokens=144, levels=(0.5, 0.25), seeds=2)
    shown = [(entry.label, entry.role) for entry in found]
    assert shown[0] == ("none", "baseline")
    assert shown[1][1] == "method" and shown[1][0].startswith("fastv(keep=0.25")
    assert shown[2] == (found[2].below.label, "below floor") and found[2].spec == ""  # two of six layers see everything
    assert [label for label, role in shown if role == "method"][1:] == [
        "uniform(keep=0.5)",
        "uniform(keep=0.25)",
        "vhr",
    ]
    extra = [entry.spec for entry in found if entry.role == "control"]
    assert "noimage" in extra and "noimage(before_layer=2)" in extra
    assert sum(spec.startswith("random") for spec in extra) == 2 * 3
    assert len({entry.spec for entry in found if entry.spec}) == sum(bool(entry.spec) for entry in found)
    row = summary.below_floor(found[2].below)
    assert "floor" in row.note


def controls_of(methods: str, seeds: int = 0, baseline: str = "none") -> dict[str, str]:
    specs = lineup.with_baseline(grid.expand(methods), baseline)
    return lineup.matching_controls(lineup.line_up(specs, num_layers=6, visual_tokens=144, seeds=seeds), 6, 144)


def test_a_method_is_paired_with_the_random_row_of_its_own_layer_and_budget() -> None:
    fastv, early = "fastv(keep=0.25, before_layer=2)", "uniform(keep=0.25)"
    assert controls_of(f"{fastv}; {early}; vhr") == {}
    added = controls_of(f"{fastv}; {early}; vhr; {fastv} + var", seeds=2)
    assert added[fastv] == added[f"{fastv} + var"] == "random(keep=0.25, before_layer=2)"
    assert controls.resolved(added[early], 6) == controls.resolved("random(keep=0.25, before_layer=0)", 6)
    assert len(added) == 3  # vhr prunes nothing, controls have no controls


def test_a_method_of_several_stages_is_paired_with_a_random_row_of_its_average() -> None:
    method = "pyramiddrop(before_layer=(2, 3, 4))"
    assert controls_of(method, seeds=1) == {method: "random(keep=0.25, before_layer=2)"}  # 72, 36, 18, 18
    assert controls_of(f"random(keep=0.5, before_layer=2); {method}") == {}
    assert lineup.written_out("pool(size=2)") == "pool(size=2)"


def test_a_random_row_that_was_typed_counts_if_it_is_the_same() -> None:
    fastv = "fastv(keep=0.25, before_layer=2)"
    (typed,) = grid.expand("random(before_layer=2, keep=0.25)")
    assert controls_of(f"{typed}; {fastv}") == {fastv: typed}
    (plain,) = grid.expand("random(keep=0.25)")  # the layer is left to the method
    layer = controls.resolved(plain, 6)
    uniform = f"uniform(keep=0.25, before_layer={parse(layer)[0].before_layer})"
    assert list(controls_of(f"{plain}; {uniform}").values()) == [plain]
    for other in ("keep=0.5, before_layer=2", "keep=0.25, before_layer=3", "keep=0.25, before_layer=2, seed=1"):
        assert controls_of(f"random({other}); {fastv}") == {}
    assert controls_of(fastv, baseline=typed) == {}  # the baseline is compared with already


def test_a_sweep_tests_methods_against_their_random_rows(loaded: models.Loaded, scenes: Any, tmp_path: Path) -> None:
    specs = grid.expand("none; fastv(keep=0.25, before_layer=2); var; random(keep=0.25, before_layer=2)")
    with models.quiet(), pytest.warns(VlmattnWarning, match="var does nothing on 'scenes-llava'"):
        rows = runner.sweep(loaded, scenes, specs, tmp_path, settings())
    assert [row.label for row in rows] == list(specs.values())
    assert [row.control for row in rows] == ["", "random(keep=0.25, before_layer=2)", "", ""]
    first, second = (runner.Run.load(tmp_path / name) for name in (runner.slug(rows[3].spec), FASTV))
    pairs = {pair.key: pair for pair in stats.paired(first.tally, second.tally)}
    assert rows[1].versus_control == pairs
    assert rows[2].note.startswith("changes nothing here")  # no sinks, no redistribution
    stored = json.loads((tmp_path / "summary.json").read_text())["runs"][1]
    assert stored["control"] == rows[1].control and set(stored["versus_control"]) == set(pairs)
    page = (tmp_path / "index.html").read_text()
    assert "Against random tokens at the same layer" in page and "random tokens at the same layer in" in page


def test_levels_as_typed() -> None:
    assert lineup.levels("auto") == ()
    assert lineup.levels("0.75, 0.5") == (0.75, 0.5) and lineup.levels("1") == (1.0,)
    for text in ("1.5", "0", "half", "64"):
        with pytest.raises(DataError, match=r"expected auto or 0\.75,0\.5"):
            lineup.levels(text)


def test_visual_tokens_of_an_image(loaded: models.Loaded, scenes: Any) -> None:
    assert runner.visual_tokens(loaded, scenes) == 144

    def broken(name: str) -> Any:
        raise OSError("gone")

    with pytest.raises(DataError, match="gone"):
        runner.visual_tokens(loaded, SimpleNamespace(items=scenes.items, open_image=broken))  # type: ignore[arg-type]
