"""`make` explains itself and refuses a Python that is too old before it installs anything."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("demo", "test", "test-all", "lint", "bench", "train-scenes", "clean")

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The finished `make` in folder `cwd`, as if no other `make` had started the tests."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=cwd, env=outside, capture_output=True, text=True, check=False)


def test_help_lists_every_target() -> None:
    listed = [line.split()[1] for line in make("help", cwd=ROOT).stdout.splitlines()]
    assert sorted(listed) == sorted([*TARGETS, "help"])


@pytest.mark.parametrize("target", ["demo", "test", "test-all", "lint"])
def test_old_python_is_refused(target: str, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "constraints-5.17.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\nexit 1\n')
    old.chmod(0o755)
    done = make(target, "PYTHON=./python3.9", cwd=tmp_path)
    assert done.returncode != 0
    assert "needs Python 3.11 to 3.13, but './python3.9' is Python 3.9.1" in done.stderr
    assert not (tmp_path / ".venv").exists()
