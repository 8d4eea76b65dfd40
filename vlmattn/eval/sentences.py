"""What the numbers of a sweep or a comparison say, in sentences.

They claim no more than the numbers do: "worse" and "better" stand only where a paired test says so, everything else is
"no difference found", with what would have been missed.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vlmattn.eval import page, summary, tabular
from vlmattn.eval.compare import Comparison
from vlmattn.eval.items import Benchmark
from vlmattn.eval.runs import Run
from vlmattn.eval.stats import Paired
from vlmattn.eval.tally import Metric

_MOST_SENTENCES = 12


def sweep_lead(bench: Benchmark, rows: Sequence[summary.Row], base: Run) -> list[str]:
    """What the numbers of a sweep say: what was asked, the baseline's values, and a sentence per method."""
    counts = Counter(row.role for row in rows)
    under = [counted(counts[role], role) for role in ("method", "control") if counts[role]]
    again = f", and again under {' and '.join(under)}. Nothing was retrained." if under else "."
    sentences = [f"{model_name(base)} answered {asked(base)} ({bench.source}) under {rows[0].label}{again}"]
    if values := [
        f"{metric.title} {_with_interval(rows[0], metric)}"
        for metric in summary.metrics(rows, headline=True)
        if rows[0].value(metric.key) is not None
    ]:
        sentences.append(f"{rows[0].label}: {', '.join(values[:3])}.")
    methods = [row for row in rows if row.role == "method"]
    sentences += [sentence(row, rows[0].label) for row in methods[:_MOST_SENTENCES]]
    if len(methods) > _MOST_SENTENCES:
        sentences.append(f"{counted(len(methods) - _MOST_SENTENCES, 'more method')}: see the table.")
    return sentences


def comparison_lead(comparisons: Sequence[Comparison], rows: Sequence[summary.Row]) -> list[str]:
    """What the numbers of a comparison say: what was asked, and a sentence per run.

    Args:
        comparisons: with the same first run.
        rows: the second runs, in the same order.
    """
    first = comparisons[0].first
    seconds = ", ".join(entry.second.label for entry in comparisons)
    sentences = [f"{model_name(first)} answered {asked(first)} under {first.label}, and again under {seconds}."]
    for entry, row in zip(comparisons, rows, strict=True):
        # The notes of a comparison say why a run must not be compared.
        sentences += [sentence(dataclasses.replace(row, invalid=""), first.label), *entry.notes]
    return sentences


def sentence(row: summary.Row, base: str) -> str:
    """Cost of a method, and what the paired tests say about it, against a baseline of that label.

    "fastv(keep=0.11): 58.7 of 144 visual tokens a layer, 47 % of the prefill MACs; worse than none in digits accuracy
    (-20.0); no difference found in the other 8 of 9 tests (differences of accuracy below 9.1 points are easily missed);
    better than random tokens at the same layer in digits accuracy (+12.0)."
    """
    parts = []
    if row.cost.get("questions"):
        kept, whole = row.cost["average_visual_tokens"], row.cost["visual_tokens"]
        share = f"{100 * row.cost['prefill_macs_ratio']:.0f} % of the prefill MACs"
        held = row.cost["kv_bytes"] / row.cost["kv_bytes_full"]
        if kept < whole:
            parts.append(f"{kept:.3g} of {whole:.3g} visual tokens a layer, {share}")
        else:
            after = f" in the prefill, {100 * held:.0f} % of the KV cache left after it" if held < 1 else ""
            parts.append(f"no token dropped{after}")
    tested = _tested(row, row.versus)
    found = sorted((pair for pair in tested if pair.significant()), key=lambda pair: -abs(pair.difference))
    for words, tone in ((f"worse than {base}", "bad"), (f"better than {base}", "good"), ("different", "")):
        if chosen := _named(found, tone):
            parts.append(f"{words} in {chosen}")
    rest = len(tested) - len(found)
    if not tested:
        parts.append("too few images to test a difference" if row.versus else "differences were not tested")
    elif rest:
        which = f"the other {rest} of {len(tested)} tests" if found else counted(rest, "test")
        parts.append(f"no difference found in {which}{_missed(tested)}")
    parts += _against_random(row, told=_missed(tested))
    if row.invalid:
        parts.append(f"not to be compared, {row.invalid}")
    return f"{row.label}: {'; '.join(parts)}."


def power_note(rows: Sequence[summary.Row], metric: Metric) -> str:
    """Which differences of methods to the baseline could have been seen: from the method measured best to the one
    measured worst; "" where that is not known of any."""
    tested = (row.versus.get(metric.key) for row in rows if row.role == "method")
    pairs = [pair for pair in tested if pair is not None and pair.detectable]
    if not pairs:
        return ""
    least, most = (
        points_text(choose(pair.detectable or 0.0 for pair in pairs), metric.percent) for choose in (min, max)
    )
    images = span_text([pair.images for pair in pairs])
    both = f"{least.removesuffix(' points')} to {most} or more, depending on the method,"
    size = f"{most} or more" if least == most else both
    return (
        f"Power: with {images} images true differences of {metric.title} of {size} between a method and "
        f"{rows[0].label} are found in 80 of 100 comparisons. Smaller ones are easily missed."
    )


def _tested(row: summary.Row, pairs: Mapping[str, Paired]) -> list[Paired]:
    """The differences that sentences speak of: tested ones, not about captions that collapsed."""
    return [pair for pair in pairs.values() if pair.p_holm is not None and pair.group not in row.collapsed]


def _missed(tested: Sequence[Paired]) -> str:
    """What tests that found nothing could not see, for the first headline metric among them; "" if that is unknown."""
    unseen = [pair for pair in tested if pair.headline and not pair.significant()]
    if not unseen or not unseen[0].detectable:
        return ""
    pair = unseen[0]
    size = points_text(pair.detectable or 0.0, pair.percent)
    return f" (differences of {pair.title} below {size} are easily missed)"


def _against_random(row: summary.Row, told: str) -> list[str]:
    """What the tests against random tokens at the same layer say; nothing where there are none.

    Args:
        row: of a method.
        told: what the tests against the baseline could not see, which is not said twice.
    """
    tested = _tested(row, row.versus_control)
    if not tested:
        return ["too few images to test it against random tokens"] if row.versus_control else []
    found = sorted((pair for pair in tested if pair.significant()), key=lambda pair: -abs(pair.difference))
    worse, better = _named(found, "bad"), _named(found, "good")
    parts = [f"worse than random tokens at the same layer in {worse}"] if worse else []
    if better:
        return [*parts, f"better than random tokens at the same layer in {better}"]
    tests = counted(len(tested), "test")
    missed = _missed(tested)
    text = f"not found better than random tokens at the same layer in any of {tests}"
    return [*parts, text if missed == told else text + missed]


def _named(pairs: Sequence[Paired], tone: str) -> str:
    """ "digits accuracy (+12.0) and F1 (+3.0)": those that point that way."""
    chosen = [f"{pair.title} ({signed_difference(pair)})" for pair in pairs if direction(pair) == tone]
    return _list(chosen) if chosen else ""


def signed_difference(pair: Paired) -> str:
    """ "+2.5": the difference as the table has it."""
    return signed(pair.difference, pair.percent)


def _with_interval(row: summary.Row, metric: Metric) -> str:
    value, ends = row.value(metric.key) or 0.0, row.intervals.get(metric.key)
    text = tabular.number_text(value, metric.percent) + (" %" if metric.percent else "")
    return text if ends is None else f"{text} ({range_text(ends, metric.percent)})"


def model_name(run: Run) -> str:
    """What the user called the model."""
    return str((run.identity.get("model") or {}).get("name", "unknown model"))


def asked(run: Run) -> str:
    """ "300 questions about 50 images"."""
    images = len({item.image for item in run.items})
    return f"{counted(len(run.items), 'question')} about {counted(images, 'image')}"


def counted(number: int, what: str) -> str:
    """ "1 question", "1,200 questions"."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def span_text(counts: Sequence[int]) -> str:
    """ "24 to 25", or "25" where all are alike."""
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def signed(value: float, percent: bool) -> str:
    """A value with its sign; what rounds to zero has none."""
    text = tabular.number_text(abs(value), percent)
    return text if float(text) == 0 else f"{page.MINUS if value < 0 else '+'}{text}"


def range_text(ends: tuple[float, float], percent: bool) -> str:
    """ "71.2 to 80.4"."""
    return " to ".join(tabular.number_text(end, percent) for end in ends)


def points_text(value: float, percent: bool) -> str:
    """ "11 points" of a share, else the bare number: a difference to two digits."""
    return f"{100 * value:.2g} points" if percent else f"{value:.3g}"


def direction(pair: Paired) -> Any:
    """Which way the difference points: "good", "bad", or "" where no direction is better."""
    if pair.better == "neither":
        return ""
    return "good" if (pair.difference > 0) == (pair.better == "higher") else "bad"


def _list(parts: Sequence[str], most: int = 4) -> str:
    shown = [*parts[:most], *([f"{len(parts) - most} more"] if len(parts) > most else [])]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
