"""`vlmattn check`: proofs on a checkpoint."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from vlmattn.cli import common
from vlmattn.cli.common import DeviceOption, DtypeOption, ModelOption, TextTowerOption, VerboseOption, app


@app.command(
    epilog="Examples:\n\n"
    "vlmattn check\n\n"
    'vlmattn check --model ORG/MODEL --image cat.jpg --question "What is it?" --methods "fastv(keep=0.5) + vhr"\n\n'
    "Exit codes: 0 everything that applies was proved; 1 something failed; 2 a mistake, or the methods were refused."
)
def check(
    image: Annotated[str, typer.Option(help="An image file, or scene:NUMBER for a rendered scene.")] = "scene:3",
    question: Annotated[str | None, typer.Option(help="What to ask. Default: a plain one.")] = None,
    methods: Annotated[str, typer.Option(help="One spec: what is to be proved.")] = "fastv(keep=0.5) + vhr",
    model: ModelOption = None,
    text_tower: TextTowerOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    verbose: VerboseOption = False,
) -> None:
    """Prove on your checkpoint that methods do what they say: no-op, removal = masking, generation, undo.

    Prints what was measured, and a support row in markdown. In half precision the bounds are looser; the row says so.
    """
    from vlmattn import check as proofs
    from vlmattn.eval import models, single
    from vlmattn.spec import parse

    parse(methods)
    name = models.check_name(model or common.embedded())
    plain = None if image.startswith("scene:") else "What is in the image?"
    picture, asked = single.picture(image, question or plain, models.world(name))
    with models.quiet(not verbose):
        with common.status(f"loading {name}"):
            loaded = models.load(name, dtype, device, text_tower)
        with common.status("proving"):
            tower = loaded.text_tower
            result = proofs.check(loaded.model, loaded.processor, picture, asked, methods, name=name, text_tower=tower)
    if as_json:
        common.print_json(result.to_dict())
    else:
        _print_check(result)
    if not result.passed:
        raise typer.Exit(common.INCOMPLETE)
    if result.refused:
        raise typer.Exit(common.MISTAKE)


def _print_check(result: Any) -> None:
    from vlmattn.check import SUPPORT_HEAD

    colours = {"pass": "green", "FAIL": "bold red", "refused": "yellow", "n/a": "dim"}
    view = common.table(
        f"{result.spec} on {result.model} ({result.dtype})", ("claim", "", "measured", "bound", "compared")
    )
    for row in result.rows:
        verdict = f"[{colours[row.verdict]}]{row.verdict}[/]"
        numbers = ["" if number is None else f"{number:.2g}" for number in (row.value, row.tolerance)]
        view.add_row(row.name, verdict, *numbers, escape(row.explanation))
    common.console().print(view)
    # the support row is one line, to be copied into a table
    typer.echo(f"{SUPPORT_HEAD}\n{result.support_row()}")
