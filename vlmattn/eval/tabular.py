"""Rows of a sweep as tables: for the terminal, as CSV and as LaTeX.

Every table marks what its numbers cannot be taken for: rows whose captions collapsed, levels below a method's floor,
questions that failed, differences that are no more than chance.
"""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmattn.eval.stats import LEVEL
from vlmattn.eval.summary import Row, metrics, title
from vlmattn.eval.tally import Metric

if TYPE_CHECKING:
    from rich.table import Table

    from vlmattn.eval.stats import Paired

Column = tuple[str, Sequence[str]]
COSTS = (
    "visual_tokens",
    "average_visual_tokens",
    "kv_bytes",
    "kv_bytes_full",
    "prefill_macs",
    "prefill_macs_full",
    "prefill_macs_ratio",
    "batch_size",
    "prefill_ms",
    "prefill_ms_per_question",
    "vision_ms",
    "ms_per_token",
    "new_tokens",
    "ms_per_question",
    "peak_memory_bytes",
    "prefill_ratio",
    "selection_ms",
    "selection_share",
    "kv_exact",
    "kept_row",
)


def tables(name: str, rows: Sequence[Row], width: int = 160) -> list[Table]:
    """The terminal tables of a sweep: headline metrics and cost, in as many tables as a terminal of `width` needs.

    A row is one method everywhere. The column of unparsed answers is there when there are some. Rows with failed
    questions or collapsed captions are red, controls dim; `notes` explains the marks. Then, if methods were tested
    against random tokens, the headline differences of these methods.
    """
    labels = [mark(entry) for entry in rows]
    shown = metrics(rows, headline=True)
    accuracy: list[Column] = [(title(metric), [cell(entry, metric) for entry in rows]) for metric in shown]
    if any(entry.score.get("unparsed") for entry in rows):
        accuracy.append(("unparsed", [str(entry.score.get("unparsed", "-")) for entry in rows]))
    names = ("visual tokens", "prefill MACs", "KV cache", "prefill", "per token", "per question")
    costs = [
        (tokens_text(entry.cost), macs_text(entry.cost), *cost_texts(entry.cost), total_text(entry.cost))
        for entry in rows
    ]
    cost: list[Column] = list(zip(names, zip(*costs, strict=True), strict=True)) if rows else []
    cost += [(name, [text(entry.cost) for entry in rows]) for name, text in extra_columns(rows).items()]
    # The first column may be folded between words, but not within them.
    room = width - max(20, min(max(map(len, [*labels, "method"])), 2 * width // 5)) - 2
    whole = [*accuracy, *cost]
    parts = [whole] if _width(whole) <= room else [*_split(accuracy, room), *_split(cost, room)]
    styles = ["red" if entry.failed or entry.invalid else "dim" if entry.role == "control" else "" for entry in rows]
    found = []
    for number, part in enumerate(parts):
        head = ["method", *(column for column, _ in part)]
        body = [list(cells) for cells in zip(labels, *(texts for _, texts in part), strict=True)]
        found.append(terminal_table(name if number == 0 else "", head, body, styles))
    return [*found, *_control_tables(rows, width)]


def notes(rows: Sequence[Row], differences: bool = True) -> list[str]:
    """What the marks in the tables mean, a sentence each; only of marks that are there.

    Args:
        rows: of the table.
        differences: whether the table prints differences, or only the mark of those that are more than chance.
    """
    base = next((entry.label for entry in rows if entry.role == "baseline"), "the first row")
    found = []
    if any(value is not None for entry in rows for value in entry.intervals.values()):
        found.append("Small print: 95 % intervals, from resampling images.")
    if differences and any(entry.versus for entry in rows):
        found.append(f"With a sign: the difference to {base}.")
    if any(pair.significant() for entry in rows for pair in entry.versus.values()):
        found.append(
            f"* differs from {base}: p < {LEVEL:g} in a paired test, after Holm's correction over the numbers shown."
        )
    if differences and any(entry.versus_control for entry in rows):
        found.append(
            "Against random tokens: as many on average, from the same first layer on, seed 0; "
            + (
                f"* as for the baseline, p < {LEVEL:g}."
                if any(pair.significant() for entry in rows for pair in entry.versus_control.values())
                else "no difference was found."
            )
        )
    found += timing_notes(rows)
    found += [f"† {entry.label}: not comparable, {entry.invalid}." for entry in rows if entry.invalid]
    found += [
        f"{entry.label}: {len(entry.failed)} questions failed and are left out." for entry in rows if entry.failed
    ]
    together: dict[str, list[str]] = {}
    for entry in rows:
        if entry.note:
            together.setdefault(entry.note, []).append(entry.label)
    everywhere = {note for note, labels in together.items() if len(labels) == len(rows) > 1}
    found += [note if note in everywhere else f"{', '.join(labels)}: {note}" for note, labels in together.items()]
    return [sentence if sentence.endswith(".") else f"{sentence}." for sentence in found]


def timing_notes(rows: Sequence[Row]) -> list[str]:
    """What timed prefills and kept rows are, and which caches did not hold what the formula says."""
    found = []
    if any("prefill_ratio" in entry.cost for entry in rows):
        found.append(
            "prefill, x: time of a prefill beside the first row's, median of interleaved rounds on this machine; "
            "choosing: scores and decisions for that batch, and their share of the first row's prefill."
        )
    if any("kept_row" in entry.cost for entry in rows):
        found.append("kept row: mean height of the kept tokens in the image, 0 the top, 1 the bottom, 0.5 if even.")
    wrong = [entry.label for entry in rows if entry.cost.get("kv_exact") is False]
    if wrong:
        found.append(f"The cache holds other bytes than the formula says: {', '.join(wrong)}.")
    return found


def terminal_table(
    title: str, head: Sequence[str], body: Sequence[Sequence[str]], styles: Sequence[str] = (), texts: int = 1
) -> Table:
    """A table that fits 80 columns: titles are wrapped, what is in brackets goes on a second line.

    Args:
        title: above the table.
        head: column titles.
        body: rows of cells.
        styles: rich style of each row, "" for plain; all plain if empty.
        texts: how many first columns are text, folded where they are long; the others are numbers and never cut.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    view = Table(
        title=escape(title) or None, box=box.SIMPLE_HEAD, title_style="bold", title_justify="left", pad_edge=False
    )
    for number, name in enumerate(head):
        if number < texts:
            view.add_column(name, overflow="fold")
        else:
            view.add_column(textwrap.fill(name, 10), justify="right", no_wrap=True)
    for number, row in enumerate(body):
        cells = [Text(cell) if column < texts else stacked(cell) for column, cell in enumerate(row)]
        view.add_row(*cells, style=styles[number] or None if styles else None)
    return view


def csv_text(rows: Sequence[Row]) -> str:
    """One line a row, plain numbers in the metrics' own units (shares are 0 to 1), empty where there is none.

    Columns: what the row is, `control` being the label of its row with random tokens; of every metric the value, `.low`
    and `.high` of its interval, `.difference` to the baseline with its `.p` and `.p_holm`, and of headline metrics
    `.difference_to_random` and `.p_holm_to_random`; then the cost as in `cost_of`.
    """
    shown = metrics(rows)
    parts = ("", ".low", ".high", ".difference", ".p", ".p_holm")
    random = (".difference_to_random", ".p_holm_to_random")
    head = ["label", "spec", "role", "control", "invalid", "note", "folder", "failed", "unparsed", "questions"]
    named = [metric.key + part for metric in shown for part in (*parts, *(random if metric.headline else ()))]
    file = io.StringIO()
    sheet = csv.writer(file, lineterminator="\n")
    sheet.writerow([*head, *named, *COSTS, "floor"])
    for entry in rows:
        line: list[Any] = [entry.label, entry.spec, entry.role, entry.control, entry.invalid, entry.note, entry.folder]
        line += [len(entry.failed), entry.score.get("unparsed"), entry.cost.get("questions")]
        for metric in shown:
            low, high = entry.intervals.get(metric.key) or (None, None)
            pair = entry.versus.get(metric.key)
            tests = (None,) * 3 if pair is None else (pair.difference, pair.p, pair.p_holm)
            line += [entry.value(metric.key), low, high, *tests]
            if metric.headline:
                other = entry.versus_control.get(metric.key)
                line += [None, None] if other is None else [other.difference, other.p_holm]
        line += [entry.cost.get(name) for name in (*COSTS, "floor")]
        sheet.writerow(["" if value is None or value != value else value for value in line])
    return file.getvalue()


def latex(rows: Sequence[Row]) -> str:
    """A booktabs table of the headline metrics and the cost, to be read with `\\input` (needs `booktabs`).

    Bold is a value that is the best of its column, by the digits shown, among the methods and controls that may be
    compared, and better than the baseline's by more than chance (`Paired.significant`); a column without such a value
    has no bold. Intervals and notes stand in small print.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    shown = metrics(rows, headline=True)
    columns = [*(title(metric) for metric in shown), "visual tokens", "MACs", "KV cache", "ms per question"]
    bold = {metric.key: _best(rows, metric) for metric in shown}
    lines = []
    for entry in rows:
        cells = [_latex_cell(entry, metric, bold[metric.key]) for metric in shown]
        costs = (tokens_text(entry.cost), macs_text(entry.cost), cost_texts(entry.cost)[0], total_text(entry.cost))
        cells += [_latex_small(text.removesuffix(" ms")) for text in costs]
        label = rf"\texttt{{{latex_escape(entry.label)}}}" + (r"$^{\dagger}$" if entry.invalid else "")
        lines.append((entry.role, " & ".join([label, *cells])))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
        comment_start_string="<#",
        comment_end_string="#>",
    )
    return environment.get_template("table.tex.j2").render(
        columns=[r" \\ ".join(map(latex_escape, textwrap.wrap(name, 10))) for name in columns],
        lines=lines,
        notes=[latex_escape(text) for text in notes(rows, differences=False)],
    )


def latex_escape(text: str) -> str:
    """Text as LaTeX prints it, in any font encoding."""
    special = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedbl{}",
        "†": r"$^{\dagger}$",
        "−": r"$-$",
        "≥": r"$\geq$",
    }
    special |= {mark: rf"\{mark}" for mark in "&%$#_{}"}
    return "".join(special.get(letter, letter) for letter in text)


def mark(entry: Row) -> str:
    """The row's label, with a dagger when its numbers must not be compared."""
    return f"{entry.label} †" if entry.invalid else entry.label


def cell(entry: Row, metric: Metric) -> str:
    """ "84.2 −1.2* (81.0-87.1)": value, difference to the baseline, interval; "-" where there is none."""
    value = entry.value(metric.key)
    if value is None:
        return "-"
    text, pair = number_text(value, metric.percent), entry.versus.get(metric.key)
    if pair is not None:
        text += f" {difference_text(pair, metric.percent)}"
    return text + _interval_text(entry.intervals.get(metric.key), metric.percent)


def difference_text(pair: Paired, percent: bool = True) -> str:
    """ "−1.2*": with the mark of a difference that is more than chance (`Paired.significant`)."""
    text = number_text(abs(pair.difference), percent)
    sign = "±" if float(text) == 0 else "−" if pair.difference < 0 else "+"
    return f"{sign}{text}" + ("*" if pair.significant() else "")


def control_text(entry: Row, metric: Metric) -> str:
    """ "+12.0*": the difference to the row's random tokens; "-" where there is none."""
    pair = entry.versus_control.get(metric.key)
    return "-" if pair is None or entry.value(metric.key) is None else difference_text(pair, metric.percent)


def number_text(value: float, percent: bool = True) -> str:
    """ "84.2": one decimal of a percentage; of other numbers one decimal, or two below 10."""
    if percent:
        return f"{100 * value:.1f}"
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}"


def stacked(text: str) -> str:
    """A cell on two lines, what is in brackets below: eight columns then fit a terminal."""
    value, bracket, rest = text.partition(" (")
    return f"{value}\n[dim]{rest.rstrip(')')}[/]" if bracket else text


def tokens_text(cost: Mapping[str, Any]) -> str:
    """ "79.2 (of 144)": visual tokens, mean over layers; "- (floor 72.5)" below a method's floor."""
    if "floor" in cost:
        return f"- (floor {cost['floor']:.4g})"
    if not cost.get("questions"):
        return "-"
    return f"{cost['average_visual_tokens']:.4g} (of {cost['visual_tokens']:.4g})"


def macs_text(cost: Mapping[str, Any]) -> str:
    """ "53 %": multiply-accumulates of the decoder's prefill, of those without pruning."""
    return f"{100 * cost['prefill_macs_ratio']:.0f} %" if cost.get("questions") else "-"


def total_text(cost: Mapping[str, Any]) -> str:
    """ "4.31 ms": measured cost of a question, prefill and decoding."""
    return f"{milliseconds(cost['ms_per_question'])} ms" if cost.get("questions") else "-"


def cost_texts(cost: Mapping[str, Any]) -> list[str]:
    """KV cache, prefill time and time per token as a table shows them (per question; a step of the whole batch)."""
    if not cost.get("questions"):
        return ["-", "-", "-"]
    share = 100 * cost["kv_bytes"] / cost["kv_bytes_full"]
    step = cost["ms_per_token"]
    return [
        f"{bytes_text(cost['kv_bytes'])} ({share:.0f} %)",
        f"{milliseconds(cost['prefill_ms_per_question'])} ms",
        "-" if step is None else f"{milliseconds(step / cost['batch_size'])} ms",
    ]


def extra_columns(rows: Sequence[Row]) -> dict[str, Callable[[Mapping[str, Any]], str]]:
    """Column title -> cell, of what only some sweeps have: timed prefills, and tokens that were dropped."""
    known = {"prefill_ratio": ("prefill, x", ratio_text), "selection_ms": ("choosing", selection_text)}
    known["kept_row"] = ("kept row", lambda cost: f"{cost['kept_row']:.2f}" if "kept_row" in cost else "-")
    return {title: text for key, (title, text) in known.items() if any(key in entry.cost for entry in rows)}


def ratio_text(cost: Mapping[str, Any]) -> str:
    """ "0.62": measured prefill beside the baseline's in the same rounds."""
    return f"{cost['prefill_ratio']:.2f}" if "prefill_ratio" in cost else "-"


def selection_text(cost: Mapping[str, Any]) -> str:
    """ "1.2 ms (0.8 %)": what choosing takes a batch, and of the baseline's prefill; "-" where nothing is chosen."""
    if not cost.get("selection_ms"):
        return "-"
    return f"{milliseconds(cost['selection_ms'])} ms ({100 * cost['selection_share']:.1f} %)"


def milliseconds(value: float) -> str:
    """Three digits, or all of a number of four and more, without an exponent."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def bytes_text(count: float) -> str:
    """A size with a binary unit: "288 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.4g} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def _interval_text(interval: tuple[float, float] | None, percent: bool) -> str:
    if interval is None:
        return ""
    return f" ({number_text(interval[0], percent)}-{number_text(interval[1], percent)})"


def _control_tables(rows: Sequence[Row], width: int) -> list[Table]:
    """Differences of methods to random tokens at the same layer, in as many tables as fit; none without such tests."""
    tested = [entry for entry in rows if entry.versus_control]
    if not tested:
        return []
    columns: list[Column] = [
        (title(metric), [control_text(entry, metric) for entry in tested]) for metric in metrics(tested, headline=True)
    ]
    labels = [mark(entry) for entry in tested]
    room = width - max(20, min(max(map(len, labels)), 2 * width // 5)) - 2
    found = []
    for number, part in enumerate(_split(columns, room)):
        body = [list(cells) for cells in zip(labels, *(texts for _, texts in part), strict=True)]
        head = ["method", *(column for column, _ in part)]
        found.append(terminal_table("" if number else "against random tokens at the same layer", head, body))
    return found


def _width(columns: Sequence[Column]) -> int:
    """Terminal cells that number columns take, with the blanks between them."""
    total = 0
    for name, texts in columns:
        lines = [*textwrap.wrap(name, 10), *(part.rstrip(")") for text in texts for part in text.split(" ("))]
        total += max(map(len, lines)) + 3
    return total


def _split(columns: Sequence[Column], room: int) -> list[list[Column]]:
    """Columns in groups that fit, about equally many in each."""
    if not columns:
        return []
    groups: list[list[Column]] = [[]]
    for column in columns:
        if groups[-1] and _width([*groups[-1], column]) > room:
            groups.append([])
        groups[-1].append(column)
    each = math.ceil(len(columns) / len(groups))
    even = [list(columns[start : start + each]) for start in range(0, len(columns), each)]
    return even if all(_width(group) <= room for group in even) else groups


def _best(rows: Sequence[Row], metric: Metric) -> str | None:
    """The best value of a column as it is shown, None where there is no contest; the baseline is not in it."""
    entries = [entry for entry in rows if entry.role in ("method", "control") and not entry.invalid]
    values = [value for entry in entries if (value := entry.value(metric.key)) is not None]
    if len(values) < 2 or metric.better == "neither":
        return None
    return number_text(max(values) if metric.better == "higher" else min(values), metric.percent)


def _latex_cell(entry: Row, metric: Metric, best: str | None) -> str:
    value = entry.value(metric.key)
    if value is None:
        return "--"
    text, pair = number_text(value, metric.percent), entry.versus.get(metric.key)
    if text == best and entry.role in ("method", "control") and not entry.invalid and _improves(pair, metric):
        text = rf"\textbf{{{text}}}"
    if pair is not None and pair.significant():
        text += r"$^{*}$"
    interval = entry.intervals.get(metric.key)
    if interval is None:
        return text
    low, high = (number_text(end, metric.percent) for end in interval)
    return rf"{text} {{\scriptsize {low}--{high}}}"


def _improves(pair: Paired | None, metric: Metric) -> bool:
    """Whether a difference to the baseline is more than chance and in the good direction."""
    if pair is None or not pair.significant():
        return False
    return pair.difference > 0 if metric.better == "higher" else pair.difference < 0


def _latex_small(text: str) -> str:
    """A cost cell, what is in brackets in small print, a lone dash as an en dash."""
    value, bracket, rest = text.partition(" (")
    value = "--" if value == "-" else latex_escape(value)
    return value + (rf" {{\scriptsize {latex_escape(rest.rstrip(')'))}}}" if bracket else "")
