"""Which implementation serves an attention call: chosen by device and shape, never by the method."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from vlmattn.kernels import naive, rows
from vlmattn.kernels.rows import Request

Backend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, Tensor, Request], tuple[Tensor, Tensor | None]]

BACKENDS: dict[str, Backend] = {"reference": naive.apply, "rows": rows.apply}


def backend(name: str | None) -> Backend:
    """The backend called `name`; None picks the fastest that serves every shape here, which is `rows`."""
    return BACKENDS[name or "rows"]
