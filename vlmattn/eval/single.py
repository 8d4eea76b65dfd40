"""One image, one question, several specs: what `vlmattn run` shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmattn.errors import DataError
from vlmattn.eval import tabular
from vlmattn.eval.models import Loaded

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.table import Table

    from vlmattn.report import Report
    from vlmattn.spans import Geometry


@dataclass(frozen=True)
class Told:
    """What one spec made of the question.

    Attributes:
        label: the spec as typed.
        text: the raw answer.
        times: as `vlmattn.eval.answer.Answers.times`.
        report: of the session.
        geometry: the image's tokens.
    """

    label: str
    text: str
    times: dict[str, float]
    report: Report
    geometry: Geometry


def picture(name: str, question: str | None, world: str) -> tuple[Image, str]:
    """The image, from a file or rendered for "scene:NUMBER", and the question to ask.

    Args:
        name: of the file or scene.
        question: None for a scene's own.
        world: of the scenes.

    Raises:
        DataError: no such file, not an image, not a scene number, or a file without a question.
    """
    if name.startswith("scene:"):
        return _scene(name, question, world)
    from PIL import Image

    if question is None:
        raise DataError(f'what shall be asked about {name}? For instance: vlmattn run {name} "What is in the image?"')
    try:
        with Image.open(name) as image:
            return image.convert("RGB"), question
    except FileNotFoundError:
        raise DataError(f"{name} does not exist; give an image file, or scene:3 for a rendered scene") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{name} cannot be read as an image: {error}") from None


def ask(loaded: Loaded, spec: str, label: str, image: Image, question: str, max_new_tokens: int) -> Told:
    """Answer under one spec; asked twice, the second time is the one that is timed."""
    from vlmattn.eval.contexts import asker_of
    from vlmattn.eval.models import wrapped

    with wrapped(loaded, spec) as session:
        asker_of(loaded, session, max_new_tokens)([image], [question])
        told = asker_of(loaded, session, max_new_tokens)([image], [question])
        geometry = session.geometry([image], told.inputs)[0]
    return Told(label, told.texts[0], told.times, told.report, geometry)


def table(told: Sequence[Told]) -> Table:
    """Answers and cost, a row per spec."""
    body = []
    for entry in told:
        report, times = entry.report, entry.times
        step = times["decode_ms"] / (times["new_tokens"] - 1) if times["new_tokens"] > 1 else None
        body.append(
            [
                entry.label,
                entry.text.strip() or "(no text)",
                f"{report.average_visual_tokens:.4g} (of {sum(report.visual_tokens)})",
                f"{tabular.bytes_text(report.kv_bytes)} ({100 * report.kv_bytes / report.kv_bytes_full:.0f} %)",
                f"{100 * report.prefill_macs / report.prefill_macs_full:.0f} %",
                f"{tabular.milliseconds(times['prefill_ms'])} ms",
                "-" if step is None else f"{tabular.milliseconds(step)} ms",
            ]
        )
    head = ["method", "answer", "visual tokens", "KV cache", "prefill MACs", "prefill", "per token"]
    return tabular.terminal_table("", head, body, texts=2)


def stage_lines(told: Sequence[Told]) -> list[str]:
    """A line per pruning stage: method, how many tokens stayed, from which layer on, how high; one for caches that were
    cut."""
    lines = []
    for entry in told:
        total = entry.geometry.num_tokens
        for stage in entry.report.stages:
            where = "before the first layer" if stage.before_layer <= 0 else f"before layer {stage.before_layer}"
            kept = len(stage.kept[0][0])
            row = "" if stage.mean_row is None else f"; mean row at {stage.mean_row:.2f} of the height"
            lines.append(f"{stage.method}: {kept} of {total} kept {where} (of {entry.report.num_layers} layers){row}")
        left = [len(cache.kept[0][0]) for cache in entry.report.caches]
        if left:
            some = f"{left[0]}" if min(left) == max(left) else f"{min(left)} to {max(left)}"
            method, layers = entry.report.caches[0].method, len(left)
            lines.append(f"{method}: {some} of {total} stay in the caches of {layers} layer{'s' * (layers > 1)}")
    return lines


def draw(told: Sequence[Told], image: Image, path: Path) -> Path:
    """A picture with a row per spec that pruned: the original, then kept tokens per stage.

    Raises:
        DataError: no spec has a pruning stage, so that there is nothing to draw.
    """
    from vlmattn.viz import overlay

    rows = []
    for entry in told:
        if entry.report.stages:
            first, *rest = overlay.panels(image, entry.geometry, entry.report)
            rows.append([(f"{first[0]}\nanswer: {told[0].text.strip()[:40]}", first[1])])
            rows[-1] += [(f"{title}\nanswer: {entry.text.strip()[:40]}", shaded) for title, shaded in rest]
    if not rows:
        raise DataError('there is nothing to draw: no method pruned; give --methods "fastv(keep=0.5)", for instance')
    try:
        return overlay.save(overlay.sheet(rows), path)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write the picture {path}: {error}") from None


def _scene(name: str, question: str | None, world: str) -> tuple[Image, str]:
    from vlmattn.scenes import benchmark

    number = name.removeprefix("scene:")
    if not number.isdecimal() or int(number) > 9999:
        raise DataError(f"{name!r} is not a scene; scene:0 to scene:9999 are")
    data = benchmark(split="test", tasks=("loc",), images=int(number) + 1, world=world)
    row = data.rows[-1]
    return data.image(row["image"]), question or row["text"]
