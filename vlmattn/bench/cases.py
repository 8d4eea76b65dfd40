"""What is timed: configurations of the bench, and the instruments that look inside without taking part."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlmattn.kernels import dispatch
from vlmattn.kernels.rows import Request
from vlmattn.methods.attend.var import VAR, sink_strength
from vlmattn.session import Session, wrap

PLAIN = "plain SDPA"
FEW = "fastv, keep 0.25"
VAR_CASE = "var through rows"
CONTRAST = "vcd, both branches in one batch"
TWO_PASSES = "two plain passes a step"


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        name: in tables.
        spec: methods, or None for the model alone, without a session.
        attention: implementation of the decoder.
        passes: forward passes a step, each with a cache of its own; two are how contrastive decoding is usually
            written.
    """

    name: str
    spec: str | None
    attention: str = "sdpa"
    passes: int = 1


def cases(var: str) -> list[Case]:
    """All configurations, the baseline first; `var` is the spec of the attention edit."""
    return [
        Case(PLAIN, None),
        Case("eager", None, "eager"),
        Case("fastv, keep 0.5", "fastv(keep=0.5, before_layer=2)"),
        Case(FEW, "fastv(keep=0.25, before_layer=2)"),
        Case("random before the LLM, keep 0.25", "random(keep=0.25, before_layer=0)"),
        Case(VAR_CASE, var),
        Case("vhr", "vhr"),
        Case("fastv, keep 0.5 + var + vhr", f"fastv(keep=0.5, before_layer=2) + {var} + vhr"),
        Case(CONTRAST, "vcd"),
        Case(TWO_PASSES, None, passes=2),
    ]


@torch.no_grad()
def tagging_var(model: Any, inputs: dict[str, Tensor], visual: Tensor) -> str:
    """A `var` spec whose sinks exist in this model: one hidden dimension and a threshold, found by measuring.

    A random model has no sinks. To time the edit, some visual tokens, but fewer than half, must pass as sinks in every
    edited layer; of all dimensions the one that parts the strongest 5 % from the median best in all layers is taken.

    Args:
        inputs: one prompt; visual: `(N,)` bool.
    """
    states = model(**inputs, logits_to_keep=1, output_hidden_states=True).hidden_states
    strong, median = [], []
    for layer in VAR(sinks=(0,)).layers(len(states) - 1):
        hidden = states[layer][:, visual].float()
        scale = hidden.square().mean(-1, keepdim=True).add(1e-6).sqrt()
        ranked = (hidden.abs() / scale)[0].sort(0).values
        strong.append(ranked[int(0.95 * (ranked.shape[0] - 1))])
        median.append(ranked[ranked.shape[0] // 2])
    low, high = torch.stack(strong).amin(0), torch.stack(median).amax(0)
    dim = int((low / high).argmax())
    tau = float(low[dim])
    assert bool((sink_strength(states[2], (dim,))[0, visual] > tau).any())
    return f"var(tau={math.floor(1000 * tau) / 1000}, sinks=[{dim}])"


@contextmanager
def installed(model: Any, case: Case) -> Iterator[Session | None]:
    """The model in one configuration; None instead of a session for the model alone."""
    model.set_attn_implementation({"text_config": case.attention})
    try:
        if case.spec is None:
            yield None
        else:
            with wrap(model, case.spec) as session:
                yield session
    finally:
        model.set_attn_implementation({"text_config": "sdpa"})


@contextmanager
def counting() -> Iterator[list[int]]:
    """Inside, the list gets one number per edited attention call: how many query rows came out changed."""
    rows, changed = dispatch.BACKENDS["rows"], []

    def look(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, out: Tensor, request: Request
    ) -> tuple[Tensor, Tensor | None]:
        new, statistics = rows(query, key, value, mask, scaling, out, request)
        changed.append(int((new != out).any(-1).any(-1).sum()))
        return new, statistics

    dispatch.BACKENDS["rows"] = look
    try:
        yield changed
    finally:
        dispatch.BACKENDS["rows"] = rows


class Shapes(TorchDispatchMode):
    """Notes the shapes of all tensors that operators return.

    Attributes:
        seen: the shapes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and look at what it returns."""
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.seen.add(tuple(tensor.shape))
        return out

    def squares(self, lengths: set[int], heads: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Shapes of attention's size: with at least `heads` squares of tokens x tokens, and with fewer (masks).

        Args:
            lengths: numbers of tokens that layers hold.
            heads: of the decoder.
        """
        square = sorted(shape for shape in self.seen if len(shape) > 1 and set(shape[-2:]) <= lengths)
        matrices = [shape for shape in square if len(shape) > 2 and shape[-3] >= heads]
        return matrices, [shape for shape in square if shape not in matrices]
