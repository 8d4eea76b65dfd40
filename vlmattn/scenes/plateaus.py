"""Training runs that sit on a plateau: how they are told early, and what is kept of them.

Whether localisation and cell lookup are learned in time depends on the seed. A check looks at one line of the curve of
stage 1; a run that fails it is not worth finishing. Everything here is a function of the files of a run, so a killed
run started again comes to the same verdict.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

CHECKPOINT, CURVE = "checkpoint.pt", "curve.jsonl"
STAGE_WEIGHTS = {"joint": "joint.safetensors", "several": "several.safetensors", "habit": "model.safetensors"}
"""Weights behind each stage but the first, by its name; never those of a seed that was given up. Each file holds the
settings that it was trained with."""
WEIGHTS = STAGE_WEIGHTS["habit"]
"""Those of a finished run."""
_ABANDONED = re.compile(r"curve-seed(\d+)\.jsonl")


@dataclass(frozen=True)
class Bound:
    """A measure of the curve (``loss`` or a task's accuracy) and the open interval in which a good run has it."""

    measure: str
    above: float = -math.inf
    below: float = math.inf

    def met(self, entry: dict[str, Any]) -> bool:
        """Whether a line of the curve is inside; raises KeyError where it has no such measure."""
        return self.above < entry[self.measure] < self.below


@dataclass(frozen=True)
class Check:
    """What a run must have reached.

    Attributes:
        step: step of stage 1 at which the curve is looked at.
        bounds: what a good run shows.
        enough: how many of the bounds must be met.
    """

    step: int
    bounds: tuple[Bound, ...]
    enough: int

    def failed(self, entry: dict[str, Any]) -> str:
        """What a line of the curve shows if it fails, else nothing."""
        if sum(bound.met(entry) for bound in self.bounds) >= self.enough:
            return ""
        return f"step {self.step}: " + ", ".join(f"{bound.measure} {entry[bound.measure]}" for bound in self.bounds)


def read_curve(file: Path) -> list[dict[str, Any]]:
    """The lines of a curve, oldest first; none if there is no such file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def plateau(curve: Sequence[dict[str, Any]], checks: Sequence[Check], stage: str) -> str:
    """The first failed check of a curve in words, or nothing; only lines of ``stage`` count."""
    found = {entry["step"]: entry for entry in curve if entry["stage"] == stage}
    failures = (check.failed(found[check.step]) for check in checks if check.step in found)
    return next(filter(None, failures), "")


def abandoned(run: Path) -> dict[int, Path]:
    """Curves of the seeds that were given up in a run's folder, by seed, ascending."""
    names = ((_ABANDONED.fullmatch(file.name), file) for file in run.glob("curve-seed*.jsonl"))
    return dict(sorted((int(match[1]), file) for match, file in names if match))


def next_seed(run: Path, first: int) -> int:
    """The first seed from ``first`` on that was not given up."""
    given_up = abandoned(run)
    return next(seed for seed in count(first) if seed not in given_up)


def abandon(run: Path, seed: int) -> None:
    """Drop the checkpoint and weights of a seed and keep its curve as ``curve-seed<seed>.jsonl``."""
    for name in (CHECKPOINT, *STAGE_WEIGHTS.values()):
        (run / name).unlink(missing_ok=True)
    os.replace(run / CURVE, run / f"curve-seed{seed}.jsonl")


def forget(run: Path) -> None:
    """Remove what earlier runs left in a folder: checkpoint, curve, weights, and the curves of seeds given up."""
    names = (CHECKPOINT, CURVE, *STAGE_WEIGHTS.values())
    for file in (*(run / name for name in names), *abandoned(run).values()):
        file.unlink(missing_ok=True)
