"""What the training curve is measured on: a fixed set of scenes that neither training nor any split ever shows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from .model import PackedForward, normalized_pixels
from .packing import MONITOR_STREAM, Packed, pack
from .questions import EXISTENCE_TASKS
from .render import render
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


class Monitor:
    """Teacher-forced accuracy per task: exact match of the whole answer, share of right tokens for captions."""

    def __init__(self, forward: PackedForward, version: Version, dtype: torch.dtype, scenes: int) -> None:
        self.forward, self.dtype = forward, dtype
        self.images: list[np.ndarray] = []
        self.packed: list[Packed] = []
        for number in range(scenes):
            rng = random_state(version.world.stream + MONITOR_STREAM, number)
            world = version.world.sized(version.world.size_at(number // _BATCH))
            scene = sample_scene(rng, world, _PARTNER, (2, world.max_anchors))
            self.images.append(render(rng, scene)[0])
            packed = pack(rng, scene, _tasks(scene, version.lessons), version.lessons)
            self.packed.append(packed if len(scene.plates) < 2 else _reading_apart(packed))

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Accuracy by task."""
        scores: dict[str, list[float]] = {}
        for start in range(0, len(self.images), _BATCH):
            samples = self.packed[start : start + _BATCH]
            ids = np.stack([sample.ids for sample in samples])
            pixels = normalized_pixels(torch.from_numpy(np.stack(self.images[start : start + _BATCH])))
            logits, _ = self.forward(pixels.to(self.dtype), torch.from_numpy(ids))
            guesses = logits.argmax(-1).numpy()
            for guess, sample in zip(guesses, samples, strict=True):
                for task, first, end in sample.slots:
                    right = guess[first - 1 : end - 1] == sample.ids[first:end]
                    scores.setdefault(task, []).append(float(right.mean() if task == "caption" else right.all()))
        return {task: round(float(np.mean(values)), 3) for task, values in scores.items()}
