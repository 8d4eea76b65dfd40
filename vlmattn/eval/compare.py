"""Two runs over the same questions: what differs, whether that can be chance, and which answers changed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from vlmattn.errors import DataError
from vlmattn.eval import controls, stats, tabular
from vlmattn.eval.items import some
from vlmattn.eval.records import texts
from vlmattn.eval.runs import Run
from vlmattn.eval.stats import Paired

if TYPE_CHECKING:
    from rich.table import Table

SAME = ("bench", "data", "prompt", "decode", "model.fingerprint", "model.dtype")
"""Parts of a run's identity without which a difference between two runs is not the method's."""
NOTED = ("model.name", "device", "sink_dims", "versions")
"""Parts that may differ between runs that are compared; a note says so."""
_TESTS = {"mcnemar": "McNemar", "mcnemar, by image": "by image", "exchange": "exchange", "none": ""}
_LONGEST = 160


@dataclass(frozen=True)
class Flip:
    """An answer that is right in one run and wrong in the other.

    Attributes:
        id, image, group, question, label: of the item.
        first_text, second_text: raw answers.
        first_verdict, second_verdict: what they were read as.
        direction: "lost" from right to wrong, "won" from wrong to right.
    """

    id: str
    image: str
    group: str
    question: str
    label: str
    first_text: str
    second_text: str
    first_verdict: str
    second_verdict: str
    direction: Literal["lost", "won"]


@dataclass(frozen=True)
class Turns:
    """How the answers of one task changed between right and wrong from the first run to the second.

    Attributes:
        group: the task.
        questions: how many both runs answered.
        lost: right, then wrong.
        won: wrong, then right.
        changed: read as something else, whether or not that made them right or wrong.
        directions: of yes/no questions, "yes to no" and "no to yes" -> {"lost": n, "won": n}; empty for others.
    """

    group: str
    questions: int
    lost: int
    won: int
    changed: int
    directions: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Comparison:
    """A run against another one, on the questions that both answered.

    Attributes:
        first: the run compared with, its answers to these questions only.
        second: the run that is judged, likewise.
        paired: per metric the difference (second - first), its interval and its test.
        flips: the answers that turned from right to wrong or back, in the order of the questions. A caption is right
            where it hallucinates nothing.
        counts: per task, how many did.
        left_out: ids of questions that are not compared: only one run answered them, or they are not the same question.
        notes: what a reader must know, a sentence each.
    """

    first: Run
    second: Run
    paired: tuple[Paired, ...]
    flips: tuple[Flip, ...]
    counts: tuple[Turns, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        sides = (("first", self.first), ("second", self.second))
        return {
            **{
                name: {"label": run.label, "folder": run.folder, "spec": run.identity.get("spec"), "cost": run.cost}
                for name, run in sides
            },
            "bench": self.first.scorer.name,
            "profile": self.first.scorer.profile,
            "questions": len(self.first.said),
            "images": len(self.first.tally.images),
            "metrics": [asdict(entry) for entry in self.paired],
            "counts": [asdict(entry) for entry in self.counts],
            "flips": [asdict(entry) for entry in self.flips],
            "left_out": list(self.left_out),
            "notes": list(self.notes),
        }


def compare(runs: Sequence[Run], *, force: bool = False, seed: int = 0) -> list[Comparison]:
    """Compare every run with the first one.

    Args:
        runs: two or more. Labels that occur twice are told apart by their folders.
        force: compare runs that differ in data, prompt, decoding or model, on the questions they share.
        seed: seed of the resampling.

    Returns:
        One comparison for every run but the first.

    Raises:
        DataError: fewer than two runs; runs that must not be compared (what differs is listed with both values); no
            question that both answered; scipy or statsmodels is not installed.
    """
    if len(runs) < 2:
        raise DataError(f"a comparison needs two runs or more, here {'is one' if runs else 'are none'}")
    labels = Counter(run.label for run in runs)
    named = [run if labels[run.label] == 1 else replace(run, label=f"{run.label} [{run.folder}]") for run in runs]
    problems = [(run, found) for run in named[1:] if (found := differences(named[0], run))]
    if problems and not force:
        raise DataError("; ".join(_refusal(named[0], run, found) for run, found in problems))
    return [_compare(named[0], run, seed) for run in named[1:]]


def differences(first: Run, second: Run, names: Sequence[str] = SAME) -> dict[str, tuple[Any, Any]]:
    """In which of these parts of their identity two runs differ: name -> both values.

    Args:
        first: a run.
        second: a run.
        names: parts of `Run.identity`, with a dot between levels. With the default, how answers are read is one more.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for name in names:
        one, two = ({name: _part(run.identity, name)} for run in (first, second))
        for side in (one, two):
            if isinstance(side[name], Mapping):
                side.update({f"{name}.{key}": value for key, value in side.pop(name).items()})
        found |= {key: (one.get(key), two.get(key)) for key in [*one, *two] if one.get(key) != two.get(key)}
    if names is SAME and first.scorer.profile != second.scorer.profile:
        found["profile"] = (first.scorer.profile, second.scorer.profile)
    if names is SAME and first.scorer.words != second.scorer.words:
        tables = [dict(run.info.get("words") or {}).get("sha256") for run in (first, second)]
        if None in tables or tables[0] != tables[1]:
            found["words"] = (first.scorer.words, second.scorer.words)
    return found


def find_flips(first: Run, second: Run) -> list[Flip]:
    """The answers that are right in one run and wrong in the other, in the order of the first run's questions.

    Questions that only one of them answered, and those without right and wrong, are left out.
    """
    said = [dict(texts(run.records)) for run in (first, second)]
    before, after = first.tally, second.tally
    return [
        Flip(
            id=item.id,
            image=item.image,
            group=item.group,
            question=item.question,
            label=item.label,
            first_text=said[0][item.id],
            second_text=said[1][item.id],
            first_verdict=before.verdicts[item.id],
            second_verdict=after.verdicts[item.id],
            direction="lost" if before.marks[item.id] else "won",
        )
        for item in first.items
        if item.id in before.marks and before.marks[item.id] != after.marks.get(item.id, before.marks[item.id])
    ]


def tables(comparison: Comparison, *, every: bool = False) -> list[Table]:
    """The terminal tables of a comparison: metrics, and how many answers changed.

    Args:
        comparison: what is shown.
        every: all metrics, instead of the headlines and the first of every task.
    """
    first, second = comparison.first, comparison.second
    entries = [entry for entry in comparison.paired if every or entry.headline or entry.p_holm is not None]
    head = ["metric", "first", "second", "difference", "p", "p Holm", "detectable"]
    body = [
        [
            f"{entry.title} %" if entry.percent else entry.title,
            tabular.number_text(entry.first, entry.percent),
            tabular.number_text(entry.second, entry.percent),
            difference_text(entry),
            "-" if entry.p is None else f"{p_text(entry.p)} ({_TESTS[entry.test]})",
            "-" if entry.p_holm is None else p_text(entry.p_holm),
            "-" if entry.detectable is None else tabular.number_text(entry.detectable, entry.percent),
        ]
        for entry in entries
    ]
    sides = "\n".join(f"{name}: {_cost_text(run)}" for name, run in (("first", first), ("second", second)))
    title = f"{first.scorer.name}: {len(first.said)} questions about {len(first.tally.images)} images\n{sides}"
    found = [tabular.terminal_table(title, head, body, [_style(entry) for entry in entries])]
    turns = [entry for entry in comparison.counts if entry.lost or entry.won or entry.changed]
    if turns:
        found.append(_turns_table(turns))
    return found


def flip_table(comparison: Comparison, limit: int) -> Table | None:
    """Examples of changed answers, from all tasks and both directions in turn; None where there are none."""
    chosen = examples(comparison.flips, limit)
    if not chosen:
        return None
    head = ["", "question", "right is", "first", "second"]
    body = [
        [flip.direction, f"{flip.id}: {flip.question}", flip.label, _plain(flip.first_text), _plain(flip.second_text)]
        for flip in chosen
    ]
    title = f"changed answers, {len(chosen)} of {len(comparison.flips)}"
    return tabular.terminal_table(title, head, body, ["" if flip.direction == "won" else "red" for flip in chosen], 5)


def examples(flips: Sequence[Flip], limit: int) -> list[Flip]:
    """The first flips of every task and direction in turn, at most `limit`."""
    seen: Counter[tuple[str, str]] = Counter()
    ranked: list[tuple[int, int, Flip]] = []
    for flip in flips:
        ranked.append((seen[flip.group, flip.direction], len(ranked), flip))
        seen[flip.group, flip.direction] += 1
    return [flip for _, _, flip in sorted(ranked, key=lambda entry: entry[:2])[: max(0, limit)]]


def explanations(comparisons: Sequence[Comparison]) -> list[str]:
    """What the columns and marks of `tables` mean, a sentence each; only of those that are there."""
    entries = [entry for comparison in comparisons for entry in comparison.paired]
    tests = {entry.test for entry in entries}
    found = []
    if any(entry.interval for entry in entries):
        found.append("Small print below a difference: its 95 % interval, from resampling images for both runs alike.")
    if "mcnemar" in tests:
        found.append("McNemar: the exact test; no image has two answers that changed.")
    if "mcnemar, by image" in tests:
        found.append(
            "by image: McNemar's test with images as units, because answers about one image are not independent."
        )
    if "exchange" in tests:
        found.append("exchange: the runs' answers change places at random, image by image.")
    if any(entry.significant() for entry in entries):
        found.append(
            f"* more than chance: p Holm, which allows for all headlines, or all other tasks, is below {stats.LEVEL:g}."
        )
    if any(entry.changed for comparison in comparisons for entry in comparison.counts):
        found.append("changed: answers that were read as something else, right or wrong.")
    if any(entry.detectable for entry in entries):
        found.append(
            "detectable: the smallest true difference that a comparison of this size finds in 80 of 100 cases."
        )
    return found


def power_notes(comparison: Comparison) -> list[str]:
    """For every headline that differs by what may be chance: what could have been seen, and what this would take."""
    found = []
    for entry in comparison.paired:
        if not entry.headline or not entry.difference or entry.detectable is None or entry.significant():
            continue
        text = stats.power_sentence(entry)
        needed = stats.images_needed(entry.standard_error, entry.images, entry.difference)
        if needed is not None and needed > entry.images:
            about = f"{float(f'{needed:.2g}'):,.0f}"
            text += f" To see the {_size(entry.difference, entry.percent)} found here takes about {about} images."
        found.append(text)
    return found


def difference_text(entry: Paired) -> str:
    """ "−1.2* (−2.0 to −0.4)": the difference with the mark of one that is more than chance, and its interval."""
    text = tabular.difference_text(entry, entry.percent)
    if entry.interval is None:
        return text
    low, high = (tabular.number_text(end, entry.percent).replace("-", "−") for end in entry.interval)
    return f"{text} ({low} to {high})"


def p_text(p: float) -> str:
    """ "0.031", "<0.001"."""
    if p < 0.001:
        return "<0.001"
    text = f"{p:.3f}"
    return (
        "<0.050" if p < stats.LEVEL <= float(text) else text
    )  # what is below the level must not look as if it were not


def _compare(first: Run, second: Run, seed: int) -> Comparison:
    asked = [{item.id: item for item in run.items if item.id not in run.failed} for run in (first, second)]
    both = [key for key in asked[0] if key in asked[1]]
    changed = [key for key in both if asked[0][key] != asked[1][key]]
    single = [key for side, other in (asked, asked[::-1]) for key in side if key not in other]
    same = [asked[0][key] for key in both if key not in changed]
    common = {item.id for item in first.scorer.whole(same)}
    single += [item.id for item in same if item.id not in common]
    if not common:
        raise DataError(
            f"{_name(first)} and {_name(second)} have no question in common that both answered "
            f"({len(asked[0])} and {len(asked[1])} answers)"
        )
    notes = [
        f"{count} questions are left out, {why}: {some(keys)}."
        for keys, why in ((single, "because only one of the runs answered them"), (changed, "because they differ"))
        if (count := len(keys))
    ]
    notes += [
        f"{run.label}: {len(run.failed)} questions failed, the first with {next(iter(run.failed.values()))}."
        for run in (first, second)
        if run.failed
    ]
    unlike = differences(first, second)
    if unlike:
        notes.insert(
            0, f"Compared by force. The runs differ in {_list(unlike)}: not all of a difference is the method's."
        )
    if noted := differences(first, second, NOTED):
        notes.append(f"The runs differ in {_list(noted)}.")
    one, two = (run.only(common) for run in (first, second))
    if set(texts(one.records)) == set(texts(two.records)):
        notes.append("All answers are the same.")
    if collapsed := controls.collapse(one.tally, two.tally):
        notes.append(f"{second.label} is not comparable, {'; '.join(collapsed.values())}.")
    flips, paired = tuple(find_flips(one, two)), stats.paired(one.tally, two.tally, seed=seed)
    compared = {entry.key for entry in paired}
    if lacking := [metric.title for metric in one.tally.metrics if metric.key not in compared]:
        notes.append(f"Not compared, because a denominator is 0 in one of the runs: {', '.join(lacking)}.")
    return Comparison(
        first=one,
        second=two,
        paired=paired,
        flips=flips,
        counts=tuple(_turns(one, two, flips)),
        left_out=(*single, *changed),
        notes=tuple(notes),
    )


def _turns(first: Run, second: Run, flips: Sequence[Flip]) -> list[Turns]:
    found = []
    for group in dict.fromkeys(item.group for item in first.items):
        items = [item for item in first.items if item.group == group]
        mine = [flip for flip in flips if flip.group == group]
        verdicts = [(first.tally.verdicts[item.id], second.tally.verdicts[item.id]) for item in items]
        directions: dict[str, dict[str, int]] = {}
        if {item.label.lower() for item in items} <= {"yes", "no"}:
            directions = {
                f"{start} to {end}": {
                    way: sum(
                        (flip.first_verdict, flip.second_verdict, flip.direction) == (start, end, way) for flip in mine
                    )
                    for way in ("lost", "won")
                }
                for start, end in (("yes", "no"), ("no", "yes"))
            }
        lost = sum(flip.direction == "lost" for flip in mine)
        changed = sum(one != two for one, two in verdicts)
        found.append(Turns(group, len(items), lost, len(mine) - lost, changed, directions))
    return found


def _turns_table(turns: Sequence[Turns]) -> Table:
    ways = list(dict.fromkeys(way for entry in turns for way in entry.directions))

    def cell(entry: Turns, way: str) -> str:
        counts = entry.directions.get(way)
        return "-" if counts is None else f"{sum(counts.values())} ({counts['lost']} lost {counts['won']} won)"

    head = ["task", "asked", "changed", "lost", "won", *ways]
    body = [
        [entry.group, str(entry.questions), str(entry.changed), str(entry.lost), str(entry.won)]
        + [cell(entry, way) for way in ways]
        for entry in turns
    ]
    title = "lost: right, then wrong; won: wrong, then right"
    return tabular.terminal_table(title, head, body)


def _style(entry: Paired) -> str:
    if not entry.significant():
        return ""
    if entry.better == "neither":
        return "bold"
    return "green" if (entry.difference > 0) == (entry.better == "higher") else "red"


def _refusal(first: Run, second: Run, found: Mapping[str, tuple[Any, Any]]) -> str:
    way_out = "run both alike, or use --force to compare the questions that both answered"
    if "profile" in found:
        way_out = "use --profile to read both alike" if len(found) == 1 else f"{way_out}; --profile reads both alike"
    return (
        f"{_name(second)} cannot be compared with {_name(first)}, they differ in {_list(found)}: "
        f"a difference would not be the method's; {way_out}"
    )


def _list(found: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} ({_short(two)}, in the first {_short(one)})" for name, (one, two) in found.items())


def _name(run: Run) -> str:
    return run.folder or run.label


def _part(identity: Mapping[str, Any], name: str) -> Any:
    value: Any = identity
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _size(difference: float, percent: bool) -> str:
    return f"{100 * abs(difference):.2g} points" if percent else f"{abs(difference):.3g}"


def _cost_text(run: Run) -> str:
    """ "none, 144 (of 144) visual tokens a layer, 100 % of the prefill MACs"."""
    if not run.cost.get("questions"):
        return run.label
    tokens, macs = tabular.tokens_text(run.cost), tabular.macs_text(run.cost)
    return f"{run.label}, {tokens} visual tokens a layer, {macs} of the prefill MACs"


def _plain(text: str) -> str:
    """Text that is safe and short in a terminal: what cannot be printed is a blank, the end of a long one is cut."""
    clean = "".join(letter if letter.isprintable() else " " for letter in text)
    return clean if len(clean) <= _LONGEST else f"{clean[: _LONGEST - 3]}..."
