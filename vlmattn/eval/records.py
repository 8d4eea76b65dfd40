"""A run is a folder: what was run (`run.json`), what the model said (`records.jsonl`), what it cost (`cost.json`).

The promise: a record whose `append` returned survives SIGKILL and power loss, and no id is ever there twice. It is
kept by one write and one fsync per batch, a torn last line that is cut off on resume, a lock against a second writer,
and atomic replacement of the two JSON files. Imports only the standard library and `vlmattn.errors`.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from vlmattn.errors import DataError

try:
    import fcntl
except ImportError:  # Windows has no flock; there two writers are not kept apart
    fcntl = None  # type: ignore[assignment]

RUN, RECORDS, COST = "run.json", "records.jsonl", "cost.json"
OPTIONS = {
    "bench": "--bench",
    "data.sha256": "--data, --tasks or --scenes",
    "data.world": "--world or --model",
    "data.limit": "--limit",
    "prompt": "--prompt",
    "model.name": "--model",
    "model.dtype": "--dtype",
    "device": "--device",
    "sink_dims": "--preset",
    "decode.max_new_tokens": "--max-new-tokens",
    "decode.batch_size": "--batch-size",
}
"""Part of a run's identity -> the option that decides it."""


def write_text(path: Path, text: str) -> None:
    """Write text so that a reader sees the old file or the new one, never a half (temporary file, fsync, rename)."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # readable as the umask says
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, as `write_text` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_records(folder: str | Path) -> list[dict[str, Any]]:
    """Complete records of a run folder, in the order written; a torn last line is left out.

    Raises:
        DataError: a line other than the last is not a JSON object with an `id`, or an id occurs twice.
    """
    return _parse(Path(folder) / RECORDS)[0]


def read_run(folder: str | Path) -> dict[str, Any]:
    """The `run.json` of a run folder.

    Raises:
        DataError: the file is missing or not JSON.
    """
    path = Path(folder) / RUN
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder} is not a run folder: it has no {RUN}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error})") from None
    if not isinstance(run, dict) or not isinstance(run.get("identity"), dict):
        raise DataError(f"{path} has no `identity`: it was not written by vlmattn eval")
    return run


def read_cost(folder: str | Path) -> dict[str, Any] | None:
    """The `cost.json` of a run folder, which is written when its last question is answered; None before.

    Raises:
        DataError: the file is not a JSON object.
    """
    path = Path(folder) / COST
    try:
        cost = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); delete it and run again") from None
    if not isinstance(cost, dict):
        raise DataError(f"{path} holds {_short(cost)}, expected a JSON object; delete it and run again")
    return cost


def check_folder(path: str | Path, identity: Mapping[str, Any]) -> None:
    """Ask whether `RunFolder` would take a folder, without making or changing anything.

    Args:
        path: the folder; it may be absent.
        identity: of the run that would be written into it.

    Raises:
        DataError: the folder cannot be made because a file is in its way, or it holds another run.
    """
    path = Path(path)
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir():
        raise DataError(f"cannot make the run folder {path}: {there} is a file; choose another --out")
    _check_identity(path, json.loads(json.dumps(identity)))


class RunFolder:
    """Writer of one run; opening an existing folder goes on where it stopped.

    Args:
        path: the folder; made if absent.
        identity: what makes two runs the same run (spec, model, data hash, prompt, decode, ...), JSON-able.
        info: what is worth knowing but may change on resume (versions, command); kept from the first start, but for
            what `update_info` changes.

    Raises:
        DataError: the folder holds a run with another identity, records without a `run.json`, a corrupt record, or is
            being written by another process.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, Any], info: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.identity = json.loads(json.dumps(identity))
        self._file = -1
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot make the run folder {self.path}: {error.strerror}; choose another --out") from None
        _check_identity(self.path, self.identity)
        # Lock first, then write run.json: of two processes that start together only one makes the folder its own.
        self._file = os.open(self.path / RECORDS, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock()
            _check_identity(self.path, self.identity)
            run = self.path / RUN
            if not run.exists():
                write_json(run, {"format": 1, "identity": self.identity, "info": dict(info or {})})
            records, self._end = _parse(self.path / RECORDS)
            os.ftruncate(self._file, self._end)
            os.fsync(self._file)
        except BaseException:
            self.close()
            raise
        self.records: list[dict[str, Any]] = records
        self._ids = {record["id"] for record in records}

    @property
    def ids(self) -> frozenset[str]:
        """Ids that are safely on the disk."""
        return frozenset(self._ids)

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add records; when it returns they are on the disk.

        Raises:
            DataError: a record has no `id`, or its id is already there; nothing is written then.
            OSError: the disk refused; what was written of this batch is taken back.
        """
        new: set[str] = set()
        for record in records:
            key = record.get("id")
            if not isinstance(key, str) or not key:
                raise DataError(f"a record needs a non-empty string `id`, got {key!r}")
            if key in self._ids or key in new:
                raise DataError(f"record {key!r} is already in {self.path / RECORDS}: every id is written once")
            new.add(key)
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        data = _encode(lines)
        try:
            _write_all(self._file, data, self._end)
            os.fsync(self._file)
        except BaseException:
            os.ftruncate(self._file, self._end)
            raise
        self._end += len(data)
        self._ids |= new
        self.records.extend(json.loads(line) for line in lines)

    def forget_failed(self) -> int:
        """Take failed records out, so that they are tried again; returns how many."""
        keep = [record for record in self.records if record.get("status") != "failed"]
        gone = len(self.records) - len(keep)
        if gone:
            self._replace_records(_encode([json.dumps(record, ensure_ascii=False) for record in keep]))
            self.records = keep
            self._ids = {record["id"] for record in keep}
        return gone

    def sort(self, ids: Sequence[str]) -> None:
        """Put the records into the order of their questions, so that a run that was mended is the file it would have
        been; nothing is written where they are in order. Records of other questions go last.

        Args:
            ids: of the questions, in the order asked.
        """
        place = {key: number for number, key in enumerate(ids)}
        ordered = sorted(self.records, key=lambda record: place.get(record["id"], len(place)))
        if ordered != self.records:
            self._replace_records(_encode([json.dumps(record, ensure_ascii=False) for record in ordered]))
            self.records = ordered

    def update_info(self, changes: Mapping[str, Any]) -> None:
        """Change entries of `info` in `run.json`, atomically; nothing is written where they are as wanted.

        Args:
            changes: name -> new value, JSON-able; the other entries and the identity stay.
        """
        run = read_run(self.path)
        info = run.get("info", {}) | json.loads(json.dumps(changes))
        if info != run.get("info"):
            write_json(self.path / RUN, run | {"info": info})

    def write_cost(self, cost: Mapping[str, Any]) -> None:
        """Write `cost.json` atomically."""
        write_json(self.path / COST, cost)

    def close(self) -> None:
        """Let go of the file and of the lock; safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(
                f"{self.path} is being written by another process; wait for it or choose another --out"
            ) from None

    def _replace_records(self, data: bytes) -> None:
        temporary = self.path / f".{RECORDS}.new"
        file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            _write_all(file, data, 0)
            os.fsync(file)
            os.replace(temporary, self.path / RECORDS)
            _sync_folder(self.path)
        except BaseException:
            os.close(file)
            raise
        os.close(self._file)
        self._file, self._end = file, len(data)
        self._lock()


def _check_identity(path: Path, identity: Mapping[str, Any]) -> None:
    if not (path / RUN).exists():
        records = path / RECORDS
        if records.exists() and records.stat().st_size:
            raise DataError(
                f"{path} has {RECORDS} but no {RUN}: it cannot be told what made them; choose another --out"
            )
        return
    found, wanted = _flat(read_run(path)["identity"]), _flat(identity)
    names = [*wanted, *(name for name in found if name not in wanted)]
    different = [
        f"{name}{f' ({OPTIONS[name]})' if name in OPTIONS else ''} was {_short(found.get(name))}, "
        f"now it is {_short(wanted.get(name))}"
        for name in names
        if found.get(name) != wanted.get(name)
    ]
    if different:
        raise DataError(
            f"{path} holds another run: {'; '.join(different)}. Choose another --out, go back to the former "
            "value, or delete the folder"
        )


def _encode(lines: Iterable[str]) -> bytes:
    # A model can say a lone surrogate (half an emoji): json reads it back with the same error handler.
    return "".join(line + "\n" for line in lines).encode("utf-8", "surrogatepass")


def _write_all(file: int, data: bytes, position: int) -> None:
    os.lseek(file, position, os.SEEK_SET)
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def _parse(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Complete records of a file and the byte at which they end."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path} does not exist: {path.parent} is not a run folder") from None
    records: list[dict[str, Any]] = []
    seen: set[str] = set()
    end = 0
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        record = _record(line)
        if record is None:
            if number == len(lines) - 1 and not lines[-1]:
                break  # the last line of a write that a power loss left unfinished
            raise DataError(
                f"{path}, line {number}: not a JSON object with a string `id`; the file was changed by hand"
            )
        if record["id"] in seen:
            raise DataError(f"{path}, line {number}: id {record['id']!r} occurs twice; the file was changed by hand")
        seen.add(record["id"])
        records.append(record)
        end += len(line) + 1
    return records, end


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("id"), str) else None


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            flat.update(_flat(entry, f"{prefix}{key}."))
        else:
            flat[prefix + key] = entry
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _sync_folder(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open a folder
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def texts(records: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(id, raw text) of the records that were answered."""
    return [(record["id"], record["text"]) for record in records if record.get("status") == "ok"]


def failed(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """id -> error of the records that failed."""
    return {record["id"]: record.get("error", "") for record in records if record.get("status") == "failed"}


def pack_tokens(kept: Iterable[int], count: int) -> str:
    """Which of an image's `count` visual tokens stayed, as base64 of one bit a token, the lowest bit of a byte first.

    `numpy.unpackbits(numpy.frombuffer(base64.b64decode(mask), numpy.uint8), bitorder="little")` reads it too.
    """
    bits = bytearray((count + 7) // 8)
    for token in kept:
        bits[token >> 3] |= 1 << (token & 7)
    return base64.b64encode(bits).decode("ascii")


def kept_tokens(stage: Mapping[str, Any]) -> list[int]:
    """Visual tokens (indices within the image, raster order) that a pruning stage of a record kept.

    Args:
        stage: an entry of a record's `kept`: `method`, `before_layer` and `mask`.
    """
    bits = base64.b64decode(stage["mask"])
    return [8 * byte + bit for byte, value in enumerate(bits) for bit in range(8) if value >> bit & 1]
