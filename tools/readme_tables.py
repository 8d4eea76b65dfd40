"""Write the README's tables of methods and families from the registries, or check that they are up to date.

python tools/readme_tables.py --write
python tools/readme_tables.py --check      # exit status 1 and a diff if the README differs
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


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description="the README's tables, from the registries")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true", help="write them into README.md")
    mode.add_argument("--check", action="store_true", help="exit with status 1 if README.md differs")
    write = parser.parse_args(arguments).write
    old = README.read_text(encoding="utf-8")
    new = with_tables(old)
    if write:
        README.write_text(new, encoding="utf-8")
    elif new != old:
        sys.stdout.writelines(
            difflib.unified_diff(old.splitlines(True), new.splitlines(True), "README.md", "registries")
        )
        print("README.md is behind the registries: python tools/readme_tables.py --write")
        return 1
    return 0


def _paper(arxiv: str) -> str:
    return f"[{arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else ""


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
