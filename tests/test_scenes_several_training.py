"""The training stage of several pictures, and going on from stages that other settings leave as they are."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_scenes_qwen import TINY as QWEN
from test_scenes_training import assert_equal_runs, curve, run, weights

from vlmattn.errors import DataError
from vlmattn.scenes import runs, stages
from vlmattn.scenes.model import PackedForward, build_model, packed_inputs
from vlmattn.scenes.monitor import Monitor
from vlmattn.scenes.plateaus import CHECKPOINT, STAGE_WEIGHTS
from vlmattn.scenes.recipes import RECIPES
from vlmattn.scenes.several_kinds import KINDS, Kind
from vlmattn.scenes.several_packing import several_batch
from vlmattn.scenes.stages import STAGE_NAMES, HabitTraining, JointTraining, Settings, SeveralTraining
from vlmattn.scenes.train import CHOICE, SETTINGS, smoke_settings

TINY = replace(QWEN, several_steps=6)
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    run(out, TINY)
    return out


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that had no stage of several pictures; its files know nothing of such a setting."""
    out = tmp_path_factory.mktemp("without")
    run(out, QWEN)
    saved = torch.load(out / CHECKPOINT, weights_only=True)
    for settings in (saved["settings"], old := json.loads((out / SETTINGS).read_text())):
        del settings["several_steps"]
    torch.save(saved, out / CHECKPOINT)
    (out / SETTINGS).write_text(json.dumps(old))
    return out


@pytest.fixture(scope="module")
def stage() -> SeveralTraining:
    model = build_model(TINY.subject, 3)
    return SeveralTraining(TINY, model, PackedForward(model, TINY.subject), 2)


def test_half_of_the_steps_have_one_picture_and_the_kinds_take_turns(stage: SeveralTraining) -> None:
    kinds = [stage.kind(step) for step in range(12)]
    assert kinds[::2] == [None] * 6 and kinds[1::2] == [*KINDS.values()] * 2
    sizes = [stage.sample(step, 0, 1).pixels.shape[1:3] for step in range(0, 8, 2)]
    assert sizes == list(TINY.subject.world.sizes)
    for step, kind in enumerate(kinds):
        pixels = stage.sample(step, 2 * step, 2).pixels
        assert pixels.shape[:2] == (2, kind.pictures) if kind else pixels.ndim == 4


def test_the_stages_have_single_pictures_of_their_own(stage: SeveralTraining, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 1 the first 12 of the stream, this one those up to 24, the last one the next."""
    parts = (TINY, stage.forward.model, stage.forward, 1)
    firsts: list[int] = []
    monkeypatch.setattr(stages, "training_batch", lambda _, __, first, *___, **____: firsts.append(first))
    for each in (JointTraining(*parts), stage, HabitTraining(*parts)):
        each.sample(0, 0, 1)
    assert firsts == [0, 12, 24]


def test_schedule(stage: SeveralTraining) -> None:
    long = SeveralTraining(replace(TINY, several_steps=300), stage.forward.model, stage.forward, 1)
    factors = [long.factor(step) for step in range(300)]
    assert factors[0] == pytest.approx(0.7 / 20) and max(factors) == factors[19] == pytest.approx(0.7 * 281 / 300)
    assert factors[299] == pytest.approx(0.7 / 300)


@every_kind
def test_loss_is_that_of_each_prompt_alone(stage: SeveralTraining, kind: Kind) -> None:
    """The weighted mean over the answers of a batch, worked out prompt by prompt with the logits of one prompt."""
    step = 1 + 2 * list(KINDS).index(kind.name)
    sample = several_batch(kind, TINY.seed, 2 * step, 2)
    total = weight = 0.0
    with torch.no_grad():
        for row in range(2):
            pixels, groups = packed_inputs(sample.pixels[row : row + 1], kind, torch.float32)
            logits, _ = stage.forward(pixels, torch.from_numpy(sample.ids[row : row + 1]), slot_groups=groups)
            told = torch.log_softmax(logits[0], -1).numpy()
            for at in np.flatnonzero(sample.weights[row]):
                total -= told[at - 1, sample.ids[row, at]] * sample.weights[row, at]
                weight += sample.weights[row, at]
        assert stage.loss(step, 0, 1).item() == pytest.approx(total / weight, rel=1e-5)


@every_kind
def test_monitor_scores_every_task_of_a_kind(stage: SeveralTraining, kind: Kind) -> None:
    """A forward that knows the answers is always right, one that knows nothing never."""

    class Oracle:
        def __init__(self, ahead: int) -> None:
            self.ahead = ahead

        def __call__(self, pixels, ids, slot_groups):
            assert slot_groups == kind.course.slot_groups and len(pixels) == (1 if kind.video else kind.pictures)
            return torch.nn.functional.one_hot(ids.roll(-self.ahead, 1), 144).float(), None

    scores = [Monitor(Oracle(ahead), TINY.subject, torch.float32, 20, kind)() for ahead in (1, 7)]
    assert set(scores[0]) == set(kind.tasks) == set(scores[1])
    assert set(scores[0].values()) == {1.0} and max(scores[1].values()) < 0.3


def test_the_curve_has_the_tasks_of_each_kind(undisturbed: Path) -> None:
    entries = curve(undisturbed)
    steps = {name: [e["step"] for e in entries if e["stage"] == name] for name in STAGE_NAMES}
    assert steps == {"pretraining": [2, 4], "joint": [2, 4, 6], "several": [2, 4, 6], "habit": [2]}
    for entry in entries:
        assert (set(KINDS) <= set(entry)) == (entry["stage"] in ("several", "habit"))
    assert {"same", "which", "loc"} < set(entries[-1]["images"]) and "moved" in entries[-1]["video"]
    assert {"loc", "cell", "color"} < set(entries[-1])


@pytest.mark.parametrize("stop", [10, 13, 16])
def test_a_stopped_run_continues_to_the_same_weights(undisturbed: Path, tmp_path: Path, stop: int) -> None:
    run(tmp_path, TINY, stop_after=stop)
    run(tmp_path, TINY)
    assert_equal_runs(undisturbed, tmp_path)


def test_two_processes_learn_what_one_learns(undisturbed: Path, tmp_path: Path) -> None:
    run(tmp_path, TINY, processes=2)
    one, two = weights(undisturbed), weights(tmp_path)
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 0.05


def test_the_last_stage_changes_what_the_stage_of_several_pictures_left(undisturbed: Path) -> None:
    joint, several, last = (load_file(undisturbed / name) for name in STAGE_WEIGHTS.values())
    assert any(not torch.equal(joint[name], several[name]) for name in joint)
    before = runs.weights(undisturbed, 0.0)
    assert all(torch.equal(before[name], several[name]) for name in before)
    assert any(not torch.equal(before[name], last[name]) for name in before)


def test_stages_that_have_not_begun_may_change(undisturbed: Path, tmp_path: Path) -> None:
    run(tmp_path, replace(TINY, several_steps=0, habit_steps=7), stop_after=9)
    run(tmp_path, TINY, resume="required")
    assert json.loads((tmp_path / SETTINGS).read_text()) == asdict(TINY)
    assert_equal_runs(undisturbed, tmp_path)


def test_a_stage_that_has_begun_may_not_change(tmp_path: Path) -> None:
    run(tmp_path, TINY, stop_after=13)
    for other in (replace(TINY, several_steps=8), replace(TINY, several_steps=0), replace(TINY, steps=7)):
        with pytest.raises(ValueError, match="--resume back to keep its stages that they do not change"):
            run(tmp_path, other)
    run(tmp_path, replace(TINY, habit_steps=1))
    assert curve(tmp_path)[-1]["step"] == 1


def copied(run: Path, out: Path) -> Path:
    out.mkdir(exist_ok=True)
    for file in run.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out


@pytest.mark.parametrize("stop", [None, 1, 3])
def test_a_finished_run_goes_back_to_the_end_of_stage_1(
    undisturbed: Path, without: Path, tmp_path: Path, stop: int | None
) -> None:
    """With all that follows as if it had been asked for at once, however often the new stages are killed."""
    copied(without, tmp_path)
    (tmp_path / CHOICE).write_text("{}")
    with pytest.raises(ValueError, match="--resume back"):
        run(tmp_path, TINY)
    assert (tmp_path / CHOICE).exists()
    for _ in range(2 if stop is not None else 0):
        run(tmp_path, TINY, resume="back", stop_after=stop)
        with pytest.raises(DataError, match=r"no several.safetensors|other settings"):
            runs.weights(tmp_path, 1.0)
        assert not (tmp_path / CHOICE).exists()
    run(tmp_path, TINY, resume="back")
    assert_equal_runs(undisturbed, tmp_path)
    assert runs.weights(tmp_path, 1.0).keys() == weights(undisturbed).keys()


def test_going_back_works_in_two_processes_and_without_a_checkpoint(without: Path, tmp_path: Path) -> None:
    for name, processes in (("one", 1), ("two", 2)):
        copied(without, tmp_path / name)
        (tmp_path / name / CHECKPOINT).unlink()
        run(tmp_path / name, TINY, resume="back", processes=processes)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 0.05
    assert [entry["stage"] for entry in curve(tmp_path / "two")] == [
        entry["stage"] for entry in curve(tmp_path / "one")
    ]


def test_going_back_needs_a_stage_that_stays_as_it_was(without: Path, tmp_path: Path) -> None:
    copied(without, tmp_path)
    for other in (replace(TINY, seed=12), replace(TINY, steps=7)):
        with pytest.raises(ValueError, match=r"none of joint.safetensors, several.safetensors, model.safetensors"):
            run(tmp_path, other, resume="back")
    with pytest.raises(ValueError, match="none of joint"):
        run(tmp_path / "empty", TINY, resume="back")


def test_files_of_finished_runs_without_the_stage_are_still_read(without: Path) -> None:
    kept = {file.name: file.read_bytes() for file in without.iterdir()}
    assert "several_steps" not in runs.settings(without) and runs.weights(without, 0.5)
    run(without, QWEN)
    assert {file.name: file.read_bytes() for file in without.iterdir()} == kept


def test_settings_say_from_which_stage_on_runs_differ() -> None:
    def last(**other: object) -> str:
        return [name for name in ("", *STAGE_NAMES) if not name or TINY.agrees(replace(TINY, **other), name)][-1]

    assert last() == "habit" and last(habit_steps=9) == "several" and last(several_steps=0) == "joint"
    assert last(steps=1) == last(batch=4) == last(auxiliary=0.0) == last(curriculum=1, habit_steps=0) == "pretraining"
    assert last(seed=1) == last(precision="bfloat16") == last(model={}) == last(habit_steps=9, seed=4) == ""


def test_a_version_without_videos_has_no_such_stage(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="several_steps=3: version 2 takes no videos"):
        run(tmp_path, Settings(several_steps=3))
    assert RECIPES["2"].several_steps == 0 < RECIPES["qwen"].several_steps
    assert smoke_settings(RECIPES["qwen"]).several_steps == 12 and smoke_settings(RECIPES["2"]).several_steps == 0
