"""What a prefill costs: multiply-accumulates, KV bytes and the theoretical saving of dropping visual tokens.

MACs follow the convention of the pruning literature (which prints them as "FLOPs"): attention is counted without the
causal half, the MLP with three matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Dims:
    """Sizes of a decoder.

    Attributes:
        num_layers, hidden, heads, kv_heads, head_dim, mlp: as in the model's text config; `mlp` is the intermediate
            size.
    """

    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int

    @classmethod
    def from_config(cls, config: Any) -> Dims:
        """Read the sizes from a Hugging Face text config."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(config.num_hidden_layers, config.hidden_size, heads, kv_heads, head_dim, config.intermediate_size)


def layer_macs(dims: Dims, tokens: int) -> int:
    """Multiply-accumulates of one decoder layer over `tokens` tokens: projections + attention + MLP."""
    projections = tokens * dims.hidden * (2 * dims.heads * dims.head_dim + 2 * dims.kv_heads * dims.head_dim)
    attention = 2 * tokens * tokens * dims.heads * dims.head_dim
    return projections + attention + 3 * tokens * dims.hidden * dims.mlp


def prefill_macs(dims: Dims, tokens_per_layer: Sequence[int]) -> int:
    """Multiply-accumulates of the decoder layers for one sample; `tokens_per_layer` counts text and visual tokens."""
    return sum(layer_macs(dims, tokens) for tokens in tokens_per_layer)


def kv_bytes(dims: Dims, tokens_per_layer: Sequence[int], bytes_per_value: int) -> int:
    """Bytes of keys and values for one sample after the prefill: `2 * sum(n_l) * kv_heads * head_dim * bytes`."""
    return 2 * sum(tokens_per_layer) * dims.kv_heads * dims.head_dim * bytes_per_value
