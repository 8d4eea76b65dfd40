"""Several specs from few words: `fastv; random` with `keep` 0.5 and 0.25 are four.

Values are written as a list, `0.5,0.25,64`, or as a range with both ends, `1..4` or `0.25..0.75:0.25`. A range may also
stand in a spec: `fastv(before_layer=1..4)`.
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from vlmattn import spec as specs
from vlmattn.errors import DataError

MOST = 200
"""A range with more values than this is taken for a slip of the pen."""
_DIGITS = 30
"""And numbers with more places than this before or after the point."""
_NUMBER = r"[+-]?(?:\d+(?:\.(?!\.)\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_COMMA = re.compile(r"(?<![\w.])0,(\d+)(?![\w.])")
_RANGE = re.compile(rf"({_NUMBER})\s*\.\.\s*({_NUMBER})(?:\s*:\s*({_NUMBER}))?")


def expand(text: str, fields: Mapping[str, Sequence[Any]] | None = None) -> dict[str, str]:
    """The specs in "a; b; c", each once for every combination of the values that it takes.

    Args:
        text: specs, separated by `;`, ranges in them allowed. A kind of methods, such as `prune`, stands for the
            methods that `members` names.
        fields: parameter -> values. A method takes them if it has the parameter and the spec does not write it; in
            "fastv(keep=0.5) + random" a `keep` goes to random only. "random.keep" speaks of that method alone, and
            goes before a `keep` for all. A spec that takes nothing stays as it is and runs once.

    Returns:
        Canonical spec text -> label, in the order written, without repetitions. The label is what was typed, with the
        values filled in: "fastv(keep=0.5)" even where 0.5 is the default.

    Raises:
        SpecError, BudgetError, LayerError, UnknownMethodError: a spec cannot be read, or a value is out of range.
        DataError: there is no spec, a range is wrong, or a parameter has no effect on any spec.
    """
    wanted = dict(fields or {})
    for name, values in wanted.items():
        if not values:
            raise DataError(f"{name} has no values; for instance {name}=0.5,0.25")
    parts = [name for part in _parts(text) for name in (members(part) or [part])]
    if not parts:
        raise DataError(f'--methods {text!r} names no method; for instance --methods "none; fastv(keep=0.5)"')
    found: dict[str, str] = {}
    taken: set[str] = set()
    written: set[str] = set()
    for plain in itertools.chain.from_iterable(map(_inline, parts)):
        terms = [_Term(node, wanted) for node in _terms(plain)]
        takes = [name for name in wanted if any(term.takes(name) for term in terms)]
        taken.update(takes)
        written.update(name for name in wanted if any(term.writes(name) for term in terms))
        for values in itertools.product(*(wanted[name] for name in takes)):
            label = " + ".join(term.text(dict(zip(takes, values))) for term in terms) if takes else plain
            found.setdefault(specs.text(specs.parse(label)), label)
    for name in wanted:
        if name not in taken:
            ahead = [other for other in wanted if other.rpartition(".")[2] == name and other in taken]
            raise _nobody(name, text, parts, name in written, ahead)
    return found


def members(kind: str) -> list[str]:
    """Names of the methods of a kind that do something by default, in the order of the registry; none of no kind."""
    return [name for name, info in specs.registry().items() if info.kind == kind and not info.cls().is_noop]


def grouped(text: str) -> set[str]:
    """Names of the methods that "a; b; c" takes only as members of a group, not by themselves."""
    parts = _parts(text)
    return {name for part in parts for name in members(part)} - set(parts)


def _parts(text: str) -> list[str]:
    return list(filter(None, map(str.strip, text.split(";"))))


def values(text: str, name: str) -> list[Any]:
    """The values of a parameter as typed: "0.5,0.25", "64", "1..4", "0.25..0.75:0.25", "all_text,None", "[0.5,0.25]".

    Numbers keep their kind (64 is a number of tokens, 0.5 a share), bare words are text. A range has both ends; it is
    of floats as soon as one of its numbers is.

    Raises:
        DataError: a value or a range cannot be read, naming `name`.
    """
    found: list[Any] = []
    for part in _split(text):
        match = _RANGE.fullmatch(part)
        if match:
            found += _range(*match.groups(), where=f"{name}={text}")
        elif ".." in part:
            raise DataError(f"{name}={text}: {part!r} is not a range; expected 1..4 or 0.25..0.75:0.25")
        elif part:
            found.append(_value(part, f"{name}={text}"))
    if not found:
        raise DataError(f"{name}={text!r} has no values; for instance {name}=0.5,0.25 or {name}=1..4")
    return found


def fields(keep: str | None, ranges: Sequence[str]) -> dict[str, list[Any]]:
    """The values behind `--keep VALUES` and any number of `--range FIELD=VALUES`.

    Raises:
        DataError: a text is not FIELD=VALUES, a parameter is given twice, or a share has a decimal comma.
    """
    found: dict[str, list[Any]] = {} if keep is None else {"keep": _shares(keep, "--keep")}
    for text in ranges:
        name, equals, rest = text.partition("=")
        name = name.strip()
        if not equals or not re.fullmatch(r"\w+(\.\w+)?", name):
            raise DataError(f"--range {text!r} is not FIELD=VALUES; for instance --range before_layer=1..4")
        if name in found:
            raise DataError(f"{name} is given twice; put its values into one list: --range {name}=VALUE,VALUE")
        found[name] = _shares(rest, name) if fills(name) == "keep" else values(rest, name)
    return found


def fills(name: str) -> str:
    """The parameter that a field fills: "keep" for "keep" and for "random.keep"."""
    return name.rpartition(".")[2]


class _Term:
    """One method of a spec as it was written, and the fields that may fill it."""

    def __init__(self, node: ast.expr, wanted: Collection[str] = ()) -> None:
        self.wanted = wanted
        call = node if isinstance(node, ast.Call) else None
        self.name = ast.unparse(call.func if call else node)
        self.given = {str(keyword.arg): ast.unparse(keyword.value) for keyword in (call.keywords if call else ())}
        self.has = [field.name for field in dataclasses.fields(specs.registry()[self.name].cls)]

    def writes(self, name: str) -> bool:
        method, _, field = name.rpartition(".")
        return method in ("", self.name) and field in self.given

    def takes(self, name: str) -> bool:
        method, _, field = name.rpartition(".")
        mine = method == self.name or (not method and f"{self.name}.{field}" not in self.wanted)
        return mine and field in self.has and field not in self.given

    def text(self, filled: Mapping[str, Any]) -> str:
        given = dict(self.given)
        for name, value in filled.items():
            if self.takes(name):
                given[name.rpartition(".")[2]] = value if isinstance(value, str) else repr(value)
        shown = ", ".join(f"{field}={given[field]}" for field in self.has if field in given)
        return f"{self.name}({shown})" if shown else self.name


def _terms(text: str) -> list[ast.expr]:
    """The methods of a spec as syntax, after the spec language has accepted it."""
    if not specs.parse(text):
        return []
    node: ast.expr = ast.parse(text, mode="eval").body
    found: list[ast.expr] = []
    while isinstance(node, ast.BinOp):
        found.append(node.right)
        node = node.left
    return [node, *reversed(found)]


def _inline(text: str) -> Iterator[str]:
    """A spec with ranges in it -> the specs it stands for."""
    match = _RANGE.search(text)
    if match is None:
        yield text
        return
    for value in _range(*match.groups(), where=text):
        yield from _inline(f"{text[: match.start()]}{value!r}{text[match.end() :]}")


def _range(first: str, last: str, step: str | None, *, where: str) -> list[int] | list[float]:
    start, end, by = Decimal(first), Decimal(last), Decimal(step or "1")
    for number in (start, end, by):
        if number and abs(number.adjusted()) > _DIGITS:
            raise DataError(f"{where}: {number} is not a number that makes sense in a range")
    whole = not any(mark in part for part in (first, last, step or "") for mark in ".eE")
    if not whole and step is None:
        raise DataError(f"{where}: a range of fractions needs a step, such as {first}..{last}:0.25")
    if by <= 0:
        raise DataError(f"{where}: the step {step} must be above 0; a range that goes down is written {first}..{last}")
    count = int(abs(end - start) / by) + 1
    if count > MOST:
        raise DataError(f"{where} stands for {count} values; at most {MOST} make sense, take a larger step")
    found = [start + (by if end >= start else -by) * index for index in range(count)]
    if found[-1] != end:
        raise DataError(
            f"{where}: steps of {step} from {first} end at {found[-1]} and do not reach {last}; write "
            f"{first}..{found[-1]}:{step}, or take another step"
        )
    return [int(value) for value in found] if whole else [float(value) for value in found]


def _split(text: str) -> list[str]:
    """At commas outside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _value(text: str, where: str) -> Any:
    if text.isidentifier() and text not in ("None", "True", "False"):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise DataError(f"{where}: {text!r} is not a value; expected a number, a word or a list") from None


def _shares(text: str, name: str) -> list[Any]:
    """`values` of keep, where 0 is no value: "0,5" is a half with a decimal comma."""
    if _COMMA.search(text):
        meant = _COMMA.sub(lambda hit: f"0.{hit[1]}", text)
        raise DataError(
            f"{name} {text} is the list of {', '.join(_split(text))}, and with 0 nothing is left; a decimal point is "
            f"meant: {name} {meant}"
        )
    return values(text, name)


def _nobody(name: str, text: str, parts: Sequence[str], written: bool, ahead: Sequence[str]) -> DataError:
    if ahead:
        return DataError(
            f"{name} has no effect: {' and '.join(ahead)} fill{'s' if len(ahead) == 1 else ''} it in every spec of "
            f"{text!r} that leaves it open; leave one of them out"
        )
    if written:
        return DataError(
            f"{name} has no effect: every spec in {text!r} that has this parameter writes it; leave it out there"
        )
    having = []
    for plain in dict.fromkeys(next(_inline(part)) for part in parts):
        has = dict.fromkeys(field for node in _terms(plain) for field in _Term(node).has)
        having.append(f"{plain} has {', '.join(has) or 'no parameters'}")
    return DataError(f"no spec takes {name}: {'; '.join(having)}")
