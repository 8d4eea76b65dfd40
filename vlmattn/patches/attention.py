"""The registered attention name: the implementation the model had, plus what methods need to see of it.

A fresh name per installed configuration makes a compiled model notice that something changed. Models may share one
config
object: the config always carries the name of the newest living registration, whose base is the implementation that
was there before the first one.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmattn.errors import UnsupportedModelError
from vlmattn.kernels.dispatch import backend
from vlmattn.kernels.reference import attention_given, attention_received
from vlmattn.kernels.rows import Request

PRIVATE = "vlmattn"
"""Name of the keyword that carries `Work` from a layer's pre-hook through the layer to the attention
function."""

_serial = itertools.count(1)
_living: dict[int, list[Registration]] = {}


@dataclass(frozen=True)
class Scoring:
    """Attention received that somebody wants to see.

    Attributes:
        options: what `attention_received` takes beside queries and keys: `rows`, `over`, `heads`.
        put: receives the scores, fp32.
    """

    options: Mapping[str, Any]
    put: Callable[[Tensor], None]


def _untimed(device: torch.device) -> AbstractContextManager[None]:
    """No clock runs inside."""
    return nullcontext()


@dataclass(frozen=True)
class Work:
    """What one attention call has to do beside attending.

    Attributes:
        taken: `(B, M)` long, the only keys and values that are attended to; mask and everything else here speak of
            these. None: all.
        scorings: the attention received that is wanted.
        given: of how many of the last rows the attention that they pay is wanted.
        put_given: receives it, `(B, given, S)` fp32.
        put_keys: receives the rotated keys, `(B, Hkv, N, D)`; None: nobody asks.
        request: the edit and the statistics wanted; None: neither.
        put_statistics: receives the statistics, `(B, H, 4)` fp32.
        attend: queries, keys, values and scaling to what stands in place of the model's attention.
        look: called with queries, keys, mask and scaling, for what else a method wants to see of the layer.
        backend: which implementation serves the request; None: the fastest.
        timed: `Program.timed`, around the scores.
    """

    taken: Tensor | None = None
    scorings: tuple[Scoring, ...] = ()
    given: int = 0
    put_given: Callable[[Tensor], None] | None = None
    put_keys: Callable[[Tensor], None] | None = None
    request: Request | None = None
    put_statistics: Callable[[Tensor], None] | None = None
    backend: str | None = None
    timed: Callable[[torch.device], AbstractContextManager[None]] = _untimed
    attend: Callable[[Tensor, Tensor, Tensor, float], Tensor] | None = None
    look: Callable[[Tensor, Tensor, Tensor | None, float], None] | None = None


def base_function(name: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function behind an implementation name; eager ones live beside the module's class."""
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def is_living(config: Any) -> bool:
    """Whether a config still carries the name of a living registration."""
    stack = _living.get(id(config), [])
    return bool(stack) and config._attn_implementation == stack[-1].name


class Registration:
    """One attention name on one text config, with its undo.

    Raises:
        UnsupportedModelError: the model's implementation is not one whose masks the engine can cut.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        stack = _living.get(id(config), [])
        self.base: str = stack[0].base if stack else config._attn_implementation
        if self.base not in ("sdpa", "eager") and not self.base.startswith("flash_attention"):
            raise UnsupportedModelError(
                f"attention implementation {self.base!r} is not supported: load the model with "
                "attn_implementation='sdpa' (or eager, flash_attention_2)"
            )
        self.name = f"vlmattn_{next(_serial)}"
        AttentionInterface.register(self.name, self._attend)
        AttentionMaskInterface.register(self.name, ALL_MASK_ATTENTION_FUNCTIONS[self.base])
        _living.setdefault(id(config), []).append(self)
        config._attn_implementation = self.name

    def _attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        work: Work | None = kwargs.pop(PRIVATE, None)
        scaling = kwargs.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if work is not None and work.attend is not None:
            return work.attend(query, key, value, scaling), None
        if work is not None and work.taken is not None:
            places = work.taken[:, None, :, None].to(key.device)
            key, value = (x.gather(2, places.expand(-1, x.shape[1], -1, x.shape[3])) for x in (key, value))
        if attention_mask is not None and attention_mask.ndim == 4 and self.base.startswith("flash"):
            attention_mask = attention_mask[:, 0, -1].bool()  # it counts the keys of every row, the last sees them all
        out, weights = base_function(self.base, module)(module, query, key, value, attention_mask, **kwargs)
        if work is None:
            return out, weights
        with work.timed(query.device):
            for scoring in work.scorings:
                scoring.put(attention_received(query, key, attention_mask, scaling, **scoring.options))
        if work.put_given is not None:
            work.put_given(attention_given(query, key, attention_mask, scaling, work.given))
        if work.put_keys is not None:
            work.put_keys(key)
        if work.look is not None:
            work.look(query, key, attention_mask, scaling)
        if work.request is not None:
            serve = backend(work.backend)
            out, statistics = serve(query, key, value, attention_mask, scaling, out, work.request)
            if work.put_statistics is not None and statistics is not None:
                work.put_statistics(statistics)
        return out, weights

    def remove(self) -> None:
        """Unregister the name and give the config back what the remaining registrations, if any, want."""
        stack = _living[id(self.config)]
        stack.remove(self)
        if self.config._attn_implementation == self.name or stack:
            self.config._attn_implementation = stack[-1].name if stack else self.base
        if not stack:
            del _living[id(self.config)]
        # There is no public way to unregister; without this, a hundred sessions leave a hundred names behind.
        AttentionInterface._global_mapping.pop(self.name)
        AttentionMaskInterface._global_mapping.pop(self.name)
