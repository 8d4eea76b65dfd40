"""Write the README's tables and docs/methods.md from the registries, or check that they are up to date.

python tools/readme_tables.py --write
python tools/readme_tables.py --check      # exit status 1 and a diff if a file differs
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
METHODS = ROOT / "docs" / "methods.md"
sys.path.insert(0, str(ROOT))

import vlmattn  # noqa: E402 - the checkout is found without being installed


def method_table(methods: Iterable[Mapping[str, Any]]) -> str:
    """Markdown table of methods as `vlmattn.methods_info()` gives them, in the order of the registry."""
    rows = []
    for method in methods:
        parameters = ", ".join(f"`{field['name']}={field['default']!r}`" for field in method["fields"])
        rows.append((f"`{method['name']}`", method["kind"], method["summary"], parameters, _paper(method["paper"])))
    return _table(("Method", "Kind", "What it does", "Parameters and defaults", "Paper"), rows)


def family_table(families: Iterable[Mapping[str, Any]]) -> str:
    """Markdown table of model families as `vlmattn.families()` gives them, by name."""
    rows = [
        (
            family["name"],
            f"`{family['model_class']}`",
            family["grid_rule"],
            {"1d": "1-D", "mrope": "M-RoPE"}.get(family["rope"], family["rope"]),
            "yes" if family["has_cls"] else "no",
            _paper(family["paper"]),
        )
        for family in families
    ]
    return _table(("Family", "Class in transformers", "Visual tokens", "Positions", "CLS token", "Paper"), rows)


def with_tables(text: str) -> str:
    """README text with the tables of this checkout between their markers.

    Raises:
        ValueError: a pair of markers is missing.
    """
    tables = {"methods": method_table(vlmattn.methods_info()), "families": family_table(vlmattn.families())}
    for name, table in tables.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        block = f"{begin}\n{table}\n{end}"
        text, count = pattern.subn(lambda _, block=block: block, text)
        if count != 1:
            raise ValueError(f"the README needs exactly one {begin} ... {end}, it has {count}")
    return text


def method_pages(methods: Iterable[Mapping[str, Any]]) -> str:
    """Text of docs/methods.md: for every method its idea and deviations as its file tells them, and its parameters."""
    parts = [
        "# Methods",
        "Written from the docstrings by `python tools/readme_tables.py --write`. Specs join methods with `+`; what two "
        "methods would do to the same thing in the same layer is refused by name.",
    ]
    for method in methods:
        rows = [(f"`{f['name']}`", f"`{f['default']!r}`", f["help"]) for f in method["fields"]]
        source = f" · arXiv {_paper(method['paper'])}" if method["paper"] else ""
        parts += [
            f"## {method['name']}",
            f"*{method['title']}* · {method['kind']}{source}",
            method["doc"],
            _table(("Parameter", "Default", "Meaning"), rows),
        ]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description="the README's tables and docs/methods.md, from the registries")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true", help="write them")
    mode.add_argument("--check", action="store_true", help="exit with status 1 if a file differs")
    write = parser.parse_args(arguments).write
    status = 0
    for path, make in ((README, with_tables), (METHODS, lambda _: method_pages(vlmattn.methods_info()))):
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        new = make(old)
        if write:
            path.write_text(new, encoding="utf-8")
        elif new != old:
            lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), path.name, "registries")
            sys.stdout.writelines(lines)
            print(f"{path.name} is behind the registries: python tools/readme_tables.py --write")
            status = 1
    return status


def _paper(arxiv: str) -> str:
    return f"[{arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else ""


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
