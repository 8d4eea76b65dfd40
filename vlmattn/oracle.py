"""What the claims of `vlmattn check` are measured by: distances, masks instead of removal, and a model's footprint."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface


@dataclass(frozen=True)
class Gap:
    """How far two sets of logits are apart.

    Attributes:
        largest: largest difference over the largest logit.
        rms: root mean square of the difference over that of the logits.
        agreement: share of positions with the same best token.
    """

    largest: float
    rms: float
    agreement: float


def compare(one: Tensor, other: Tensor) -> Gap:
    """The gap between logits `(n, vocabulary)`; NaN anywhere makes it infinite."""
    largest, scale, same = 0.0, torch.finfo(torch.float32).tiny, 0
    squares = torch.zeros(2, dtype=torch.float64)
    for a, b in zip(one.split(64), other.split(64), strict=True):
        a, b = a.float(), b.float()
        cut = a.isneginf() & b.isneginf()  # tokens that a calibration rules out
        a, b = a.masked_fill(cut, 0.0), b.masked_fill(cut, 0.0)
        largest = max(largest, float((a - b).abs().max().nan_to_num(torch.inf)))
        scale = max(scale, float(b.abs().max()))
        squares += torch.stack([(a - b).square().sum(), b.square().sum()]).cpu().double()
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
    rms = float((squares[0] / squares[1].clamp_min(1e-300)).sqrt().nan_to_num(torch.inf))
    return Gap(largest / scale, rms, same / max(one.shape[0], 1))


def longer(inputs: Mapping[str, Any], ids: Tensor) -> dict[str, Any]:
    """Inputs whose per-token tensors cover `ids` `(1, n + new)` as well; what is new is text."""
    length = inputs["input_ids"].shape[1]
    longer = dict(inputs) | {"input_ids": ids}
    for name, value in inputs.items():
        if name != "input_ids" and isinstance(value, Tensor) and value.shape == (1, length):
            fill = value.new_full((1, ids.shape[1] - length), int(name == "attention_mask"))
            longer[name] = torch.cat([value, fill], 1)
    return longer


@contextmanager
def masked(
    layers: Sequence[nn.Module],
    dropped: Mapping[int, Sequence[int]],
    additive: bool,
    gone: Mapping[int, Sequence[int]] = MappingProxyType({}),
    start: int = 0,
) -> Iterator[None]:
    """Inside, nobody but themselves sees the columns that `dropped` names from its layer on (until a later entry).

    Args:
        layers: the decoder layers.
        dropped: layer -> prompt columns.
        additive: whether the attention takes masks of 0 and the lowest number instead of bools.
        gone: layer -> columns that rows from `start` on do not see in this layer either.
        start: first row that is meant.
    """

    def swap(module: nn.Module, args: Any, kwargs: dict[str, Any], columns: Sequence[int], later: Sequence[int]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        n, device = hidden.shape[1], hidden.device
        allowed = torch.ones(n, dtype=torch.bool, device=device)
        allowed[list(columns)] = False
        square = torch.ones(n, n, dtype=torch.bool, device=device).tril() & allowed
        square[start:, list(later)] = False
        square = (square | torch.eye(n, dtype=torch.bool, device=device))[None, None]
        if additive:
            lowest = torch.finfo(hidden.dtype).min
            square = torch.zeros(square.shape, dtype=hidden.dtype, device=device).masked_fill(~square, lowest)
        return args, kwargs | {"attention_mask": square}

    def hook(columns: Sequence[int], later: Sequence[int]) -> Callable[..., Any]:
        return lambda module, args, kwargs: swap(module, args, kwargs, columns, later)

    handles = []
    try:
        for index, layer in enumerate(layers):
            ruling = [start for start in sorted(dropped) if start <= index]
            if ruling or index in gone:
                columns = dropped[ruling[-1]] if ruling else ()
                handles.append(layer.register_forward_pre_hook(hook(columns, gone.get(index, ())), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def footprint(model: nn.Module) -> dict[str, Any]:
    """Everything a session could leave behind on a model and in the registries of transformers, by name."""
    kinds = [name for name in nn.Module().__dict__ if "hook" in name]
    modules = dict(model.named_modules())
    configs = {id(m.config): m.config for m in modules.values() if hasattr(m, "config")}.values()
    return {
        "hooks": {name: {kind: list(getattr(m, kind) or ()) for kind in kinds} for name, m in modules.items()},
        "attributes": {name: sorted(m.__dict__) for name, m in modules.items()},
        "replaced methods": {
            name: {key: id(value) for key, value in m.__dict__.items() if inspect.isroutine(value)}
            for name, m in modules.items()
        },
        "classes": {name: type(m) for name, m in modules.items()},
        "attention names": [getattr(config, "_attn_implementation", None) for config in configs],
        "registries": (sorted(AttentionInterface().valid_keys()), sorted(AttentionMaskInterface().valid_keys())),
    }
