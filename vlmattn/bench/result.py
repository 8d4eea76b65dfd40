"""From raw seconds to a record: summary, table, picture."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers

import vlmattn
from vlmattn.bench import Settings, selection
from vlmattn.bench.cases import CONTRAST, FEW, VAR_CASE
from vlmattn.bench.measure import Measured, Timing
from vlmattn.scenes import bench_model

REALISED, SCORING, EDIT, DECODING = 0.85, 0.03, 0.15, 1.35


def cpu_model() -> str:
    """The CPU as it calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def load() -> list[float] | None:
    """The machine's load averages, where it has them."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def summary(timing: Timing, plain: Timing) -> dict[str, Any]:
    """Numbers of one configuration beside those of the baseline of the same rounds."""
    ratios = [mine / theirs for mine, theirs in zip(timing.prefill, plain.prefill)]
    ratio, macs_ratio = float(numpy.median(ratios)), timing.macs / plain.macs
    tokens = [numpy.median(steps) for steps in timing.decode]
    plain_tokens = [numpy.median(steps) for steps in plain.decode]
    return {
        "name": timing.case.name,
        "spec": timing.case.spec,
        "attention": timing.case.attention,
        "prefill_ms": _spread(timing.prefill),
        "prefill_ratio": ratio,
        "prefill_cpu_ratio": float(
            numpy.median([mine / theirs for mine, theirs in zip(timing.prefill_cpu, plain.prefill_cpu)])
        ),
        "prefill_ratio_of_medians": float(numpy.median(timing.prefill) / numpy.median(plain.prefill)),
        "macs": timing.macs,
        "macs_ratio": macs_ratio,
        "saving_realised": (1 - ratio) / (1 - macs_ratio) if macs_ratio < 1 else None,
        "decode_ms_per_token": _spread(tokens),
        "decode_ratio": float(numpy.median([mine / theirs for mine, theirs in zip(tokens, plain_tokens)])),
        "kv_bytes": timing.kv_bytes,
        "tokens_per_layer": timing.tokens,
        "heads_n_n_tensors": [list(shape) for shape in timing.matrices],
        "n_n_masks": [list(shape) for shape in timing.masks],
        "edited_layers": len(timing.edited_rows),
        "edited_rows": timing.edited_rows,
        "raw": {"prefill_s": timing.prefill, "prefill_cpu_s": timing.prefill_cpu, "decode_s": timing.decode},
    }


def _spread(seconds: Sequence[Any]) -> dict[str, float]:
    low, middle, high = numpy.percentile(numpy.asarray(seconds, dtype=float) * 1000, [10, 50, 90])
    return {"median": float(middle), "p10": float(low), "p90": float(high)}


def record(
    settings: Settings,
    shape: bench_model.Shape,
    proofs: list[dict[str, Any]],
    measured: Measured,
    load_before: list[float] | None,
) -> dict[str, Any]:
    """The JSON record of a run."""
    plain = measured.timings[0]
    rows = [summary(timing, plain) for timing in measured.timings]
    by_name = {row["name"]: row for row in rows}
    scoring = float(numpy.median([mine / theirs for mine, theirs in zip(measured.scoring, plain.prefill)]))
    edit = by_name[VAR_CASE]["prefill_ratio"] - 1
    decoding = by_name[CONTRAST]["decode_ratio"]
    realised = by_name[FEW]["saving_realised"]
    return {
        "bench": bench_model.NAME,
        "command": settings.command,
        "versions": {
            "vlmattn": vlmattn.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": numpy.__version__,
        },
        "cpu": {"model": cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "load": {"before": load_before, "after": load()},
        "model": {
            "layers": shape.layers,
            "dim": shape.dim,
            "heads": shape.heads,
            "mlp": shape.mlp,
            "dtype": "float32",
            "visual_tokens": shape.visual,
            "images": shape.images,
            "text_tokens": shape.text,
        },
        "repeats": len(plain.prefill),
        "proofs": proofs,
        "configurations": rows,
        "vision": {
            "ms": _spread(measured.vision),
            "share_of_prefill": float(numpy.median([a / b for a, b in zip(measured.vision, plain.prefill)])),
            "raw_s": measured.vision,
        },
        "scoring": {
            "what": "one FastV score row over all heads and the choice from it, timed alone, over the unpruned prefill",
            "ms": _spread(measured.scoring),
            "share_of_prefill": scoring,
            "raw_s": measured.scoring,
        },
        "selection": [selection.summary(choosing, plain.prefill) for choosing in measured.choosing],
        "targets": [
            _target(f"{FEW}: share of the theoretical saving realised", realised, REALISED, realised >= REALISED),
            _target("scoring, share of the unpruned prefill", scoring, SCORING, scoring < SCORING),
            _target(f"{VAR_CASE}: added to the prefill", edit, EDIT, edit <= EDIT),
            _target(f"{CONTRAST}: decoding, x plain", decoding, DECODING, decoding <= DECODING),
        ],
    }


def _target(name: str, measured: float, wanted: float, met: bool) -> dict[str, Any]:
    return {"name": name, "measured": measured, "wanted": wanted, "met": bool(met)}


def markdown(result: dict[str, Any]) -> str:
    """The record as a page; generated, not written."""
    model, cpu, versions = result["model"], result["cpu"], result["versions"]
    lines = [
        f"# {result['bench']} on a CPU",
        "",
        f"Generated by `{result['command']}`; numbers and raw timings are in the JSON file beside this page.",
        "",
        f"- {cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads; load averages before "
        f"{_loads(result['load']['before'])}, after {_loads(result['load']['after'])}",
        f"- vlmattn {versions['vlmattn']}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"python {versions['python']}",
        f"- random weights, {model['layers']} layers, width {model['dim']}, {model['heads']} heads, "
        f"MLP {model['mlp']}, fp32; {model['visual_tokens']} visual and {model['text_tokens']} text tokens",
        f"- {result['repeats']} interleaved rounds; medians, and ratios to plain SDPA of the same round. Ratios hold "
        "on this machine and in this run; milliseconds are there to judge them",
        "",
        *table(result),
        "",
        f"Vision tower and projector are inside the prefill: {result['vision']['share_of_prefill']:.1%} of the plain "
        "one. MACs are those of `vlmattn.cost`, which counts attention without the causal half; a text-only stream "
        "counts with its own tokens, though it runs padded to the prompt.",
        "",
        "| target | measured | wanted | met |",
        "| --- | --- | --- | --- |",
    ]
    for target in result["targets"]:
        met = "yes" if target["met"] else "no"
        lines.append(f"| {target['name']} | {target['measured']:.3f} | {target['wanted']:g} | {met} |")
    return "\n".join([*lines, "", *selection.page(result["selection"]), ""])


def table(result: dict[str, Any]) -> list[str]:
    """The configurations as lines of a markdown table."""
    head = (
        "configuration",
        "prefill ms (p10, p90)",
        "x plain",
        "CPU time x plain",
        "MACs x plain",
        "saving realised",
        "decode ms/token",
        "x plain",
        "heads x N x N",
    )
    lines = [_line(head), _line(["---"] * len(head))]
    for row in result["configurations"]:
        prefill = row["prefill_ms"]
        cells = [
            row["name"],
            f"{prefill['median']:.0f} ({prefill['p10']:.0f}, {prefill['p90']:.0f})",
            f"{row['prefill_ratio']:.3f}",
            f"{row['prefill_cpu_ratio']:.3f}",
            f"{row['macs_ratio']:.3f}",
            "" if row["saving_realised"] is None else f"{row['saving_realised']:.2f}",
            f"{row['decode_ms_per_token']['median']:.1f}",
            f"{row['decode_ratio']:.2f}",
            "yes" if row["heads_n_n_tensors"] else "none",
        ]
        lines.append(_line(cells))
    return lines


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _loads(values: list[float] | None) -> str:
    return "unknown" if values is None else ", ".join(f"{value:.1f}" for value in values)


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write record, page and, where matplotlib is installed, the picture; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"cpu-{result['bench']}"
    paths = [stem.with_suffix(".json"), stem.with_suffix(".md")]
    paths[0].write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    paths[1].write_text(markdown(result), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is not None:
        paths.append(stem.with_suffix(".png"))
        plot(result, paths[-1])
    return paths


def plot(result: dict[str, Any], path: Path) -> None:
    """Prefill time over plain SDPA as bars, and what the MACs promise as marks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = result["configurations"][::-1]
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(rows))
    axes.barh(places, [row["prefill_ratio"] for row in rows], color="#4c78a8", label="time")
    axes.plot([row["macs_ratio"] for row in rows], places, "D", color="#e45756", label="MACs")
    for place, row in zip(places, rows):
        axes.text(row["prefill_ratio"] + 0.02, place, f"{row['prefill_ratio']:.2f}", va="center", fontsize=9)
    axes.set_yticks(list(places), [row["name"] for row in rows])
    axes.axvline(1.0, color="0.6", linewidth=0.8)
    axes.set_xlabel("prefill, relative to plain SDPA in the same round")
    axes.set_title(f"{result['bench']}: {result['cpu']['model']}, {result['cpu']['threads']} threads", fontsize=10)
    axes.set_xlim(right=1.12 * max(row["prefill_ratio"] for row in rows))
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)
