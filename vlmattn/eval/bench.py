"""Benchmarks by name: "pope" on the original files or on the embedded scenes, "scenes" for all tasks of the scenes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmattn.errors import DataError, nearest
from vlmattn.eval.benchmarks import pope, scenes
from vlmattn.eval.items import Benchmark, Item, Said
from vlmattn.eval.tally import Scorer

if TYPE_CHECKING:
    from PIL.Image import Image

NAMES = ("pope", "scenes")
SCENES = 100
_VALIDATION = "val"


def load(
    name: str,
    *,
    embedded: bool,
    data: str | Path | None = None,
    images: str | Path | None = None,
    profile: str = "official",
    prompt: str | None = None,
    scenes_count: int = SCENES,
    tasks: Iterable[str] | None = None,
    split: str = "test",
    world: str | None = None,
    words: str | Path | None = None,
) -> Benchmark:
    """Make a benchmark ready to run.

    Args:
        name: one of `NAMES`.
        embedded: whether the model is the embedded one; then `pope` without `data` asks about rendered scenes.
        data: folder with the three POPE files.
        images: folder with the images the files name; default: `images` or `val2014` in `data`, or `data` itself.
        profile: how yes/no answers are read.
        prompt: prompt template; default `bare` for embedded models and rendered scenes, else `single_word`.
        scenes_count: how many scenes are rendered.
        tasks: of `scenes`, a part of `benchmarks.scenes.ALL_TASKS`; default as `benchmarks.scenes.chosen` says.
        split: of the rendered scenes.
        world: of the rendered scenes, a name in `vlmattn.scenes.world.WORLDS`; default
            `benchmarks.scenes.DEFAULT_WORLD`.
        words: path of a word table for the captions of `scenes`; default: the world's own.

    Raises:
        DataError: an unknown name, profile, template, task, world or split, options that do not go together, data
            missing or malformed, gold that cannot be scored (with the word table, say).
    """
    rule = scorer(name, profile, words)
    template = prompt or ("bare" if embedded or data is None else "single_word")
    look = scenes.check_world(scenes.DEFAULT_WORLD if world is None else world)
    pope.prompt("", template)
    if name == "scenes":
        if data is not None or images is not None:
            given = "--data" if data is not None else "--images"
            raise DataError(f"--bench scenes renders its own images; leave {given} out, or say --bench pope")
        asked = scenes.chosen(tasks)
        if "caption" in asked and template == "single_word":
            raise DataError("prompt 'single_word' asks for one word, which no caption is; use 'bare', or leave it out")
        return _scorable(rendered(rule, asked, count=scenes_count, prompt=template, split=split, world=look))
    if tasks is not None:
        raise DataError("--tasks belongs to --bench scenes; POPE always asks its three categories")
    if data is not None:
        if world is not None:
            raise DataError(f"--world {world} is about rendered scenes; leave it out, or --data")
        return _scorable(original(data, images, rule=rule, prompt=template))
    if images is not None:
        raise DataError("--images needs the questions about them: say --data FOLDER too")
    if not embedded:
        raise DataError(
            "POPE for a downloaded model needs its questions and images: fetch "
            "coco_pope_random.json, coco_pope_popular.json and "
            f"coco_pope_adversarial.json from {pope.URL} into one folder, unpack "
            f"{pope.IMAGES_URL} (6 GB) beside them, and say "
            "--data FOLDER --images FOLDER/val2014. Without a download: --model "
            f"{_embedded_name()}, whose questions and images are rendered."
        )
    asked = scenes.chosen(pope.CATEGORIES)
    return _scorable(rendered(rule, asked, count=scenes_count, prompt=template, split=split, world=look))


def scorer(name: str, profile: str = "official", words: str | Path | None = None) -> Scorer:
    """The rule from answers to numbers of a benchmark; needs none of its data.

    Args:
        name: one of `NAMES`.
        profile: how yes/no answers are read.
        words: path of a word table for captions; default: the rendered world's own.

    Raises:
        DataError: an unknown name or profile, a word table that cannot be read or that nothing would use.
    """
    if name not in NAMES:
        raise DataError(f"benchmark {name!r} is unknown; {nearest(name, NAMES)}")
    if name == "scenes":
        return scenes.scorer(profile, words)
    if words is not None:
        raise DataError(
            f"benchmark {name!r} has no captions, so the word table {words} would not be used; leave it out"
        )
    return pope.scorer(profile)


def describe_words(rule: Scorer) -> dict[str, str]:
    """The word table of a scorer as a run records it: `path` and `sha256` of its content; empty without a table."""
    return {"path": rule.words, "sha256": _sha256(Path(rule.words))} if rule.words else {}


def recorded_words(found: Any) -> str | None:
    """Path of the word table that a run recorded (`describe_words`, or the mere path); None if it recorded none.

    Raises:
        DataError: the table is gone, or it is not the one it was.
    """
    if not isinstance(found, Mapping):
        return found or None
    path = found.get("path")
    if path and _sha256(Path(path)) != found.get("sha256"):
        raise DataError(
            f"the word table {path} was changed after this run was scored with it; put it back, or say which one is "
            "meant with --words FILE"
        )
    return path or None


def open_pictures(pictures: Mapping[str, str]) -> Callable[[str], Image]:
    """A function that opens the images of a benchmark by name, from `Benchmark.pictures`.

    Args:
        pictures: {"scenes": split, "world": name} or {"folder": path}.

    Returns:
        name -> RGB image; raises OSError or ValueError for an image that is missing or broken.

    Raises:
        DataError: the folder is gone, the world or split is unknown, or `pictures` is neither.
    """
    if "folder" in pictures:
        folder = Path(pictures["folder"])
        if not folder.is_dir():
            raise DataError(f"the folder with the images, {folder}, is not there any more; put it back, or run again")
        return functools.partial(_open_file, folder)
    if "scenes" in pictures and "world" in pictures:
        from vlmattn.scenes.splits import SPLITS

        split, world = pictures["scenes"], scenes.check_world(pictures["world"])
        if split not in SPLITS:
            raise DataError(f"split {split!r} of the scenes is unknown; {nearest(split, SPLITS)}")
        return functools.partial(_open_scene, world, split)
    expected = "{'scenes': split, 'world': name} or {'folder': path}"
    raise DataError(f"pictures={dict(pictures)!r}; expected {expected}")


def original(folder: str | Path, images: str | Path | None, *, rule: Scorer, prompt: str) -> Benchmark:
    """POPE from its three JSON-lines files (the original COCO set, RePOPE, or an export of the scenes)."""
    items, hashes = pope.load(folder)
    where = _image_folder(Path(folder), Path(images) if images is not None else None, items)
    pictures = {"folder": str(where.resolve())}
    return Benchmark(
        name=rule.name,
        items=items,
        open_image=open_pictures(pictures),
        scorer=rule,
        sha256=hashlib.sha256("".join(sorted(hashes.values())).encode()).hexdigest(),
        source=f"{folder}: {pope.version(hashes)}",
        prompt=prompt,
        files=hashes,
        pictures=pictures,
    )


def rendered(
    rule: Scorer,
    tasks: Sequence[str],
    *,
    count: int,
    prompt: str = "bare",
    split: str = "test",
    world: str = scenes.DEFAULT_WORLD,
) -> Benchmark:
    """Questions about rendered scenes, with the split "val" to tune on unless that is what is asked for.

    Args:
        rule: how the answers are scored.
        tasks: names in `benchmarks.scenes.ALL_TASKS`.
        count: how many scenes.
        prompt: prompt template.
        split: of the scenes.
        world: of the scenes.
    """
    from vlmattn.scenes import benchmark

    data = benchmark(split, [scenes.in_splits(task) for task in tasks], count, world=world)
    items = []
    for row in data.rows:
        group = row["task"].removeprefix("exist-")
        key = f"{group}/{row['question_id']}"
        items.append(Item(key, row["image"], row["text"], row["label"], group, data.gold(row)))
    again = functools.partial(rendered, rule, tasks, count=count, prompt=prompt, split=_VALIDATION, world=world)
    return Benchmark(
        name=rule.name,
        items=tuple(items),
        open_image=functools.partial(_open_scene, world, split),
        scorer=rule,
        sha256=data.sha256,
        source=f"rendered scenes of world {world}, split {split}, {count} images",
        prompt=prompt,
        pictures={"scenes": split, "world": world},
        validation=None if split == _VALIDATION else again,
    )


def _scorable(benchmark: Benchmark) -> Benchmark:
    """The benchmark, after its gold was scored once against empty answers: a mistake in it is told before a model is
    loaded."""
    benchmark.scorer.tally(benchmark.items, [Said(item.id, "") for item in benchmark.items])
    return benchmark


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(
            f"the word table {path} cannot be read ({error.strerror}); put it back, or say which one is meant with "
            "--words FILE"
        ) from None


def _embedded_name() -> str:
    from vlmattn.scenes import names

    return next(iter(names()), "(none in this installation)")


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


def _open_file(folder: Path, name: str) -> Image:
    from PIL import Image

    with Image.open(folder / name) as image:
        return image.convert("RGB")


def _open_scene(world: str, split: str, name: str) -> Image:
    from vlmattn.scenes import SceneSet
    from vlmattn.scenes.world import WORLDS

    try:
        return SceneSet(split, 0, (), WORLDS[world], []).image(name)
    except KeyError as error:
        raise DataError(f"split {split!r} has no picture {name!r}: {error.args[0]}") from None
