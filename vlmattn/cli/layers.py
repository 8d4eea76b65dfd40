"""`vlmattn layers`: which decoder layers of a checkpoint change least."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmattn.cli import common
from vlmattn.cli.common import DeviceOption, DtypeOption, ModelOption, VerboseOption, app

SCENES = 32


@app.command(
    epilog="Examples:\n\n"
    "vlmattn layers\n\n"
    'vlmattn layers --model ORG/MODEL --image cat.jpg --image street.jpg --question "Describe the image." --drop 2'
)
def layers(
    model: ModelOption = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="An image to measure with, best 32 or more. Default: rendered scenes if embedded."),
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option(help="What is asked about the images, in turn. Default: four short questions.")
    ] = None,
    drop: Annotated[int, typer.Option(help="How many layers layerskip should leave out.")] = 1,
    score: Annotated[str, typer.Option(help="angular_last, bi or bi_multimodal.")] = "angular_last",
    region: Annotated[str | None, typer.Option(help="Protected layers: paper or code (32 layers only).")] = None,
    apart: Annotated[bool, typer.Option("--apart", help="Leave out no two neighbouring layers.")] = False,
    iterative: Annotated[bool, typer.Option("--iterative", help="Measure anew after every layer left out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object instead of a table.")] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Which decoder layers change least what goes through them, and the layerskip that leaves them out.

    One prompt is run for every image. The list belongs to this checkpoint; layerskip is experimental.
    """
    from vlmattn import discover as finder
    from vlmattn import layers as measure
    from vlmattn.eval import models

    name = models.check_name(model or common.embedded())
    pictures = finder.load_images(image or [])
    if not pictures:
        embedded = models.is_embedded(name)
        pictures = finder.scene_pictures(SCENES, name) if embedded else finder.generated_pictures()
    with models.quiet(not verbose):
        with common.status(f"loading {name}"):
            loaded = models.load(name, dtype, device)
        with common.status("measuring"):
            prompts = measure.prepare(loaded.model, loaded.processor, pictures, question or list(finder.PROMPTS))
            found = measure.redundant_layers(
                loaded.model, prompts, drop, score=score, region=region, adjacent=not apart, iterative=iterative
            )
    if as_json:
        common.print_json(found.to_dict())
        return
    view = common.table(f"{found.score}, {found.prompts} prompts", ("layer", "score", ""))
    for layer, value in enumerate(found.scores):
        place = found.order.index(layer) + 1 if layer in found.order else 0
        stays = "protected" if layer in found.protected or layer in (0, len(found.scores) - 1) else ""
        view.add_row(str(layer), f"{value:.4f}", f"left out, choice {place}" if place else stays)
    common.console().print(view)
    common.console().print(f'Use: --methods "{found.spec}"', highlight=False)
