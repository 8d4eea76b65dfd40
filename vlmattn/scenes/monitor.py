"""What the training curve is measured on: fixed sets of prompts that neither training nor any split ever shows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from .model import PackedForward, packed_inputs
from .packing import MONITOR_STREAM, Packed, pack
from .questions import EXISTENCE_TASKS
from .render import render
from .several_kinds import Kind
from .several_packing import pack_several
from .versions import Lessons, Version
from .world import Scene, random_state, sample_scene

_PARTNER = 0.4
_BATCH = 16


def _tasks(scene: Scene, lessons: Lessons) -> tuple[list[str], list[str], list[str]]:
    """Every task of the lessons, existence in all its categories; position questions twice."""
    short = ["exist-yes", *EXISTENCE_TASKS, "loc", "loc", "cell", "cell", "color", "shape", "count"]
    short += [task for task in dict.fromkeys(lessons.short) if task not in short]
    return short + ["digits"] * bool(scene.plates), list(lessons.relations), ["caption"]


def _reading_apart(packed: Packed) -> Packed:
    """Count reading one of several plates apart from reading the only one: it is learned much later."""
    slots = (slot._replace(task="digits of two") if slot.task == "digits" else slot for slot in packed.slots)
    return replace(packed, slots=tuple(slots))


def _one_picture(version: Version, number: int) -> tuple[np.ndarray, Packed]:
    """Pixels and questions of a scene; those of a batch have the same size."""
    rng = random_state(version.world.stream + MONITOR_STREAM, number)
    world = version.world.sized(version.world.size_at(number // _BATCH))
    scene = sample_scene(rng, world, _PARTNER, (2, world.max_anchors))
    pixels = render(rng, scene)[0]
    packed = pack(rng, scene, _tasks(scene, version.lessons), version.lessons)
    return pixels, packed if len(scene.plates) < 2 else _reading_apart(packed)


def _several_pictures(kind: Kind, number: int) -> tuple[np.ndarray, Packed]:
    """Pixels and questions of a prompt with several pictures."""
    rng, prompt = kind.sample(MONITOR_STREAM, 0, number, _PARTNER, (2, kind.world.max_anchors))
    pixels = prompt.render(rng)[0]
    return pixels, pack_several(rng, prompt, kind.course)


class Monitor:
    """Teacher-forced accuracy per task: exact match of the whole answer, share of right tokens for captions.

    Args:
        forward: of the model.
        version: of the model.
        dtype: of its weights.
        scenes: how many prompts.
        kind: what they show; None for one picture.
    """

    def __init__(
        self, forward: PackedForward, version: Version, dtype: torch.dtype, scenes: int, kind: Kind | None = None
    ) -> None:
        self.forward, self.dtype, self.kind = forward, dtype, kind
        samples = (
            _several_pictures(kind, number) if kind else _one_picture(version, number) for number in range(scenes)
        )
        self.images, self.packed = map(list, zip(*samples, strict=True))

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Accuracy by task."""
        scores: dict[str, list[float]] = {}
        for start in range(0, len(self.images), _BATCH):
            samples = self.packed[start : start + _BATCH]
            ids = np.stack([sample.ids for sample in samples])
            pixels = np.stack(self.images[start : start + _BATCH])
            inputs, groups = packed_inputs(pixels, self.kind, self.dtype)
            logits, _ = self.forward(inputs, torch.from_numpy(ids), slot_groups=groups)
            guesses = logits.argmax(-1).numpy()
            for guess, sample in zip(guesses, samples, strict=True):
                for task, first, end in sample.slots:
                    right = guess[first - 1 : end - 1] == sample.ids[first:end]
                    scores.setdefault(task, []).append(float(right.mean() if task == "caption" else right.all()))
        return {task: round(float(np.mean(values)), 3) for task, values in scores.items()}
