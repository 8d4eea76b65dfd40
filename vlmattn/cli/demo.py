"""`vlmattn demo`: what it is about, without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from vlmattn.cli import common
from vlmattn.cli.common import DeviceOption, VerboseOption, app


@app.command()
def demo(
    images: Annotated[
        int, typer.Option(help="How many scenes; more narrow the intervals and take longer.", min=2)
    ] = 30,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("demo.html"),
    device: DeviceOption = None,
    verbose: VerboseOption = False,
) -> None:
    """The embedded model with and without methods: tables here, and one self-contained page.

    No download is needed. Accuracy, F1 and intervals stand beside visual tokens, KV bytes and time, and the page
    shows which tokens were kept.
    """
    from vlmattn.eval import demo as show
    from vlmattn.eval import models, page

    name, console = common.embedded(), common.console()
    with models.quiet(not verbose):
        with common.status(f"loading {name}"):
            loaded = models.load(name, device=device)
            planted = models.load(_planted(), device=device)
        with common.progress() as progress:
            result = show.measure(loaded, images, progress=progress)
        with common.progress() as progress:
            sinks = show.measure(planted, images, show.SINK_SPECS, progress=progress)
        with common.status("drawing"):
            path = page.write(show.content(result, sinks), out)
    for shown in (result, sinks):
        for table in show.terminal_tables(shown):
            console.print(table)
    console.print(
        "Results of the embedded scenes model; they claim nothing about real models. "
        f"The page: [bold]{escape(str(path))}[/]"
    )


def _planted() -> str:
    """Name of the embedded model with planted attention sinks."""
    from vlmattn.scenes import names

    return next(name for name in names() if name.endswith("-sink"))
