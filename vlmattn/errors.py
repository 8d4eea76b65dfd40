"""Exceptions. Each derives from `VlmattnError` and from the built-in that fits, and says value, expectation and way
out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VlmattnError(Exception):
    """Base class of every error that vlmattn raises on purpose."""


class SpecError(VlmattnError, ValueError):
    """A method specification cannot be read, or its parts do not fit together."""


class UnknownMethodError(SpecError):
    """A method name or a parameter name that is not in the registry."""


class BudgetError(VlmattnError, ValueError):
    """A `keep` value that is not a share in (0, 1] or a positive number of tokens."""


class LayerError(VlmattnError, ValueError):
    """A decoder layer that the model does not have, or that the method cannot use."""


class UnsupportedModelError(VlmattnError, TypeError):
    """A model that no family file describes, or whose configuration the engine cannot serve."""


class AlreadyWrappedError(VlmattnError, RuntimeError):
    """`wrap` was called on a model that already carries a session."""


class CallError(VlmattnError, RuntimeError):
    """A forward or generate call that the installed methods cannot serve."""


class DataError(VlmattnError, ValueError):
    """A file of questions, answers or images that is missing or malformed."""


class TrainingError(VlmattnError, RuntimeError):
    """A training run of an embedded model that did not become what it should."""


class VlmattnWarning(UserWarning):
    """Something that was asked for does nothing here, and why."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence that names the closest known word, or all of them when nothing is close."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
