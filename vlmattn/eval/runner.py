"""Run a benchmark under several method specs: one resumable run folder a spec, batches fixed by the item list.

A batch that was interrupted is asked again as a whole and only its missing records are written, so that a killed and
resumed run says what an uninterrupted one says (in low precision, padding partners can change an answer).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlmattn.errors import DataError, VlmattnError
from vlmattn.eval import records as run_records
from vlmattn.eval import summary
from vlmattn.eval.bench import describe_words
from vlmattn.eval.benchmarks import pope
from vlmattn.eval.items import Benchmark, Item, some
from vlmattn.eval.lineup import Entry, is_only, matching_controls, written_out
from vlmattn.eval.records import RunFolder
from vlmattn.eval.runs import Run, check_records

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmattn import VisionStore
    from vlmattn.eval.answer import Answers
    from vlmattn.eval.models import Loaded

Progress = Callable[[str, int, int], None]
VALIDATION = "validation"
YES_NO = "yes_no"
"""The kind of questions whose margins are recorded."""
NOT_GREEDY = frozenset(
    (
        *("transformers_version", "_from_model_config", "bos_token_id", "pad_token_id", "eos_token_id"),
        *("decoder_start_token_id", "max_length", "max_new_tokens", "use_cache", "return_dict_in_generate"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
        *("do_sample", "temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        *("num_beams", "num_beam_groups", "early_stopping", "length_penalty", "diversity_penalty"),
    )
)
"""Generation settings of a checkpoint that say nothing about greedy answers: token ids, lengths that the runner sets,
outputs, sampling and beams. Whatever else is not the default is a part of a run's identity."""


class AsksModel(Protocol):
    """Whatever answers a batch; `vlmattn.eval.answer.Asker` with a real model."""

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> Answers:
        """Answer prompts[i] about images[i]."""
        ...


def check_seed(seed: int) -> None:
    """Whether torch and numpy take a seed.

    Raises:
        DataError: it is below 0, or 2**63 or more.
    """
    if not 0 <= seed < 2**63:
        raise DataError(f"--seed {seed} must be 0 or more and below 2**63; for instance --seed 0")


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
        threshold: add the threshold control: the baseline also answers yes/no questions of the validation split, on
            which a constant bias is tuned.
        share_vision: compute vision features once for all specs that allow it.
        rounds: how often every prefill is timed beside the baseline's, see `timing.measure`; 0: not at all.
    """

    limit: int | None = None
    batch_size: int = 16
    max_new_tokens: int = 16
    seed: int = 0
    retry_failed: bool = False
    command: str = ""
    threshold: bool = False
    share_vision: bool = True
    rounds: int = 0

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"--{name.replace('_', '-')} {value} must be 1 or more")
        if self.rounds < 0:
            raise DataError(f"--rounds {self.rounds} must be 0 (no timing) or more")
        check_seed(self.seed)


@dataclass(frozen=True)
class Job:
    """A run that is to be answered.

    Attributes:
        name: unique in a sweep; what progress calls it.
        spec: canonical spec text.
        label: what tables call it.
        bench: what is asked.
        items: which of it, in order.
        folder: the run folder.
    """

    name: str
    spec: str
    label: str
    bench: Benchmark
    items: Sequence[Item]
    folder: Path


def slug(spec: str) -> str:
    """A folder name for a spec: "fastv(keep=0.5) + random" -> "fastv-keep=0.5+random"; long ones end in a hash."""
    name = re.sub(r"[^A-Za-z0-9.+=,_-]", "", spec.replace("(", "-").replace("[", "-")).strip("-.") or "run"
    if len(name) > 80:
        name = f"{name[:70]}-{hashlib.sha256(spec.encode()).hexdigest()[:8]}"
    return name


def run_items(
    bench: Benchmark,
    items: Sequence[Item],
    ask: AsksModel,
    folder: RunFolder,
    batch_size: int,
    progress: Progress | None = None,
    name: str | None = None,
) -> None:
    """Answer the items that the folder does not have yet; questions about a broken image become failed records.

    Args:
        bench: what is asked.
        items: which of it, in the order that makes the batches.
        ask: what answers a batch.
        folder: where the records go.
        batch_size: questions asked at once.
        progress: called with (name, records done, records in all).
        name: what progress calls the run; its spec if None.
    """
    spec = name or str(folder.identity.get("spec", ""))
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
    specs: Mapping[str, str] | Sequence[Entry],
    out: str | Path,
    settings: Settings,
    progress: Progress | None = None,
) -> list[summary.Row]:
    """Run every spec into OUT/<slug>, then write the tables, the plot and the page of the sweep into OUT.

    The specs share the loaded model and, where a method does not look inside the vision tower, the features of equal
    batches of images (bit-identical; times are as if nothing were shared). The first spec is the baseline.

    Args:
        loaded: model and processor.
        bench: what is asked.
        specs: canonical spec text -> how the tables call it; or the rows with their roles, the baseline first.
        out: the folder of the sweep.
        settings: how.
        progress: called with (spec, records done, records in all); before the first question once for every run.

    Returns:
        One row per spec, scored, with intervals and cost, against the baseline, and methods with pruners also against
        random tokens at the same layer, where such a row is there; then the threshold control, if it was asked for and
        there are yes/no questions.

    Raises:
        VlmattnError: a spec does not fit the model (asked for all specs before the first run), or a folder holds
        another run.
    """
    from vlmattn.eval import controls, timing, views

    entries = _entries(specs)
    baseline, *_ = entries
    out = Path(out)
    check_specs(loaded, [entry.spec for entry in entries if entry.spec])
    items = ordered(bench, bench.take(settings.limit))
    jobs = {
        entry.spec: Job(entry.spec, entry.spec, entry.label, bench, items, out / slug(written_out(entry.spec)))
        for entry in entries
        if entry.spec
    }
    specs_run = list(jobs)
    tuned = settings.threshold and YES_NO in _kinds(bench, items).values()
    if tuned and bench.validation is not None:
        jobs[VALIDATION] = _validation(bench.validation(), baseline, out, settings)
    matched = _controls(loaded, bench, entries)
    with _threads(loaded):
        times = timing.measure(loaded, bench, items, specs_run, settings, progress) if settings.rounds else {}
    runs = answer_all(loaded, list(jobs.values()), settings, progress)
    base = runs[baseline.spec]
    rows = []
    for entry in entries:
        if entry.below is not None:
            rows.append(summary.below_floor(entry.below, entry.label))
        elif entry.refused:
            rows.append(summary.refused(entry.label, entry.refused))
        else:
            random, even = (runs.get(found.get(entry.spec, "")) for found in matched)
            other = None if entry is baseline else base
            row = summary.row(
                runs[entry.spec], other, role=entry.role, seed=settings.seed, control=random, uniform=even
            )
            rows.append(dataclasses.replace(row, cost={**row.cost, **times.get(entry.spec, {})}))
    shown = [runs[entry.spec] for entry in entries if entry.spec]
    notes = _others(out, [job.folder for job in jobs.values()])
    if tuned:
        try:
            if VALIDATION not in runs:
                raise DataError("there are no other images of this benchmark to tune a bias on")
            control = controls.threshold(base, runs[VALIDATION])
        except DataError as error:  # told below the table, which stands without it
            notes.append(f"no threshold control: {error}")
        else:
            row = summary.row(control.run, base, role="control", seed=settings.seed)
            rows.append(dataclasses.replace(row, note="; ".join(filter(None, (control.note, row.note)))))
            shown.append(control.run)
    if notes:
        rows[0] = dataclasses.replace(rows[0], note="; ".join(filter(None, (rows[0].note, *notes))))
    made = identity(loaded, bench, "", settings)
    about = {"model": loaded.name, "command": settings.command, "settings": made, **versions()}
    summary.write(out, bench, rows, about)
    views.write_sweep(out, bench, rows, shown, about)
    return rows


def _others(out: Path, used: Sequence[Path]) -> list[str]:
    """What to say about runs of former sweeps in the same folder, which its tables do not show."""
    found = sorted(path.parent.name for path in out.glob(f"*/{run_records.RUN}") if path.parent not in used)
    if not found:
        return []
    names = f"{some(found)}: {'it is' if len(found) == 1 else 'they are'} in the folder but not in this table"
    return [f"{len(found)} other run{'s' * (len(found) > 1)} ({names}; vlmattn compare takes run folders)"]


def ordered(bench: Benchmark, items: Sequence[Item]) -> list[Item]:
    """Items in the order in which they are asked: captions last, so that short answers never wait for a long one."""
    kinds = _kinds(bench, items)
    return sorted(items, key=lambda item: kinds[item.group] == "caption")


def answer_all(
    loaded: Loaded, jobs: Sequence[Job], settings: Settings, progress: Progress | None = None
) -> dict[str, Run]:
    """Answer what the run folders of some jobs do not have yet.

    Returns:
        Name of the job -> its run, complete.

    Raises:
        VlmattnError: a spec does not fit the model, or a folder holds another run.
    """
    from vlmattn import VisionStore

    for job in jobs:  # all of them before the first question, and before progress is shown
        run_records.check_folder(job.folder, identity(loaded, job.bench, job.spec, settings))
    if progress:
        for job in jobs:
            progress(job.name, _done(job), len(job.items))
    shares = settings.share_vision and len(jobs) > 1
    store = VisionStore() if shares else None
    with _threads(loaded):
        return {job.name: _answer(loaded, job, settings, store, progress) for job in jobs}


def visual_tokens(loaded: Loaded, bench: Benchmark) -> int:
    """Visual tokens of an image of the benchmark in this model without methods: the median of the first eight.

    Raises:
        DataError: none of them can be read.
    """
    import statistics

    from vlmattn.eval.contexts import asker_of
    from vlmattn.eval.models import wrapped

    names = list(dict.fromkeys(item.image for item in bench.items))[:8]
    images = [image for image in (_open(bench, name) for name in names) if not isinstance(image, str)]
    if not images:
        raise DataError(f"none of the first images can be read: {_open(bench, names[0])}")
    with wrapped(loaded, "none") as session:
        ask = asker_of(loaded, session, max_new_tokens=1)
        return statistics.median_low(
            ask([image], [bench.items[0].question]).report.visual_tokens[0] for image in images
        )


def check_specs(loaded: Loaded, specs: Iterable[str]) -> None:
    """Install and remove every spec once, so that a mistake in the last one is told before hours of the first."""
    from vlmattn.eval.models import wrapped

    for spec in specs:
        wrapped(loaded, spec).remove()


def refusals(loaded: Loaded, specs: Iterable[str]) -> dict[str, str]:
    """The specs that the model cannot take -> why."""
    found = {}
    for spec in specs:
        try:
            check_specs(loaded, [spec])
        except VlmattnError as error:
            found[spec] = str(error)
    return found


def identity(loaded: Loaded, bench: Benchmark, spec: str, settings: Settings) -> dict[str, Any]:
    """What must be the same for a run to be continued."""
    from vlmattn import presets

    preset = presets.find(loaded.model.config)
    world = {"world": name} if (name := bench.pictures.get("world")) else {}
    return {
        "spec": spec,
        "sink_dims": None if preset is None else preset["sink_dims"],
        "model": {"name": loaded.name, "fingerprint": loaded.fingerprint, "dtype": loaded.dtype},
        **({"text_tower": loaded.text_fingerprint} if loaded.text_fingerprint else {}),
        "device": loaded.device.split(":")[0],
        "bench": bench.name,
        "data": {"sha256": bench.sha256, "limit": settings.limit, **world},
        "prompt": bench.prompt,
        "decode": {
            "do_sample": False,
            "num_beams": 1,
            "max_new_tokens": settings.max_new_tokens,
            "batch_size": settings.batch_size,
            **({"generation_config": generation} if (generation := _generation(loaded.model)) else {}),
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
        "data": {"source": bench.source, "files": dict(bench.files)},
        "pictures": dict(bench.pictures),
        "profile": bench.scorer.profile,
        "words": describe_words(bench.scorer),
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


def _entries(specs: Mapping[str, str] | Sequence[Entry]) -> list[Entry]:
    if isinstance(specs, Mapping):
        roles = ("baseline", *("method" for _ in range(len(specs) - 1)))
        return [Entry(label, spec, role) for (spec, label), role in zip(specs.items(), roles)]  # type: ignore[arg-type]
    return list(specs)


def _controls(loaded: Loaded, bench: Benchmark, entries: Sequence[Entry]) -> list[dict[str, str]]:
    """Spec of a method -> spec of its random row, and of its uniform one; images are only counted where it matters."""
    names = ("random", "uniform")
    if not any(is_only(entry.spec, name) for entry in entries for name in names):
        return [{} for _ in names]
    layers, tokens = loaded.model.config.get_text_config().num_hidden_layers, visual_tokens(loaded, bench)
    return [matching_controls(entries, layers, tokens, name) for name in names]


def _validation(bench: Benchmark, baseline: Entry, out: Path, settings: Settings) -> Job:
    """The run on which the threshold control is tuned: the yes/no questions of the validation split."""
    kinds = _kinds(bench, bench.items)
    items = [item for item in bench.take(settings.limit) if kinds[item.group] == YES_NO]
    folder = out / VALIDATION / slug(written_out(baseline.spec))
    return Job(VALIDATION, baseline.spec, f"{baseline.label} on the validation split", bench, items, folder)


def _kinds(bench: Benchmark, items: Iterable[Item]) -> dict[str, str]:
    """Group -> name of its kind."""
    return {group: bench.scorer.kind(group).name for group in dict.fromkeys(item.group for item in items)}


def _done(job: Job) -> int:
    """How many of its questions the job's folder has; mistakes in it are told when it is opened for writing."""
    try:
        ids = {record["id"] for record in run_records.read_records(job.folder)}
    except DataError:
        return 0
    return sum(item.id in ids for item in job.items)


def _answer(loaded: Loaded, job: Job, settings: Settings, store: VisionStore | None, progress: Progress | None) -> Run:
    import torch

    from vlmattn.eval.contexts import asker_of
    from vlmattn.eval.models import wrapped

    torch.manual_seed(settings.seed)
    what, about = identity(loaded, job.bench, job.spec, settings), info(loaded, job.bench, settings)
    with RunFolder(job.folder, what, about | {"questions": len(job.items)}) as folder:
        check_records(job.folder, folder.records)
        # Answers are scored as this command says, also those that were there: what reads the folder does the same.
        folder.update_info({name: about[name] for name in ("profile", "words")})
        if settings.retry_failed:
            folder.forget_failed()
        peak = _peak_before(folder)
        if any(item.id not in folder.ids for item in job.items):
            with wrapped(loaded, job.spec) as session:
                # Nothing of the warm-up goes into the store: its features took longer than later ones.
                _warm_up(job, asker_of(loaded, session, settings.max_new_tokens), settings.batch_size)
                ask = asker_of(loaded, session, settings.max_new_tokens, store)
                run_items(job.bench, job.items, ask, folder, settings.batch_size, progress, job.name)
            peak = max((number for number in (peak, ask.peak_memory_bytes) if number is not None), default=None)
        elif progress:
            progress(job.name, len(job.items), len(job.items))
        folder.sort([item.id for item in job.items])
        about = run_records.read_run(job.folder)["info"]
        run = Run(str(job.folder), job.label, folder.identity, about, folder.records, job.bench.scorer, peak)
        folder.write_cost({"peak_memory_bytes": peak, **run.cost})
    return run


def _ask_batch(bench: Benchmark, batch: Sequence[Item], ask: AsksModel, number: int) -> list[dict[str, Any]]:
    images: dict[str, Image | str] = {}
    for item in batch:
        if item.image not in images:
            images[item.image] = _open(bench, item.image)
    good = [item for item in batch if not isinstance(images[item.image], str)]
    prompts = [pope.prompt(item.question, bench.prompt) for item in good]
    kinds = _kinds(bench, good)
    told: dict[str, dict[str, Any]] = {}
    if good:
        answers = ask([images[item.image] for item in good], prompts)  # type: ignore[misc]
        times = {"batch": number, "questions": len(good), **answers.times}
        for row, item in enumerate(good):
            said: dict[str, Any] = {"prompt": prompts[row], "status": "ok", "text": answers.texts[row]}
            if answers.truncated[row]:
                said["truncated"] = True
            if kinds[item.group] == YES_NO and answers.margins[row] is not None:
                said["margin"] = answers.margins[row]
            told[item.id] = said | answers.seen[row] | {"cost": answers.costs[row], "time": times}
    records = []
    for item in batch:
        start: dict[str, Any] = {name: getattr(item, name) for name in ("id", "image", "group", "question", "label")}
        if item.gold:
            start["gold"] = dict(item.gold)
        records.append(start | told.get(item.id, {"status": "failed", "error": str(images[item.image])}))
    return records


def _open(bench: Benchmark, name: str) -> Image | str:
    """The image, or why it cannot be read (PIL raises SyntaxError for some broken files)."""
    try:
        return bench.open_image(name)
    except (OSError, ValueError, SyntaxError) as error:
        return f"{name}: {type(error).__name__}: {error}"


@contextmanager
def _threads(loaded: Loaded) -> Iterator[None]:
    """One CPU thread for a small model: two gain little, and stall many times over when something else wants a core."""
    import torch

    if not loaded.embedded or loaded.device != "cpu":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _generation(model: Any) -> dict[str, Any]:
    """What the checkpoint's generation settings change in greedy decoding: those that are not the default."""
    found = json.loads(model.generation_config.to_json_string(use_diff=True))
    return {name: value for name, value in sorted(found.items()) if name not in NOT_GREEDY}


def _warm_up(job: Job, ask: AsksModel, batch_size: int) -> None:
    """Pay for the first call of a shape before anything is timed."""
    opened = [(_open(job.bench, item.image), item) for item in job.items[:batch_size]]
    good = [(image, item.question) for image, item in opened if not isinstance(image, str)]
    if good:
        ask([image for image, _ in good], [pope.prompt(question, job.bench.prompt) for _, question in good])


def _peak_before(folder: RunFolder) -> int | None:
    """Peak memory of the former part of a run."""
    return (run_records.read_cost(folder.path) or {}).get("peak_memory_bytes")


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
