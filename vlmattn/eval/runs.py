"""A run folder read back: what was asked, what was said, what it cost, scored again without model and without data."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vlmattn.errors import DataError
from vlmattn.eval import records as run_records
from vlmattn.eval import summary
from vlmattn.eval.items import Item, Said, some
from vlmattn.eval.tally import Scorer, Tally


@dataclass(frozen=True)
class Run:
    """The answers of one method to one benchmark.

    Attributes:
        folder: where it was read from; "" for a run that was derived from another one.
        label: what tables call it.
        identity: what was run, as in `run.json`.
        info: what else `run.json` says.
        records: one per question, in the order written.
        scorer: how answers become numbers.
        peak_memory_bytes: of the GPU, None on a CPU.
    """

    folder: str
    label: str
    identity: Mapping[str, Any]
    info: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]] = field(repr=False)
    scorer: Scorer = field(repr=False)
    peak_memory_bytes: int | None = None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        profile: str | None = None,
        words: str | Path | None = None,
        label: str | None = None,
        partial: bool = False,
    ) -> Run:
        """Read a run folder.

        Args:
            folder: the folder of one method, with `run.json` and `records.jsonl`.
            profile: how answers are read; default: as when it was run.
            words: path of a word table for captions; default: as when it was run.
            label: what tables call it; default: its spec.
            partial: take a run that was stopped before its last question.

        Raises:
            DataError: not a run folder, no records, a record that lacks something, or (unless `partial`) fewer records
                than questions; the word table of the run is gone or was changed.
        """
        from vlmattn.eval import bench

        path = Path(folder)
        described, found = run_records.read_run(path), run_records.read_records(path)
        identity, info = described["identity"], described.get("info", {})
        if not found:
            raise DataError(f"{path} has no records yet; start its `vlmattn eval` command again")
        check_records(path, found)
        cost = run_records.read_cost(path)
        wanted = info.get("questions")
        missing = cost is None if wanted is None else len(found) < wanted
        if missing and not partial:
            lack = "is not finished" if wanted is None else f"lacks {wanted - len(found)} of {wanted} records"
            raise DataError(
                f"{path} {lack}; start its `vlmattn eval` command again, or use --force to take what is there"
            )
        table = bench.recorded_words(info.get("words")) if words is None else words
        scorer = bench.scorer(identity.get("bench", ""), profile or info.get("profile", "official"), table)
        run = cls(
            folder=str(path),
            label=label or str(identity.get("spec", path.name)),
            identity=identity,
            info=info,
            records=found,
            scorer=scorer,
            peak_memory_bytes=(cost or {}).get("peak_memory_bytes"),
        )
        # A run that was stopped can end between questions that are scored together.
        return run.only([item.id for item in scorer.whole(run.items)]) if missing else run

    @classmethod
    def of(
        cls,
        folder: str,
        records: Sequence[Mapping[str, Any]],
        identity: Mapping[str, Any],
        info: Mapping[str, Any],
        scorer: Scorer,
        label: str,
    ) -> Run:
        """A run of records that are in memory."""
        return cls(folder, label, identity, info, records, scorer)

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """What was asked, answered or not, in the order of the records."""
        return tuple(
            Item(
                id=record["id"],
                image=record["image"],
                question=record["question"],
                label=record["label"],
                group=record["group"],
                gold=record.get("gold", {}),
            )
            for record in self.records
        )

    @cached_property
    def said(self) -> tuple[Said, ...]:
        """The answers, in the order of the records."""
        return tuple(
            Said(record["id"], record["text"], record.get("truncated", False), record.get("margin"))
            for record in self.records
            if record.get("status") == "ok"
        )

    @cached_property
    def failed(self) -> dict[str, str]:
        """Item id -> error of the questions without an answer."""
        return run_records.failed(self.records)

    @cached_property
    def tally(self) -> Tally:
        """The answers as sums per image.

        Raises:
            DataError: what `Scorer.tally` raises.
        """
        return self.scorer.tally(self.items, self.said, self.failed)

    @cached_property
    def score(self) -> dict[str, Any]:
        """All numbers, as `Scorer.numbers` gives them."""
        return self.scorer.numbers(self.tally, self.items, self.failed)

    @cached_property
    def cost(self) -> dict[str, Any]:
        """What `vlmattn.eval.summary.cost_of` finds in the records, and `peak_memory_bytes` on a GPU."""
        found = summary.cost_of(self.records)
        return found if self.peak_memory_bytes is None else {**found, "peak_memory_bytes": self.peak_memory_bytes}

    def only(self, ids: Collection[str]) -> Run:
        """The same run with these questions only, in the order of its records.

        Raises:
            DataError: an id is not in the run.
        """
        wanted = set(ids)
        if strange := sorted(wanted - {record["id"] for record in self.records}):
            raise DataError(f"{self.folder or self.label} has no record of {len(strange)} questions: {some(strange)}")
        return replace(self, records=[record for record in self.records if record["id"] in wanted])


def find(path: str | Path) -> list[tuple[Path, str | None]]:
    """The run folders that a path stands for, each with its label in the sweep.

    Args:
        path: a run folder, or the folder of a sweep.

    Returns:
        The folder itself, or those of the sweep in the order of its `summary.json` (rows that are no folders are left
        out); without a `summary.json`, the folders inside with a `run.json`, by name, "none" first. A label is None
        where the sweep gives none.

    Raises:
        DataError: there is no such folder, or no run in it.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; give a run folder or the folder of a sweep, as vlmattn eval wrote it")
    if (path / run_records.RUN).exists():
        return [(path, None)]
    inside = {run.parent.name: run.parent for run in sorted(path.glob(f"*/{run_records.RUN}"))}
    if not inside:
        raise DataError(f"{path} has no {run_records.RUN}, nor has a folder in it: it is not a run, and not a sweep")
    rows = [(name, row.get("label")) for row in _rows(path) if (name := Path(row.get("folder") or "").name) in inside]
    names = rows or [(name, None) for name in sorted(inside, key=lambda name: (name != "none", name))]
    return [(inside[name], label) for name, label in dict.fromkeys(names)]


def _rows(sweep: Path) -> list[dict[str, Any]]:
    """The rows of a sweep's summary; none where there is no readable one."""
    try:
        value = json.loads((sweep / summary.SUMMARY).read_text(encoding="utf-8"))
        return [row for row in value["runs"] if isinstance(row, dict)]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{sweep / summary.SUMMARY} was not written by vlmattn eval ({error!r}); delete it, and the runs beside it "
            "are taken by name"
        ) from None


def check_records(folder: str | Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Whether records have what scoring and cost need.

    Raises:
        DataError: one does not; the record and what it lacks are named.
    """
    for record in records:
        kinds: dict[str, type] = dict.fromkeys(("image", "group", "question", "label"), str)
        if (status := record.get("status")) == "ok":
            kinds |= {"text": str, "cost": dict, "time": dict}
        elif status != "failed":
            raise _unusable(folder, record, f"status {status!r}, expected 'ok' or 'failed'")
        for name, kind in kinds.items():
            if not isinstance(record.get(name), kind):
                what = "a text" if kind is str else "an object"
                raise _unusable(folder, record, f"{name} {record[name]!r}, expected {what}" if name in record else name)


def _unusable(folder: str | Path, record: Mapping[str, Any], what: str) -> DataError:
    lack = "has" if ", expected" in what else "lacks"
    return DataError(
        f"{Path(folder) / run_records.RECORDS}: record {record['id']!r} {lack} {what}; the file was changed or is of "
        "another version: delete the folder and run again"
    )
