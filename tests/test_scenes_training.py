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

from vlmattn.errors import DataError, TrainingError
from vlmattn.scenes import runs
from vlmattn.scenes import train as training
from vlmattn.scenes.dense import pretraining_batch, target_classes
from vlmattn.scenes.export import export, trained_model
from vlmattn.scenes.measure import FLOORS
from vlmattn.scenes.measure import main as measure
from vlmattn.scenes.monitor import Monitor
from vlmattn.scenes.optim import orthogonalize, warmup_stable_decay
from vlmattn.scenes.plateaus import STAGE_WEIGHTS, Bound, Check, abandoned, plateau, read_curve
from vlmattn.scenes.recipes import CHECKS, RECIPES
from vlmattn.scenes.stages import Settings
from vlmattn.scenes.train import CHECKPOINT, CURVE, SETTINGS, WEIGHTS, Running, main, smoke_settings, train
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
    train(settings, running(out, **options))


def running(out: Path, **options) -> Running:
    return Running(out, **({"processes": 1, "checkpoint_every": 2, "monitor_scenes": 2} | options))


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


def test_a_run_is_packaged_and_measured(tmp_path: Path) -> None:
    run(tmp_path, replace(TINY, model=TINY.model | {"kv_heads": 1, "decoder_layers": 3}))
    assert {"next", "pair-color", "pair-place", "pair-rel"} < curve(tmp_path)[-1].keys()
    model = trained_model(tmp_path)
    assert model.config.text_config.vocab_size == 144 and model.config.text_config.num_key_value_heads == 1
    export(tmp_path, tmp_path / "packaged")
    measure(["--model", str(tmp_path / "packaged"), "--questions", "2", "--seed", "1", "--card"])
    measured = json.loads((tmp_path / "packaged" / "measured.json").read_text())
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


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The loss of the first steps of stage 1, by seed."""
    found = {}
    for seed in (11, 12):
        out = tmp_path_factory.mktemp("loss")
        run(out, replace(TINY, seed=seed), checkpoint_every=3, stop_after=7)
        found[seed] = next(e["loss"] for e in curve(out) if (e["stage"], e["step"]) == ("joint", 3))
    assert found[11] != found[12]
    return found


def only(seed: int, losses: dict[int, float]) -> tuple[Check, ...]:
    """A check at step 3 of stage 1, where no checkpoint is due, that of both seeds only this one meets."""
    middle = sum(losses.values()) / 2
    low = losses[seed] < middle
    return (Check(3, (Bound("loss", below=middle) if low else Bound("loss", above=middle),), enough=1),)


@pytest.mark.parametrize("stop", [None, 2, 7, 8, 11])
def test_a_run_on_a_plateau_is_started_again_with_the_next_seed(
    losses: dict[int, float], tmp_path: Path, stop: int | None
) -> None:
    checks = only(12, losses)
    if stop is not None:
        run(tmp_path, checks=checks, stop_after=stop)
        assert not (tmp_path / WEIGHTS).exists()
    run(tmp_path, checks=checks)
    assert json.loads((tmp_path / SETTINGS).read_text())["seed"] == 12
    assert list(abandoned(tmp_path)) == [11]
    last = read_curve(abandoned(tmp_path)[11])[-1]
    assert (last["stage"], last["step"], last["loss"]) == ("joint", 3, losses[11])
    run(tmp_path / "alone", replace(TINY, seed=12), checks=checks)
    assert abandoned(tmp_path / "alone") == {}
    assert_equal_runs(tmp_path / "alone", tmp_path)


def test_processes_agree_on_a_plateau(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="seeds 11 to 11"):
        run(tmp_path, processes=2, restarts=0, checks=(Check(2, (Bound("loss", below=0.0),), enough=1),))
    assert [entry["step"] for entry in read_curve(abandoned(tmp_path)[11])][-1] == 2


def test_restarts_come_to_an_end_and_never_resuming_forgets_them(tmp_path: Path) -> None:
    hopeless = (Check(1, (Bound("loss", below=0.0),), enough=1),)
    for _ in range(2):
        with pytest.raises(TrainingError, match="seeds 11 to 12 sit on plateaus"):
            run(tmp_path, checks=hopeless, restarts=1)
        assert list(abandoned(tmp_path)) == [11, 12]
        assert not (tmp_path / CHECKPOINT).exists() and not (tmp_path / CURVE).exists()
    run(tmp_path, resume="never", stop_after=2)
    assert abandoned(tmp_path) == {} and json.loads((tmp_path / SETTINGS).read_text())["seed"] == 11
    with pytest.raises(ValueError, match="restarts=-1"):
        run(tmp_path, restarts=-1)


def test_another_runs_plateau_is_not_given_up(tmp_path: Path) -> None:
    """A folder of other settings is refused before anybody looks at its curve."""
    run(tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        run(tmp_path, replace(TINY, steps=7), checks=(Check(2, (Bound("loss", below=0.0),), enough=1),))
    assert (tmp_path / CHECKPOINT).exists() and abandoned(tmp_path) == {}


HOPELESS = (Check(2, (Bound("loss", below=0.0),), enough=1),)


def test_a_finished_run_is_not_given_up_by_checks_that_it_was_not_trained_with(tmp_path: Path) -> None:
    run(tmp_path)
    before = weights(tmp_path)
    run(tmp_path, checks=HOPELESS, restarts=0)
    assert (tmp_path / CHECKPOINT).exists() and abandoned(tmp_path) == {}
    assert all(torch.equal(weight, before[name]) for name, weight in weights(tmp_path).items())


def test_nothing_of_an_earlier_run_passes_for_the_new_one(tmp_path: Path) -> None:
    run(tmp_path)
    kept = {name: (tmp_path / name).read_bytes() for name in (WEIGHTS, STAGE_WEIGHTS["joint"])}
    run(tmp_path, replace(TINY, seed=77), resume="never", stop_after=1)
    with pytest.raises(DataError, match="not finished"):
        runs.weights(tmp_path, 1.0)
    for name, data in kept.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match="other settings"):
        runs.weights(tmp_path, 1.0)


def test_a_seed_that_was_given_up_can_be_finished_without_checks(tmp_path: Path) -> None:
    with pytest.raises(TrainingError):
        run(tmp_path, checks=HOPELESS, restarts=0)
    run(tmp_path, restarts=0)
    assert json.loads((tmp_path / SETTINGS).read_text())["seed"] == TINY.seed and (tmp_path / WEIGHTS).exists()


def test_a_smoke_run_refuses_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--smoke", "--steps", "3"])
    assert "leave out steps" in capsys.readouterr().err


def test_checks_by_hand() -> None:
    first, second = CHECKS["2"]
    assert [check.step for check in CHECKS["2"]] == [300, 600]

    def failed(check: Check, **measures: float) -> str:
        line = {"stage": "joint", "step": check.step, "loss": 9.0} | measures
        return plateau([{"stage": "habit", "step": check.step}, line], CHECKS["2"], "joint")

    assert failed(first, loss=1.2, loc=0.1) == failed(first, loss=1.4, loc=0.6) == ""
    assert failed(first, loss=1.4, loc=0.4) == "step 300: loss 1.4, loc 0.4"
    assert failed(second, cell=0.6, color=0.9) == ""
    assert failed(second, cell=0.6, color=0.8) == "step 600: cell 0.6, color 0.8"
    assert failed(second, cell=0.5, color=0.9)


def test_recipes_speak_of_versions_and_checks_of_what_is_measured() -> None:
    assert all(settings.version == name for name, settings in RECIPES.items())
    assert RECIPES.keys() == VERSIONS.keys() >= CHECKS.keys()
    for name, checks in CHECKS.items():
        measured = {
            slot.task for packed in Monitor(None, VERSIONS[name], torch.float32, 8).packed for slot in packed.slots
        }
        for check in checks:
            assert check.step < RECIPES[name].steps
            assert {bound.measure for bound in check.bounds} <= measured | {"loss"}
            assert 0 < check.enough <= len(check.bounds)


def test_the_command_line_follows_the_recipe_and_its_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Settings, Running]] = []
    monkeypatch.setattr(training, "train", lambda settings, running: seen.append((settings, running)))
    main(["--out", "x", "--version", "2"])
    main(["--out", "x", "--version", "2", "--seed", "5", "--habit-steps", "0", "--no-checks", "--restarts", "0"])
    (settings, running), (other, unchecked) = seen
    assert settings == RECIPES["2"] and running.checks == CHECKS["2"] and running.restarts == 2
    assert other == replace(settings, seed=5, habit_steps=0)
    assert unchecked.checks == () and unchecked.restarts == 0


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
    size = version.world.sizes[-1]
    pixels, targets = pretraining_batch(version, 1, 0, 30, size)
    known = target_classes(version)
    assert pixels.shape == (30, *size, 3) and targets.shape == (len(known), 30, size[0] * size[1] // 64)
    for (name, count), classes in zip(known.items(), targets, strict=True):
        assert classes.max() == count - 1, name
        assert set(range(count)) <= set(classes.ravel().tolist()) or name.startswith("digit")
    digits = targets[3] >= 0
    assert ((targets[0] == 8) == digits).all() and digits.any()
