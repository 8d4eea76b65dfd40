"""The command `vlmattn`: demo, run, eval, compare, discover, check, bench, ... Heavy imports wait inside the commands.

A module in this package adds its commands to `common.app` when it is imported; all of them are.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Annotated

import typer

from vlmattn.cli.common import app

__all__ = ["app", "main"]

_ORDER = ("demo", "run", "show", "evaluate", "compare", "discover", "layers", "listing", "check", "bench")


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version and stop.")] = False,
) -> None:
    """Options before the command."""
    if version:
        from vlmattn import __version__

        typer.echo(f"vlmattn {__version__}")
        raise typer.Exit


def _add_commands() -> None:
    """Import every module of commands, in the order in which the help lists them; new ones come last."""
    found = [module.name for module in pkgutil.iter_modules(__path__) if module.name != "common"]
    for name in sorted(found, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)):
        importlib.import_module(f"{__name__}.{name}")


_add_commands()
