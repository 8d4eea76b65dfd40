"""One whole run: proofs, inspection, timing, record."""

from __future__ import annotations

from typing import Any

import torch

from vlmattn.bench import Settings
from vlmattn.bench.cases import cases, tagging_var
from vlmattn.bench.gate import prove
from vlmattn.bench.measure import Say, measure
from vlmattn.bench.result import load, record
from vlmattn.errors import SpecError
from vlmattn.scenes import bench_model


def run(settings: Settings, say: Say) -> dict[str, Any]:
    """Prove, then time; returns the record of `result.record`.

    Args:
        settings: sizes and repeats.
        say: receives lines about the progress.

    Raises:
        GateError: a proof failed; nothing was timed.
        SpecError: the sizes do not make a model.
    """
    try:
        shape = bench_model.Shape.of(settings.layers, settings.dim, settings.tokens)
    except ValueError as error:
        raise SpecError(str(error)) from None
    if settings.repeats < 1 or settings.steps < 1:
        raise SpecError(f"repeats={settings.repeats}, steps={settings.steps}: expected at least 1")
    threads = torch.get_num_threads()
    before = load()
    try:
        say("proving on a small model that every configuration is right")
        torch.set_num_threads(1)
        proofs = prove()
        torch.set_num_threads(settings.threads or threads)
        say(f"building {bench_model.NAME}: {shape}")
        model, inputs = bench_model.build(shape), bench_model.prompt(shape)
        var = tagging_var(model, inputs, inputs["input_ids"][0] == bench_model.IMAGE_ID)
        measured = measure(model, shape, cases(var), settings.repeats, settings.steps, say)
        return record(settings, shape, proofs, measured, before)
    finally:
        torch.set_num_threads(threads)
