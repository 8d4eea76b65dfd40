"""Correctness before speed: the proofs of `vlmattn check` for every configuration, on a small model of its make."""

from __future__ import annotations

from typing import Any

import torch

from vlmattn.bench.cases import cases, counting, installed, tagging_var
from vlmattn.check import check_inputs
from vlmattn.errors import VlmattnError
from vlmattn.scenes import bench_model

SMALL = bench_model.Shape.of(layers=4, dim=128, tokens=128, text=24)
SPREAD = 0.1


class GateError(VlmattnError, RuntimeError):
    """A proof failed, so nothing is timed."""


def prove() -> list[dict[str, Any]]:
    """Run every proof; returns the claims as data.

    Raises:
        GateError: a claim failed, was refused, or an edit that is to be timed changes nothing.
    """
    model = bench_model.build(SMALL, initializer_range=SPREAD)
    inputs = bench_model.prompt(SMALL)
    visual = inputs["input_ids"][0] == bench_model.IMAGE_ID
    proofs: list[dict[str, Any]] = []
    for case in cases(tagging_var(model, inputs, visual)):
        if case.spec is None or case.attention != "sdpa":
            continue
        with torch.no_grad(), counting() as changed, installed(model, case):
            model(**inputs)
        if "var(" in case.spec and not all(changed or [0]):
            raise GateError(
                f"{case.name}: the edit changed {changed} rows in its layers, so its time would mean nothing"
            )
        result = check_inputs(model, inputs, case.spec)
        for row in result.rows:
            if row.passed is False or row.refused:
                raise GateError(f"{case.name}: {row.name} {row.verdict}, nothing is timed: {row.explanation}")
        rows = [{"name": row.name, "verdict": row.verdict, "value": row.value} for row in result.rows]
        proofs.append({"configuration": case.name, "spec": result.spec, "claims": rows})
    return proofs
