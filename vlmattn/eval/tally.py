"""From answers to numbers, in one way for all benchmarks.

A *kind* of question (yes/no, pairs, exact match, caption ...) turns the answers about one image into a few sums; a
*formula* turns sums into a number. Because every number is a formula of sums that add up over images, point values,
bootstrap intervals and paired tests all come from the same table, `Tally.sums`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlmattn.errors import DataError
from vlmattn.eval.items import Item, Said, match

Sums = NDArray[np.float64]
Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Formula:
    """A number made of the summed columns of a kind.

    Attributes:
        name: "f1".
        title: column title in tables, without the unit.
        of: (..., columns) sums -> (...) values, NaN where a denominator is zero.
        better: which direction is good.
        percent: whether the value is a share, shown times 100.
        of_marks: whether the value is the share of answers that are right, or of those that are wrong, so that
            McNemar's test is about it.
    """

    name: str
    title: str
    of: Callable[[Sums], Sums]
    better: Better = "higher"
    percent: bool = True
    of_marks: bool = False


@dataclass(frozen=True)
class Kind:
    """How the answers to one kind of question become sums.

    Attributes:
        name: "yes_no", "pairs", "exact", "caption", "box".
        columns: names of the sums. One called "total" counts answers, one called "unparsed" unreadable ones.
        count: (item, answer) pairs of one group about one image -> one number per column.
        formulas: what is made of the sums, the headline first.
        mark: whether an answer is right; None where there is no such thing.
        verdict: what an answer was read as ("yes", "no", "other", a normalised text), for flip reports.
        check: raises DataError unless the items of one group about one image, answered or not, can be scored together;
            None where every item stands for itself.
    """

    name: str
    columns: tuple[str, ...]
    count: Callable[[Sequence[tuple[Item, Said]]], Sequence[float]]
    formulas: tuple[Formula, ...]
    mark: Callable[[Item, Said], bool | None]
    verdict: Callable[[Item, Said], str]
    check: Callable[[Sequence[Item]], None] | None = None

    def formula(self, name: str) -> Formula:
        """The formula of that name."""
        return next(formula for formula in self.formulas if formula.name == name)


@dataclass(frozen=True)
class Aggregate:
    """A number over several groups of the same kind.

    Attributes:
        name: "mean_f1".
        title: column title.
        kind: name of the kind whose groups are taken.
        formula: name of its formula.
        how: "mean" or "sum" of the groups' values, or "pool": the formula of their summed columns.
        groups: only these; all groups of the kind if empty. A sum over named groups needs all of them.
    """

    name: str
    title: str
    kind: str
    formula: str
    how: Literal["mean", "sum", "pool"] = "mean"
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metric:
    """One number of a benchmark, ready to be computed from the rows of `Tally.sums`.

    Attributes:
        key: "mean_f1", "random.f1", "caption.chair_s".
        title: for tables.
        group: the group it is about, "" for an aggregate.
        groups: all groups it is about.
        headline: whether a table that has no room for everything shows it.
        better, percent, of_marks: as in `Formula`.
        raw: (..., K) sums -> (...) values, NaN where undefined.
    """

    key: str
    title: str
    group: str
    groups: tuple[str, ...]
    headline: bool
    better: Better
    percent: bool
    of_marks: bool
    raw: Callable[[Sums], Sums] = field(repr=False)

    def of(self, sums: Sums) -> Sums:
        """(..., K) sums -> (...) values; 0 where a denominator is zero."""
        return np.nan_to_num(self.raw(sums), nan=0.0)


@dataclass(frozen=True)
class Tally:
    """The answers of a run as sums per image.

    Attributes:
        images: C names, the clusters.
        columns: K names, "group.column".
        sums: (C, K) float64.
        metrics: what can be computed from `sums`, aggregates first.
        groups: item id -> group.
        clusters: item id -> image.
        marks: item id -> right or wrong, for the items that can be.
        verdicts: item id -> what the answer was read as.
    """

    images: tuple[str, ...]
    columns: tuple[str, ...]
    sums: Sums
    metrics: tuple[Metric, ...]
    groups: Mapping[str, str]
    clusters: Mapping[str, str]
    marks: Mapping[str, bool]
    verdicts: Mapping[str, str]

    def metric(self, key: str) -> Metric:
        """The metric of that key; KeyError if there is none."""
        for metric in self.metrics:
            if metric.key == key:
                return metric
        raise KeyError(f"no metric {key!r}; there are {', '.join(metric.key for metric in self.metrics)}")

    def values(self) -> dict[str, float]:
        """Metric key -> value over all images; 0 where a denominator is zero."""
        whole = self.sums.sum(axis=0)
        return {metric.key: float(metric.of(whole)) for metric in self.metrics}

    def images_of(self) -> dict[str, int]:
        """Metric key -> how many images have an answer that the metric is about."""
        seen: dict[str, set[str]] = {}
        for key, group in self.groups.items():
            seen.setdefault(group, set()).add(self.clusters[key])
        return {
            metric.key: len(set().union(*(seen.get(group, ()) for group in metric.groups))) for metric in self.metrics
        }

    def undefined(self) -> list[str]:
        """Keys of the metrics whose denominator is zero."""
        whole = self.sums.sum(axis=0)
        return [metric.key for metric in self.metrics if np.isnan(metric.raw(whole))]


@dataclass(frozen=True)
class Scorer:
    """A benchmark's rule from answers to numbers; pure.

    Attributes:
        name: of the benchmark.
        profile: how answers are read.
        kind: group -> its kind; raises DataError for a group it does not know.
        aggregates: numbers over groups; those whose kind does not occur are left out.
        headlines: keys of the metrics a narrow table shows; empty: all aggregates, and the first formula of groups that
            no aggregate covers.
        tasks: key of a metric -> what a comparison of many methods calls it; empty: the headlines under their titles.
        words: path of the word table that captions are read with; "" for the benchmark's own.
    """

    name: str
    profile: str
    kind: Callable[[str], Kind]
    aggregates: tuple[Aggregate, ...] = ()
    headlines: tuple[str, ...] = ()
    words: str = ""
    tasks: Mapping[str, str] = field(default_factory=dict)

    def tally(self, items: Sequence[Item], said: Iterable[Said], failed: Collection[str] = ()) -> Tally:
        """Sums per image.

        Args:
            items: what was asked.
            said: the answers, in any order.
            failed: ids of items that have no answer; they are left out.

        Raises:
            DataError: answers and items do not fit (ids are listed), a group is unknown, or items that are scored
                together are not all there.
        """
        pairs = match(items, said, failed)
        kinds = {group: self.kind(group) for group in dict.fromkeys(item.group for item in items)}
        for check, lot in _together(kinds, items):
            check(lot)
        start: dict[str, int] = {}
        columns: list[str] = []
        for group, kind in kinds.items():
            start[group] = len(columns)
            columns += [f"{group}.{column}" for column in kind.columns]
        together: dict[str, dict[str, list[tuple[Item, Said]]]] = {}
        for item, answer in pairs:
            together.setdefault(item.image, {}).setdefault(item.group, []).append((item, answer))
        sums = np.zeros((len(together), len(columns)))
        for row, groups in enumerate(together.values()):
            for group, mine in groups.items():
                sums[row, start[group] : start[group] + len(kinds[group].columns)] = kinds[group].count(mine)
        marks = {item.id: kinds[item.group].mark(item, answer) for item, answer in pairs}
        return Tally(
            images=tuple(together),
            columns=tuple(columns),
            sums=sums,
            metrics=tuple(self._metrics(kinds, start)),
            groups={item.id: item.group for item, _ in pairs},
            clusters={item.id: item.image for item, _ in pairs},
            marks={key: mark for key, mark in marks.items() if mark is not None},
            verdicts={item.id: kinds[item.group].verdict(item, answer) for item, answer in pairs},
        )

    def whole(self, items: Sequence[Item]) -> tuple[Item, ...]:
        """A part of a benchmark without what it tore apart: items that are scored together and not all there."""
        torn: set[str] = set()
        for check, lot in _together({group: self.kind(group) for group in {item.group for item in items}}, items):
            try:
                check(lot)
            except DataError:
                torn.update(item.id for item in lot)
        return tuple(item for item in items if item.id not in torn)

    def score(
        self, items: Sequence[Item], said: Iterable[Said], failed: Collection[str] = (), *, strict: bool = False
    ) -> dict[str, Any]:
        """All numbers of a run, JSON-able.

        Returns:
            `profile`; `values`: metric key -> value; `groups`: per group `kind`, `counts` (the sums), `failed` and the
            values of its formulas; `unparsed`, `failed`: how many answers in all; `undefined`: keys whose denominator
            is zero (their value is 0).

        Raises:
            DataError: as `tally`.
            ZeroDivisionError: `strict`, and a denominator is zero, as the official scripts do.
        """
        return self.numbers(self.tally(items, said, failed), items, failed, strict=strict)

    def numbers(
        self, tally: Tally, items: Sequence[Item], failed: Collection[str] = (), *, strict: bool = False
    ) -> dict[str, Any]:
        """What `score` returns, from a tally that is there already."""
        undefined = tally.undefined()
        if strict and undefined:
            raise ZeroDivisionError(f"undefined, because a denominator is 0: {', '.join(undefined)}")
        values, whole = tally.values(), dict(zip(tally.columns, tally.sums.sum(axis=0).tolist(), strict=True))
        groups: dict[str, Any] = {}
        for group in dict.fromkeys(item.group for item in items):
            kind = self.kind(group)
            groups[group] = {
                "kind": kind.name,
                **{formula.name: values[f"{group}.{formula.name}"] for formula in kind.formulas},
                "counts": {column: whole[f"{group}.{column}"] for column in kind.columns},
                "failed": sum(item.group == group for item in items if item.id in failed),
            }
        return {
            "profile": self.profile,
            "values": values,
            "groups": groups,
            "unparsed": int(sum(entry["counts"].get("unparsed", 0) for entry in groups.values())),
            "failed": sum(entry["failed"] for entry in groups.values()),
            "undefined": undefined,
        }

    def _metrics(self, kinds: Mapping[str, Kind], start: Mapping[str, int]) -> Iterable[Metric]:
        covered: set[str] = set()
        for aggregate in self.aggregates:
            groups = [
                group
                for group, kind in kinds.items()
                if kind.name == aggregate.kind and (not aggregate.groups or group in aggregate.groups)
            ]
            if not groups or (aggregate.how == "sum" and set(aggregate.groups) - set(groups)):
                continue
            covered.update(groups)
            formula = kinds[groups[0]].formula(aggregate.formula)
            slices = [slice(start[group], start[group] + len(kinds[group].columns)) for group in groups]
            headline = aggregate.name in self.headlines if self.headlines else True
            yield Metric(
                key=aggregate.name,
                title=aggregate.title,
                group="",
                groups=tuple(groups),
                headline=headline,
                better=formula.better,
                percent=formula.percent,
                of_marks=formula.of_marks and aggregate.how != "sum",
                raw=_combined(formula, slices, aggregate.how),
            )
        for group, kind in kinds.items():
            part = slice(start[group], start[group] + len(kind.columns))
            for rank, formula in enumerate(kind.formulas):
                key = f"{group}.{formula.name}"
                yield Metric(
                    key=key,
                    title=f"{group} {formula.title}",
                    group=group,
                    groups=(group,),
                    headline=key in self.headlines if self.headlines else rank == 0 and group not in covered,
                    better=formula.better,
                    percent=formula.percent,
                    of_marks=formula.of_marks,
                    raw=_combined(formula, [part], "pool"),
                )


def ratio(part: Sums, whole: Sums) -> Sums:
    """part / whole, NaN where whole is 0."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole != 0)


def share(part: int, whole: int) -> Callable[[Sums], Sums]:
    """Formula: column `part` over column `whole`, by index."""
    return lambda sums: ratio(sums[..., part], sums[..., whole])


def _together(kinds: Mapping[str, Kind], items: Sequence[Item]) -> Iterable[tuple[Callable[..., None], list[Item]]]:
    """The items that are scored together, each lot with the check it has to pass."""
    lots: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        if kinds[item.group].check is not None:
            lots.setdefault((item.group, item.image), []).append(item)
    for (group, _), lot in lots.items():
        if (check := kinds[group].check) is not None:
            yield check, lot


def _combined(formula: Formula, slices: Sequence[slice], how: str) -> Callable[[Sums], Sums]:
    def raw(sums: Sums) -> Sums:
        if how == "pool":
            return formula.of(np.sum([sums[..., part] for part in slices], axis=0))
        # A group without a denominator counts as 0, as in the official scripts' means.
        values = np.nan_to_num(np.stack([formula.of(sums[..., part]) for part in slices], axis=-1), nan=0.0)
        return values.mean(axis=-1) if how == "mean" else values.sum(axis=-1)

    return raw
