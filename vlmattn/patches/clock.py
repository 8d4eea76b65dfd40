"""The time that a session spends on choosing tokens, apart from the model's own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Adds up the time of the parts of a prefill that choose: looks inside the tower, scores, and decisions.

    Attributes:
        seconds: since it was made or set to 0.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Inside, time counts; a GPU is waited for before and after, so that nothing else is counted."""
        _wait(device)
        start = time.perf_counter()
        try:
            yield
        finally:
            _wait(device)
            self.seconds += time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
