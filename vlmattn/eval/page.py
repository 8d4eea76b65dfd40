"""The demo page: one HTML file with everything inside, readable from a disk without a network."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Answer:
    """What one spec made the model say.

    Attributes:
        label: the spec.
        text: the raw answer.
        right: whether it is the label.
    """

    label: str
    text: str
    right: bool


@dataclass(frozen=True)
class Example:
    """A question with its picture.

    Attributes:
        question, expected: of the item.
        answers: per spec.
        picture: kept tokens per spec.
    """

    question: str
    expected: str
    answers: Sequence[Answer]
    picture: Image


@dataclass(frozen=True)
class Section:
    """A further table.

    Attributes:
        title: its heading.
        text: what it is about, a paragraph.
        columns, rows: as in `Content`.
    """

    title: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Content:
    """What the page shows.

    Attributes:
        title, lead: first lines; `lead` says in words what the numbers say.
        columns: table head.
        rows: table cells as text, the first one the method.
        table_notes: how to read the table, one sentence each.
        section: a second table.
        plot: an `<svg>` element.
        examples: questions with pictures; `examples_note` says how they were chosen.
        commands: (what it does, command line).
        about: name -> value: model, data, hashes, versions.
    """

    title: str
    lead: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    table_notes: Sequence[str]
    section: Section
    plot: str
    examples: Sequence[Example]
    examples_note: str
    commands: Sequence[tuple[str, str]]
    about: Mapping[str, str]


def render(content: Content) -> str:
    """The page as HTML text; nothing in it is fetched from elsewhere."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    values: dict[str, Any] = {**vars(content), "plot": Markup(content.plot)}
    return environment.get_template("page.html.j2").render(values)


def write(content: Content, path: str | Path) -> Path:
    """Write the page by way of a temporary file beside it; returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(render(content), encoding="utf-8")
    os.replace(temporary, path)
    return path


def data_uri(image: Image) -> str:
    """A PNG image as a data: address."""
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
