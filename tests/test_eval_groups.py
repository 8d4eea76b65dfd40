"""A kind of methods as what is run: its members, what the model refuses, and the table of all of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rows as made
from typer.testing import CliRunner

from vlmattn import cli, spec
from vlmattn.errors import BudgetError, UnsupportedModelError, VlmattnError
from vlmattn.eval import bench as benches
from vlmattn.eval import budgets, controls, grid, lineup, markdown, models, place_plots, places, runner, summary, timing
from vlmattn.eval.records import pack_tokens

DEEP = {"num_layers": 12, "visual_tokens": 144}


def record(kept: list[int], grid: list[int], **more: Any) -> dict[str, Any]:
    total = grid[0] * grid[1] * grid[2]
    return {"kept": [{"mask": pack_tokens(kept, total)}], "geometry": {"grid": grid}, **more}


# Groups


def test_a_kind_stands_for_its_methods() -> None:
    registry = spec.registry()
    assert grid.members("attend") == [name for name, info in registry.items() if info.kind == "attend"]
    pruners = grid.members("prune")
    assert {"fastv", "divprune", "random", "downsample"} <= set(pruners)
    assert "oraclebox" not in pruners  # the whole box drops nothing
    assert grid.members("fastv") == [] and grid.members("nothing") == []
    found = grid.expand("prune; fastv(before_layer=3)")
    assert list(found) == [*pruners, "fastv(before_layer=3)"]
    assert grid.grouped("prune; fastv") == set(pruners) - {"fastv"} and grid.grouped("fastv; random") == set()


def test_a_kind_takes_budgets_where_its_methods_have_one() -> None:
    found = grid.expand("prune", {"keep": [0.5, 0.25]})
    assert {"fastv(keep=0.25)", "fastv", "noimage"} <= set(found)
    assert found["fastv"] == "fastv(keep=0.5)"


def test_what_the_model_refuses_is_a_row_that_says_why() -> None:
    specs = {"none": "none", "cdpruner": "cdpruner", "fastv": "fastv"}
    found = lineup.line_up(specs, **DEEP, levels=[0.5], refused={"cdpruner": "no text tower"})
    assert [(entry.label, entry.role) for entry in found] == [
        ("none", "baseline"),
        ("cdpruner", "refused"),
        ("fastv(keep=0.45)", "method"),
    ]
    row = summary.refused(found[1].label, found[1].refused)
    assert row.note == "refused: no text tower" and row.value("mean_accuracy") is None and not row.spec


def test_only_refusals_are_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrapped(loaded: Any, text: str) -> Any:
        if text == "hired":
            raise UnsupportedModelError("no such rows")
        return SimpleNamespace(remove=lambda: None)

    monkeypatch.setattr(models, "wrapped", wrapped)
    loaded: Any = None
    assert runner.refusals(loaded, ["fastv", "hired"]) == {"hired": "no such rows"}


# Budgets that a method refuses


@pytest.mark.parametrize("text", [name for name in grid.members("prune")])
@pytest.mark.parametrize(("layers", "visual"), [(12, 144), (4, 16)])
def test_every_pruner_can_be_matched_or_says_why_not(text: str, layers: int, visual: int) -> None:
    for match in budgets.match_average_tokens(text, [0.75, 0.5, 0.2], num_layers=layers, visual_tokens=visual):
        if match.level is None:
            continue
        assert (match.spec is None) == bool(match.floor_text)
        if match.spec is not None:
            counts = spec.parse(match.spec)[0].expected_tokens(visual, layers)
            assert sum(counts) / layers == match.average


def test_a_level_beyond_what_a_schedule_allows_has_its_reason() -> None:
    high, low = budgets.match_average_tokens("schedule(ceiling=0.3)", [0.75, 0.25], **DEEP)
    assert high.spec is None and "between 0.0897 and 0.3583" in high.floor_text
    assert low.spec == "schedule(keep=0.25, ceiling=0.3)" and low.floor_text == ""
    with pytest.raises(BudgetError):
        spec.parse("schedule(ceiling=0.3, keep=0.75)")[0].expected_tokens(144, 12)


# Controls


def test_evenly_spread_tokens_are_a_control_beside_random_ones() -> None:
    found = list(controls.specs_for(["fastv(keep=0.25)", "uniform(keep=0.5)"], **DEEP, even=True))
    assert found[:2] == ["random(keep=0.25, before_layer=1)", "random(before_layer=0)"]
    assert found[2] == "uniform(keep=0.25, before_layer=1)" and found[-1] == "noimage"
    assert controls.resolved("uniform(keep=0.5)", 12) not in found  # it is run already
    (scoped, *_) = controls.specs_for(["fastv(keep=9, budget_scope=sample)"], **DEEP, even=True).items()
    assert scoped[0].startswith("random(keep=9, before_layer=1, budget_scope=sample)")


def test_a_method_is_tested_against_both() -> None:
    specs = lineup.with_baseline(grid.expand("fastv(keep=0.25, before_layer=2)"))
    entries = lineup.line_up(specs, **DEEP, seeds=1)
    for name in ("random", "uniform"):
        found = lineup.matching_controls(entries, 12, 144, name)
        assert found == {"fastv(keep=0.25, before_layer=2)": f"{name}(keep=0.25, before_layer=2)"}


# Where kept tokens are


def test_the_mean_row_and_the_bands_of_kept_tokens() -> None:
    assert places.kept_rows([record([12, 13, 14, 15], [1, 4, 4])]) == {
        "kept_row": 0.875,
        "kept_bands": [0, 0, 0, 0, 0, 0, 0.5, 0.5],
    }
    even = places.kept_rows([record(list(range(15)), [1, 3, 5])])
    assert even["kept_row"] == pytest.approx(0.5) and even["kept_bands"] == pytest.approx([1 / 8] * 8)
    frames = places.kept_rows([record([0, 1, 4, 5], [2, 2, 2])])  # the top of both frames
    assert frames["kept_row"] == 0.25 and frames["kept_bands"] == pytest.approx([1 / 4] * 4 + [0] * 4)


def test_images_of_several_grids_count_every_token_in_its_own_grid() -> None:
    tiles = {
        "kept": [{"mask": pack_tokens([0, 1, 10], 12)}],
        "geometry": {"grid": [1, 2, 2], "more": [{"grid": [1, 4, 2]}]},
    }
    assert places.kept_rows([tiles])["kept_row"] == pytest.approx((0.25 + 0.25 + 0.875) / 3)


def test_questions_count_alike_and_the_last_stage_counts() -> None:
    first = record([0], [1, 2, 1]) | {"kept": [{"mask": pack_tokens([0, 1], 2)}, {"mask": pack_tokens([0], 2)}]}
    many = [first, record([2, 3], [1, 2, 2]), record([], [1, 2, 2]), {"status": "ok"}]
    assert places.kept_rows(many)["kept_row"] == 0.5
    assert places.kept_rows([record([], [1, 2, 2]), {}]) == {}


def sweep() -> list[summary.Row]:
    """As `rows.sweep`, with a timed method that keeps the bottom, and one that is refused."""
    base, method, *others = made.sweep()
    cost = {
        **method.cost,
        **{"prefill_ratio": 0.62, "selection_ms": 1.25, "selection_share": 0.008, "kv_exact": False},
        **{"kept_row": 0.71, "kept_bands": [0.0] * 4 + [0.25] * 4},
    }
    against = {"mean_accuracy": made.paired("mean_accuracy", 0.03, 0.001)}
    method = dataclasses.replace(method, cost=cost, versus_control=against, control="random", uniform="uniform")
    method = dataclasses.replace(method, versus_uniform={"mean_accuracy": made.paired("mean_accuracy", -0.02, 0.6)})
    return [base, method, *others, summary.refused("cdpruner", "no text tower")]


def test_the_plot_names_every_method_whose_tokens_are_known() -> None:
    svg = place_plots.kept_bands(sweep())
    assert svg.startswith("<svg") and "<image" not in svg
    assert svg == place_plots.kept_bands(sweep())


# The table


def test_the_table_in_markdown() -> None:
    lines = markdown.table(sweep(), {"mean_accuracy": "existence", "loc.hit": "localisation", "absent": "x"})
    head, _, base, method, *_ = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert head[:4] == ["method", "visual tokens", "existence %", "localisation %"]
    assert head[4:] == ["prefill MACs", "KV cache", "prefill, x", "choosing", "kept row"]
    assert base[0] == "`none`" and base[2] == "90.0" and base[6:] == ["-", "-", "-"]
    assert method[2] == "88.0 (−2.0)<br>r +3.0*, u −2.0"
    assert method[6:] == ["0.62", "1.25 ms<br>(0.8 %)", "0.71"]
    assert method[4] == "78 %"  # of the baseline's arithmetic
    assert "`random(keep=0.5, before_layer=2)` (control)" in "\n".join(lines) and "cdpruner" not in "\n".join(lines)
    assert len({line.count("|") for line in lines}) == 1


def test_the_page_says_how_it_was_made_and_what_is_missing() -> None:
    bench: Any = SimpleNamespace(name="scenes", source="rendered", scorer=SimpleNamespace(tasks={}))
    about = {"command": "vlmattn eval --methods prune", "model": "toy", "versions": {"torch": "2"}, "platform": "Linux"}
    text = markdown.page(bench, sweep(), about)
    assert "Made by `vlmattn eval --methods prune`." in text and "# scenes on toy" in text
    assert "- `cdpruner`: refused: no text tower" in text
    assert "The cache holds other bytes than the formula says: fastv(keep=0.5, before_layer=2)." in text
    assert "0.5 if even" in text and "accuracy %" in text  # without tasks the headlines


def test_the_page_and_the_terminal_have_the_new_columns() -> None:
    from vlmattn.eval import page_tables, tabular

    found = page_tables.cost_table(sweep())
    assert [column.title for column in found.columns][-3:] == ["prefill, x", "choosing", "kept row"]
    assert [cell.text for cell in found.rows[1].cells[-3:]] == ["0.62", "1.25 ms", "0.71"]
    assert found.rows[1].cells[-2].small == ["0.8 %"] and found.rows[-1].role == "none"
    assert tabular.tables("x", sweep(), 400)
    assert {"prefill_ratio", "kept_row"} <= set(tabular.csv_text(sweep()).splitlines()[0].split(","))
    assert not any("kept row" in note for note in tabular.notes(made.sweep()))


# With the embedded model


@pytest.fixture(scope="module")
def loaded() -> models.Loaded:
    with models.quiet():
        return models.load("scenes-llava")


def test_a_sweep_of_a_kind(loaded: models.Loaded, tmp_path: Path) -> None:
    """Timed, with controls, from refusal to table."""
    bench = benches.load("scenes", embedded=True, scenes_count=2, tasks=["random"], world=models.world("scenes-llava"))
    specs = {"none": "none", "fastv": "fastv", "cdpruner": "cdpruner", "downsample": "downsample"}
    refused = runner.refusals(loaded, list(specs))
    assert set(refused) == {"cdpruner", "downsample"} and "keeps the size of images" in refused["downsample"]
    entries = lineup.line_up(specs, **DEEP, levels=[0.5], seeds=1, refused=refused)
    settings = runner.Settings(batch_size=2, max_new_tokens=2, rounds=1, limit=2)
    rows = {row.label: row for row in runner.sweep(loaded, bench, entries, tmp_path, settings)}
    method = rows["fastv(keep=0.45)"]
    assert method.control and method.uniform and method.versus_uniform
    assert rows["none"].cost["prefill_ratio"] == 1.0 and rows["none"].cost["selection_ms"] == 0.0
    assert method.cost["selection_ms"] > 0 and method.cost["prefill_ratio"] > 0
    assert all(row.cost["kv_exact"] for row in rows.values() if row.cost["questions"])
    assert 0 < method.cost["kept_row"] < 1
    text = (tmp_path / summary.MARKDOWN).read_text()
    assert "existence %" in text and "`downsample`: refused" in text
    assert (tmp_path / summary.PLACES).read_text().startswith("<svg")
    assert "Where kept tokens are" in (tmp_path / "index.html").read_text()
    stored = json.loads((tmp_path / "summary.json").read_text())["runs"]
    assert stored[1]["cost"]["kv_exact"] is True and stored[1]["uniform"]


@pytest.mark.parametrize("text", ["divprune(keep=0.25)", "pyramiddrop", "visionzip(keep=0.25)", "sparsevlm"])
def test_what_the_cache_holds_is_what_the_formula_says(loaded: models.Loaded, text: str) -> None:
    bench = benches.load("scenes", embedded=True, scenes_count=1, tasks=["random"], world=models.world("scenes-llava"))
    images, prompt = timing._batch(bench, bench.items, 1)
    assert timing._prefill(loaded, text, images, prompt)[2]


def test_rounds_are_not_negative() -> None:
    with pytest.raises(VlmattnError, match="--rounds -1"):
        runner.Settings(rounds=-1)


def test_a_kind_on_the_command_line(tmp_path: Path) -> None:
    """Both attention edits, unmatched budgets and all: a table, and a file of it where it was wanted."""
    file = tmp_path / "docs" / "table.md"
    options = ["--tasks", "random", "--scenes", "1", "--limit", "1", "--max-new-tokens", "1", "--no-controls"]
    where = ["--out", str(tmp_path / "run"), "--markdown", str(file), "--rounds", "0"]
    done = CliRunner().invoke(cli.app, ["eval", "--bench", "scenes", "--methods", "attend", *options, *where])
    assert done.exit_code == 0, done.output
    labels = [row["label"] for row in json.loads((tmp_path / "run" / "summary.json").read_text())["runs"]]
    assert labels == ["none", *grid.members("attend")]
    assert file.read_text() == (tmp_path / "run" / "table.md").read_text() and "existence %" in file.read_text()
    assert "Controls are missing" in done.output


def test_budgets_are_matched_by_keep_or_by_match() -> None:
    done = CliRunner().invoke(cli.app, ["eval", "--methods", "prune", "--keep", "0.5", "--match", "auto"])
    assert done.exit_code == 2
