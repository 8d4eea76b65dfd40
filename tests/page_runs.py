"""Runs of a made-up yes/no benchmark, in memory, for the tests of pages."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlmattn.eval import bench, summary
from vlmattn.eval.items import Benchmark, Item
from vlmattn.eval.records import pack_tokens
from vlmattn.eval.runs import Run

GROUPS = ("random", "popular", "adversarial")
TOKENS = 36
Stage = tuple[str, int, Sequence[int]]


def photo(name: str, size: tuple[int, int] = (60, 60)) -> Image.Image:
    """A noisy picture that depends on the name alone; noise is the worst case for the size of a page."""
    seed = sum(map(ord, name))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def questions(images: int = 20, evil: str = "") -> tuple[Item, ...]:
    """Two questions of each group about every image, one to be answered yes and one no."""
    return tuple(
        Item(f"{group}/{image}-{label}", f"{image}.png{evil}", f"{label}: {group} {image}?{evil}", label, group)
        for image in range(images)
        for group in GROUPS
        for label in ("yes", "no")
    )


def make_run(
    spec: str,
    items: Sequence[Item],
    wrong: Collection[str] = (),
    *,
    evil: str = "",
    stages: Sequence[Stage] = (),
    tokens: float = TOKENS,
    model: str = "org/model",
    info: Mapping[str, Any] | None = None,
    failed: Collection[str] = (),
    size: tuple[int, int] = (60, 60),
) -> Run:
    """A run about images of that size that answers everything right but `wrong`; `evil` follows every answer."""
    geometry = {"grid": [1, 6, 6], "size": list(size), "origin": [0.0, 0.0], "cell": [size[0] / 6, size[1] / 6]}
    flip = {"yes": "no", "no": "yes"}
    cost = {"prompt_tokens": 50, "visual_tokens": TOKENS, "visual_per_layer": [tokens] * 4}
    cost |= {"kv_bytes": 100.0 * tokens, "kv_bytes_full": 100.0 * TOKENS}
    cost |= {"prefill_macs": 10.0 * tokens, "prefill_macs_full": 10.0 * TOKENS}
    time = {"batch": 0, "questions": 4, "prefill_ms": 8.0, "decode_ms": 2.0, "new_tokens": 2, "vision_ms": 0.0}
    records: list[dict[str, Any]] = []
    for item in items:
        start = {"id": item.id, "image": item.image, "group": item.group, "question": item.question}
        start |= {"label": item.label}
        if item.id in failed:
            records.append(start | {"status": "failed", "error": "broken"})
            continue
        text = flip[item.label] if item.id in wrong else item.label
        kept = [
            {"method": method, "before_layer": layer, "mask": pack_tokens(tokens, TOKENS)}
            for method, layer, tokens in stages
        ]
        more = {"kept": kept, "geometry": geometry} if kept else {}
        records.append(start | {"status": "ok", "text": f"{text}. {evil}".strip(), "cost": cost, "time": time} | more)
    identity = {
        "spec": spec,
        "model": {"name": model, "fingerprint": "f00d", "dtype": "float32"},
        "device": "cpu",
        "bench": "pope",
        "data": {"sha256": "abc123", "limit": None},
        "prompt": "bare",
        "decode": {"do_sample": False, "num_beams": 1, "max_new_tokens": 8, "batch_size": 4},
        "versions": {"vlmattn": "9.9", "torch": "8.8"},
    }
    described = {"command": "vlmattn eval --bench pope", "platform": "Linux", "data": {"source": "made up"}}
    return Run.of(f"runs/{spec}", records, identity, described | dict(info or {}), bench.scorer("pope"), spec)


def make_bench(items: Sequence[Item], open_image: Callable[[str], Image.Image] = photo) -> Benchmark:
    """The benchmark of these items."""
    return Benchmark("pope", tuple(items), open_image, bench.scorer("pope"), "abc123", "made up")


def make_sweep(evil: str = "") -> tuple[Benchmark, list[summary.Row], list[Run]]:
    """A baseline, a method that is clearly worse, one that is not, a control, an invalid row, a level below a floor."""
    items = questions(evil=evil)
    asked = [item.id for item in items]
    kept = [0, 1, 7, 35]
    runs = [
        make_run("none", items, asked[::40]),
        make_run(
            f"fastv(keep=0.1){evil}", items, asked[::3], evil=evil, stages=[("fastv(keep=0.1)", 2, kept)], tokens=4
        ),
        make_run("vhr", items, [asked[0], asked[50]]),
        make_run("random(keep=0.1)", items, asked[::2], stages=[("random(keep=0.1)", 2, kept)], tokens=4),
    ]
    roles: tuple[summary.Role, ...] = ("baseline", "method", "method", "control")
    rows = [summary.row(run, runs[0] if run is not runs[0] else None, role=role) for run, role in zip(runs, roles)]
    floor = {"questions": 0, "visual_tokens": TOKENS, "floor": 18.5}
    note = f"level 0.35 is below the method's floor{evil}"
    rows.append(summary.Row(f"fastv at 0.35{evil}", "", "", {}, {}, floor, note=note, role="below floor"))
    return make_bench(items), rows, runs
