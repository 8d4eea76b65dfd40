"""The packaged checkpoints: which there are, where they lie, and how to load one without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmattn.errors import DataError

from .versions import VERSIONS, Version

if TYPE_CHECKING:
    import torch

CHECKPOINTS = Path(__file__).parent / "checkpoints"
DERIVED = {"scenes-llava-sink": "scenes-llava"}
"""Models that are made in memory from a packaged one by weight edits (planted.py), with the one they come from."""


def names() -> list[str]:
    """Names of the packaged models, sorted."""
    found = [folder.parent.name for folder in CHECKPOINTS.glob("*/config.json")]
    return sorted([*found, *(name for name, base in DERIVED.items() if base in found)])


def path(name: str) -> Path:
    """Folder of a packaged model, in the Hugging Face layout.

    Raises:
        DataError: no packaged model has that name, or it is derived and has no folder.
    """
    if name in DERIVED:
        raise DataError(
            f"{name} has no folder, it is made from {DERIVED[name]} when it is loaded; "
            "`python -m vlmattn.scenes.planted --out DIR` writes one"
        )
    if name not in names():
        raise DataError(f"there is no packaged model {name!r}; there are: {', '.join(names()) or 'none'}")
    return CHECKPOINTS / name


def version(name: str) -> Version:
    """The version of a packaged model, as its training record says; a derived one has that of its base.

    Raises:
        DataError: no packaged model has that name, or as for :func:`recorded_version`.
    """
    return recorded_version(path(DERIVED.get(name, name)))


def recorded_version(folder: Path) -> Version:
    """The version of a packaged or exported model, as the training record in its folder says.

    Raises:
        DataError: the record is missing or names no known version.
    """
    return VERSIONS[recorded_settings(folder)["version"]]


def recorded_settings(folder: Path) -> dict[str, Any]:
    """The settings that a packaged or exported model was trained with, as the training record in its folder says.

    Raises:
        DataError: the record is missing or names no known version.
    """
    record = folder / "training.json"
    try:
        settings = json.loads(record.read_text())["settings"]
        VERSIONS[settings["version"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{record}: no training record of a known version ({', '.join(VERSIONS)}): {error}") from error
    return settings


def load(name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """Load a packaged model and its processor from the package's own files; a derived one is made on the way.

    Args:
        name: one of :func:`names`.
        dtype: of the weights; None for float32 (they are stored in bfloat16).
        device: where to put the model.

    Returns:
        The model in evaluation mode, and its processor.

    Raises:
        DataError: no packaged model has that name, or it is derived and its recipe does not fit.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    if name in DERIVED:
        from .planted import plant

        model, processor = load(DERIVED[name])
        return plant(model).to(device=device, dtype=dtype or torch.float32), processor
    folder = path(name)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype or torch.float32, local_files_only=True)
    return model.eval().to(device), load_processor(folder)


def load_processor(folder: Path) -> Any:
    """The processor in the folder of a scenes model, packaged or exported; it needs no torchvision.

    ``AutoProcessor`` reads the same folders, but that of a Qwen model only where torchvision works.
    """
    from transformers import AutoProcessor

    from .qwen_processor import PROCESSOR_FILE, ScenesQwenProcessor

    stock = json.loads((folder / PROCESSOR_FILE).read_text())["processor_class"]
    reader = ScenesQwenProcessor if stock == ScenesQwenProcessor.__base__.__name__ else AutoProcessor
    return reader.from_pretrained(folder, local_files_only=True)
