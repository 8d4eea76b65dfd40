"""`vlmattn discover`: sink dimensions of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from vlmattn.cli import common
from vlmattn.cli.common import DeviceOption, DtypeOption, ModelOption, VerboseOption, app


@app.command(
    epilog="Examples:\n\n"
    "vlmattn discover\n\n"
    "vlmattn discover --model ORG/MODEL --image cat.jpg --image street.jpg --out sinks.json\n\n"
    'vlmattn run cat.jpg "What is this?" --model ORG/MODEL --methods var --preset sinks.json'
)
def discover(
    model: ModelOption = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="An image to look at, best four of them. Default: rendered scenes if embedded, else generated."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write what was found as a preset file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of tables.")] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Which hidden dimensions carry attention sinks in a model, and how sure that is; or that it has none.

    Methods that work on sinks need this once for a checkpoint that vlmattn does not know. Eight short prompts are run.
    """
    from vlmattn import discover as finder
    from vlmattn.eval import models

    name = models.check_name(model or common.embedded())
    pictures, source = finder.load_images(image or []) or None, "given"
    if pictures is None and models.is_embedded(name):
        pictures, source = finder.scene_pictures(name=name), "scenes"
    with models.quiet(not verbose):
        with common.status(f"loading {name}"):
            loaded = models.load(name, dtype, device)
        with common.status("looking"):
            found = finder.discover(loaded.model, loaded.processor, images=pictures, pictures=source)
    if out is not None:
        found.write(
            out, " ".join(["vlmattn discover --model", name, *(f"--image {file.name}" for file in image or [])])
        )
    if as_json:
        common.print_json(found.to_dict())
        return
    for part in finder.tables(found):
        common.console().print(part, highlight=False, soft_wrap=isinstance(part, str))
    if out is not None:
        common.console().print(f"preset: [bold]{escape(str(out))}[/]", highlight=False)
