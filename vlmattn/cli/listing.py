"""`vlmattn methods` and `vlmattn models`: what there is."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from vlmattn.cli import common
from vlmattn.cli.common import JsonOption, app
from vlmattn.errors import UnknownMethodError, nearest


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Only this one, with a line about every parameter.")] = None,
    as_json: JsonOption = False,
) -> None:
    """What can be installed on a model, with parameters and defaults."""
    import vlmattn

    found = vlmattn.methods_info()
    if name is not None:
        known = [entry["name"] for entry in found]
        if name not in known:
            raise UnknownMethodError(f"there is no method {name!r}; {nearest(name, known)}")
        found = [entry for entry in found if entry["name"] == name]
    if as_json:
        common.print_json(found)
        return
    if name is not None:
        _print_method(found[0])
        return
    view = common.table("methods", ("name", "kind", "paper", "what it does", "parameters"))
    for entry in found:
        fields = ", ".join(f"{field['name']}={field['default']}" for field in entry.get("fields", ()))
        view.add_row(entry["name"], entry["kind"], entry["paper"] or "-", entry.get("summary", ""), fields)
    common.console().print(view)
    common.console().print(
        'Use: vlmattn run scene:3 --methods "fastv(keep=0.5)". In full: vlmattn methods fastv. Papers are arXiv ids.'
    )


@app.command()
def models(as_json: JsonOption = False) -> None:
    """Which models can be wrapped: the embedded ones, and the families of downloaded ones."""
    import vlmattn
    from vlmattn.scenes import names

    found: list[dict[str, Any]] = [
        {"name": name, "kind": "embedded", "paper": "", "summary": "ships with the package, trained on rendered scenes"}
        for name in names()
    ]
    found += [{**entry, "kind": entry.get("kind") or "family"} for entry in vlmattn.families()]
    if as_json:
        common.print_json(found)
        return
    view = common.table("models", ("name", "kind", "paper", "config.model_type", "notes"))
    for entry in found:
        notes = entry.get("summary") or ", ".join(
            text
            for text in (f"rope {entry['rope']}" if "rope" in entry else "", "has CLS" if entry.get("has_cls") else "")
            if text
        )
        view.add_row(entry["name"], entry["kind"], entry["paper"] or "-", str(entry.get("model_type", "-")), notes)
    common.console().print(view)
    common.console().print("Use: --model NAME for an embedded one; any checkpoint of a family by its hub id or folder.")


def _print_method(entry: dict[str, Any]) -> None:
    paper = f" (arXiv {entry['paper']})" if entry["paper"] else ""
    console = common.console()
    console.print(f"[bold]{escape(entry['name'])}[/]: {escape(entry['title'])}{paper}", highlight=False)
    console.print(escape(entry["summary"]), highlight=False)
    view = common.table("", ("parameter", "default", "meaning"))
    for field in entry["fields"]:
        view.add_row(field["name"], escape(str(field["default"])), escape(field["help"]))
    console.print(view)
