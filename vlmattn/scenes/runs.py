"""The folder of a finished training run, read back: weights, curves, and what choose.py found out about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vlmattn.errors import DataError

from .card import ABANDONED
from .plateaus import CURVE, STAGE_WEIGHTS, abandoned, read_curve
from .resume import agree
from .stages import Settings
from .train import CHOICE, SETTINGS


def weights(run: Path, habit_share: float) -> dict[str, Tensor]:
    """The fp32 weights of a run: those before the last stage plus a share of what that stage changed.

    Args:
        run: folder of a finished run.
        habit_share: 0 for the weights before the last stage, 1 for those after it.

    Raises:
        DataError: the share is outside 0..1, or the run is not finished, or a file is another run's.
    """
    if not 0 <= habit_share <= 1:
        raise DataError(f"habit_share={habit_share} is outside 0..1")
    wanted = Settings(**settings(run))
    files = {stage: run / STAGE_WEIGHTS[stage] for stage in wanted.stages[-2:]}
    for stage, file in files.items():
        if not file.exists():
            raise DataError(f"{run} has no {file.name}: the run is not finished; start it again with the same --out")
        if not agree(file, wanted, stage):
            raise DataError(f"{file} was written with other settings than {SETTINGS} has: train it anew")
    before, after = map(load_file, files.values())
    return {name: torch.lerp(weight, after[name], habit_share) for name, weight in before.items()}


def settings(run: Path) -> dict[str, Any]:
    """The settings of a run as they were written; raises DataError if the folder has none."""
    if not (run / SETTINGS).exists():
        raise DataError(f"{run} has no {SETTINGS}: it is not the folder of a run of vlmattn.scenes.train")
    return json.loads((run / SETTINGS).read_text())


def choice(run: Path) -> dict[str, Any]:
    """What `python -m vlmattn.scenes.choose` wrote about a run; empty if it was not asked."""
    file = run / CHOICE
    return json.loads(file.read_text()) if file.exists() else {}


def record(run: Path) -> dict[str, Any]:
    """Settings, curve and the curves of the seeds that were given up, as training.json holds them."""
    return {
        "settings": settings(run),
        "curve": read_curve(run / CURVE),
        ABANDONED: {str(seed): read_curve(file) for seed, file in abandoned(run).items()},
    }
