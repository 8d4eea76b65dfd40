"""The interleaved run: every round times every configuration once, in rotating order."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmattn import cost
from vlmattn.bench import selection
from vlmattn.bench.cases import Case, Shapes, counting, installed
from vlmattn.bench.gate import GateError
from vlmattn.bench.selection import Choosing
from vlmattn.edits import Keep
from vlmattn.kernels.reference import attention_received
from vlmattn.scenes import bench_model

Say = Callable[[str], None]


@dataclass
class Timing:
    """Raw measurements of one configuration.

    Attributes:
        case: the configuration.
        prefill: seconds per round: the whole forward over the prompt, vision tower included, one position of logits.
        prefill_cpu: processor seconds of the same, over all threads; on a busy machine the better witness.
        decode: per round the seconds of every generated token.
        macs: multiply-accumulates of the decoder's prefill; a text-only stream counts with its own tokens.
        kv_bytes: keys and values after the prefill; None without a session.
        tokens: per layer the tokens it holds of the prompt.
        matrices: shapes of heads x N x N tensors that were allocated; masks: those of N x N ones.
        edited_rows: query rows that attention edits changed, per edited layer.
    """

    case: Case
    prefill: list[float] = field(default_factory=list)
    prefill_cpu: list[float] = field(default_factory=list)
    decode: list[list[float]] = field(default_factory=list)
    macs: int = 0
    kv_bytes: int | None = None
    tokens: list[int] = field(default_factory=list)
    matrices: list[tuple[int, ...]] = field(default_factory=list)
    masks: list[tuple[int, ...]] = field(default_factory=list)
    edited_rows: list[int] = field(default_factory=list)


@dataclass
class Measured:
    """Everything one run measured.

    Attributes:
        timings: in the order of the configurations.
        vision: seconds per round of vision tower and projector alone.
        scoring: seconds per round of a FastV score row (all heads, fp32 softmax) and the choice from it.
        choosing: what every pruner's own work takes.
    """

    timings: list[Timing]
    vision: list[float] = field(default_factory=list)
    scoring: list[float] = field(default_factory=list)
    choosing: list[Choosing] = field(default_factory=list)


@torch.no_grad()
def measure(model: Any, shape: bench_model.Shape, cases: list[Case], repeats: int, steps: int, say: Say) -> Measured:
    """Inspect every configuration once, which also warms it up, then time `repeats` rounds.

    Raises:
        GateError: an edit changed nothing, or a configuration other than eager allocates heads x N x N.
    """
    inputs = bench_model.prompt(shape)
    measured = Measured([Timing(case) for case in cases])
    for timing in measured.timings:
        say(f"inspecting and warming up: {timing.case.name}")
        inspect(timing, model, inputs)
    measured.choosing = selection.warm_up(model, inputs, say)
    for number in range(repeats):
        turn = number % len(cases)
        for timing in measured.timings[turn:] + measured.timings[:turn]:
            with installed(model, timing.case):
                busy = time.process_time()
                seconds, outs = _timed(lambda passes=timing.case.passes: _prefill(model, inputs, passes))  # type: ignore[misc]
                timing.prefill_cpu.append(time.process_time() - busy)
                timing.prefill.append(seconds)
                timing.decode.append(_decode(model, inputs, outs, steps))
        measured.vision.append(_timed(lambda: bench_model.encode_images(model, inputs))[0])
        measured.scoring.append(_scoring(shape))
        for choosing in measured.choosing:
            if not choosing.refused:
                selection.run(choosing, model, inputs)
        last = ", ".join(f"{1000 * timing.prefill[-1]:.0f}" for timing in measured.timings)
        say(f"round {number + 1} of {repeats}: prefill ms {last}")
    return measured


def inspect(timing: Timing, model: Any, inputs: dict[str, Tensor]) -> None:
    """One untimed prefill and one token: what is allocated, edited, kept and counted."""
    config = model.config.get_text_config()
    dims, length = cost.Dims.from_config(config), inputs["input_ids"].shape[1]
    timing.tokens = [length] * dims.num_layers
    timing.macs = cost.prefill_macs(dims, timing.tokens) * timing.case.passes
    with installed(model, timing.case) as session, counting() as changed:
        with Shapes() as shapes:
            outs = _prefill(model, inputs, timing.case.passes)
        _decode(model, inputs, outs, 1)
        timing.edited_rows = [rows for rows in changed if rows > 1]
        if session is not None:
            report = session.report()
            text = report.prompt_tokens[0] - report.visual_tokens[0]
            timing.tokens = [text + visual for visual in report.visual_per_layer[0]]
            timing.macs, timing.kv_bytes = report.prefill_macs, report.kv_bytes
            if any("text_stream" in method.needs for method in session.methods):
                timing.macs += cost.prefill_macs(dims, [text] * dims.num_layers)
    timing.matrices, timing.masks = shapes.squares(set(timing.tokens), dims.heads)
    if timing.matrices and timing.case.attention != "eager":
        raise GateError(f"{timing.case.name}: allocates heads x N x N: {timing.matrices}")
    if "var(" in (timing.case.spec or "") and not timing.edited_rows:
        raise GateError(f"{timing.case.name}: the edit changed nothing, so its time would mean nothing")


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    out = call()
    return time.perf_counter() - start, out


def _prefill(model: Any, inputs: dict[str, Tensor], passes: int) -> list[Any]:
    return [model(**inputs, logits_to_keep=1, use_cache=True) for _ in range(passes)]


def _decode(model: Any, inputs: dict[str, Tensor], outs: list[Any], steps: int) -> list[float]:
    """Seconds of every token; of several passes each goes on with its own cache."""
    mask, caches = inputs["attention_mask"], [out.past_key_values for out in outs]
    seconds = []
    for _ in range(steps):
        mask = torch.cat([mask, mask[:, :1]], 1)
        token, seen = outs[0].logits[:, -1:].argmax(-1), mask

        def step(token: Tensor = token, seen: Tensor = seen) -> list[Any]:
            return [
                model(input_ids=token, attention_mask=seen, past_key_values=cache, use_cache=True) for cache in caches
            ]

        spent, outs = _timed(step)
        seconds.append(spent)
    return seconds


def _scoring(shape: bench_model.Shape) -> float:
    """Seconds of one score row over the prompt and the choice of a quarter of its visual tokens."""
    length = shape.visual + shape.text
    query, key = torch.randn(2, 1, shape.heads, length, bench_model.HEAD_DIM)
    last = torch.zeros(1, length, dtype=torch.bool)
    last[:, -1] = True
    group = torch.arange(shape.images).repeat_interleave(shape.side**2)[None]
    counts = torch.full((1, shape.images), shape.side**2 // 4)

    def score() -> Keep:
        received = attention_received(query, key, None, bench_model.HEAD_DIM**-0.5, last)
        return Keep.top(received[:, : shape.visual], group, counts)

    score()
    return _timed(score)[0]
