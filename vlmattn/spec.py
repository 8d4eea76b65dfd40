"""Text <-> methods, and the registry.

A spec is methods joined by `+`, each a name with optional parameters: `fastv(keep=0.5) + random(keep=64,
before_layer=3)`. Values are Python literals; bare words are strings (`query=all_text`). `none` is the empty spec.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmattn.errors import SpecError, UnknownMethodError, nearest
from vlmattn.methods.base import REGISTRY, Method

Spec = str | Method | Sequence["str | Method | None"] | None


@dataclass(frozen=True)
class MethodInfo:
    """A registered method as the CLI and the docs show it.

    Attributes:
        name, kind, title, paper: as registered; `paper` is an arXiv id or empty.
        summary: first sentence of the docstring.
        doc: the docstring of the method's file: idea, source, deviations.
        cls: the dataclass.
        fields: one dict per parameter with `name`, `type`, `default`, `help`.
    """

    name: str
    kind: str
    title: str
    paper: str
    summary: str
    doc: str
    cls: type[Method]
    fields: tuple[dict[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, without the class."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "cls"}
        return data | {"fields": [dict(entry) for entry in self.fields]}


@functools.cache
def _import_methods() -> None:
    package = importlib.import_module("vlmattn.methods")
    for module in pkgutil.walk_packages(package.__path__, "vlmattn.methods."):
        importlib.import_module(module.name)


def registry() -> dict[str, MethodInfo]:
    """All registered methods by name, those of the package and those the user registered."""
    _import_methods()
    return {name: _info(REGISTRY[name]) for name in sorted(REGISTRY, key=lambda n: (REGISTRY[n].kind, n))}


def _info(cls: type[Method]) -> MethodInfo:
    fields = tuple(
        {"name": f.name, "type": str(f.type), "default": f.default, "help": f.metadata.get("help", "")}
        for f in dataclasses.fields(cls)
    )
    summary = re.split(r"(?<=\.)\s", (cls.__doc__ or "").strip(), maxsplit=1)[0]
    doc = inspect.cleandoc(getattr(sys.modules.get(cls.__module__), "__doc__", None) or "")
    return MethodInfo(cls.name, cls.kind, cls.title, cls.paper, summary, doc, cls, fields)


def parse(spec: Spec) -> tuple[Method, ...]:
    """Read a spec: text, a method object, or a list of both.

    Raises:
        SpecError: it is not in the spec language, or a value is out of range.
        UnknownMethodError: a method or parameter that does not exist, with the nearest name.
    """
    if spec is None:
        return ()
    if isinstance(spec, Method):
        return (spec,)
    if isinstance(spec, str):
        return _parse_text(spec)
    if isinstance(spec, Sequence):
        return tuple(method for part in spec for method in parse(part))
    raise SpecError(f"a spec is text, a method object or a list of them, not {type(spec).__name__}")


def text(methods: Sequence[Method]) -> str:
    """The canonical text of some methods: only what differs from the defaults. `parse(text(m)) == m`."""
    return " + ".join(map(str, methods)) or "none"


def _parse_text(source: str) -> tuple[Method, ...]:
    if source.strip().lower() in ("none", ""):
        return ()
    try:
        tree = ast.parse(source.strip(), mode="eval").body
    except SyntaxError as error:
        raise SpecError(
            f"cannot read the spec {source!r}: expected something like 'fastv(keep=0.5) + random(keep=64)'"
        ) from error
    return tuple(_method(node, source) for node in _terms(tree))


def _terms(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_terms(node.left), *_terms(node.right)]
    return [node]


def _method(node: ast.expr, source: str) -> Method:
    _import_methods()
    call = node if isinstance(node, ast.Call) else None
    name_node = call.func if call else node
    if not isinstance(name_node, ast.Name):
        raise SpecError(f"cannot read {ast.unparse(node)!r} in the spec {source!r}: expected name or name(field=value)")
    name = name_node.id
    if name not in REGISTRY:
        raise UnknownMethodError(f"unknown method {name!r}: {nearest(name, REGISTRY)}")
    if call is None:
        return REGISTRY[name]()
    if call.args:
        raise SpecError(f"{ast.unparse(node)}: give parameters by name, such as {name}(keep=0.5)")
    values = {keyword.arg or "**": _value(keyword.value) for keyword in call.keywords}
    known = [field.name for field in dataclasses.fields(REGISTRY[name])]
    for field in values:
        if field not in known:
            raise UnknownMethodError(f"{name} has no parameter {field!r}: {nearest(field, known)}")
    return REGISTRY[name](**values)


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return node.id
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise SpecError(f"{ast.unparse(node)!r} is not a value: expected a number, a word or a list") from error


def replace(methods: Sequence[Method], path: str, value: Any) -> tuple[Method, ...]:
    """Methods with one parameter changed: `replace(methods, "fastv.keep", 0.3)`; `random[1].seed` names the second of
    two.

    Raises:
        SpecError: the path does not name one parameter of one installed method.
    """
    match = re.fullmatch(r"(\w+)(?:\[(\d+)\])?\.(\w+)", path)
    if not match:
        raise SpecError(f"cannot read {path!r}: expected method.parameter, such as fastv.keep")
    name, position, field = match.groups()
    places = [i for i, method in enumerate(methods) if method.name == name]
    if not places:
        raise UnknownMethodError(f"no {name!r} is installed: the session has {text(methods)}")
    if position is None and len(places) > 1:
        raise SpecError(f"{name!r} is installed {len(places)} times: say which, such as {name}[0].{field}")
    if position is not None and int(position) >= len(places):
        raise SpecError(f"{path!r}: {name!r} is installed {len(places)} time(s), counting from 0")
    place = places[int(position or 0)]
    known = [entry.name for entry in dataclasses.fields(methods[place])]
    if field not in known:
        raise UnknownMethodError(f"{name} has no parameter {field!r}: {nearest(field, known)}")
    changed = dataclasses.replace(methods[place], **{field: value})
    return (*methods[:place], changed, *methods[place + 1 :])
