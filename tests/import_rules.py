"""Which part of the package may import which: the table, and a checker that reads the sources without running them.

An import counts wherever it stands: at the top, inside a function, under TYPE_CHECKING, or as a literal given to
`importlib.import_module`. A module belongs to the rule with the longest zone that is a prefix of its name.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "vlmattn"
WORDS = ("budget", "spans", "edits", "errors")
BASES = tuple(
    f"methods.{name}"
    for name in (
        "base",
        "cache",
        "calibrate",
        "compressor",
        "memory",
        "rehearsal",
        "segments",
        "skipper",
        "views",
    )
)
PUBLIC = ("", "spec", "spans", "report", "errors", "scenes")
FAMILY_NAMES = ("llava", "qwen", "internvl", "smolvlm", "idefics", "gemma")
FAMILY_HOMES = ("patches/families/", "scenes/")


@dataclass(frozen=True)
class Rule:
    """What modules in `zone` may import.

    Attributes:
        zone: part of the package, a dotted name below it ("" is the package's own `__init__`).
        inside: parts of the package it may import, itself included by default; "" is the public API.
        libraries: third-party libraries it may import; None allows any.
    """

    zone: str
    inside: tuple[str, ...]
    libraries: tuple[str, ...] | None


RULES = (
    Rule("", ("errors", "report", "session", "spec"), ()),
    Rule("__main__", ("cli",), ()),
    Rule("errors", (), ()),
    Rule("budget", WORDS, ("torch",)),
    Rule("spans", WORDS, ("torch",)),
    Rule("edits", WORDS, ("torch",)),
    Rule("plan", WORDS, ("torch",)),
    Rule("cost", WORDS, ("torch",)),
    Rule("report", (*WORDS, "plan", "cost"), ("torch",)),
    Rule("methods", WORDS, ("torch",)),
    Rule("kernels", ("edits",), ("torch", "triton")),
    Rule("presets", ("errors",), ()),
    Rule(
        "patches",
        (*WORDS, "plan", "cost", "kernels", "presets", *BASES),
        ("torch", "transformers"),
    ),
    Rule("spec", (*WORDS, "methods"), ()),
    Rule("chat", ("errors",), ("torch", "PIL")),
    Rule("context", (*WORDS, "chat", "session", "methods", "patches"), ("torch", "PIL")),
    Rule(
        "session",
        (*WORDS, "chat", "plan", "cost", "report", "spec", "methods", "patches", "kernels", "context"),
        ("torch", "PIL"),
    ),
    Rule("discover", (*WORDS, "chat", "presets", "methods", "patches", "scenes"), None),
    Rule("oracle", (), ("torch", "transformers")),
    Rule(
        "proof",
        (*WORDS, "session", "oracle", "methods.base", "methods.cache", "patches.families"),
        ("torch", "transformers"),
    ),
    Rule("layers", (*WORDS, "check", "session", "methods", "patches.families"), ("torch", "PIL")),
    Rule(
        "check",
        (*WORDS, "chat", "spec", "proof", "patches.families", "patches.text_tower"),
        ("torch", "transformers", "PIL"),
    ),
    Rule(
        "bench",
        ("", *WORDS, "spec", "session", "cost", "kernels", "methods", "check", "scenes"),
        ("torch", "transformers", "numpy", "safetensors", "matplotlib", "triton"),
    ),
    Rule("scenes", ("errors",), None),
    Rule("scenes.measure", ("", "errors", "scenes"), None),
    Rule("scenes.planted_measure", ("", "errors", "discover", "methods", "presets", "scenes"), None),
    Rule("eval", (*PUBLIC, "chat", "presets", "viz"), None),
    Rule("viz", PUBLIC, None),
    Rule("tune", (*PUBLIC, "eval"), None),
    Rule("app", (*PUBLIC, "eval", "viz"), None),
    Rule("cli", (*PUBLIC, "eval", "viz", "tune", "app", "discover", "layers", "presets", "check", "bench"), None),
)


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package in folder `root`, as dotted name below the package -> file."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def rule_for(module: str) -> Rule | None:
    """The rule with the longest zone that holds `module`; None if no rule speaks of it."""
    zones = [rule for rule in RULES if _within(module, rule.zone)]
    return max(zones, key=lambda rule: len(rule.zone), default=None)


def imports(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that file `path` imports; `from a import b` gives "a.b"."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    base = [PACKAGE, *package.split(".")] if package else [PACKAGE]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = base[: len(base) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            if isinstance(name := getattr(node.args[0], "value", None), str):
                yield node.lineno, name


def import_violations(root: Path) -> list[str]:
    """One line for each import in the package at `root` that no rule allows, and for each module without a rule."""
    known = modules(root)
    faults = []
    for module, path in known.items():
        rule = rule_for(module)
        where = path.relative_to(root.parent)
        if rule is None:
            faults.append(f"{where}: no rule says what it may import")
            continue
        for line, name in imports(path, module):
            if fault := _fault(rule, name, known):
                faults.append(f"{where}:{line}: {fault}")
    return faults


def family_violations(root: Path) -> list[str]:
    """One line for each mention of a model family in a source file outside the adapters and the scenes."""
    pattern = re.compile("|".join(FAMILY_NAMES), re.IGNORECASE)
    faults = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root).as_posix()
        if inside.startswith(FAMILY_HOMES):
            continue
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if found := pattern.search(text):
                faults.append(f"{path.relative_to(root.parent)}:{number}: names the family {found.group()!r}")
    return faults


def _fault(rule: Rule, name: str, known: dict[str, Path]) -> str | None:
    top, _, rest = name.partition(".")
    if top == PACKAGE:
        target = _module_of(rest, known)
        allowed = any(_within(target, zone) for zone in (rule.zone, *rule.inside))
        return None if allowed else f"{rule.zone or PACKAGE} must not import {PACKAGE}.{target}".rstrip(".")
    if top in sys.stdlib_module_names or rule.libraries is None or top in rule.libraries:
        return None
    return f"{rule.zone or PACKAGE} must not import {top}"


def _module_of(name: str, known: dict[str, Path]) -> str:
    """The longest prefix of dotted `name` that is a module, so that `spans.Geometry` counts as `spans`."""
    parts = name.split(".") if name else []
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in known:
            return ".".join(parts[:length])
    return ""


def _within(module: str, zone: str) -> bool:
    """Whether `module` is `zone` or lies below it; the empty zone holds the package's own `__init__` only."""
    return module == zone or (zone != "" and module.startswith(zone + "."))
