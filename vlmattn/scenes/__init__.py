"""The embedded benchmark and models: rendered scenes, questions, splits, and a small VLM trained on them.

Nothing here needs a network. ``benchmark`` and ``SceneSet`` need numpy and pillow only; ``load`` needs torch and
transformers. Results on these models are never results on real VLMs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .library import load, names, path, version
    from .splits import SceneSet, benchmark

__all__ = ["SceneSet", "benchmark", "load", "names", "path", "version"]

_HOMES = {
    **dict.fromkeys(("SceneSet", "benchmark"), "splits"),
    **dict.fromkeys(("load", "names", "path", "version"), "library"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
