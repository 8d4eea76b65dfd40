"""Train the embedded model: ``python -m vlmattn.scenes.train --out DIR``.

Three stages (stages.py), step based and seeded. A checkpoint is written every ``--checkpoint-every`` steps; a killed
run started again continues from the last one and ends with the same weights as an undisturbed run, because every batch
is a function of the seed and the step. ``DIR`` receives ``settings.json``, ``curve.jsonl`` (one JSON object per line),
``checkpoint.pt`` and at the end ``joint.safetensors`` and ``model.safetensors`` (fp32 master weights before and after
the last stage), which ``python -m vlmattn.scenes.export`` turns into a packaged model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file

from .model import PackedForward, build_model
from .stages import HabitTraining, JointTraining, Pretraining, Settings, Stage
from .versions import VERSIONS

CHECKPOINT, CURVE, SETTINGS, WEIGHTS = "checkpoint.pt", "curve.jsonl", "settings.json", "model.safetensors"
WEIGHTS_BEFORE_HABIT = "joint.safetensors"
STAGE_NAMES = (Pretraining.name, JointTraining.name, HabitTraining.name)
HEAD_PREFIXES = ("head.", "heads.")
_PROGRESS_EVERY = 10
_SMOOTHING = 0.95


@dataclass(frozen=True)
class Running:
    """How a run is carried out; no influence on what is learned.

    Attributes:
        out: output folder.
        processes: data-parallel processes of one thread each.
        checkpoint_every: steps between checkpoints and between measurements of the curve.
        monitor_scenes: scenes the curve is measured on.
        resume: continue from a checkpoint in ``out``: ``automatic`` if there is one, ``required``, or ``never``.
        stop_after: end early after that many steps of this call, as a kill would; for tests.
    """

    out: Path
    processes: int = 2
    checkpoint_every: int = 100
    monitor_scenes: int = 128
    resume: str = "automatic"
    stop_after: int | None = None


class Recorder:
    """Progress lines, curve and checkpoints of process 0; the other processes only read the checkpoint."""

    def __init__(self, settings: Settings, running: Running, rank: int) -> None:
        self.settings, self.running, self.rank = settings, running, rank
        self.started = time.monotonic()
        self.state: dict[str, Any] = {
            "settings": asdict(settings),
            "stage": "",
            "step": 0,
            "seconds": 0.0,
            "loss": None,
        }
        path = running.out / CHECKPOINT
        if running.resume == "never" or not path.exists():
            if running.resume == "required":
                raise FileNotFoundError(f"--resume required, but {path} does not exist")
        else:
            self.state = torch.load(path, weights_only=True)
            if self.state["settings"] != asdict(settings):
                raise ValueError(f"{path} was written with other settings; use --resume never or another --out")
        if rank == 0:
            self._open()

    def _open(self) -> None:
        """Write the settings and drop curve lines that are newer than the checkpoint."""
        self.running.out.mkdir(parents=True, exist_ok=True)
        (self.running.out / SETTINGS).write_text(json.dumps(asdict(self.settings), indent=2) + "\n")
        curve = self.running.out / CURVE
        lines = curve.read_text().splitlines() if curve.exists() else []
        reached = (self.state["stage"], self.state["step"])
        kept = []
        for line in lines if self.state["stage"] else []:
            kept.append(line)
            entry = json.loads(line)
            if (entry["stage"], entry["step"]) == reached:
                break
        curve.write_text("".join(f"{line}\n" for line in kept))

    def seconds(self) -> float:
        """Time spent so far, over all calls."""
        return float(self.state["seconds"]) + time.monotonic() - self.started

    def say(self, text: str) -> None:
        """Print a progress line from process 0."""
        if self.rank == 0:
            print(text, flush=True)

    def record(self, stage: Stage, step: int, loss: float) -> None:
        """Measure, append to the curve and write the checkpoint atomically."""
        if self.rank == 0:
            entry = {"stage": stage.name, "step": step, "seconds": round(self.seconds(), 1), "loss": round(loss, 4)}
            entry |= stage.measures()
            with open(self.running.out / CURVE, "a") as curve:
                curve.write(json.dumps(entry) + "\n")
            self.say(json.dumps(entry))
            state = self.state | {"stage": stage.name, "step": step, "seconds": self.seconds(), "loss": loss}
            temporary = self.running.out / f"{CHECKPOINT}.new"
            with open(temporary, "wb") as file:
                torch.save(state | {"optimizer": stage.optimizer.state()}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.running.out / CHECKPOINT)
        if dist.is_initialized():
            dist.barrier()


def _drive(stage: Stage, recorder: Recorder, budget: int | None) -> int | None:
    """Run a stage to its end or until the step budget is used up; returns what is left of the budget."""
    running, state = recorder.running, recorder.state
    step, smooth = 0, None
    if state["stage"] == stage.name:
        stage.optimizer.restore(state["optimizer"])
        step, smooth = state["step"], state["loss"]
    while step < stage.steps and budget != 0:
        loss = stage.loss(step, recorder.rank, running.processes)
        loss.backward()
        stage.optimizer.step(stage.factor(step))
        step += 1
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss of {stage.name} step {step} is {value}; try another --seed")
        smooth = value if smooth is None else _SMOOTHING * smooth + (1 - _SMOOTHING) * value
        if step % running.checkpoint_every == 0 or step == stage.steps:
            recorder.record(stage, step, smooth)
        elif step % _PROGRESS_EVERY == 0:
            recorder.say(f"{stage.name} {step}/{stage.steps}  loss {smooth:.3f}  {recorder.seconds():.0f} s")
        budget = None if budget is None else budget - 1
    return budget


def _train(rank: int, settings: Settings, running: Running, port: int) -> None:
    """One process of a run."""
    torch.set_num_threads(1)
    if running.processes > 1:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=running.processes)
    recorder = Recorder(settings, running, rank)
    model = build_model(settings.subject, settings.seed).to(settings.dtype)
    forward = PackedForward(model, settings.subject, settings.compile)
    stages: list[Callable[[], Stage]] = [
        lambda: Pretraining(settings, model, forward),
        lambda: JointTraining(settings, model, forward, running.monitor_scenes),
        lambda: HabitTraining(settings, model, forward, running.monitor_scenes),
    ]
    budget, weights = running.stop_after, dict[str, torch.Tensor]()
    for make in stages[STAGE_NAMES.index(recorder.state["stage"] or STAGE_NAMES[0]) :]:
        model.load_state_dict(weights, strict=False)
        stage = make()
        for name, weight in stage.optimizer.weights().items():
            weight.copy_(weights.get(name, weight))
        budget = _drive(stage, recorder, budget)
        weights = {n: w.contiguous() for n, w in stage.optimizer.weights().items() if not n.startswith(HEAD_PREFIXES)}
        if budget == 0:
            break
        if rank == 0 and stage.name != Pretraining.name:
            file = running.out / (WEIGHTS if stage.name == HabitTraining.name else WEIGHTS_BEFORE_HABIT)
            save_file(weights, file, metadata={"settings": json.dumps(asdict(settings))})
    else:
        if rank == 0:
            recorder.say(f"wrote {running.out / WEIGHTS} after {recorder.seconds():.0f} s")
    if dist.is_initialized():
        dist.destroy_process_group()


def train(settings: Settings, running: Running) -> None:
    """Train, or continue training.

    Raises:
        ValueError: the batches cannot be split evenly over the processes, or the checkpoint has other settings.
        FileNotFoundError: ``resume`` is ``required`` and there is no checkpoint.
        FloatingPointError: the loss is not finite.
    """
    for name, batch in (("pretraining_batch", settings.pretraining_batch), ("batch", settings.batch)):
        if batch % running.processes:
            raise ValueError(f"{name}={batch} cannot be split over processes={running.processes}")
    if running.processes == 1:
        _train(0, settings, running, 0)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_train, (settings, running, port), nprocs=running.processes)


def smoke_settings(settings: Settings) -> Settings:
    """A one-minute variant on one core: enough to see both losses fall, not to answer questions."""
    return replace(
        settings,
        pretraining_steps=60,
        pretraining_batch=16,
        steps=40,
        habit_steps=5,
        batch=8,
        curriculum=1000,
        compile=False,
    )


def main(arguments: list[str] | None = None) -> None:
    """Command line of :func:`train`."""
    parser = argparse.ArgumentParser(
        prog="python -m vlmattn.scenes.train",
        description="Train the embedded scenes model from scratch. A killed run started again continues where it was.",
    )
    defaults = Settings()
    parser.add_argument("--out", type=Path, required=True, help="output folder (settings, curve, checkpoint, weights)")
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread each (default %(default)s)")
    parser.add_argument("--version", choices=tuple(VERSIONS), default=defaults.version, help="of scenes and model")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="initialisation and data (default %(default)s)")
    parser.add_argument("--pretraining-steps", type=int, default=defaults.pretraining_steps, help="steps of stage 0")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="steps of stage 1 (default %(default)s)")
    parser.add_argument("--curriculum", type=int, default=defaults.curriculum, help="steps per number of anchors")
    parser.add_argument("--habit-steps", type=int, default=defaults.habit_steps, help="steps of stage 2")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default=defaults.precision,
        help="of weights and activations; bfloat16 pays only on CPUs with AMX or AVX512-BF16 (default %(default)s)",
    )
    parser.add_argument("--no-compile", action="store_true", help="do not compile the layers")
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps between checkpoints (default 100)")
    parser.add_argument("--resume", choices=("automatic", "required", "never"), default="automatic")
    parser.add_argument("--smoke", action="store_true", help="a one-minute run that shows both losses falling")
    options = parser.parse_args(arguments)
    settings = replace(
        defaults,
        version=options.version,
        seed=options.seed,
        pretraining_steps=options.pretraining_steps,
        steps=options.steps,
        habit_steps=options.habit_steps,
        curriculum=options.curriculum,
        precision=options.precision,
        compile=not options.no_compile,
    )
    running = Running(options.out, options.processes, options.checkpoint_every, resume=options.resume)
    if options.smoke:
        settings = smoke_settings(settings)
        running = replace(running, processes=1, checkpoint_every=20, monitor_scenes=16)
    train(settings, running)


if __name__ == "__main__":
    main()
