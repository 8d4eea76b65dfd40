"""Where a training run goes on: at its checkpoint, or behind a finished stage that other settings leave as it was."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .plateaus import CHECKPOINT, CURVE, STAGE_WEIGHTS, read_curve
from .stages import STAGE_NAMES, Settings

RESUME = ("automatic", "required", "back", "never")
"""See :class:`~vlmattn.scenes.train.Running`."""


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        state: what a checkpoint holds: ``settings``, ``stage`` (empty for a new run), ``step``, ``seconds``, ``loss``
            and, of the stage it lies in, the ``optimizer``.
        weights: fp32 weights by name behind that stage, if the run goes back to its end; else none.
    """

    state: dict[str, Any]
    weights: dict[str, Tensor] = field(default_factory=dict)

    def keeps(self, entry: dict[str, Any]) -> bool:
        """Whether a line of the curve is not newer than this."""
        if not self.state["stage"]:
            return False
        reached = STAGE_NAMES.index(self.state["stage"]), self.state["step"]
        return (STAGE_NAMES.index(entry["stage"]), entry["step"]) <= reached


def start(out: Path, resume: str, settings: Settings) -> Start:
    """Where a run with these settings begins in a folder.

    A checkpoint is continued if all settings that differ are first used in a stage that it has not come to.

    Args:
        out: folder of the run.
        resume: a name in RESUME.
        settings: of the run.

    Raises:
        FileNotFoundError: ``resume`` is ``required`` and there is no checkpoint.
        ValueError: what is there was trained with other settings.
    """
    path = out / CHECKPOINT
    if resume != "never" and path.exists():
        state = torch.load(path, weights_only=True)
        if Settings(**state["settings"]).agrees(settings, state["stage"]):
            return Start(state | {"settings": asdict(settings)})
    if resume == "required" and not path.exists():
        raise FileNotFoundError(f"--resume required, but {path} does not exist")
    if resume == "back":
        return _behind_a_stage(out, settings)
    if resume != "never" and path.exists():
        raise ValueError(
            f"{path} was written with other settings; use --resume back to keep its stages that they do not change, "
            "--resume never to begin anew, or another --out"
        )
    return Start({"settings": asdict(settings), "stage": "", "step": 0, "seconds": 0.0, "loss": None})


def _behind_a_stage(out: Path, settings: Settings) -> Start:
    """Behind the last stage whose weights these settings leave as they are."""
    for stage in reversed(settings.stages):
        if stage in STAGE_WEIGHTS and agree(out / STAGE_WEIGHTS[stage], settings, stage):
            lines = [entry for entry in read_curve(out / CURVE) if entry["stage"] == stage]
            step, seconds = (lines[-1]["step"], lines[-1]["seconds"]) if lines else (0, 0.0)
            state = {"settings": asdict(settings), "stage": stage, "step": step, "seconds": seconds, "loss": None}
            return Start(state, load_file(out / STAGE_WEIGHTS[stage]))
    files = ", ".join(STAGE_WEIGHTS[stage] for stage in settings.stages if stage in STAGE_WEIGHTS)
    raise ValueError(f"--resume back: {out} has none of {files} that these settings leave as it is")


def save(file: Path, weights: dict[str, Tensor], settings: Settings) -> None:
    """Write the weights behind a stage with the settings that they were trained with."""
    save_file(weights, file, metadata={"settings": json.dumps(asdict(settings))})


def agree(file: Path, settings: Settings, stage: str) -> bool:
    """Whether there are weights behind a stage that these settings lead to, too."""
    if not file.exists():
        return False
    with safe_open(file, framework="pt") as weights:
        return Settings(**json.loads(weights.metadata()["settings"])).agrees(settings, stage)
