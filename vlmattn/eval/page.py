"""One HTML file with everything inside, readable from a disk without a network: made of sections of a few kinds.

What a page says is decided elsewhere (`views`, `demo`); here it becomes HTML. All text is escaped by the template, and
a content security policy lets the page load nothing and run nothing but its own sorting script.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

DASH = "\u2013"
MINUS = "\u2212"
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Column:
    """Head of a table column.

    Attributes:
        title: what it shows.
        small: in small print below, for instance the unit.
        number: whether its cells are sorted and aligned as numbers.
        code: whether its cells are specs, shown in letters of one width.
    """

    title: str
    small: str = ""
    number: bool = True
    code: bool = False


@dataclass(frozen=True)
class Cell:
    """One value of a table.

    Attributes:
        text: the value; empty or `DASH` where there is none.
        small: lines in small print below the value, for instance an interval.
        value: what sorting goes by; None sorts last in both directions, whatever the text is.
        tone: "good" or "bad" colours the value and the last small line.
        struck: whether the value does not count; it is struck through.
    """

    text: str
    small: Sequence[str] = ()
    value: float | str | None = None
    tone: Literal["", "good", "bad"] = ""
    struck: bool = False


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        cells: one per column; the first one names the row.
        role: "baseline" is marked as what the others are compared with, "control" is tinted, "none" is a row without
            values.
        invalid: why the row is not comparable, which stands below its name; the cells it is about are `struck`.
        notes: what else stands below the name.
    """

    cells: Sequence[Cell]
    role: Literal["", "baseline", "control", "none"] = ""
    invalid: str = ""
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Prose:
    """Paragraphs and a list.

    Attributes:
        title: heading of the section.
        paragraphs: text.
        points: list items after them.
        warning: whether it stands out, for what a reader must not miss.
    """

    kind: ClassVar[str] = "prose"
    title: str
    paragraphs: Sequence[str] = ()
    points: Sequence[str] = ()
    warning: bool = False


@dataclass(frozen=True)
class Table:
    """A table; a click on a column head sorts it.

    Attributes:
        title: heading of the section; empty for a table that belongs to the section before it.
        columns, rows: head and body.
        text: a paragraph above it.
        notes: how to read it, one sentence or two each, below it.
        folded: whether it is closed until the reader opens it.
    """

    kind: ClassVar[str] = "table"
    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    text: str = ""
    notes: Sequence[str] = ()
    folded: bool = False


@dataclass(frozen=True)
class Plot:
    """A picture made of lines.

    Attributes:
        title: heading of the section.
        svg: an `<svg>` element, put into the page as it is: it must come from `plots`, never from a file or a model.
        notes: how to read it.
    """

    kind: ClassVar[str] = "plot"
    title: str
    svg: str
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Answer:
    """What one run said.

    Attributes:
        label: the spec.
        text: the raw answer.
        right: whether it is right; None where there is no such thing.
    """

    label: str
    text: str
    right: bool | None


@dataclass(frozen=True)
class Picture:
    """An image with a title.

    Attributes:
        title: lines above it.
        image: embedded in the page.
    """

    title: Sequence[str]
    image: Image


@dataclass(frozen=True)
class Example:
    """A question with its answers and pictures.

    Attributes:
        question, expected: of the item.
        answers: per run.
        pictures: the image, and which of its tokens were kept.
        task: group of the item.
        missing: why there are no pictures, or fewer than one expects.
    """

    question: str
    expected: str
    answers: Sequence[Answer]
    pictures: Sequence[Picture] = ()
    task: str = ""
    missing: str = ""


@dataclass(frozen=True)
class Gallery:
    """Examples.

    Attributes:
        title: heading of the section.
        examples: in the order shown.
        notes: how they were chosen and how to read the pictures, above them.
    """

    kind: ClassVar[str] = "gallery"
    title: str
    examples: Sequence[Example]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Commands:
    """Command lines.

    Attributes:
        title: heading of the section.
        lines: (what it does, command line).
    """

    kind: ClassVar[str] = "commands"
    title: str
    lines: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Facts:
    """Names and values: model, data, hashes, versions.

    Attributes:
        title: heading of the section.
        facts: name -> value.
    """

    kind: ClassVar[str] = "facts"
    title: str
    facts: Mapping[str, str]


Section = Prose | Table | Plot | Gallery | Commands | Facts


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        title: heading, and the title of the browser's tab.
        lead: what the numbers say in words; the first sentence is a paragraph, the others a list.
        sections: the rest, in order.
    """

    title: str
    lead: Sequence[str]
    sections: Sequence[Section] = field(default_factory=tuple)


def render(page: Page) -> str:
    """The page as HTML text; nothing in it is fetched from elsewhere.

    Raises:
        jinja2.UndefinedError: a section lacks a value.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    # Only what ships with the package or was drawn by `plots` goes in unescaped.
    environment.filters["as_it_is"] = Markup
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = environment.get_template("page.html.j2").render(
        page=page,
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        script=script,
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'",
    )
    return text.strip() + "\n"


def write(page: Page, path: str | Path) -> Path:
    """Write the page by way of a temporary file beside it; returns its path.

    Characters that UTF-8 does not have (a model can say half of a surrogate pair) or that HTML forbids (control
    characters) become U+FFFD.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(_FORBIDDEN.sub("\ufffd", render(page)), encoding="utf-8", newline="\n")
    os.replace(temporary, path)
    return path


def data_uri(image: Image) -> str:
    """An image as a data: address: PNG for drawings, JPEG where that is much smaller, as it is for photographs."""
    png = _encoded(image, "PNG", optimize=True)
    jpeg = _encoded(image.convert("RGB"), "JPEG", quality=85, optimize=True)
    kind, data = ("jpeg", jpeg) if 2 * len(jpeg) < len(png) else ("png", png)
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()


_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def _encoded(image: Image, kind: str, **options: int | bool) -> bytes:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()
