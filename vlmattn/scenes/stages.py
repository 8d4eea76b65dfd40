"""The training stages: dense vision pre-training, next-token training on answers about one picture, then about several
in the versions that have it, and a short one that makes a habit.

A stage knows its parameters, its loss at a step and its schedule; the loop that drives it is in train.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dense import BACKGROUND_COLOR, IGNORE, PLACES, pretraining_batch, target_classes
from .model import PackedForward, normalized_pixels, packed_inputs
from .monitor import Monitor
from .optim import MuonAdamW, Rates, Trainable, warmup_stable_decay
from .packing import Batch, training_batch
from .several_kinds import KINDS, Kind
from .several_packing import several_batch
from .versions import VERSION_2, VERSIONS, Version

STAGE_NAMES = PRETRAINING, JOINT, SEVERAL, HABIT = ("pretraining", "joint", "several", "habit")
_FIRST_USED = {
    "steps": JOINT,
    "batch": JOINT,
    "curriculum": JOINT,
    "auxiliary": JOINT,
    "several_steps": SEVERAL,
    "habit_steps": HABIT,
}
"""The stage that a setting is used in first, where that is not the first one."""
_SEVERAL_RATE = 0.7
"""Largest factor on the learning rates of stage 1 in the stage of several pictures."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides the outcome of a training run.

    Attributes:
        version: name of the model's version, in ``vlmattn.scenes.versions.VERSIONS``.
        seed: seed of the initialisation and of the data streams.
        pretraining_steps: steps of stage 0.
        pretraining_batch: pictures per step of stage 0, over all processes.
        steps: steps of stage 1.
        batch: prompts per step of stage 1 and behind, over all processes; below 32 seeds get stuck on plateaus.
        several_steps: steps of the stage of several pictures, between stages 1 and 2; 0 for no such stage.
        habit_steps: steps of stage 2.
        curriculum: steps with at most one anchor, again that many with at most two, and so on.
        auxiliary: weight of the auxiliary place loss until 55 % of the run; linear to zero until 85 %.
        precision: dtype of weights and activations; the masters are fp32 anyway.
        compile: compile the layer functions.
        decoder_from: packaged model or finished run whose decoder this one starts from; "" for none.
        model: sizes that differ from those of the version, for tests.
    """

    version: str = VERSION_2.name
    seed: int = 11
    pretraining_steps: int = 500
    pretraining_batch: int = 64
    steps: int = 1300
    batch: int = 32
    several_steps: int = 0
    habit_steps: int = 80
    curriculum: int = 80
    auxiliary: float = 0.3
    precision: str = "float32"
    compile: bool = True
    decoder_from: str = ""
    model: dict[str, int] = field(default_factory=dict)

    @property
    def subject(self) -> Version:
        """The version, with other sizes if ``model`` says so."""
        version = VERSIONS[self.version]
        return replace(version, architecture=replace(version.architecture, **self.model))

    @property
    def dtype(self) -> torch.dtype:
        """``precision`` as a torch dtype."""
        return torch.float32 if self.precision == "float32" else torch.bfloat16

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages in order."""
        return tuple(name for name in STAGE_NAMES if name != SEVERAL or self.several_steps)

    def agrees(self, other: Settings, stage: str) -> bool:
        """Whether runs of both are the same until the end of a stage: what differs is first used behind it."""
        differing = (x.name for x in fields(self) if getattr(self, x.name) != getattr(other, x.name))
        first = (_FIRST_USED.get(name, PRETRAINING) for name in differing)
        return all(STAGE_NAMES.index(name) > STAGE_NAMES.index(stage) for name in first)


class Stage(Protocol):
    """What the training loop needs of a stage."""

    name: str
    steps: int
    optimizer: MuonAdamW

    def loss(self, step: int, rank: int, processes: int) -> Tensor:
        """Scalar loss on this process's share of the step's batch."""

    def factor(self, step: int) -> float:
        """Factor on the learning rates."""

    def measures(self) -> dict[str, Any]:
        """JSON-able measures of the present state for the curve."""


class Pretraining:
    """Stage 0: throw-away linear heads on every visual token name its colour, shape, size, digits, row and column."""

    name = PRETRAINING

    def __init__(self, settings: Settings, model: nn.Module, forward: PackedForward) -> None:
        self.settings, self.forward, self.steps = settings, forward, settings.pretraining_steps
        torch.manual_seed(settings.seed)
        parts, width = forward.parts, settings.subject.architecture.hidden
        classes = target_classes(settings.subject)
        self.heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in classes.items()})
        self.heads.to(settings.dtype)
        trainables = [
            Trainable(name, parameter, parameter.dim() == 2 and "embed" not in name)
            for name, parameter in model.named_parameters()
            if parts.pretrained(name) and parts.rate(name)
        ]
        trainables += [
            Trainable(f"heads.{name}", parameter, False) for name, parameter in self.heads.named_parameters()
        ]
        self.optimizer = MuonAdamW(trainables, Rates())
        self._accuracy: dict[str, float] = {}

    def factor(self, step: int) -> float:
        """Warm-up of 50 steps, linear to zero over the last 60 %."""
        return warmup_stable_decay(step, self.steps, 50, 0.6)

    def loss(self, step: int, rank: int, processes: int) -> Tensor:
        """Sum of the cross-entropies per token; shape counts three times, background tokens 0.15."""
        share = self.settings.pretraining_batch // processes
        first = step * self.settings.pretraining_batch + rank * share
        subject = self.settings.subject
        batch = pretraining_batch(subject, self.settings.seed, first, share, subject.world.size_at(step))
        images, labels = (torch.from_numpy(x) for x in batch)
        contents, places = self.forward.dense(normalized_pixels(images).to(self.settings.dtype))
        importance = torch.where(labels[0] == BACKGROUND_COLOR, 0.15, 1.0).flatten()
        total = torch.zeros(())
        for name, target in zip(self.heads, labels.flatten(1), strict=True):
            logits = self.heads[name](places if name in PLACES else contents).float().flatten(0, 1)
            each = F.cross_entropy(logits, target, reduction="none", ignore_index=IGNORE)
            known = target != IGNORE
            counted = known
            if name in ("color", "shape"):
                total = total + (3.0 if name == "shape" else 1.0) * (each * importance).sum() / importance.sum()
                counted = known & (labels[0].flatten() < BACKGROUND_COLOR - 1)
            else:
                total = total + each.sum() / known.sum().clamp(min=1)
            right = (logits.detach().argmax(-1) == target)[counted].float()
            self._accuracy[name] = round(right.mean().item(), 3) if len(right) else 0.0
        return total

    def measures(self) -> dict[str, Any]:
        """Accuracy of each head on the last training batch of this process, colour and shape on object tokens."""
        return dict(self._accuracy)


class JointTraining:
    """Stage 1: next-token loss on answers, with a thrown-away head that names the cell of every mentioned object.

    The auxiliary head reads decoder layer ``tap`` at the last word of an object's name and makes relations leave chance
    earlier.
    """

    name = JOINT

    def __init__(self, settings: Settings, model: nn.Module, forward: PackedForward, monitor_scenes: int) -> None:
        self.settings, self.forward, self.steps = settings, forward, settings.steps
        torch.manual_seed(settings.seed)
        subject = settings.subject
        self.head = nn.Linear(subject.architecture.hidden, subject.world.cells + 1).to(settings.dtype)
        self.tap = min(subject.architecture.tap, subject.architecture.decoder_layers - 1)
        trainables = [
            Trainable(
                name,
                parameter,
                parameter.dim() == 2 and "embed" not in name and "lm_head" not in name,
                forward.parts.rate(name),
            )
            for name, parameter in model.named_parameters()
            if forward.parts.rate(name)
        ]
        trainables += [Trainable(f"head.{name}", parameter, False) for name, parameter in self.head.named_parameters()]
        self.optimizer = MuonAdamW(trainables, Rates())
        self.monitor = Monitor(forward, subject, settings.dtype, monitor_scenes)
        self.several: dict[str, Monitor] = {}

    def factor(self, step: int) -> float:
        """Warm-up of 100 steps, linear to zero over the last half."""
        return warmup_stable_decay(step, self.steps, 100, 0.5)

    def auxiliary_weight(self, step: int) -> float:
        """Weight of the place loss: constant until 55 % of the run, zero from 85 %."""
        return self.settings.auxiliary * min(1.0, max(0.0, (0.85 - step / self.steps) / 0.3))

    def loss(self, step: int, rank: int, processes: int) -> Tensor:
        """Weighted cross-entropy of the answer tokens plus the auxiliary place loss."""
        share = self.settings.batch // processes
        sample = self.sample(step, step * self.settings.batch + rank * share, share)
        ids, weights, cells = (torch.from_numpy(x) for x in (sample.ids, sample.weights, sample.cells))
        pixels, groups = packed_inputs(sample.pixels, self.kind(step), self.settings.dtype)
        logits, hidden = self.forward(pixels, ids, tap=self.tap, slot_groups=groups)
        weights = weights[:, 1:].flatten()
        each = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        answers = (each * weights).sum() / weights.sum()
        weight, mentioned = self.auxiliary_weight(step), cells != IGNORE
        if not weight:
            return answers
        assert hidden is not None
        return answers + weight * F.cross_entropy(self.head(hidden[mentioned]).float(), cells[mentioned])

    def kind(self, step: int) -> Kind | None:
        """What the prompts of a step show; None for one picture."""
        return None

    def sample(self, step: int, first: int, count: int) -> Batch:
        """Samples number ``first`` on of this stage; the first steps have fewer anchors."""
        anchors = 1 + step // max(1, self.settings.curriculum)
        subject = self.settings.subject
        return training_batch(subject, self.settings.seed, first, count, anchors, size=subject.world.size_at(step))

    def measures(self) -> dict[str, Any]:
        """Teacher-forced accuracy per task on the monitor scenes, and by kind on prompts with several pictures."""
        return self.monitor() | {kind: monitor() for kind, monitor in self.several.items()}


def _several_monitors(settings: Settings, forward: PackedForward, prompts: int) -> dict[str, Monitor]:
    """By kind; none where there is no stage of several pictures."""
    kinds = KINDS.items() if settings.several_steps else ()
    return {name: Monitor(forward, settings.subject, settings.dtype, prompts, kind) for name, kind in kinds}


class SeveralTraining(JointTraining):
    """Between stages 1 and 2: two images or a video in the prompts of every other step, a kind in turn.

    The other steps are those of stage 1, so that nothing about single pictures is forgotten.
    """

    name = SEVERAL

    def __init__(self, settings: Settings, model: nn.Module, forward: PackedForward, monitor_scenes: int) -> None:
        super().__init__(settings, model, forward, monitor_scenes)
        self.steps = settings.several_steps
        self.several = _several_monitors(settings, forward, monitor_scenes)

    def factor(self, step: int) -> float:
        """At most 0.7, warm-up of 20 steps, then linear to zero."""
        return _SEVERAL_RATE * warmup_stable_decay(step, self.steps, 20, 1.0)

    def auxiliary_weight(self, step: int) -> float:
        """No place loss any more."""
        return 0.0

    def kind(self, step: int) -> Kind | None:
        """One picture in even steps, the kinds in turn in odd ones."""
        return tuple(KINDS.values())[step // 2 % len(KINDS)] if step % 2 else None

    def sample(self, step: int, first: int, count: int) -> Batch:
        """Samples of a kind, or those behind stage 1."""
        if kind := self.kind(step):
            return several_batch(kind, self.settings.seed, first, count)
        subject, behind = self.settings.subject, self.settings.steps * self.settings.batch
        size = subject.world.size_at(step // 2)
        return training_batch(subject, self.settings.seed, behind + first, count, size=size)


class HabitTraining(JointTraining):
    """Stage 2: as stage 1, but many partners can hardly be seen and are asked about all the same.

    After stage 1 the model looks carefully: it affirms hardly more absent partners than random absent objects. In this
    stage trusting the pair statistics pays, so that the model leaves it with a prior that a method can be measured on.
    """

    name = HABIT

    def __init__(self, settings: Settings, model: nn.Module, forward: PackedForward, monitor_scenes: int) -> None:
        super().__init__(settings, model, forward, monitor_scenes)
        self.steps = settings.habit_steps
        self.several = _several_monitors(settings, forward, monitor_scenes)

    def factor(self, step: int) -> float:
        """At most 0.35, warm-up of 10 steps, then linear to zero."""
        return 0.35 * warmup_stable_decay(step, self.steps, 10, 1.0)

    def auxiliary_weight(self, step: int) -> float:
        """No place loss any more."""
        return 0.0

    def sample(self, step: int, first: int, count: int) -> Batch:
        """Samples behind those of the stages before, with hidden partners."""
        subject = self.settings.subject
        behind = (self.settings.steps + self.settings.several_steps) * self.settings.batch
        size = subject.world.size_at(step)
        return training_batch(subject, self.settings.seed, behind + first, count, habit=True, size=size)
