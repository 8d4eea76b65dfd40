"""What is captured at the vision tower: so far, a key of the content of every image."""

from __future__ import annotations

import functools
import inspect
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def content_key(tensor: Tensor, start: int = 0) -> int:
    """CRC-32 of a tensor's bytes, continued from `start`; floats count as bfloat16, so that the model's dtype is no
    matter."""
    if tensor.is_floating_point():
        tensor = tensor.bfloat16()
    return zlib.crc32(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes(), start)


def tapped(
    original: Callable[..., Any],
    split: Callable[[Mapping[str, Any]], Sequence[Tensor]],
    put: Callable[[list[int]], None],
) -> Callable[..., Any]:
    """`original` with a look at its pixels: `put` receives one content key per image before it runs."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def features(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        put([content_key(pixels) for pixels in split(arguments)])
        return original(*args, **kwargs)

    return features
