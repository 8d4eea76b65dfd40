"""The registered attention name: the implementation the model had, plus what methods need to see of it.

A fresh name per installed configuration makes a compiled model notice that something changed. Models may share one
config
object: the config always carries the name of the newest living registration, whose base is the implementation that
was there before the first one.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmattn.errors import UnsupportedModelError
from vlmattn.kernels.reference import attention_received

PRIVATE = "vlmattn"
"""Name of the keyword that carries a `Collector` from a layer's pre-hook through the layer to the attention
function."""

_serial = itertools.count(1)
_living: dict[int, list[Registration]] = {}


class Collector:
    """Takes the attention that each key of one layer receives and hands it to `put`.

    Args:
        put: receives `(B, N)` fp32.
        rows: `(B, N)` bool query rows.
    """

    def __init__(self, put: Callable[[Tensor], None], rows: Tensor) -> None:
        self.put = put
        self.rows = rows

    def __call__(self, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> None:
        """Score the keys; shapes as in `attention_received`."""
        self.put(attention_received(query, key, mask, scaling, self.rows))


def base_function(name: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function behind an implementation name; eager ones live beside the module's class."""
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


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
        collector = kwargs.pop(PRIVATE, None)
        if collector is not None:
            scaling = kwargs.get("scaling")
            collector(query, key, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
        return base_function(self.base, module)(module, query, key, value, attention_mask, **kwargs)

    def remove(self) -> None:
        """Unregister the name and give the config back what the remaining registrations, if any, want."""
        stack = _living[id(self.config)]
        stack.remove(self)
        self.config._attn_implementation = stack[-1].name if stack else self.base
        if not stack:
            del _living[id(self.config)]
        # There is no public way to unregister; without this, a hundred sessions leave a hundred names behind.
        AttentionInterface._global_mapping.pop(self.name)
        AttentionMaskInterface._global_mapping.pop(self.name)
