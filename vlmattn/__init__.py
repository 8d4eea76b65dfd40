"""vlmattn: cheaper and more truthful Hugging Face vision-language models by one call, nothing retrained.

>>> import vlmattn
>>> session = vlmattn.wrap(model, "fastv(keep=0.5)")   # doctest: +SKIP
>>> model.generate(**inputs)                            # doctest: +SKIP
>>> print(session.report()); session.remove()           # doctest: +SKIP

Importing this package imports neither torch nor transformers; the public names load what they need when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmattn.errors import VlmattnError
    from vlmattn.report import Report
    from vlmattn.session import CompressedContext, Session, TextTower, VisionStore, families, methods_info, wrap

__version__ = "0.1.0"

_HOME = {
    "VlmattnError": "vlmattn.errors",
    "Report": "vlmattn.report",
    "CompressedContext": "vlmattn.session",
    "Session": "vlmattn.session",
    "TextTower": "vlmattn.session",
    "VisionStore": "vlmattn.session",
    "families": "vlmattn.session",
    "methods_info": "vlmattn.session",
    "wrap": "vlmattn.session",
}

__all__ = [
    "CompressedContext",
    "Report",
    "Session",
    "TextTower",
    "VisionStore",
    "VlmattnError",
    "__version__",
    "families",
    "methods_info",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'vlmattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
