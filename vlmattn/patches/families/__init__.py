"""Model families: one file of declarations each, found by the config's `model_type`."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

from vlmattn.errors import UnsupportedModelError
from vlmattn.patches.families.base import FAMILIES, Family


@functools.cache
def _import_families() -> None:
    for module in pkgutil.iter_modules(__path__, __name__ + "."):
        importlib.import_module(module.name)


def supported() -> list[Family]:
    """All known families, by name."""
    _import_families()
    return [FAMILIES[key] for key in sorted(FAMILIES)]


def find(model: Any) -> Family:
    """The family of a model.

    Raises:
        UnsupportedModelError: no family describes this model; the message lists those that exist.
    """
    known = ", ".join(f"{family.model_type} ({family.model_class})" for family in supported())
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    family = FAMILIES.get(model_type or "")
    if family is None:
        what = f"model type {model_type!r}" if model_type else f"an object of type {type(model).__name__}"
        raise UnsupportedModelError(f"{what} is not supported: vlmattn knows {known}")
    if not hasattr(model, "generate") or not hasattr(model, "lm_head"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head: wrap the whole model, such as {family.model_class}"
        )
    return family
