"""What a prefill takes under each spec of a sweep, in rounds that take turns, and how much of it goes into choosing.

Apart from the answers: the same questions for all specs, nothing shared between them, and every time beside the
baseline's of the same round, so that whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vlmattn.errors import DataError
from vlmattn.eval.benchmarks import pope
from vlmattn.eval.items import Benchmark, Item

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmattn.eval.models import Loaded
    from vlmattn.eval.runner import Progress, Settings


def measure(
    loaded: Loaded,
    bench: Benchmark,
    items: Sequence[Item],
    specs: Sequence[str],
    settings: Settings,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Time the prefill of one batch under every spec, in `settings.rounds` interleaved rounds after a warm-up.

    Args:
        loaded: model and processor.
        bench: what is asked.
        items: of it; the first question, about the first `settings.batch_size` images that can be read, is the batch.
        specs: spec texts, the baseline first.
        settings: how the sweep is run.
        progress: called with ("timing", rounds done, rounds in all).

    Returns:
        Per spec `prefill_ratio`: median over rounds of its time to the baseline's, vision tower included;
        `selection_ms`: median time that choosing took, for the batch; `selection_share`: median over rounds of that
        time to the baseline's prefill; `kv_exact`: whether the keys and values that one prompt left in the cache are as
        many bytes as the report's formula says. Specs that answer from compressed contexts, whose questions have no
        prefill of their own, are left out.

    Raises:
        DataError: no image can be read.
        VlmattnError: a spec does not fit the model.
    """
    images, prompt = _batch(bench, items, settings.batch_size)
    specs = [spec for spec in specs if not _compresses(loaded, spec)]
    exact = {spec: _prefill(loaded, spec, images[:1], prompt)[2] for spec in specs}
    seconds: dict[str, list[float]] = {spec: [] for spec in specs}
    chosen: dict[str, list[float]] = {spec: [] for spec in specs}
    for number in range(settings.rounds + 1):
        turn = number % len(specs)
        for spec in [*specs[turn:], *specs[:turn]]:
            spent, selecting, _ = _prefill(loaded, spec, images, prompt)
            if number:
                seconds[spec].append(spent)
                chosen[spec].append(selecting)
        if progress:
            progress("timing", number, settings.rounds)
    base = seconds[specs[0]]
    return {
        spec: {
            "prefill_ratio": statistics.median(a / b for a, b in zip(seconds[spec], base, strict=True)),
            "selection_ms": statistics.median(chosen[spec]),
            "selection_share": statistics.median(a / 1e3 / b for a, b in zip(chosen[spec], base, strict=True)),
            "kv_exact": exact[spec],
        }
        for spec in specs
    }


def _batch(bench: Benchmark, items: Sequence[Item], size: int) -> tuple[list[Image], str]:
    """Up to `size` images, and the prompt that is asked about each of them."""
    images: list[Image] = []
    for name in dict.fromkeys(item.image for item in items):
        if len(images) == size:
            break
        try:
            images.append(bench.open_image(name))
        except (OSError, ValueError, SyntaxError):  # named where it is asked about
            continue
    if not images:
        raise DataError("none of the images can be read, so that there is nothing to time")
    return images, pope.prompt(items[0].question, bench.prompt)


def _compresses(loaded: Loaded, spec: str) -> bool:
    from vlmattn.eval.models import wrapped

    with wrapped(loaded, spec) as session:
        return session.compresses


def _prefill(loaded: Loaded, spec: str, images: Sequence[Image], prompt: str) -> tuple[float, float, bool]:
    """Seconds of one prefill, milliseconds of choosing in it, and whether the cache has the bytes of the formula."""
    from vlmattn.eval.answer import encode
    from vlmattn.eval.models import wrapped

    with wrapped(loaded, spec) as session, session.images(images) as seen, torch.inference_mode():
        session.time_selection()
        inputs = encode(loaded, seen, [prompt] * len(images))
        _wait(loaded)
        start = time.perf_counter()
        out = loaded.model(**inputs, use_cache=True, logits_to_keep=1)
        _wait(loaded)
        spent = time.perf_counter() - start
        report = session.report()
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    return spent, report.selection_ms or 0.0, held == report.kv_bytes


def _wait(loaded: Loaded) -> None:
    if loaded.device.startswith("cuda"):
        torch.cuda.synchronize(loaded.device)
