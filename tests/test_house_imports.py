"""The arrows between the parts of the package go one way, and importing it is cheap."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from import_rules import family_violations, import_violations, imports

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vlmattn"

ALLOWED = {
    "methods/prune/first.py": "import torch\nfrom vlmattn.edits import Keep\nfrom vlmattn.methods.base import Method\n",
    "methods/base.py": "from ..budget import count\n",
    "patches/families/llava.py": "import transformers\nfrom vlmattn.methods import base\nNAME = 'llava'\n",
    "eval/runner.py": "import vlmattn\nfrom vlmattn import wrap\nfrom vlmattn.spans import Geometry\nimport scipy\n",
    "budget.py": "",
    "edits.py": "",
    "spans.py": "",
    "__init__.py": "",
}

PLANTED = {
    "a method that knows the patches": ("methods/prune/bad.py", "from vlmattn.patches import engine\n"),
    "the same, relative": ("methods/prune/bad.py", "from ...patches import engine\n"),
    "a method that knows transformers": ("methods/bad.py", "import transformers.cache_utils\n"),
    "hidden in a function": ("methods/bad.py", "def late():\n    from transformers import Cache\n"),
    "for the type checker only": (
        "methods/bad.py",
        "import typing\nif typing.TYPE_CHECKING:\n    import transformers\n",
    ),
    "by name at run time": ("methods/bad.py", "import importlib\nx = importlib.import_module('vlmattn.session')\n"),
    "a kernel that knows the package": ("kernels/bad.py", "from vlmattn.spans import Span\n"),
    "a kernel that needs numpy": ("kernels/bad.py", "import numpy\n"),
    "a patch that knows one method": ("patches/bad.py", "from vlmattn.methods.prune.first import First\n"),
    "a patch that knows the session": ("patches/bad.py", "from vlmattn import session\n"),
    "evaluation through a private door": ("eval/bad.py", "from vlmattn.patches import engine\n"),
    "a picture that reads the session": ("viz/bad.py", "from vlmattn.session import Session\n"),
    "a command that reads a kernel": ("cli/run.py", "import vlmattn.kernels\n"),
    "a word that knows a method": ("budget.py", "from .methods.base import Method\n"),
    "a part that no rule knows": ("misc.py", "import math\n"),
}


def plant(folder: Path, files: dict[str, str]) -> Path:
    """Write `files` (path -> source) below `folder`/vlmattn, with the modules that the planted imports name."""
    for path in ("patches/engine.py", "kernels/__init__.py", "session.py", "methods/__init__.py"):
        files = {path: "", **files}
    for path, source in files.items():
        (folder / "vlmattn" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "vlmattn" / path).write_text(source)
    return folder / "vlmattn"


def python(code: str) -> str:
    """What `code` prints in a fresh interpreter that finds the package in this checkout."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_arrows_go_one_way() -> None:
    assert import_violations(PACKAGE) == []


def test_no_family_is_named_outside_its_adapter() -> None:
    assert family_violations(PACKAGE) == []


def test_checker_accepts_what_the_design_allows(tmp_path: Path) -> None:
    root = plant(tmp_path, ALLOWED)
    assert import_violations(root) == []
    assert family_violations(root) == []


@pytest.mark.parametrize("case", PLANTED)
def test_checker_catches(case: str, tmp_path: Path) -> None:
    path, source = PLANTED[case]
    root = plant(tmp_path, {**ALLOWED, path: source})
    faults = import_violations(root)
    assert len(faults) == 1
    assert faults[0].startswith(f"vlmattn/{path}:")


def test_checker_catches_a_family_name(tmp_path: Path) -> None:
    root = plant(tmp_path, {**ALLOWED, "patches/engine.py": "x = 1\nif kind == 'Qwen2_5_VL': pass\n"})
    assert family_violations(root) == ["vlmattn/patches/engine.py:2: names the family 'Qwen'"]


def test_relative_imports_are_resolved(tmp_path: Path) -> None:
    root = plant(tmp_path, {"a/b/c.py": "from . import d\nfrom .. import e\nfrom ...f import g\n"})
    assert [name for _, name in imports(root / "a/b/c.py", "a.b.c")] == ["vlmattn.a.b.d", "vlmattn.a.e", "vlmattn.f.g"]


@pytest.mark.parametrize("module", ["vlmattn", "vlmattn.errors", "vlmattn.eval.records"])
def test_imports_neither_torch_nor_transformers(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    assert python(code) == "[]"


def test_import_takes_less_than_150_ms() -> None:
    code = "import time; t = time.perf_counter(); import vlmattn; print(time.perf_counter() - t)"
    assert min(float(python(code)) for _ in range(5)) < 0.150
