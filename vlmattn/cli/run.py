"""`vlmattn run`: one image, one question."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from vlmattn.cli import common
from vlmattn.cli.common import DeviceOption, DtypeOption, ModelOption, PresetOption, TextTowerOption, VerboseOption, app


@app.command(
    epilog="Examples:\n\n"
    'vlmattn run scene:3 --methods "fastv(keep=0.25, before_layer=2)" --show kept.png\n\n'
    'vlmattn run cat.jpg "What is on the sofa?" --model ORG/MODEL --methods "fastv(keep=0.5); random(keep=0.5)"'
)
def run(
    image: Annotated[str, typer.Argument(help="An image file, or scene:NUMBER for a rendered scene.")],
    question: Annotated[str | None, typer.Argument(help="What to ask; a scene brings its own question.")] = None,
    methods: Annotated[
        str, typer.Option(help="Specs, separated by ';'. The model as it is always comes first.")
    ] = "fastv(keep=0.5)",
    show: Annotated[Path | None, typer.Option(help="Draw which tokens each stage kept into this picture.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Where an answer is cut.", min=1)] = 64,
    model: ModelOption = None,
    text_tower: TextTowerOption = None,
    preset: PresetOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    verbose: VerboseOption = False,
) -> None:
    """One image, one question: the answer with and without, and what it cost."""
    from vlmattn.eval import grid, models, runner, single

    common.use_preset(preset)
    specs = grid.expand(f"none; {methods}")
    name = models.check_name(model or common.embedded())
    picture, asked = single.picture(image, question, models.world(name))
    console = common.console()
    with models.quiet(not verbose):
        with common.status(f"loading {name}"):
            loaded = models.load(name, dtype, device, text_tower)
        runner.check_specs(loaded, specs)
        with common.status("asking"):
            told = [single.ask(loaded, spec, label, picture, asked, max_new_tokens) for spec, label in specs.items()]
        console.print(f"[bold]{escape(asked)}[/]")
        console.print(single.table(told))
        for line in single.stage_lines(told):
            console.print(line, highlight=False)
        if show is not None:
            console.print(f"picture: [bold]{escape(str(single.draw(told, picture, show)))}[/]")
