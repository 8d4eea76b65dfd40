"""The command: help that teaches, pure JSON, one red line for a mistake, exit codes, and the real thing end to end."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vlmattn import __version__
from vlmattn.cli import app
from vlmattn.eval import models, records
from vlmattn.eval.runs import Run

METHODS = "none; fastv(keep=0.25, before_layer=2)"


def vlmattn(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, [str(argument) for argument in arguments])


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_help_teaches_with_examples() -> None:
    text = plain(vlmattn("--help").output)
    for word in (
        "demo",
        "run",
        "eval",
        "methods",
        "models",
        "needs no download",
        "fastv(keep=0.5) + random",
        "Exit codes",
    ):
        assert word in text, word
    text = plain(vlmattn("eval", "--help").output)
    for word in (
        "--methods",
        "--limit",
        "--batch-size",
        "--model",
        "--dtype",
        "--device",
        "--out",
        "--keep",
        "--range",
        "--match",
        "--controls",
        "--baseline",
        "RUCAIBox/POPE",
        "Examples",
    ):
        assert word in text, word
    assert "--show kept.png" in plain(vlmattn("run", "--help").output)


def test_version_and_no_arguments() -> None:
    assert vlmattn("--version").output == f"vlmattn {__version__}\n"
    assert "demo" in vlmattn().output


@pytest.mark.parametrize("command", ["methods", "models"])
def test_json_is_a_list_with_name_kind_and_paper(command: str) -> None:
    result = vlmattn(command, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found and all({"name", "kind", "paper"} <= set(entry) for entry in found)
    names = {entry["name"] for entry in found}
    if command == "methods":
        assert {"fastv", "random", "uniform"} <= names
    else:
        assert "scenes-llava" in names and {"embedded", "family"} == {entry["kind"] for entry in found}
        assert {"llava", "qwen2_5_vl"} <= {entry.get("model_type") for entry in found}
    table = vlmattn(command)
    assert table.exit_code == 0 and all(name in table.output for name in names)


def test_the_command_starts_without_torch() -> None:
    code = (
        "import sys, vlmattn.cli; assert not {'torch', 'transformers', 'matplotlib', 'scipy', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "--methods", "none; fastvv(keep=0.5)"], "did you mean 'fastv'"),
        (["eval", "--methods", "fastv(kep=0.5)"], "did you mean 'keep'"),
        (["eval", "--methods", "fastv(keep=1.5)"], "1.5"),
        (["eval", "--bench", "pop"], "did you mean 'pope'"),
        (["eval", "--profile", "loose"], "official, lmms_eval"),
        (["eval", "--limit", "0"], "--limit 0 must be 1 or more"),
        (["eval", "--model", "no/such-model"], "coco_pope_random.json"),
        (["eval", "--model", "scenes-lava"], "did you mean 'scenes-llava'"),
        (["methods", "fastw"], "did you mean 'fastv'"),
        (["eval", "--data", "nowhere"], "nowhere is not a folder"),
        (["eval", "--data", "nowhere", "--scenes", "5"], "--scenes is for rendered images"),
        (["eval", "--bench", "scenes", "--tasks", "digit"], "did you mean 'digits'"),
        (["eval", "--world", "3"], "world '3' of the scenes is unknown"),
        (["eval", "--data", "nowhere", "--world", "2"], "--world 2 is about rendered scenes"),
        (["eval", "--methods", "vhr", "--keep", "0.5"], "no spec takes keep: vhr has alpha"),
        (["eval", "--keep", "a b"], "'a b' is not a value"),
        (["eval", "--range", "1..4"], "is not FIELD=VALUES"),
        (["eval", "--match", "auto", "--keep", "0.5"], "--match chooses keep itself"),
        (["eval", "--match", "auto", "--methods", "random", "--range", "random.keep=0.5"], "the values of random.keep"),
        (["eval", "--match", "auto", "--range", "keepers=1..2"], "no spec takes keepers"),
        (["eval", "--keep", "0,5"], "a decimal point is meant: --keep 0.5"),
        (["eval", "--range", "keep=0..1e9999999:0.1"], "is not a number that makes sense in a range"),
        (["eval", "--seed", "-1"], "--seed -1 must be 0 or more"),
        (["eval", "--seed", str(2**63)], "below 2**63"),
        (["compare", "nowhere", "--seed", "-1"], "--seed -1 must be 0 or more"),
        (["compare", "nowhere", "--seed", str(10**30)], "below 2**63"),
        (["eval", "--match", "2"], "no share of the visual tokens"),
        (["eval", "--baseline", "none; fastv"], "is 2 specs"),
        (["run", "nowhere.png", "What is this?"], "nowhere.png does not exist"),
        (["run", "nowhere.png"], "what shall be asked"),
        (["run", "scene:x"], "is not a scene"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], words: str) -> None:
    result = vlmattn(*arguments)
    assert result.exit_code == 2
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert words in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "no/such-model"], "cannot load the model 'no/such-model'"),
        (["--dtype", "int8"], "auto, float32, bfloat16, float16"),
        (["--device", "cuda:77"], "--device 'cuda:77' cannot be used"),
        (["--methods", "fastv(before_layer=99)"], "99"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_that_only_the_model_shows(arguments: list[str], words: str) -> None:
    result = vlmattn("run", "scene:1", *arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr and "Traceback" not in result.stderr


def test_run_answers_with_and_without_and_draws(tmp_path: Path) -> None:
    from PIL import Image

    result = vlmattn(
        "run",
        "scene:3",
        "--methods",
        "fastv(keep=0.25, before_layer=2); uniform(keep=16)",
        "--show",
        tmp_path / "kept.png",
    )
    assert result.exit_code == 0, result.output
    text = plain(result.stdout)
    assert text.startswith("Where is the") and "none" in text and "of 144" in text and re.search(r"\d [KM]iB", text)
    assert "fastv(keep=0.25, before_layer=2): 36 of 144 kept before layer 2" in text
    assert "uniform(keep=16): 16 of 144 kept before the first layer" in text
    assert "(of 12 layers); mean row at 0." in text
    assert Image.open(tmp_path / "kept.png").width > 600


def test_run_reads_a_file_and_refuses_a_broken_one(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (120, 80), (200, 30, 30)).save(tmp_path / "red.jpg")
    assert vlmattn("run", tmp_path / "red.jpg", "Is there a dog in the image?").exit_code == 0
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no")
    result = vlmattn("run", tmp_path / "broken.jpg", "Is there a dog in the image?")
    assert result.exit_code == 2 and "cannot be read as an image" in result.stderr
    result = vlmattn("run", "scene:1", "--methods", "none", "--show", tmp_path / "x.png")
    assert result.exit_code == 2 and "nothing to draw" in result.stderr


def test_eval_writes_folders_resumes_and_refuses_another_run(tmp_path: Path) -> None:
    arguments = ["eval", "--methods", METHODS, "--limit", 6, "--batch-size", 9, "--out", tmp_path / "out"]
    first = vlmattn(*arguments)
    assert first.exit_code == 0, first.output
    for word in ("none", "of 144", "fastv(keep=0.25, before_layer=2)", "accuracy", "F1", "KV cache", "prefill"):
        assert word in first.stdout
    assert "--controls adds" in plain(first.stdout) and "index.html" in first.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [run["label"] for run in summary["runs"]] == ["none", "fastv(keep=0.25, before_layer=2)"]
    for run in summary["runs"]:
        folder = Path(run["folder"])
        assert len(records.read_records(folder)) == 18
        identity = records.read_run(folder)["identity"]
        assert identity["spec"] == run["spec"] and identity["decode"]["do_sample"] is False
        assert identity["data"]["world"] == models.world("scenes-llava")
        cost = json.loads((folder / "cost.json").read_text())
        assert cost["kv_bytes"] <= cost["kv_bytes_full"] and cost["prefill_ms"] > 0
        assert cost["visual_per_layer"][:2] == [144, 144] and len(cost["visual_per_layer"]) > 2
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("records.jsonl")}
    again = vlmattn(*arguments)
    assert again.exit_code == 0
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("records.jsonl")}
    elsewhere = vlmattn(*arguments, "--world", "qwen")
    assert elsewhere.exit_code == 2 and "data.world (--world or --model) was" in plain(elsewhere.stderr)
    other = vlmattn(*arguments[:-4], "--batch-size", 5, "--out", tmp_path / "out")
    assert other.exit_code == 2
    assert "decode.batch_size (--batch-size) was 9, now it is 5" in plain(other.stderr) and "--out" in other.stderr


def test_an_out_that_is_a_file_or_in_one_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "x"):
        result = vlmattn("eval", "--methods", "none", "--limit", 1, "--scenes", 2, "--out", out)
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert "file is a file; choose another --out" in result.stderr


def test_a_word_table_that_does_not_fit_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text(json.dumps({"classes": {"dog": ["hound"]}}))
    scenes = ("eval", "--model", "no/such-model", "--bench", "scenes", "--scenes", 2)
    result = vlmattn(*scenes, "--words", tmp_path / "words.json", "--out", tmp_path / "out")
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert "not among the classes of the word table" in result.stderr and result.stderr.count("\n") == 1


def test_answers_read_otherwise_are_compared_as_the_table_has_them(tmp_path: Path) -> None:
    arguments = ["eval", "--methods", METHODS, "--limit", 4, "--scenes", 8, "--out", tmp_path / "out"]
    assert vlmattn(*arguments).exit_code == 0
    before = records.read_run(tmp_path / "out" / "none")
    assert before["info"]["profile"] == "official"
    assert vlmattn(*arguments, "--profile", "lmms_eval").exit_code == 0
    for folder in filter(Path.is_dir, (tmp_path / "out").iterdir()):
        after = records.read_run(folder)
        assert after["info"]["profile"] == "lmms_eval"
    assert records.read_run(tmp_path / "out" / "none")["identity"] == before["identity"]
    done = vlmattn("compare", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    table = json.loads((tmp_path / "out" / "summary.json").read_text())["runs"]
    assert json.loads(done.stdout) and Run.load(tmp_path / "out" / "none").score["profile"] == "lmms_eval"
    assert Run.load(tmp_path / "out" / "none").score["values"] == table[0]["score"]["values"]


def test_folders_that_were_spoilt_are_a_mistake(tmp_path: Path) -> None:
    arguments = ["eval", "--methods", "none", "--limit", 2, "--scenes", 4, "--out", tmp_path / "out"]
    assert vlmattn(*arguments).exit_code == 0
    cost, said = (tmp_path / "out" / "none" / name for name in (records.COST, records.RECORDS))
    good = cost.read_text()
    cost.write_text("[1]")

    def refused(words: str) -> None:
        for command in (arguments, ["compare", tmp_path / "out" / "none", tmp_path / "copy"]):
            result = vlmattn(*command)
            assert result.exit_code == 2 and words in result.stderr, result.output
            assert result.stderr.count("error: ") == 1 and "Traceback" not in result.output

    shutil.copytree(tmp_path / "out" / "none", tmp_path / "copy")
    refused("cost.json holds [1], expected a JSON object")
    cost.write_text(good)
    first, *others = [json.loads(line) for line in said.read_text().splitlines()]
    del first["cost"]
    said.write_text("".join(json.dumps(line) + "\n" for line in (first, *others)))
    refused(f"record '{first['id']}' lacks cost")


def test_a_folder_of_another_run_is_refused_before_there_is_a_bar(tmp_path: Path) -> None:
    arguments = ["eval", "--methods", METHODS, "--limit", 1, "--scenes", 2, "--out", tmp_path / "out"]
    folder = tmp_path / "out" / "fastv-keep=0.25,before_layer=2"
    records.RunFolder(folder, {"spec": "another"}).close()
    result = vlmattn(*arguments)
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "holds another run" in result.stderr and not (tmp_path / "out" / "none").exists()


def test_eval_runs_a_grid_with_matched_rows_and_controls(tmp_path: Path) -> None:
    def rows(*arguments: object) -> list[tuple[str, str]]:
        result = vlmattn("eval", "--limit", 2, "--scenes", 5, "--out", tmp_path / "out", *arguments)
        assert result.exit_code == 0, result.output
        found = json.loads((tmp_path / "out" / "summary.json").read_text())["runs"]
        assert all(label in plain(result.stdout) for label in (run["label"].split("(")[0] for run in found))
        return [(run["label"], run["role"]) for run in found]

    assert rows("--methods", "fastv; vhr", "--keep", "0.5,0.25", "--range", "before_layer=1..2") == [
        ("none", "baseline"),
        *((f"fastv(keep={keep}, before_layer={layer})", "method") for keep in (0.5, 0.25) for layer in (1, 2)),
        ("vhr", "method"),
    ]
    matched = rows("--methods", "fastv(before_layer=3)", "--match", "0.75,0.25", "--controls", "--control-seeds", 2)
    assert [role for _, role in matched] == ["baseline", "method", "below floor", *["control"] * 6]
    names = ["random", "random", "uniform", "noimage", "noimage", "threshold"]
    assert [label.split("(")[0] for label, _ in matched[3:]] == names


def test_eval_names_broken_images_goes_on_and_exits_1(tmp_path: Path) -> None:
    from vlmattn.scenes import benchmark

    tasks = ("exist-random", "exist-popular", "exist-adversarial")
    data = benchmark(tasks=tasks, images=4)
    data.save(tmp_path / "data")
    broken = tmp_path / "data" / "images" / data.names[0]
    good = broken.read_bytes()
    broken.write_bytes(good[: len(good) // 2])
    arguments = [
        "eval",
        "--data",
        tmp_path / "data",
        "--prompt",
        "bare",
        "--methods",
        "none",
        "--out",
        tmp_path / "out",
    ]
    result = vlmattn(*arguments)
    assert result.exit_code == 1
    assert data.names[0] in result.stderr and "have no answer" in result.stderr and "--retry-failed" in result.stderr
    found = records.read_records(tmp_path / "out" / "none")
    lost = [record for record in found if record["status"] == "failed"]
    assert len(found) == len(data.rows) and lost and {record["image"] for record in lost} == {data.names[0]}
    broken.write_bytes(good)
    assert vlmattn(*arguments, "--retry-failed").exit_code == 0
    assert all(record["status"] == "ok" for record in records.read_records(tmp_path / "out" / "none"))


def test_our_warnings_are_a_note_without_a_place_in_the_source() -> None:
    done = vlmattn("run", "scene:1", "--methods", "var")
    assert done.exit_code == 0, done.output
    assert "note: var does nothing on 'scenes-llava'" in plain(done.stderr)
    assert "VlmattnWarning" not in done.stderr and ".py:" not in done.stderr


def test_layers_prints_a_spec_that_can_be_used() -> None:
    options = ("--drop", 2, "--apart", "--question", "Describe the image.")
    found = json.loads(vlmattn("layers", *options, "--json").output)
    assert len(found["scores"]) == 12 and found["prompts"] == 32 and found["protected"] == [0, 4, 8]
    first, second = found["layers"]
    assert second - first > 1 and not {0, 4, 8, 11} & {first, second}
    assert found["spec"] == f"layerskip(layers=({first}, {second}))"
    table = vlmattn("layers", *options)
    assert table.exit_code == 0 and f'Use: --methods "{found["spec"]}"' in table.output
    assert "left out, choice 1" in table.output and "protected" in table.output
    result = vlmattn("layers", "--score", "l2")
    assert result.exit_code == 2 and "expected one of angular_last" in plain(result.output)
