"""`vlmattn bench`: time against arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmattn.cli.common import app


@app.command()
def bench(
    layers: Annotated[int | None, typer.Option(help="Decoder layers. Default: 24.")] = None,
    dim: Annotated[int | None, typer.Option(help="Width, a multiple of 128. Default: 1024.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Visual tokens. Default: 2048.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed rounds. Default: 7.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch. Default: torch's choice.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the record, the page and the picture.")] = Path("runs/bench"),
    quick: Annotated[bool, typer.Option("--quick", help="A small model, two rounds: shows that it works.")] = False,
) -> None:
    """Time against arithmetic: a large random model, plain, pruned and edited, in one interleaved run.

    Proofs come first; while one fails, nothing is timed. Takes about ten minutes on two quiet cores.
    """
    from vlmattn.bench import __main__ as command

    given = {"layers": layers, "dim": dim, "tokens": tokens, "repeats": repeats, "threads": threads, "out": out}
    words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    raise typer.Exit(command.main([*words, *(["--quick"] if quick else [])]))
