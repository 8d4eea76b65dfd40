"""`vlmattn eval` killed with SIGKILL in each of its specs, then run to the end, equals a sweep left alone: records and
table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from vlmattn.eval.records import read_records

SPECS = ("none", "fastv-keep=0.25", "uniform-keep=0.25")
QUESTIONS = 3 * 16


def command(out: Path) -> list[str]:
    what = ["--bench", "scenes", "--tasks", "random,digits,caption", "--scenes", "40", "--limit", "16"]
    options = ["--methods", "fastv; uniform", "--keep", "0.25", "--batch-size", "4", "--out", str(out)]
    return [sys.executable, "-m", "vlmattn", "eval", *what, *options]


def lines(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.glob("*/records.jsonl"))


def kill_at(out: Path, count: int) -> None:
    """Start the command and kill it as soon as `count` records are on the disk."""
    process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    end = time.monotonic() + 120
    while lines(out) < count and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
    process.stderr.close()


def without_time(folder: Path) -> list[dict]:
    return [{**record, "time": None} for record in read_records(folder)]


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        own = {
            key: entry
            for key, entry in value.items()
            if "ms" not in key.split("_") and key not in ("folder", "command")
        }
        return {key: without_times(entry) for key, entry in own.items()}
    return [without_times(entry) for entry in value] if isinstance(value, list) else value


def test_eval_killed_three_times_equals_a_run_left_alone(tmp_path: Path) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), check=True, capture_output=True)
    assert lines(whole) == len(SPECS) * QUESTIONS
    seen: set[tuple[str, str]] = set()
    for count in (1, QUESTIONS + QUESTIONS // 2, 2 * QUESTIONS + 5):
        kill_at(killed, count)
        now = [
            (path.parent.name, record["id"])
            for path in killed.glob("*/records.jsonl")
            for record in read_records(path.parent)
        ]
        assert len(now) == len(set(now)) >= count
        assert seen <= set(now)
        seen = set(now)
    assert len(seen) < lines(whole), "the last kill came too late to prove anything"
    subprocess.run(command(killed), check=True, capture_output=True)
    for slug in SPECS:
        assert without_time(killed / slug) == without_time(whole / slug)
    tables = [without_times(json.loads((out / "summary.json").read_text())) for out in (whole, killed)]
    assert tables[0] == tables[1] and len(tables[0]["runs"]) == len(SPECS)
