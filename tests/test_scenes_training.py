"""Training: the smoke run learns, and a killed run continues as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlmattn.scenes.dense import pretraining_batch, target_classes
from vlmattn.scenes.export import export, trained_model
from vlmattn.scenes.measure import FLOORS
from vlmattn.scenes.measure import main as measure
from vlmattn.scenes.optim import orthogonalize, warmup_stable_decay
from vlmattn.scenes.stages import Settings
from vlmattn.scenes.train import CHECKPOINT, CURVE, WEIGHTS, Running, main, smoke_settings, train
from vlmattn.scenes.versions import VERSIONS, Version

TINY = Settings(
    pretraining_steps=4,
    pretraining_batch=2,
    steps=6,
    habit_steps=2,
    batch=2,
    compile=False,
    model={"hidden": 32, "decoder_layers": 2, "vision_layers": 1, "heads": 2, "kv_heads": 2, "mlp": 64},
)


def run(out: Path, settings: Settings = TINY, **options) -> None:
    defaults = {"processes": 1, "checkpoint_every": 2, "monitor_scenes": 2}
    train(settings, Running(out, **(defaults | options)))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / WEIGHTS)


def curve(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / CURVE).read_text().splitlines()]


def assert_equal_runs(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    without_time = [
        [{k: v for k, v in entry.items() if k != "seconds"} for entry in curve(out)] for out in (one, other)
    ]
    assert without_time[0] == without_time[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    run(out)
    return out


def test_a_run_of_the_second_version_is_packaged_and_measured(tmp_path: Path) -> None:
    run(tmp_path, replace(TINY, version="2", model=TINY.model | {"kv_heads": 1, "decoder_layers": 3}))
    assert {"next", "pair-color", "pair-place", "pair-rel"} < curve(tmp_path)[-1].keys()
    model = trained_model(tmp_path)
    assert model.config.text_config.vocab_size == 144 and model.config.text_config.num_key_value_heads == 1
    export(tmp_path, tmp_path / "scenes-llava-2")
    measure(["--model", str(tmp_path / "scenes-llava-2"), "--questions", "2", "--seed", "1", "--card"])
    measured = json.loads((tmp_path / "scenes-llava-2" / "measured.json").read_text())
    assert measured["version"] == "2" and measured["deep"]["before_layer"] == 1
    assert {"next", "pair-color", "pair-place", "pair-rel"} < measured["tasks"].keys()
    assert [floor["name"] for floor in measured["floors"]] == list(FLOORS["2"])


@pytest.mark.parametrize("stop", [1, 4, 5, 9, 10, 11])
def test_a_stopped_run_continues_to_the_same_weights(undisturbed: Path, tmp_path: Path, stop: int) -> None:
    run(tmp_path, stop_after=stop)
    assert not (tmp_path / WEIGHTS).exists()
    run(tmp_path)
    assert_equal_runs(undisturbed, tmp_path)


def test_a_killed_process_continues_to_the_same_weights(undisturbed: Path, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; from pathlib import Path;"
        f"from test_scenes_training import run; run(Path({str(tmp_path)!r}))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / CHECKPOINT).exists() and time.monotonic() < deadline:
        assert child.poll() is None
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    run(tmp_path)
    assert_equal_runs(undisturbed, tmp_path)


def test_two_processes_learn_what_one_learns(undisturbed: Path, tmp_path: Path) -> None:
    """The mean of two half batches is not the mean of the whole (answers differ in number), so only nearly the same."""
    run(tmp_path, processes=2)
    one, two = weights(undisturbed), weights(tmp_path)
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 0.05


def test_other_settings_and_a_missing_checkpoint_are_refused(undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="other settings"):
        run(undisturbed, replace(TINY, seed=12))
    with pytest.raises(FileNotFoundError, match="--resume required"):
        run(tmp_path, resume="required")
    with pytest.raises(ValueError, match="batch=2 cannot be split"):
        run(tmp_path, processes=3)


def test_trained_weights_load_into_the_stock_model(undisturbed: Path) -> None:
    model = trained_model(undisturbed)
    stored = weights(undisturbed)
    state = model.state_dict()
    assert all(torch.equal(state[name], stored[name]) for name in stored)


def test_bfloat16_training_keeps_fp32_masters(tmp_path: Path) -> None:
    run(tmp_path, replace(TINY, precision="bfloat16"), stop_after=5)
    run(tmp_path, replace(TINY, precision="bfloat16"))
    stored = weights(tmp_path)
    assert all(weight.dtype == torch.float32 for weight in stored.values())
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in stored.values())


def test_both_losses_fall_in_a_smoke_run(tmp_path: Path) -> None:
    """A third of ``--smoke``: place targets are learned at once, answers a little."""
    settings = replace(smoke_settings(Settings()), pretraining_steps=30, steps=16, pretraining_batch=8, batch=4)
    run(tmp_path, settings, checkpoint_every=4, monitor_scenes=2)
    for stage, fall in (("pretraining", 1.0), ("joint", 0.2)):
        losses = [entry["loss"] for entry in curve(tmp_path) if entry["stage"] == stage]
        assert losses[-1] < losses[0] - fall


def test_command_line_describes_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "--smoke" in text and "--resume" in text and "--processes" in text


def test_orthogonalize_brings_singular_values_near_one() -> None:
    matrices = torch.randn(3, 24, 8, generator=torch.Generator().manual_seed(0))
    for shape in (matrices, matrices.transpose(1, 2)):
        values = torch.linalg.svdvals(orthogonalize(shape))
        assert values.min() > 0.5 and values.max() < 1.3


def test_learning_rate_schedule() -> None:
    factors = [warmup_stable_decay(step, 100, 10, 0.5) for step in range(100)]
    assert factors[0] == 0.1 and factors[9] == 1 and factors[50] == 1
    assert factors[75] == pytest.approx(0.5) and 0 < factors[99] < 0.03


@pytest.mark.parametrize("version", VERSIONS.values(), ids=VERSIONS)
def test_dense_targets_mark_plates_and_objects(version: Version) -> None:
    pixels, targets = pretraining_batch(version, 1, 0, 30)
    known = target_classes(version)
    assert pixels.shape == (30, 96, 96, 3) and targets.shape == (len(known), 30, 144)
    for (name, count), classes in zip(known.items(), targets, strict=True):
        assert classes.max() == count - 1, name
        assert set(range(count)) <= set(classes.ravel().tolist()) or name.startswith("digit")
    digits = targets[3] >= 0
    assert ((targets[0] == 8) == digits).all() and digits.any()
