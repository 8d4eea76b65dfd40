"""The run folder: SIGKILL at any moment loses nothing and doubles nothing; a folder of another run is refused."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlmattn.errors import DataError
from vlmattn.eval import records as run_records
from vlmattn.eval.records import RunFolder, read_records, read_run

IDENTITY = {
    "spec": "none",
    "model": {"name": "m", "fingerprint": "f"},
    "data": {"sha256": "d"},
    "decode": {"max_new_tokens": 8},
}

WRITER = """
import sys
import time
from vlmattn.eval.records import RunFolder
assert "torch" not in sys.modules, "the records writer must not import torch"
folder, total = sys.argv[1], int(sys.argv[2])
with RunFolder(folder, {"spec": "none"}) as run:
    todo = [n for n in range(total) if f"q/{n}" not in run.ids]
    print("start", flush=True)
    for start in range(0, len(todo), 3):
        batch = todo[start:start + 3]
        run.append([{"id": f"q/{n}", "status": "ok", "text": "x" * (n % 70)} for n in batch])
        print(*batch, flush=True)
        time.sleep(0.0005)
"""


def record(number: int, **more: object) -> dict:
    return {"id": f"q/{number}", "status": "ok", "text": f"answer {number} \u2028 \u00e4", **more}


def test_writer_killed_fifty_times_loses_and_doubles_nothing(tmp_path: Path) -> None:
    folder, total, acknowledged = tmp_path / "run", 20_000, set()
    script, draw = tmp_path / "writer.py", random.Random(5)
    script.write_text(WRITER)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    for _ in range(50):
        process = subprocess.Popen(
            [sys.executable, script, folder, str(total)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.readline()
        if first != b"start\n":
            raise AssertionError(process.stderr.read().decode())
        time.sleep(draw.uniform(0.0, 0.02))
        process.send_signal(signal.SIGKILL)
        lines = process.stdout.read().decode().split("\n")
        process.stderr.close()
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
        acknowledged |= {f"q/{number}" for line in lines[:-1] for number in line.split()}
        ids = [entry["id"] for entry in read_records(folder)]
        assert len(ids) == len(set(ids))
        assert acknowledged <= set(ids)
    count = len(ids)
    assert 50 < count < total, "the kills did not fall into the writing"
    with RunFolder(folder, {"spec": "none"}) as run:
        assert [entry["id"] for entry in run.records] == [f"q/{number}" for number in range(count)]


def test_any_torn_end_is_cut_and_written_again(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "whole", IDENTITY) as run:
        run.append([record(1), record(2)])
        run.append([record(3)])
    whole = (tmp_path / "whole" / run_records.RECORDS).read_bytes()
    for size in range(len(whole)):
        folder = tmp_path / "torn"
        folder.mkdir(exist_ok=True)
        run_records.write_json(folder / run_records.RUN, {"identity": IDENTITY})
        (folder / run_records.RECORDS).write_bytes(whole[:size])
        before = read_records(folder)
        with RunFolder(folder, IDENTITY) as run:
            assert run.records == before
            run.append([record(number) for number in (1, 2, 3) if f"q/{number}" not in run.ids])
        assert (folder / run_records.RECORDS).read_bytes() == whole


def test_a_last_line_of_garbage_is_cut_but_garbage_in_the_middle_is_an_error(tmp_path: Path) -> None:
    with RunFolder(tmp_path, IDENTITY) as run:
        run.append([record(1)])
    path = tmp_path / run_records.RECORDS
    good = path.read_bytes()
    path.write_bytes(good + b"\0\0\0\n")
    with RunFolder(tmp_path, IDENTITY) as run:
        assert run.ids == {"q/1"}
    assert path.read_bytes() == good
    path.write_bytes(b"{}\n" + good)
    with pytest.raises(DataError, match=r"records\.jsonl, line 1"):
        RunFolder(tmp_path, IDENTITY)
    path.write_bytes(good + good)
    with pytest.raises(DataError, match="line 2: id 'q/1' occurs twice"):
        read_records(tmp_path)


def test_an_id_is_written_once(tmp_path: Path) -> None:
    with RunFolder(tmp_path, IDENTITY) as run:
        run.append([record(1)])
        for batch in ([record(1)], [record(2), record(2)], [{"text": "no id"}], [{"id": 3}]):
            with pytest.raises(DataError):
                run.append(batch)
        assert run.ids == {"q/1"}
    assert read_records(tmp_path) == [record(1)]


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with RunFolder(tmp_path, IDENTITY), pytest.raises(DataError, match="another process"):
        RunFolder(tmp_path, IDENTITY)
    RunFolder(tmp_path, IDENTITY).close()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"spec": "fastv"}, "spec"),
        ({"model": {"name": "other", "fingerprint": "f"}}, "model.name"),
        ({"data": {"sha256": "e"}}, "data.sha256"),
        ({"decode": {"max_new_tokens": 9}}, "decode.max_new_tokens"),
        ({"prompt": "llava"}, "prompt"),
    ],
)
def test_another_run_is_refused_by_the_field_that_differs(tmp_path: Path, change: dict, name: str) -> None:
    RunFolder(tmp_path, IDENTITY).close()
    with pytest.raises(
        DataError, match=rf"holds another run: {re.escape(name)} .*was .*, now it is .* Choose another --out"
    ):
        RunFolder(tmp_path, IDENTITY | change)
    with RunFolder(tmp_path, IDENTITY) as run:
        assert run.records == []


def test_all_that_differs_is_named_with_its_option(tmp_path: Path) -> None:
    RunFolder(tmp_path, IDENTITY).close()
    changed = IDENTITY | {"model": {"name": "other", "fingerprint": "f"}, "decode": {"max_new_tokens": 9}}
    told = (
        'holds another run: model.name (--model) was "m", now it is "other"; '
        "decode.max_new_tokens (--max-new-tokens) was 8, now it is 9. Choose another --out"
    )
    for refuses in (RunFolder, run_records.check_folder):
        with pytest.raises(DataError, match=re.escape(told)):
            refuses(tmp_path, changed)


def test_a_folder_is_checked_without_being_made(tmp_path: Path) -> None:
    run_records.check_folder(tmp_path / "a" / "b", IDENTITY)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(DataError, match=r"file is a file; choose another --out"):
            run_records.check_folder(path, IDENTITY)
        with pytest.raises(DataError, match=r"is not a run folder"):
            read_records(path)
        with pytest.raises(DataError, match=r"is not a run folder"):
            read_run(path)


def test_info_can_be_changed_and_the_rest_stays(tmp_path: Path) -> None:
    with RunFolder(tmp_path, IDENTITY, {"command": "first", "profile": "official"}) as run:
        before = read_run(tmp_path)
        run.update_info({"profile": "lmms_eval", "words": {"path": "w"}})
        after = read_run(tmp_path)
        assert after["info"] == {"command": "first", "profile": "lmms_eval", "words": {"path": "w"}}
        assert after | {"info": 0} == before | {"info": 0}
        inode = (tmp_path / run_records.RUN).stat().st_ino
        run.update_info({"profile": "lmms_eval"})
        assert (tmp_path / run_records.RUN).stat().st_ino == inode, "nothing changed, nothing is written"


def test_records_are_put_into_the_order_of_the_questions(tmp_path: Path) -> None:
    with RunFolder(tmp_path, IDENTITY) as run:
        run.append([record(3), record(1), record(9), record(2)])
        run.sort(["q/1", "q/2", "q/3"])
        assert run.records == read_records(tmp_path) == [record(number) for number in (1, 2, 3, 9)]
        run.append([record(4)])
        with pytest.raises(DataError, match="another process"):
            RunFolder(tmp_path, IDENTITY)
    assert [entry["id"] for entry in read_records(tmp_path)] == ["q/1", "q/2", "q/3", "q/9", "q/4"]


@pytest.mark.parametrize(("text", "words"), [("[1]", r"holds \[1\], expected a JSON object"), ("{", "is not JSON")])
def test_a_cost_that_is_no_object_is_said(tmp_path: Path, text: str, words: str) -> None:
    assert run_records.read_cost(tmp_path) is None
    (tmp_path / run_records.COST).write_text(text)
    with pytest.raises(DataError, match=rf"cost\.json {words}.*; delete it and run again"):
        run_records.read_cost(tmp_path)


def test_records_without_a_run_and_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / run_records.RECORDS).write_text('{"id": "q/1"}\n')
    with pytest.raises(DataError, match=r"no run\.json"):
        RunFolder(tmp_path, IDENTITY)
    (tmp_path / run_records.RUN).write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        RunFolder(tmp_path, IDENTITY)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="choose another --out"):
        RunFolder(tmp_path / "file", IDENTITY)
    with pytest.raises(DataError, match="not a run folder"):
        read_run(tmp_path / "nothing")


def test_a_full_disk_takes_the_batch_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder(tmp_path, IDENTITY) as run:
        run.append([record(1)])
        write = os.write

        def full(file: int, data: bytes) -> int:
            if len(data) > 10:
                return write(file, bytes(data[:10]))
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(run_records.os, "write", full)
        with pytest.raises(OSError, match="No space"):
            run.append([record(2), record(3)])
        monkeypatch.undo()
        run.append([record(2)])
    assert [entry["id"] for entry in read_records(tmp_path)] == ["q/1", "q/2"]


def test_half_an_emoji_survives(tmp_path: Path) -> None:
    with RunFolder(tmp_path, IDENTITY) as run:
        run.append([{"id": "q/1", "status": "ok", "text": "\ud83d"}])
    assert read_records(tmp_path)[0]["text"] == "\ud83d"


def test_failed_records_can_be_forgotten_and_tried_again(tmp_path: Path) -> None:
    with RunFolder(tmp_path, IDENTITY) as run:
        run.append([record(1), {"id": "q/2", "status": "failed", "error": "broken"}, record(3)])
        assert run.forget_failed() == 1
        run.append([record(2)])
        with pytest.raises(DataError, match="another process"):
            RunFolder(tmp_path, IDENTITY)
    assert [entry["id"] for entry in read_records(tmp_path)] == ["q/1", "q/3", "q/2"]
    assert run_records.failed(read_records(tmp_path)) == {}


def test_run_and_cost_are_json_and_info_is_kept_from_the_first_start(tmp_path: Path) -> None:
    with RunFolder(tmp_path, IDENTITY, {"command": "first"}) as run:
        run.write_cost({"prefill_ms": 1.5})
    RunFolder(tmp_path, IDENTITY, {"command": "second"}).close()
    assert read_run(tmp_path)["info"] == {"command": "first"}
    assert json.loads((tmp_path / run_records.COST).read_text()) == {"prefill_ms": 1.5}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cost.json", "records.jsonl", "run.json"]
