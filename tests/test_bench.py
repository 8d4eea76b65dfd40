"""The bench: proofs before times, a record with everything promised, and no library that it does not need."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vlmattn import cli
from vlmattn.bench import QUICK, Settings, __main__, gate, result, selection
from vlmattn.bench.cases import PLAIN, Shapes, cases, counting, installed, tagging_var
from vlmattn.bench.measure import Timing
from vlmattn.bench.run import run
from vlmattn.errors import SpecError
from vlmattn.kernels import dispatch, rows
from vlmattn.patches import passes
from vlmattn.scenes import bench_model

ROOT = Path(__file__).resolve().parents[1]
SMALL = gate.SMALL
RECORD = {"bench", "command", "versions", "cpu", "load", "model", "repeats", "proofs", "configurations", "vision",
          "scoring", "targets"}  # fmt: skip
ROW = {"name", "spec", "prefill_ms", "prefill_ratio", "prefill_cpu_ratio", "macs_ratio", "saving_realised",
       "decode_ms_per_token", "kv_bytes", "heads_n_n_tensors", "n_n_masks", "edited_rows", "raw"}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return bench_model.build(SMALL, initializer_range=gate.SPREAD)


@pytest.fixture(scope="module")
def inputs():
    return bench_model.prompt(SMALL)


def test_a_quick_run_writes_what_is_promised(tmp_path, monkeypatch):
    monkeypatch.setattr(gate, "prove", lambda: [])
    assert __main__.main(["--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "cpu-bench-llava.json").read_text())
    assert set(record) >= RECORD
    assert record["command"].startswith("python -m vlmattn.bench --quick --threads 1")
    assert record["cpu"]["threads"] == 1 and record["cpu"]["model"]
    rows = {row["name"]: row for row in record["configurations"]}
    assert next(iter(rows)) == PLAIN and len(rows) == 10
    for row in rows.values():
        assert set(row) >= ROW
        assert len(row["raw"]["prefill_s"]) == len(row["raw"]["decode_s"]) == record["repeats"] == QUICK.repeats
        assert bool(row["heads_n_n_tensors"]) is (row["attention"] == "eager")
    assert rows[PLAIN]["prefill_ratio"] == rows[PLAIN]["macs_ratio"] == 1.0
    assert rows["fastv, keep 0.25"]["macs_ratio"] < rows["fastv, keep 0.5"]["macs_ratio"] < 1
    assert rows["var through rows"]["edited_layers"] == QUICK.layers - 3
    assert not any(row["n_n_masks"] for name, row in rows.items() if "vhr" not in name and name != "eager")
    chosen = {row["spec"]: row for row in record["selection"]}
    refused = {spec for spec in chosen if "refused" in chosen[spec]}
    assert refused == {"cdpruner(keep=0.3)", "recoverable"}
    assert {"divprune(keep=0.3)", "cdpruner(keep=0.3, relevance=embeddings)", "vflowopt(keep=0.3)"} <= set(chosen)
    for row in chosen.values():
        assert "refused" in row or (len(row["raw_s"]) == record["repeats"] and row["share_of_prefill"] > 0)
    page = (tmp_path / "cpu-bench-llava.md").read_text()
    assert all(f"`{spec}`" in page for spec in chosen) and "text tower" in page
    assert all(f"| {name} |" in page for name in rows) and record["cpu"]["model"] in page
    assert (tmp_path / "cpu-bench-llava.png").stat().st_size > 10_000


def test_the_gate_passes():
    proofs = gate.prove()
    assert len(proofs) == 7
    claims = {claim["name"] for proof in proofs for claim in proof["claims"] if claim["verdict"] == "pass"}
    assert claims == {"no-op", "removal = masking", "oracle generation", "backends", "undo"}


@pytest.mark.parametrize("defect", ["backend", "pruning"])
def test_nothing_is_timed_while_a_proof_fails(defect, monkeypatch, tmp_path, capsys):
    if defect == "backend":
        monkeypatch.setitem(dispatch.BACKENDS, "rows", lambda *a: (rows.apply(*a)[0] * 1.01, None))
    else:
        monkeypatch.setattr(
            passes, "prefill_mask", lambda mask, stage: torch.ones(1, 1, stage.size, stage.size, dtype=torch.bool)
        )
    assert __main__.main(["--quick", "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "nothing is timed" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_an_edit_that_changes_nothing_is_not_timed(monkeypatch):
    monkeypatch.setattr(gate, "tagging_var", lambda *args: "var(sinks=[0], tau=1000.0)")
    with pytest.raises(gate.GateError, match="its time would mean nothing"):
        gate.prove()


def test_the_measured_sinks_are_tagged_in_every_edited_layer(model, inputs):
    spec = tagging_var(model, inputs, inputs["input_ids"][0] == bench_model.IMAGE_ID)
    case = next(case for case in cases(spec) if case.spec == spec)
    with torch.no_grad(), counting() as changed, installed(model, case):
        model(**inputs)
    assert len(changed) == SMALL.layers - 3 and all(changed)
    assert dispatch.BACKENDS["rows"] is rows.apply


def test_eager_is_installed_and_undone(model, inputs):
    eager = next(case for case in cases("vhr") if case.attention == "eager")
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), installed(model, eager), Shapes() as shapes:
        model(**inputs)
    assert (1, SMALL.heads, length, length) in shapes.squares({length}, SMALL.heads)[0]
    with torch.no_grad(), Shapes() as shapes:
        model(**inputs)
    assert shapes.squares({length}, SMALL.heads) == ([], [])


def test_summary_by_hand():
    case = cases("vhr")[0]
    plain = Timing(case, [1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [[0.1, 0.3, 0.2]] * 3, macs=100)
    fast = Timing(case, [0.5, 1.0, 1.0], [0.5, 1.0, 1.0], [[0.1]] * 3, macs=40)
    row = result.summary(fast, plain)
    assert row["prefill_ratio"] == 0.5 and row["prefill_ratio_of_medians"] == 0.5
    assert row["saving_realised"] == pytest.approx(0.5 / 0.6)
    assert row["decode_ratio"] == pytest.approx(0.5) and row["prefill_ms"]["median"] == 1000


def test_shares_of_choosing_by_hand():
    choosing = selection.Choosing("fastv", seconds=[0.02, 0.01, 0.09])
    row = selection.summary(choosing, [1.0, 1.0, 2.0])
    assert (row["ms"], row["share_of_prefill"], row["largest_share"], row["met"]) == (20.0, 0.02, 0.045, True)
    slow = selection.summary(selection.Choosing("slow", seconds=[0.04]), [1.0])
    refused = selection.summary(selection.Choosing("never", refused="no text tower"), [1.0])
    lines = selection.page([row, slow, refused])
    assert "Above the bound: `slow`." in lines and "- `never`: no text tower" in lines
    assert lines.index("| `slow` | 40.0 | 4.00% | 4.00% | no |") < lines.index(
        "| `fastv` | 20.0 | 2.00% | 4.50% | yes |"
    )
    assert "All are below the bound." in selection.page([row])


@pytest.mark.parametrize(
    "wrong", [{"layers": 2}, {"dim": 100}, {"tokens": 7 * 13}, {"repeats": 0}, {"steps": 0}], ids=str
)
def test_sizes_that_make_no_model(wrong):
    with pytest.raises(SpecError):
        run(dataclasses.replace(QUICK, **wrong), print)


def test_the_default_is_the_model_of_the_design():
    settings = Settings()
    shape = bench_model.Shape.of(settings.layers, settings.dim, settings.tokens)
    assert (shape.layers, shape.dim, shape.heads, shape.mlp, shape.visual) == (24, 1024, 16, 2816, 2048)
    assert settings.repeats == 7


def test_help_and_run_need_no_command_or_table_library():
    code = (
        "import runpy, sys; sys.argv = ['bench', '--help']\n"
        "def found(*names): print('FOUND', sorted(set(names) & set(sys.modules)))\n"
        "try: runpy.run_module('vlmattn.bench', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "found('typer', 'rich', 'matplotlib', 'datasets', 'torch')\n"
        "import vlmattn.bench.run\n"
        "found('typer', 'matplotlib', 'datasets')"  # older transformers import rich themselves
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--repeats" in done.stdout and done.stdout.splitlines()[-2:] == ["FOUND []", "FOUND []"]


def test_the_command_passes_its_options_on(monkeypatch, tmp_path):
    seen: list[list[str]] = []
    monkeypatch.setattr(__main__, "main", lambda words: seen.append(list(words)) or 1)
    done = CliRunner().invoke(cli.app, ["bench", "--quick", "--layers", "5", "--out", str(tmp_path)])
    assert done.exit_code == 1
    assert seen == [["--layers", "5", "--out", str(tmp_path), "--quick"]]
