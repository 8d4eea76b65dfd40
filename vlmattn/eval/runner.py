"""Run a benchmark under several method specs: one resumable run folder a spec, batches fixed by the item list.

A batch that was interrupted is asked again as a whole and only its missing records are written, so that a killed and
resumed run says what an uninterrupted one says (in low precision, padding partners can change an answer).
"""

from __future__ import annotations

import hashlib
import platform
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlmattn.errors import DataError
from vlmattn.eval import summary
from vlmattn.eval.benchmarks import pope
from vlmattn.eval.items import Benchmark, Item
from vlmattn.eval.records import RunFolder

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmattn.eval.answer import Answers
    from vlmattn.eval.models import Loaded

Progress = Callable[[str, int, int], None]


class AsksModel(Protocol):
    """Whatever answers a batch; `vlmattn.eval.answer.Asker` with a real model."""

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> Answers:
        """Answer prompts[i] about images[i]."""
        ...


@dataclass(frozen=True)
class Settings:
    """How a sweep is run.

    Attributes:
        limit: items of each group, None for all.
        batch_size: questions asked at once.
        max_new_tokens: where an answer is cut.
        seed: of the bootstrap, and of torch before every run.
        retry_failed: ask failed records of a former run again.
        command: what the user typed, for the record.
    """

    limit: int | None = None
    batch_size: int = 16
    max_new_tokens: int = 16
    seed: int = 0
    retry_failed: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"--{name.replace('_', '-')} {value} must be 1 or more")


def slug(spec: str) -> str:
    """A folder name for a spec: "fastv(keep=0.5) + random" -> "fastv-keep=0.5+random"; long ones end in a hash."""
    name = re.sub(r"[^A-Za-z0-9.+=,_-]", "", spec.replace("(", "-").replace("[", "-")).strip("-.") or "run"
    if len(name) > 80:
        name = f"{name[:70]}-{hashlib.sha256(spec.encode()).hexdigest()[:8]}"
    return name


def split_specs(text: str) -> dict[str, str]:
    """The specs in "a; b; c" in order, each once: canonical text -> what was typed.

    Raises:
        SpecError: a spec cannot be read. DataError: there is none.
    """
    from vlmattn import spec

    found: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(";"))):
        found.setdefault(spec.text(spec.parse(part)), part)
    if not found:
        raise DataError(f'--methods {text!r} names no method; for instance --methods "none; fastv(keep=0.5)"')
    return found


def run_items(
    bench: Benchmark,
    items: Sequence[Item],
    ask: AsksModel,
    folder: RunFolder,
    batch_size: int,
    progress: Progress | None = None,
) -> None:
    """Answer the items that the folder does not have yet; questions about a broken image become failed records."""
    spec = str(folder.identity.get("spec", ""))
    done = sum(item.id in folder.ids for item in items)
    if progress:
        progress(spec, done, len(items))
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        if all(item.id in folder.ids for item in batch):
            continue
        records = _ask_batch(bench, batch, ask, start // batch_size)
        new = [record for record in records if record["id"] not in folder.ids]
        folder.append(new)
        done += len(new)
        if progress:
            progress(spec, done, len(items))


def sweep(
    loaded: Loaded,
    bench: Benchmark,
    specs: Mapping[str, str],
    out: str | Path,
    settings: Settings,
    progress: Progress | None = None,
) -> list[summary.Row]:
    """Run every spec into OUT/<slug> and write OUT/summary.json.

    Args:
        loaded: model and processor.
        bench: what is asked.
        specs: canonical spec text -> how the tables call it.
        out: the folder of the sweep.
        settings: how.
        progress: called with (spec, records done, records in all).

    Returns:
        One row per spec, scored, with intervals and cost.

    Raises:
        VlmattnError: a spec does not fit the model (asked for all specs before the first run), or a folder holds
        another run.
    """
    import torch

    from vlmattn import wrap
    from vlmattn.eval.answer import Asker

    check_specs(loaded, specs)
    items = bench.take(settings.limit)
    rows = []
    for spec, label in specs.items():
        torch.manual_seed(settings.seed)
        path = Path(out) / slug(spec)
        with RunFolder(path, identity(loaded, bench, spec, settings), info(loaded, bench, settings)) as folder:
            if settings.retry_failed:
                folder.forget_failed()
            with wrap(loaded.model, spec, processor=loaded.processor) as session:
                ask = Asker(loaded, session, settings.max_new_tokens)
                _warm_up(bench, items, ask, folder, settings.batch_size)
                _reset_peak(loaded.device)
                run_items(bench, items, ask, folder, settings.batch_size, progress)
            cost = summary.cost_of(folder.records)
            cost["peak_memory_bytes"] = _peak(loaded.device)
            folder.write_cost(cost)
            rows.append(summary.row(label, spec, str(path), bench, items, folder.records, cost, settings.seed))
    summary.write(
        Path(out), bench, rows, {"model": loaded.name, "settings": identity(loaded, bench, "", settings), **versions()}
    )
    return rows


def check_specs(loaded: Loaded, specs: Iterable[str]) -> None:
    """Install and remove every spec once, so that a mistake in the last one is told before hours of the first."""
    from vlmattn import wrap

    for spec in specs:
        wrap(loaded.model, spec, processor=loaded.processor).remove()


def identity(loaded: Loaded, bench: Benchmark, spec: str, settings: Settings) -> dict[str, Any]:
    """What must be the same for a run to be continued."""
    from vlmattn import presets

    preset = presets.find(loaded.model.config)
    return {
        "spec": spec,
        "sink_dims": None if preset is None else preset["sink_dims"],
        "model": {"name": loaded.name, "fingerprint": loaded.fingerprint, "dtype": loaded.dtype},
        "device": loaded.device.split(":")[0],
        "bench": bench.name,
        "data": {"sha256": bench.sha256, "limit": settings.limit},
        "prompt": bench.prompt,
        "decode": {
            "do_sample": False,
            "num_beams": 1,
            "max_new_tokens": settings.max_new_tokens,
            "batch_size": settings.batch_size,
        },
        # Records of two versions of a method or of a kernel must not stand in one file.
        "versions": {name: versions()["versions"][name] for name in ("vlmattn", "torch", "transformers")},
    }


def info(loaded: Loaded, bench: Benchmark, settings: Settings) -> dict[str, Any]:
    """What is worth knowing about a run besides its identity."""
    images = getattr(loaded.processor, "image_processor", None)
    names = ("size", "crop_size", "min_pixels", "max_pixels", "do_resize", "do_center_crop")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": settings.command,
        "seeds": {"torch": settings.seed, "bootstrap": settings.seed},
        "data": {"source": bench.source, "files": bench.files},
        "profile": bench.profile,
        "model_class": type(loaded.model).__name__,
        "image_size": {
            name: _plain(getattr(images, name)) for name in names if getattr(images, name, None) is not None
        },
        **versions(),
    }


def versions() -> dict[str, Any]:
    """Versions and machine, for result files."""
    import vlmattn

    found: dict[str, str] = {"vlmattn": str(vlmattn.__version__), "python": platform.python_version()}
    for name in ("torch", "transformers", "numpy", "pillow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return {"versions": found, "platform": f"{platform.system()} {platform.machine()}"}


def _ask_batch(bench: Benchmark, batch: Sequence[Item], ask: AsksModel, number: int) -> list[dict[str, Any]]:
    images: dict[str, Image | str] = {}
    for item in batch:
        if item.image not in images:
            images[item.image] = _open(bench, item.image)
    good = [item for item in batch if not isinstance(images[item.image], str)]
    prompts = [pope.prompt(item.question, bench.prompt) for item in good]
    told: dict[str, dict[str, Any]] = {}
    if good:
        answers = ask([images[item.image] for item in good], prompts)  # type: ignore[misc]
        times = {"batch": number, "questions": len(good), **answers.times}
        for item, prompt, text, cost in zip(good, prompts, answers.texts, answers.costs, strict=True):
            told[item.id] = {"prompt": prompt, "status": "ok", "text": text, "cost": cost, "time": times}
    records = []
    for item in batch:
        start = {
            "id": item.id,
            "image": item.image,
            "group": item.group,
            "question": item.question,
            "label": item.label,
        }
        records.append(start | told.get(item.id, {"status": "failed", "error": str(images[item.image])}))
    return records


def _open(bench: Benchmark, name: str) -> Image | str:
    """The image, or why it cannot be read (PIL raises SyntaxError for some broken files)."""
    try:
        return bench.open_image(name)
    except (OSError, ValueError, SyntaxError) as error:
        return f"{name}: {type(error).__name__}: {error}"


def _warm_up(bench: Benchmark, items: Sequence[Item], ask: AsksModel, folder: RunFolder, batch_size: int) -> None:
    """Pay for the first call of a shape before anything is timed; skipped when nothing is left to do."""
    if all(item.id in folder.ids for item in items):
        return
    opened = [(_open(bench, item.image), item) for item in items[:batch_size]]
    good = [(image, pope.prompt(item.question, bench.prompt)) for image, item in opened if not isinstance(image, str)]
    if good:
        ask([image for image, _ in good], [prompt for _, prompt in good])


def _reset_peak(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: str) -> int | None:
    import torch

    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None


def _plain(value: Any) -> Any:
    """A processor's setting as JSON: numbers as they are, size objects as the sides that are set."""
    if isinstance(value, bool | int | float):
        return value
    sides = value if isinstance(value, Mapping) else vars(value) if hasattr(value, "__dict__") else None
    return str(value) if sides is None else {name: side for name, side in sides.items() if side is not None}


def command_line() -> str:
    """What the user typed, as one line."""
    import shlex

    return shlex.join(["vlmattn", *sys.argv[1:]])
