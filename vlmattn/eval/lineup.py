"""The rows of a sweep before it is run: the baseline first, then the methods, budgets matched if asked for, controls
last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from vlmattn.errors import DataError

if TYPE_CHECKING:
    from vlmattn.eval.budgets import Match
    from vlmattn.eval.summary import Role


@dataclass(frozen=True)
class Entry:
    """A row of a sweep.

    Attributes:
        label: what tables call it.
        spec: canonical spec text; "" for what cannot be run: a level that a method does not reach, or a refused one.
        role: what the row is to the sweep.
        below: the level that cannot be reached.
        refused: why the model cannot take the method; "" if it can.
    """

    label: str
    spec: str
    role: Role = "method"
    below: Match | None = None
    refused: str = ""


def with_baseline(specs: Mapping[str, str], baseline: str = "none") -> dict[str, str]:
    """The specs with the baseline first, wherever and whether or not it is among them.

    Args:
        specs: canonical spec text -> label.
        baseline: spec text.

    Raises:
        SpecError, UnknownMethodError: the baseline cannot be read.
        DataError: it is several specs.
    """
    from vlmattn.eval import grid

    first = grid.expand(baseline)
    if len(first) != 1:
        raise DataError(f"--baseline {baseline!r} is {len(first)} specs; the others are compared with one")
    (spec, label), *_ = first.items()
    return {spec: specs.get(spec, label), **{key: value for key, value in specs.items() if key != spec}}


def levels(text: str) -> tuple[float, ...]:
    """The levels behind `--match`: "auto" is an empty tuple, "0.75,0.5" are shares.

    Raises:
        DataError: a level is not a share of the visual tokens.
    """
    from vlmattn.eval import grid

    if text.strip() == "auto":
        return ()
    found = grid.values(text, "--match")
    for level in found:
        if isinstance(level, bool) or not isinstance(level, int | float) or not 0 < level <= 1:
            raise DataError(f"--match {text}: {level!r} is no share of the visual tokens; expected auto or 0.75,0.5")
    return tuple(map(float, found))


def line_up(
    specs: Mapping[str, str],
    *,
    num_layers: int,
    visual_tokens: int = 0,
    levels: Sequence[float] | None = None,
    seeds: int = 0,
    refused: Mapping[str, str] | None = None,
) -> list[Entry]:
    """The rows of a sweep in order.

    Args:
        specs: canonical spec text -> label, the baseline first; the baseline keeps its budget.
        num_layers: decoder layers of the model.
        visual_tokens: of an image; needed for `levels` and for `seeds`.
        levels: average visual tokens per layer to match, as shares; empty for the usual ones of each kind of method,
            None to leave budgets as they are.
        seeds: draws of random tokens for each insertion layer; 0 for no controls.
        refused: specs that the model cannot take -> why; each is a row that says so.

    Raises:
        DataError: a spec with several pruners cannot be matched, or a level is no share.
    """
    from vlmattn.eval import budgets, controls

    (base, label), *others = specs.items()
    found = [Entry(label, base, "baseline")]
    for spec, label in others:
        if refused and spec in refused:
            found.append(Entry(label, "", "refused", refused=refused[spec]))
            continue
        if levels is None:
            found.append(Entry(label, spec))
            continue
        for match in budgets.match_average_tokens(
            spec, levels or None, num_layers=num_layers, visual_tokens=visual_tokens
        ):
            if match.spec is None:
                found.append(Entry(match.label, "", "below floor", match))
            else:
                found.append(Entry(label if match.level is None else written_out(match.spec), match.spec))
    if seeds:
        run = [entry.spec for entry in found if entry.spec]
        extra = controls.specs_for(run, num_layers=num_layers, visual_tokens=visual_tokens, seeds=seeds, even=True)
        found += [Entry(label, spec, "control") for spec, label in extra.items()]
    rows: dict[str, Entry] = {}
    for entry in found:
        rows.setdefault(entry.spec or entry.label, entry)  # the first one stays, where it is
    return list(rows.values())


def matching_controls(
    entries: Sequence[Entry], num_layers: int, visual_tokens: int, name: str = "random"
) -> dict[str, str]:
    """What each method with pruners is to be tested against beside the baseline: its own random, or uniform, row.

    That is the row with as many such tokens, on average, from the same layer on (and seed 0), as `controls.specs_for`
    makes it. It counts whether `--controls` added it or it was typed; the baseline does not, because every row is
    compared with it anyway.

    Args:
        entries: the rows of a sweep, the baseline first.
        num_layers: decoder layers of the model.
        visual_tokens: of an image.
        name: "random" or "uniform".

    Returns:
        Spec of a method -> spec of its control; without methods that have none in the sweep.
    """
    from vlmattn.eval import controls

    there = {controls.resolved(entry.spec, num_layers): entry.spec for entry in entries[1:] if entry.spec}
    found = {}
    for entry in entries:
        if entry.role != "method" or not entry.spec:
            continue
        made = controls.specs_for([entry.spec], num_layers=num_layers, visual_tokens=visual_tokens, even=True)
        for control in made:
            if control in there and is_only(control, name):
                found[entry.spec] = there[control]
    return found


def is_only(spec: str, name: str) -> bool:
    """Whether a spec is of methods of that name alone."""
    from vlmattn import spec as specs

    names = [method.name for method in specs.parse(spec)]
    return bool(names) and set(names) == {name}


def written_out(spec: str) -> str:
    """The spec with every budget written out, also where it is the default, so that rows can be told apart."""
    from vlmattn import spec as specs
    from vlmattn.eval import budgets

    texts = []
    for method in cast("tuple[Any, ...]", specs.parse(spec)):
        text, keep = str(method), method.keep if budgets.takes_keep(method) else None
        if keep is not None and "(keep=" not in text:
            name, bracket, rest = text.partition("(")
            text = f"{name}(keep={keep!r}{', ' if bracket else ''}{rest or ')'}"
        texts.append(text)
    return " + ".join(texts) or spec
