"""`vlmattn show`: what happens inside a model, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from vlmattn.cli import common
from vlmattn.cli.common import DeviceOption, DtypeOption, ModelOption, PresetOption, VerboseOption, app


@app.command(
    epilog="Examples:\n\n"
    "vlmattn show scene:3 --heads heads.png\n\n"
    'vlmattn show cat.jpg "What is on the sofa?" --model ORG/MODEL --methods "fastv(keep=0.5) + vhr" --heads heads.png'
)
def show(
    image: Annotated[str, typer.Argument(help="An image file, or scene:NUMBER for a rendered scene.")],
    question: Annotated[str | None, typer.Argument(help="What to ask; a scene brings its own question.")] = None,
    heads: Annotated[
        Path, typer.Option(help="Draw layer x head maps of attention and of divergence without the image here.")
    ] = Path("heads.png"),
    methods: Annotated[str, typer.Option(help="One spec to look at; 'none' is the model as it is.")] = "none",
    max_new_tokens: Annotated[int, typer.Option(help="Where the answer is cut.", min=1)] = 64,
    model: ModelOption = None,
    preset: PresetOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    verbose: VerboseOption = False,
) -> None:
    """What the heads of every layer look at while one question is answered, as maps of layers and heads."""
    from vlmattn.eval import headmaps, models, single

    common.use_preset(preset)
    name = models.check_name(model or common.embedded())
    picture, asked = single.picture(image, question, models.world(name))
    console = common.console()
    with models.quiet(not verbose):
        with common.status(f"loading {name}"):
            loaded = models.load(name, dtype, device)
        with common.status("looking"):
            found = headmaps.measure(loaded, methods, picture, asked, max_new_tokens)
    console.print(f"[bold]{escape(asked)}[/] {escape(found.text.strip() or '(no text)')}", highlight=False)
    for line in headmaps.lines(found):
        console.print(line, highlight=False)
    console.print(f"picture: [bold]{escape(str(headmaps.draw(found, methods, asked, heads)))}[/]", highlight=False)
