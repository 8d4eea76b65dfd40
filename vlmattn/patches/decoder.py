"""The parts of a decoder that scoring uses apart from its layers' own pass: projections, rotation, norms."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmattn.kernels.reference import attention_received
from vlmattn.patches.families.base import Family

Tables = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary positions, `(B or 1, N, D)`, or `(3, B, N, D)` where the axes are not yet merged."""


@dataclass(frozen=True)
class Decoder:
    """A decoder, found by its family's declaration.

    Attributes:
        model: the wrapped model.
        family: of the model.
        heads: query heads of a layer.
    """

    model: nn.Module
    family: Family
    heads: int

    @property
    def text_model(self) -> nn.Module:
        """The module that the family names."""
        return self.family.part(self.model, "text_model")

    @property
    def num_layers(self) -> int:
        """How many layers it has."""
        return len(getattr(self.text_model, self.family.layers))

    @property
    def project(self) -> Callable[[Tensor], Tensor]:
        """From the vision tower's features to embedding rows."""
        return self.family.project(self.model)

    def _layer(self, index: int) -> nn.Module:
        return getattr(self.text_model, self.family.layers)[index]

    def norms(self, index: int) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """The norm behind the last layer and the one at the entry of layer `index`."""
        final = operator.attrgetter(self.family.final_norm)(self.text_model)
        return {"final": final, "layer": operator.attrgetter(self.family.entry_norm)(self._layer(index))}

    def tables(self, hidden: Tensor, position_ids: Tensor) -> Tables:
        """Rotary tables of positions `(B, N)` in the dtype of `hidden`."""
        return operator.attrgetter(self.family.rotary)(self.text_model)(hidden, position_ids)

    def scores(
        self, index: int, hidden: Tensor, tables: Tables | None, mask: Tensor | None, score: Mapping[str, Any]
    ) -> Tensor:
        """Attention that tokens receive in layer `index` if `hidden` enters it, without running the layer.

        Queries are computed only from the first row on that counts.

        Args:
            hidden: `(B, N, C)` the layer's input.
            tables: its rotary tables; None: no rotation.
            mask: its attention mask.
            score: `rows`, `over` and `heads` of `attention_received`.

        Returns:
            fp32 `(B, N)` or `(B, H, N)`.
        """
        layer = self._layer(index)
        first = int(score["rows"].any(0).long().argmax())
        entering = operator.attrgetter(self.family.entry_norm)(layer)(hidden)
        key = self._project(layer, self.family.key, entering)
        query = self._project(layer, self.family.query, entering[:, first:])
        if tables is not None:
            cos, sin = self.merged(tables)
            key = _rotate(key, cos, sin)
            query = _rotate(query, cos[..., first:, :], sin[..., first:, :])
        return attention_received(query, key, mask, query.shape[-1] ** -0.5, **score)

    def _project(self, layer: nn.Module, names: tuple[str, ...], entering: Tensor) -> Tensor:
        """`(B, H, N, D)`: the projection, and the norm of heads where the family names one."""
        project, *norms = (operator.attrgetter(name)(layer) for name in names)
        width: Any = operator.attrgetter("self_attn.head_dim")(layer)
        heads = project(entering).unflatten(-1, (-1, width))
        for norm in norms:
            heads = norm(heads)
        return heads.transpose(1, 2)

    def merged(self, tables: Tables) -> Tables:
        """Tables `(B or 1, N, D)`: some releases merge the axes of M-RoPE only inside the attention."""
        if tables[0].ndim == 3:
            return tables
        config: Any = self.text_model.config
        sections = config.rope_parameters["mrope_section"] * 2
        cos, sin = (
            torch.cat([part[axis % 3] for axis, part in enumerate(table.split(sections, -1))], -1) for table in tables
        )
        return cos, sin


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads `(B, H, N, D)` rotated by tables `(B or 1, N, D)`, halves as pairs."""
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
