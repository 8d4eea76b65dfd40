"""What CONTRIBUTING.md shows of the code is the code."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_diff_of_a_family_is_what_the_files_hold() -> None:
    (block,) = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    parts = re.split(r"^\+\+\+ (.*)\n", block, flags=re.MULTILINE)[1:]
    shown = dict(zip(parts[::2], parts[1::2], strict=True))
    assert list(shown) == ["vlmattn/patches/families/qwen2_vl.py", "tests/tiny.py"]
    for path, lines in shown.items():
        assert all(line.startswith("+") for line in lines.splitlines())
        text = re.sub(r"^\+", "", lines, flags=re.MULTILINE)
        held = (ROOT / path).read_text(encoding="utf-8")
        assert text == held if "families" in path else text in held
