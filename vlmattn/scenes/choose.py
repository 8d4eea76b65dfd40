"""Choose among finished training runs: ``python -m vlmattn.scenes.choose RUN [RUN ...]``.

Everything is measured on the split ``val``, so that ``test`` stays unseen. First each run's share of the last stage is
chosen: the model to ship is before + share * (after - before), with the smallest share that hallucinates enough, by a
margin, and still says no to random absent objects. Then the runs are ranked at their shares, by how far they fall short
of the floors of their version (mean over the floors of min(0, value - floor)), ties by mean accuracy. What was found is
written into each run's folder, where ``python -m vlmattn.scenes.export`` looks for the share.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from vlmattn.errors import DataError, VlmattnError

from .export import export, run_settings
from .library import load_processor
from .measure import CAPTION, FLOORS, measure
from .runs import weights
from .train import CHOICE
from .versions import Version

SPLIT = "val"
SHARES = tuple(step / 10 for step in range(11))
MARGINS = {"false yes, adversarial minus random": 0.02, "caption CHAIR_s": 0.03, "existence no, random": 0.0}
"""By how much each floor that the share decides must be exceeded: the first two are about hallucinating enough, with
at least two standard errors at 1,000 questions, the last is about not hallucinating at random."""
GROWING = ("false yes, adversarial minus random", "caption CHAIR_s")
"""Those of them that grow with the share."""
HABIT_TASKS = (("exist-random", "exist-adversarial"), (CAPTION,))
"""What the floors in MARGINS need; captions take longest and are left out where existence decides already."""


def measured(run: Path, share: float, questions: int, seed: int, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """Measures on the split ``val`` of a run as it would be shipped with a share of its last stage."""
    with TemporaryDirectory() as folder:
        export(run, Path(folder), share)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
        processor = load_processor(Path(folder))
        return measure(model, processor, questions, seed, _version(run), SPLIT, only)


def _version(run: Path) -> Version:
    """The version of a run; raises DataError if it has no floors."""
    version = run_settings(run).subject
    if version.name not in FLOORS:
        known = ", ".join(FLOORS)
        raise DataError(f"{run} is of version {version.name}, which has no floors to choose by; these have: {known}")
    return version


def slack(floors: Iterable[dict[str, Any]], margins: float = 1.0, names: Collection[str] = MARGINS.keys()) -> float:
    """The smallest excess over the floors of these names and ``margins`` times their margins."""
    decided = (floor for floor in floors if floor["name"] in names)
    return round(min(floor["value"] - floor["floor"] - margins * MARGINS[floor["name"]] for floor in decided), 4)


def _try(run: Path, share: float, questions: int, seed: int) -> dict[str, Any]:
    """What is measured for a share, and whether the model hallucinates enough with it."""
    floors: list[dict[str, Any]] = []
    for tasks in HABIT_TASKS:
        floors += measured(run, share, questions, seed, tasks)["floors"]
        enough = slack(floors, names=GROWING) >= 0
        if not enough:
            break
    distances = {"slack": slack(floors), "slack without margins": slack(floors, margins=0)}
    line = {"share": share, "enough": enough} | distances | {floor["name"]: floor["value"] for floor in floors}
    print(f"{run}: " + ", ".join(f"{name} {value}" for name, value in line.items()), flush=True)
    return line


def habit_share(run: Path, questions: int, seed: int) -> tuple[float, list[dict[str, Any]]]:
    """The share of the last stage to ship a run with, and what was measured for each share that was looked at.

    The smallest share that hallucinates enough is found by bisection, for the habit grows with the share. If it costs
    the floors at random, or no share is enough, it is the one that was tried and falls the least short of the floors
    themselves, and of those that meet them the one that comes closest to the margins.
    """
    tried: list[dict[str, Any]] = []
    first, last = 0, len(SHARES)
    while first < last:
        middle = (first + last) // 2
        tried.append(_try(run, SHARES[middle], questions, seed))
        first, last = (first, middle) if tried[-1]["enough"] else (middle + 1, last)
    tried.sort(key=lambda line: line["share"])
    good = [line for line in tried if line["enough"] and line["slack"] >= 0]
    if good:
        return good[0]["share"], tried
    return max(tried, key=lambda line: (min(0, line["slack without margins"]), line["slack"]))["share"], tried


def rating(result: dict[str, Any]) -> tuple[float, float]:
    """What runs are ranked by, larger is better: the mean shortfall over the floors, then the mean accuracy."""
    floors, tasks = result["floors"], result["tasks"].values()
    shortfall = sum(min(0.0, floor["value"] - floor["floor"]) for floor in floors) / len(floors)
    return round(shortfall, 6), round(sum(task["accuracy"] for task in tasks) / len(tasks), 6)


def choose(run: Path, questions: int, seed: int) -> dict[str, Any]:
    """Measure a run, write ``choice.json`` into its folder and return what it holds.

    Raises:
        DataError: the run is not finished, or its version has no floors.
    """
    share, tried = habit_share(run, questions, seed)
    result = measured(run, share, questions, seed)
    shortfall, accuracy = rating(result)
    found = {
        "habit_share": share,
        "good_share": any(line["share"] == share and line["enough"] and line["slack"] >= 0 for line in tried),
        "split": SPLIT,
        "questions": questions,
        "seed": seed,
        "shortfall": shortfall,
        "accuracy": accuracy,
        "floors": result["floors"],
        "tried": tried,
    }
    new = run / f"{CHOICE}.new"
    new.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(new, run / CHOICE)
    return found


def table(choices: dict[Path, dict[str, Any]]) -> str:
    """The runs side by side with their floors, best first, as text."""
    lines = []
    ranked = sorted(choices.items(), key=lambda item: (item[1]["shortfall"], item[1]["accuracy"]), reverse=True)
    for place, (run, found) in enumerate(ranked, 1):
        verdict = "the smallest good one" if found["good_share"] else "none is good, this one comes closest"
        lines.append(f"{place}. {run}: shortfall {found['shortfall']:.4f}, mean accuracy {found['accuracy']:.4f}")
        lines.append(f"     share of the last stage {found['habit_share']} ({verdict})")
        for floor in found["floors"]:
            met = "" if floor["met"] else "  missed"
            lines.append(f"     {floor['name']:58}  {floor['value']:.3f}  at least {floor['floor']:.2f}{met}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line of :func:`choose`."""
    parser = argparse.ArgumentParser(
        prog="python -m vlmattn.scenes.choose",
        description="Choose each run's share of the last stage, and rank the runs, all on the split val.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a finished vlmattn.scenes.train")
    parser.add_argument("--questions", type=int, default=1000, help="questions per task (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split val (default %(default)s)")
    options = parser.parse_args(arguments)
    try:
        for run in options.runs:
            _version(run)
            weights(run, 0.0)
        print(table({run: choose(run, options.questions, options.seed) for run in options.runs}))
    except VlmattnError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
