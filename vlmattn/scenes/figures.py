"""The pictures of a model card: the curve of the training, where the attention goes, and how large activations are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .card import (
    ABANDONED,
    ACTIVATIONS_FILE,
    ATTENTION_FILE,
    CURVE_FILE,
    MEASURED_FILE,
    NOT_MEASURES,
    TRAINING_FILE,
    by_stage,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 90


def write(folder: Path) -> None:
    """Draw what training.json and measured.json of a packaged model hold."""
    training = json.loads((folder / TRAINING_FILE).read_text())
    measured = json.loads((folder / MEASURED_FILE).read_text())
    _save(curve(training["curve"], training[ABANDONED]), folder / CURVE_FILE)
    _save(attention(measured["statistics"]["attention"]), folder / ATTENTION_FILE)
    _save(activations(measured["statistics"]["activations"]), folder / ACTIVATIONS_FILE)


def _save(figure: Figure, file: Path) -> None:
    figure.savefig(file, dpi=_DPI, metadata={"Software": None})


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def curve(entries: list[dict[str, Any]], abandoned: dict[str, list[dict[str, Any]]]) -> Figure:
    """Loss and measures by step of each stage with more than one line, of a kind of prompt the measures alone; seeds
    that were given up are dashed."""
    every = by_stage(entries)
    stages = {stage: lines for stage, lines in every.items() if len(lines) > 1} or every
    figure = _figure(4.6 * len(stages), 6.4)
    axes = figure.subplots(2, len(stages), squeeze=False)
    trained = {entry["stage"] for entry in entries}
    for column, (stage, lines) in enumerate(stages.items()):
        losses, shares = axes[0][column], axes[1][column]
        if stage in trained:
            _losses(losses, lines, {seed: by_stage(others).get(stage, []) for seed, others in abandoned.items()})
        else:
            losses.axis("off")
        (losses if stage in trained else shares).set_title(stage)
        losses.set_ylabel("loss" if column == 0 else "")
        names = [name for name in lines[-1] if name not in NOT_MEASURES]
        for number, name in enumerate(names):
            known = [(e["step"], e[name]) for e in lines if name in e]
            style = ("-", "--", ":")[number // 10]
            shares.plot(*zip(*known, strict=True), style, marker=".", label=name, color=f"C{number % 10}")
        shares.set(xlabel="step", ylabel="accuracy" if column == 0 else "", ylim=(-0.02, 1.02))
        shares.legend(fontsize=6, ncols=2)
    return figure


def _losses(axes: Axes, lines: list[dict[str, Any]], abandoned: dict[str, list[dict[str, Any]]]) -> None:
    """The loss of one stage by step."""
    axes.plot([e["step"] for e in lines], [e["loss"] for e in lines], "k.-")
    for seed, same in abandoned.items():
        if same:
            axes.plot([e["step"] for e in same], [e["loss"] for e in same], "--", label=f"seed {seed}, given up")
            axes.legend(fontsize=7)
    axes.set(yscale="log")


def attention(layers: list[dict[str, Any]]) -> Figure:
    """Heat map of the attention that tokens behind the image spend on visual tokens, layer by head."""
    heads = len(layers[0]["visual"])
    figure = _figure(2.2 + 0.55 * 2 * heads, 1.4 + 0.32 * len(layers))
    titles = {"visual": "tokens behind the image", "visual_last": "last token of the prompt"}
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        table = [layer[key] for layer in layers]
        drawn = axes.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for row, shares in enumerate(table):
            for column, share in enumerate(shares):
                ink = "black" if share > 0.6 else "white"
                axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=7, color=ink)
        axes.set(title=title, xlabel="head", xticks=range(heads), yticks=range(len(layers)))
        axes.title.set_fontsize(8)
    figure.axes[0].set_ylabel("layer")
    figure.colorbar(drawn, ax=figure.axes, label="share on visual tokens")
    return figure


def activations(layers: list[dict[str, Any]]) -> Figure:
    """The largest activation at the input of each layer as a multiple of the median, by kind of token."""
    figure = _figure(5.2, 3.4)
    axes = figure.subplots()
    kinds = [name for name in layers[0] if name != "median"]
    for number, kind in enumerate(kinds):
        axes.plot([layer[kind]["ratio"] for layer in layers], marker="os^D"[number % 4], label=kind)
    axes.set(xlabel="input of layer", ylabel="largest / median", yscale="log", xticks=range(len(layers)))
    axes.legend(fontsize=8)
    return figure
