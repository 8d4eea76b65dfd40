"""Per-checkpoint data: which hidden dimensions carry sinks, which heads a method is for. Each entry names its source;
nothing is guessed.

An entry is a JSON object with `names` (last parts of hub ids or folders), `hidden_size`, `num_layers`, `sink_dims`
(empty: the checkpoint has no visual sinks) and `source`. Besides the packaged file, folders and files can be added by
`add`. In `heads.json` it has `method` and `heads`, pairs of layer and query head, in place of `sink_dims`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlmattn.errors import DataError, SpecError

FIELDS = {"names": list, "hidden_size": int, "num_layers": int, "sink_dims": list, "source": str}
HEAD_FIELDS = {"method": str, "names": list, "hidden_size": int, "num_layers": int, "heads": list, "source": str}

_added: list[dict[str, Any]] = []


@functools.cache
def _packaged() -> tuple[dict[str, Any], ...]:
    return tuple(read(Path(__file__).with_name("sinks.json")))


@functools.cache
def _packaged_heads() -> tuple[dict[str, Any], ...]:
    return tuple(read(Path(__file__).with_name("heads.json"), HEAD_FIELDS))


def read(path: Path, fields: Mapping[str, type] = FIELDS) -> list[dict[str, Any]]:
    """The entries of a preset file, each with these fields.

    Raises:
        DataError: not JSON, or an entry lacks a field or has one of the wrong type.
    """
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error
    entries = entries if isinstance(entries, list) else [entries]
    for number, entry in enumerate(entries):
        for field, kind in fields.items():
            if not isinstance(entry.get(field), kind):
                raise DataError(f"{path}: entry {number}: {field} must be of type {kind.__name__}")
    return entries


def add(path: Path) -> None:
    """Use the entries of a file, such as one that `vlmattn discover` wrote, before the packaged ones."""
    _added[:0] = read(path)


def find(config: Any) -> dict[str, Any] | None:
    """The entry for a model with this config, or None.

    It must match in the last part of its name and in width and depth.
    """
    return _matching((*_added, *_packaged()), config)


def _matching(entries: Iterable[dict[str, Any]], config: Any) -> dict[str, Any] | None:
    text = config.get_text_config()
    name = Path(str(getattr(config, "_name_or_path", "") or "")).name.lower()
    for entry in entries:
        size = (entry["hidden_size"], entry["num_layers"])
        if name in entry["names"] and size == (text.hidden_size, text.num_hidden_layers):
            return entry
    return None


def head_list(config: Any, method: str) -> tuple[tuple[int, int], ...]:
    """The heads that a method is for in a checkpoint, pairs of layer and query head.

    Raises:
        SpecError: none are known.
    """
    entry = _matching([entry for entry in _packaged_heads() if entry["method"] == method], config)
    if entry is None:
        name = Path(getattr(config, "_name_or_path", "") or "this model").name
        raise SpecError(
            f"no heads of {name!r} are known for {method}, and those of one checkpoint mean nothing in another: give "
            f"them as {method}(heads=[(layer, head), ...])"
        )
    return tuple((layer, head) for layer, head in entry["heads"])


def sink_dims(config: Any) -> tuple[int, ...]:
    """Hidden dimensions of a checkpoint's sinks; empty if it is known to have none.

    Raises:
        SpecError: nothing is known about this checkpoint.
    """
    entry = find(config)
    if entry is None:
        name = getattr(config, "_name_or_path", "") or "this model"
        raise SpecError(
            f"no sink dimensions are known for {name!r}: run `vlmattn discover --model {name}` to find them, "
            "or give them as var(sinks=[...])"
        )
    return tuple(entry["sink_dims"])
