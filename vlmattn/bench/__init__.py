"""The bench: what methods cost and save in time, beside what arithmetic promises. `python -m vlmattn.bench`.

Correctness comes first: no time is printed while a proof fails. Then one interleaved run over all configurations of a
large model with random weights, and ratios within that run. Needs torch, transformers, numpy and safetensors only;
where matplotlib is installed it also draws.
"""

from __future__ import annotations

from dataclasses import dataclass

DECODE_STEPS = 6


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        layers, dim, tokens: decoder layers, width, visual tokens.
        repeats: timed rounds after the warm-up.
        threads: of torch; None leaves torch's own choice.
        steps: generated tokens that are timed in every round.
        command: the command line, for the record.
    """

    layers: int = 24
    dim: int = 1024
    tokens: int = 2048
    repeats: int = 7
    threads: int | None = None
    steps: int = DECODE_STEPS
    command: str = "python -m vlmattn.bench"


QUICK = Settings(layers=4, dim=256, tokens=128, repeats=2, steps=2)
"""A run of seconds that shows that everything works; its times mean nothing."""
