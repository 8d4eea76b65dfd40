"""Train the embedded model: ``python -m vlmattn.scenes.train --out DIR``.

Three or four stages (stages.py), step based and seeded, by the version's recipe (recipes.py) unless a flag says
otherwise. A checkpoint is written every ``--checkpoint-every`` steps; a killed run started again continues from the
last one and ends with the same weights as an undisturbed run, because every batch is a function of the seed and the
step. A run that sits on a plateau (plateaus.py) is given up and started again with the next seed. ``DIR`` receives
``settings.json``, ``curve.jsonl`` (one JSON object per line), ``curve-seed<N>.jsonl`` of each seed that was given up,
``checkpoint.pt`` and ``joint.safetensors``, ``several.safetensors`` where there is that stage, and
``model.safetensors`` (fp32 master weights behind each stage but the first): ``python -m vlmattn.scenes.export`` makes
a packaged model of them. Stages that have not begun may be given other settings; ``--resume back`` trains anew what
other settings change, and keeps the stages before.
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
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vlmattn.errors import TrainingError, VlmattnError

from . import plateaus
from .model import PackedForward, build_model, load_decoder
from .plateaus import CHECKPOINT, CURVE, STAGE_WEIGHTS, WEIGHTS, Check
from .recipes import CHECKS, RECIPES
from .resume import RESUME, agree, save, start
from .stages import HABIT, JOINT, HabitTraining, JointTraining, Pretraining, Settings, SeveralTraining, Stage
from .versions import VERSIONS

SETTINGS = "settings.json"
CHOICE = "choice.json"
"""What choose.py writes about a finished run."""
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
        resume: continue from a checkpoint in ``out``: ``automatic`` if there is one, ``required``, ``back``, which
            trains anew the stages that other settings change, from the weights behind those before, or ``never``,
            which forgets the seeds that were given up there, too.
        checks: what the curve must show at certain steps of stage 1; else the next seed is taken.
        restarts: how many further seeds may be taken.
        stop_after: end each seed's run early after that many steps of this call, as a kill would; for tests.
    """

    out: Path
    processes: int = 2
    checkpoint_every: int = 100
    monitor_scenes: int = 128
    resume: str = "automatic"
    checks: tuple[Check, ...] = ()
    restarts: int = 2
    stop_after: int | None = None


class Recorder:
    """Progress lines, curve and checkpoints of process 0; the other processes only read the checkpoint."""

    def __init__(self, settings: Settings, running: Running, rank: int) -> None:
        self.settings, self.running, self.rank = settings, running, rank
        self.started = time.monotonic()
        self.start = start(running.out, running.resume, settings)
        self.state = self.start.state

    def open(self) -> None:
        """Write the settings, and drop curve lines that are newer than the start and a choice that is outdated."""
        out = self.running.out
        out.mkdir(parents=True, exist_ok=True)
        (out / SETTINGS).write_text(json.dumps(asdict(self.settings), indent=2) + "\n")
        kept = [entry for entry in plateaus.read_curve(out / CURVE) if self.start.keeps(entry)]
        (out / CURVE).write_text("".join(f"{json.dumps(entry)}\n" for entry in kept))
        if self.start.weights:
            self.say(f"goes back to the end of stage {self.state['stage']}")
            (out / CHOICE).unlink(missing_ok=True)

    def due(self, stage: Stage, step: int) -> bool:
        """Whether the curve is measured and a checkpoint is written after this many steps."""
        checked = stage.name == JOINT and step in (check.step for check in self.running.checks)
        return checked or step % self.running.checkpoint_every == 0 or step == stage.steps

    def plateau(self) -> str:
        """The first check that the recorded curve fails, in words, or nothing; the same in every process."""
        return plateaus.plateau(plateaus.read_curve(self.running.out / CURVE), self.running.checks, JOINT)

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
        _wait()


def _wait() -> None:
    """Until all processes have come here."""
    if dist.is_initialized():
        dist.barrier()


def _drive(stage: Stage, recorder: Recorder, budget: int | None) -> int | None:
    """Run a stage to its end, to a plateau or until the step budget is used up; returns what is left of the budget."""
    running, state = recorder.running, recorder.state
    step, smooth = 0, None
    if state["stage"] == stage.name:
        stage.optimizer.restore(state["optimizer"])
        step, smooth = state["step"], state["loss"]
    stuck = recorder.plateau()
    while step < stage.steps and budget != 0 and not stuck:
        loss = stage.loss(step, recorder.rank, running.processes)
        loss.backward()
        stage.optimizer.step(stage.factor(step))
        step += 1
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss of {stage.name} step {step} is {value}; try another --seed")
        smooth = value if smooth is None else _SMOOTHING * smooth + (1 - _SMOOTHING) * value
        if recorder.due(stage, step):
            recorder.record(stage, step, smooth)
            stuck = recorder.plateau()
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
    _wait()
    if rank == 0:
        recorder.open()
    _wait()
    model = build_model(settings.subject, settings.seed)
    if settings.decoder_from:
        load_decoder(model, settings.decoder_from)
    model.to(settings.dtype)
    forward = PackedForward(model, settings.subject, settings.compile)
    make: dict[str, Callable[[], Stage]] = {Pretraining.name: lambda: Pretraining(settings, model, forward)}
    for kind in (JointTraining, SeveralTraining, HabitTraining):
        make[kind.name] = partial(kind, settings, model, forward, running.monitor_scenes)
    budget, weights, stages = running.stop_after, recorder.start.weights, settings.stages
    begun = stages.index(recorder.state["stage"] or stages[0])
    for name in stages[begun + bool(weights) :]:
        model.load_state_dict(weights, strict=False)
        stage = make[name]()
        for parameter, weight in stage.optimizer.weights().items():
            weight.copy_(weights.get(parameter, weight))
        budget = _drive(stage, recorder, budget)
        weights = {n: w.contiguous() for n, w in stage.optimizer.weights().items() if not n.startswith(HEAD_PREFIXES)}
        if budget == 0 or recorder.plateau():
            break
        if rank == 0 and stage.name in STAGE_WEIGHTS:
            save(running.out / STAGE_WEIGHTS[stage.name], weights, settings)
    else:
        if rank == 0:
            recorder.say(f"wrote {running.out / WEIGHTS} after {recorder.seconds():.0f} s")
    if dist.is_initialized():
        dist.destroy_process_group()


def train(settings: Settings, running: Running) -> None:
    """Train, or continue training; a seed whose curve fails a check is followed by the next one.

    Raises:
        ValueError: the batches cannot be split evenly over the processes, ``restarts`` is negative, what there is to
            resume has other settings, or there is a stage of several pictures for a version without videos.
        FileNotFoundError: ``resume`` is ``required`` and there is no checkpoint.
        FloatingPointError: the loss is not finite.
        TrainingError: as many seeds as allowed sit on a plateau.
    """
    for name, batch in (("pretraining_batch", settings.pretraining_batch), ("batch", settings.batch)):
        if batch % running.processes:
            raise ValueError(f"{name}={batch} cannot be split over processes={running.processes}")
    if settings.several_steps and not settings.subject.videos:
        raise ValueError(
            f"several_steps={settings.several_steps}: version {settings.version} takes no videos; expected 0"
        )
    if running.restarts < 0:
        raise ValueError(f"restarts={running.restarts}; expected 0 or more, and no checks to finish any run")
    if running.resume == "never":
        plateaus.forget(running.out)
        (running.out / CHOICE).unlink(missing_ok=True)
    if plateaus.abandoned(running.out) and running.resume == "required":
        running = replace(running, resume="automatic")  # a seed that follows another has no checkpoint at first
    last = settings.seed + running.restarts
    while (seed := _next_seed(settings.seed, running)) <= last:
        if finished(running.out, replace(settings, seed=seed)):
            print(f"{running.out} holds the finished run of seed {seed}; --resume never trains it anew", flush=True)
            return
        _launch(replace(settings, seed=seed), running)
        curve = plateaus.read_curve(running.out / CURVE)
        reason = plateaus.plateau(curve, running.checks, JOINT)
        if not reason:
            return
        print(f"seed {seed} sits on a plateau and is given up ({reason})", flush=True)
        plateaus.abandon(running.out, seed)
        running = replace(running, resume="automatic")
    raise TrainingError(
        f"the seeds {settings.seed} to {last} sit on plateaus; their curves are in {running.out}. "
        "Allow more restarts, or start with another seed"
    )


def _next_seed(first: int, running: Running) -> int:
    """The seed to train: one that was given up only where nothing is checked and no other has begun."""
    begun = (running.out / CHECKPOINT).exists()
    return plateaus.next_seed(running.out, first) if running.checks or begun else first


def finished(run: Path, settings: Settings) -> bool:
    """Whether a folder holds the weights of a finished run of just these settings."""
    return agree(run / WEIGHTS, settings, HABIT)


def _launch(settings: Settings, running: Running) -> None:
    """Run one seed in as many processes as wanted."""
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
        several_steps=min(settings.several_steps, 12),
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
    parser.add_argument("--out", type=Path, required=True, help="output folder (settings, curve, checkpoint, weights)")
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread each (default %(default)s)")
    parser.add_argument("--version", choices=tuple(VERSIONS), default=Settings().version, help="default %(default)s")
    parser.add_argument("--no-compile", action="store_true", help="do not compile the layers")
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps between checkpoints (default 100)")
    parser.add_argument("--resume", choices=RESUME, default="automatic")
    parser.add_argument("--restarts", type=int, default=2, help="further seeds, if a run sits on a plateau (default 2)")
    parser.add_argument("--no-checks", action="store_true", help="finish a run that sits on a plateau")
    parser.add_argument("--smoke", action="store_true", help="a one-minute run that shows both losses falling")
    own = parser.add_argument_group("instead of what the version's recipe says")
    own.add_argument("--seed", type=int, help="initialisation and data")
    own.add_argument("--pretraining-steps", type=int, help="steps of stage 0")
    own.add_argument("--steps", type=int, help="steps of stage 1")
    own.add_argument("--curriculum", type=int, help="steps per number of anchors")
    own.add_argument("--several-steps", type=int, help="steps with several pictures, between stages 1 and 2")
    own.add_argument("--habit-steps", type=int, help="steps of stage 2")
    own.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        help="of weights and activations; bfloat16 pays only on CPUs with AMX or AVX512-BF16",
    )
    own.add_argument("--decoder-from", help="packaged model or run whose decoder this one starts from")
    options = parser.parse_args(arguments)
    steps = ("pretraining_steps", "steps", "several_steps", "habit_steps")
    names = ("seed", *steps, "curriculum", "precision", "decoder_from")
    asked = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    settings = replace(RECIPES[options.version], **asked, compile=not options.no_compile)
    checks = () if options.no_checks else CHECKS.get(options.version, ())
    running = Running(
        options.out,
        options.processes,
        options.checkpoint_every,
        resume=options.resume,
        checks=checks,
        restarts=options.restarts,
    )
    if options.smoke:
        if fixed := sorted(set(asked) - {"seed", "precision", "decoder_from"}):
            parser.error(f"--smoke has lengths of its own: leave out {', '.join(fixed)}")
        settings = smoke_settings(settings)
        running = replace(running, processes=1, checkpoint_every=20, monitor_scenes=16)
    try:
        train(settings, running)
    except VlmattnError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
