"""The README tells the truth: its tables are the registries', its first code block runs, what it points to exists."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import typer

from vlmattn.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """The script that writes the tables, as a module."""
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "tools" / "readme_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_equal_the_registries(tables: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    status = tables.main(["--check"])
    assert status == 0, capsys.readouterr().out


def test_check_notices_a_stale_table(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stale = tmp_path / "README.md"
    stale.write_text(re.sub(r"\| `fastv` .*\n", "", README), encoding="utf-8")
    monkeypatch.setattr(tables, "README", stale)
    assert tables.main(["--check"]) == 1
    assert "fastv" in capsys.readouterr().out
    assert tables.main(["--write"]) == 0
    assert stale.read_text(encoding="utf-8") == README


def test_missing_markers_are_an_error(tables: ModuleType) -> None:
    with pytest.raises(ValueError, match="methods:begin"):
        tables.with_tables("no markers here")


def test_first_code_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert block is not None
    exec(compile(block.group(1), "README.md", "exec"), {})
    assert "fastv" in capsys.readouterr().out


def test_links_into_the_repository_exist() -> None:
    targets = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in target}
    assert [target for target in sorted(targets - {""}) if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^    make ([a-z-]+)", README, re.MULTILINE))))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", re.findall(r"^    vlmattn ([^#\n]+)", README, re.MULTILINE))
def test_commands_and_options_exist(line: str) -> None:
    name, _, rest = line.partition(" ")
    command = typer.main.get_command(app).commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"(?<!\S)--[a-z-]+", rest)) <= known
