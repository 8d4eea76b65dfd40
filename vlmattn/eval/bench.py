"""Benchmarks by name: "pope" on the embedded scenes or on the original files, "scenes" for positions and digits."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmattn.errors import DataError, nearest
from vlmattn.eval import stats
from vlmattn.eval.benchmarks import pope, scenes
from vlmattn.eval.items import Benchmark, Item

if TYPE_CHECKING:
    from PIL.Image import Image

NAMES = ("pope", "scenes")
SCENES = 200
ScoredTexts = Iterable[tuple[str, str]]
Interval = tuple[float, float] | None


def load(
    name: str,
    *,
    embedded: bool,
    data: str | Path | None = None,
    images: str | Path | None = None,
    profile: str = "official",
    prompt: str | None = None,
    scenes_count: int = SCENES,
) -> Benchmark:
    """Make a benchmark ready to run.

    Args:
        name: one of `NAMES`.
        embedded: whether the model is the embedded one; then `pope` without `data` asks about rendered scenes.
        data: folder with the three POPE files.
        images: folder with the images the files name; default: `images` or `val2014` in `data`, or `data` itself.
        profile: parser profile of POPE.
        prompt: prompt template; default `bare` for embedded models and rendered scenes, else `single_word`.
        scenes_count: how many scenes are rendered.

    Raises:
        DataError: an unknown name, profile or template, data missing or malformed.
    """
    if name not in NAMES:
        raise DataError(f"benchmark {name!r} is unknown; {nearest(name, NAMES)}")
    pope.parse("", profile)
    template = prompt or ("bare" if embedded or data is None else "single_word")
    pope.prompt("", template)
    if name == "scenes":
        if data is not None:
            raise DataError("--bench scenes renders its own images; leave --data out, or say --bench pope")
        return rendered("scenes", scenes.TASKS, count=scenes_count, prompt=template)
    if data is not None:
        return original(data, images, profile=profile, prompt=template)
    if not embedded:
        raise DataError(
            "POPE for a downloaded model needs its questions and images: fetch "
            "coco_pope_random.json, coco_pope_popular.json and "
            f"coco_pope_adversarial.json from {pope.URL} into one folder, unpack "
            f"{pope.IMAGES_URL} (6 GB) beside them, and say "
            "--data FOLDER --images FOLDER/val2014. Without a download: --model "
            f"{_embedded_name()}, whose questions and images are rendered."
        )
    tasks = tuple(f"exist-{category}" for category in pope.CATEGORIES)
    return rendered("pope", tasks, count=scenes_count, prompt=template, profile=profile)


def original(folder: str | Path, images: str | Path | None, *, profile: str, prompt: str) -> Benchmark:
    """POPE from its three JSON-lines files (the original COCO set, RePOPE, or an export of the scenes)."""
    items, hashes = pope.load(folder)
    where = _image_folder(Path(folder), Path(images) if images is not None else None, items)
    digest = hashlib.sha256("".join(sorted(hashes.values())).encode()).hexdigest()
    return Benchmark(
        name="pope",
        items=items,
        open_image=functools.partial(_open_image, where),
        score=functools.partial(pope.score, profile=profile),
        intervals=functools.partial(_pope_intervals, profile=profile),
        sha256=digest,
        source=f"{folder}: {pope.version(hashes)}",
        prompt=prompt,
        profile=profile,
        files=hashes,
    )


def rendered(
    name: str, tasks: Sequence[str], *, count: int, prompt: str = "bare", profile: str = "official", split: str = "test"
) -> Benchmark:
    """Questions about rendered scenes: `pope` for the existence tasks, `scenes` for the others."""
    from vlmattn.scenes import benchmark

    data = benchmark(split=split, tasks=tuple(tasks), images=count)
    items = tuple(_scene_item(row) for row in data.rows)
    is_pope = name == "pope"
    return Benchmark(
        name=name,
        items=items,
        open_image=data.image,
        score=functools.partial(pope.score, profile=profile) if is_pope else scenes.score,
        intervals=functools.partial(_pope_intervals, profile=profile) if is_pope else _scenes_intervals,
        sha256=data.sha256,
        source=f"rendered scenes, split {split}, {count} images",
        prompt=prompt,
        profile=profile if is_pope else "exact",
    )


def _embedded_name() -> str:
    from vlmattn.scenes import names

    return next(iter(names()), "(none in this installation)")


def _scene_item(row: dict[str, Any]) -> Item:
    group = row["task"].removeprefix("exist-")
    return Item(f"{group}/{row['question_id']}", row["image"], row["text"], row["label"], group)


def _image_folder(data: Path, images: Path | None, items: Sequence[Item]) -> Path:
    names = list(dict.fromkeys(item.image for item in items))
    folders = [images] if images is not None else [data / "images", data / "val2014", data]
    best = max(folders, key=lambda folder: sum((folder / name).is_file() for name in names))
    there = sum((best / name).is_file() for name in names)
    if not there:
        looked = ", ".join(str(folder) for folder in folders)
        raise DataError(
            f"none of the {len(names)} images is in {looked} (the first one wanted "
            f"is {names[0]}); say where they are with "
            f"--images FOLDER; the COCO images are {pope.IMAGES_URL}"
        )
    return best


def _open_image(folder: Path, name: str) -> Image:
    from PIL import Image

    with Image.open(os.path.join(folder, name)) as image:
        return image.convert("RGB")


def _pope_intervals(
    items: Sequence[Item],
    answers: ScoredTexts,
    failed: Collection[str] = (),
    *,
    profile: str = "official",
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    by_image = pope.counts_by_image(items, answers, failed, profile=profile)
    groups = list(dict.fromkeys(item.group for item in items))
    none = pope.Counts()
    rows = [[image.get(group, none) for group in groups] for image in by_image.values()]
    if not rows:
        return {"mean_accuracy": None, "mean_f1": None}
    right = np.array([[(c.tp + c.tn, c.total) for c in row] for row in rows], dtype=float).reshape(len(rows), -1)
    f1 = np.array([[(c.tp, c.fp, c.fn) for c in row] for row in rows], dtype=float).reshape(len(rows), -1)
    interval = functools.partial(stats.bootstrap_interval, n_resamples=n_resamples, seed=seed)
    result: dict[str, Interval] = {
        "mean_accuracy": interval(right, stats.mean_share),
        "mean_f1": interval(f1, stats.mean_f1),
    }
    for number, group in enumerate(groups):
        result[f"{group}.accuracy"] = interval(right[:, 2 * number : 2 * number + 2], stats.mean_share)
        result[f"{group}.f1"] = interval(f1[:, 3 * number : 3 * number + 3], stats.mean_f1)
    return result


def _scenes_intervals(
    items: Sequence[Item],
    answers: ScoredTexts,
    failed: Collection[str] = (),
    *,
    n_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Interval]:
    by_image = scenes.counts_by_image(items, answers, failed)
    groups = list(dict.fromkeys(item.group for item in items))
    if not by_image:
        return {"mean_accuracy": None}
    rows = np.array([[image.get(group, (0, 0)) for group in groups] for image in by_image.values()], dtype=float)
    rows = rows.reshape(len(by_image), -1)
    interval = functools.partial(stats.bootstrap_interval, n_resamples=n_resamples, seed=seed)
    result: dict[str, Interval] = {"mean_accuracy": interval(rows, stats.mean_share)}
    for number, group in enumerate(groups):
        result[f"{group}.accuracy"] = interval(rows[:, 2 * number : 2 * number + 2], stats.mean_share)
    return result
