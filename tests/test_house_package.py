"""The package keeps its own promises: documented public names, no shadowed modules, honest packaging metadata."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from import_rules import modules

import vlmattn

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vlmattn"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = {"gradio", "optuna", "triton"}
SOURCES = modules(PACKAGE)
PUBLIC = [name for name in SOURCES if not any(part.startswith("_") for part in name.split("."))]


def load(module: str) -> ModuleType:
    """The module of the package with this dotted name; skips where it needs an extra that is not installed."""
    try:
        return importlib.import_module(f"vlmattn.{module}" if module else "vlmattn")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"needs the optional {error.name}")


def undocumented(path: Path) -> Iterator[str]:
    """Public functions and classes at the top level of a file that have no docstring, and the file itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not ast.get_docstring(tree):
        yield "the module"
    for node in tree.body:
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if named and not node.name.startswith("_") and not ast.get_docstring(node):
            yield node.name


def undocumented_members(module: ModuleType) -> Iterator[str]:
    """Public methods and properties of the module's public classes without a docstring, not even an inherited one."""
    for name, cls in inspect.getmembers(module, inspect.isclass):
        if cls.__module__ != module.__name__ or name.startswith("_"):
            continue
        for member, value in vars(cls).items():
            described = inspect.isfunction(value) or isinstance(value, property | classmethod | staticmethod)
            if described and not member.startswith("_") and not inspect.getdoc(getattr(cls, member)):
                yield f"{name}.{member}"


def environment_reads(source: str) -> list[int]:
    """Lines of `source` that read environment variables, ascending."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            found = ast.unparse(node) in ("os.environ", "os.getenv")
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            found = bool({"environ", "getenv"} & set(names)) and node.module == "os"
        if found:
            lines.append(node.lineno)
    return sorted(lines)


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_documented(module: str) -> None:
    assert list(undocumented(SOURCES[module])) == []
    assert list(undocumented_members(load(module))) == []


def test_missing_docstrings_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "bare.py").write_text(
        '"""A module."""\n\ndef said():\n    """Yes."""\n\ndef unsaid(): ...\n\nclass _Own: ...\n'
    )
    assert list(undocumented(tmp_path / "bare.py")) == ["unsaid"]


@pytest.mark.parametrize("package", [name for name, path in SOURCES.items() if path.name == "__init__.py"])
def test_no_public_name_hides_a_submodule(package: str) -> None:
    prefix = f"{package}." if package else ""
    submodules = {name.removeprefix(prefix).split(".")[0] for name in SOURCES if name.startswith(prefix)} - {""}
    module = load(package)
    names = set(vars(module)) | set(getattr(module, "__all__", ()))
    hidden = {name for name in names & submodules if not inspect.ismodule(getattr(module, name))}
    assert hidden == set()


@pytest.mark.parametrize("name", vlmattn.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(vlmattn, name) is not None


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="rap"):
        vlmattn.rap  # noqa: B018


@pytest.mark.parametrize(
    "module", [m for m in SOURCES if m.split(".")[0] not in ("cli", "eval", "scenes", "app", "tune")]
)
def test_environment_variables_are_no_arguments(module: str) -> None:
    assert environment_reads(SOURCES[module].read_text(encoding="utf-8")) == []


def test_environment_reads_are_noticed() -> None:
    assert environment_reads("import os\nx = os.environ.get('KEEP')\ny = os.getenv('KEEP')\n") == [2, 3]


def test_vlmattn_is_the_only_import_package_at_the_root() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == {"vlmattn"}
    assert list(ROOT.glob("*.py")) == []
    assert not (ROOT / "kernels").exists(), "transformers imports a root package of this name"


def test_tests_are_flat_and_no_package() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []
    assert [path.name for path in (ROOT / "tests").rglob("test_*.py") if path.parent != ROOT / "tests"] == []


def test_version_is_said_once() -> None:
    assert vlmattn.__version__ == PROJECT["version"]


@pytest.mark.parametrize("constraints", ["constraints.txt", "constraints-5.17.txt"])
def test_constraints_pin_every_dependency(constraints: str) -> None:
    lines = (ROOT / constraints).read_text().splitlines()
    pinned = {re.sub("[-_.]+", "-", line.partition("==")[0]).lower() for line in lines if "==" in line}
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines if not line.startswith("#"))
    extras = PROJECT["optional-dependencies"]
    needed = [
        re.split(r"[^A-Za-z0-9._-]", item)[0].lower()
        for item in PROJECT["dependencies"] + extras["eval"] + extras["dev"]
    ]
    assert set(needed) - {"vlmattn"} - pinned == set()


def test_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    """Checkpoints, presets, templates and py.typed travel with the code; nothing else does."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    assert packed == {name for name in files if "__pycache__" not in name}
    assert "vlmattn/py.typed" in packed
