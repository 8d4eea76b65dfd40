"""Checks of a method's fields: each raises `SpecError` with the value and what is expected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from vlmattn.errors import SpecError


class Checks:
    """What `__post_init__` of a method calls for its own fields."""

    name: ClassVar[str]

    def _one_of(self, field: str, words: Sequence[str]) -> None:
        value = getattr(self, field)
        if not isinstance(value, str) or value not in words:
            raise SpecError(f"{self.name}.{field}={value!r}: expected one of {', '.join(words)}")

    def _flag(self, *fields: str) -> None:
        for field in fields:
            value = getattr(self, field)
            if not isinstance(value, bool):
                raise SpecError(f"{self.name}.{field}={value!r}: expected True or False")

    def _number(self, field: str, expected: str, fits: Callable[[float], bool]) -> None:
        """Refuse what is no int or float, or does not fit; `expected` says in words what does."""
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
            raise SpecError(f"{self.name}.{field}={value!r}: expected {expected}")

    def _count(self, field: str, least: int) -> None:
        value = getattr(self, field)
        if type(value) is not int or value < least:
            raise SpecError(f"{self.name}.{field}={value!r}: expected an int >= {least}")
