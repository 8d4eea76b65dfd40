"""VAR: attention wasted on sink tokens is given to the visual tokens that are not sinks.

Idea: some tokens, visual ones among them, carry massive activations in a few hidden dimensions and soak up attention in
every head although nothing is to be seen there. In heads that look at the image, take a share p from all sinks and
hand it to the other visual tokens in proportion to the attention they have. Kang et al., "See What You Are Told",
arXiv 2503.03321.

Deviations: `p` is the share taken (paper), not the factor left (code); `rho` is the paper's share of non-sinks; the
last layer is left out as the paper says (the code edits it); the 1e-6 of the code inside the share is not copied;
`tau` scales with the width, 0.3125 * sqrt(C), which is the paper's 20 at 4096 (our choice for other widths).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.edits import NOT_A_KEY, TEXT_SINK, VISUAL, VISUAL_SINK, AttnEdit, Tags
from vlmattn.errors import SpecError
from vlmattn.methods.attend._layers import LayerRange
from vlmattn.methods.base import LayerView, param, register


def sink_strength(hidden: Tensor, dims: tuple[int, ...]) -> Tensor:
    """`(B, S)` fp32, phi: the largest of the sink dimensions over the root mean square of the token (without
    weight)."""
    wide = hidden.float()
    rms = (wide.square().mean(-1) + 1e-6).sqrt()
    return wide[..., list(dims)].abs().amax(-1) / rms


@register("var", title="See What You Are Told: Visual Attention Sink in Large Multimodal Models", paper="2503.03321")
@dataclass(frozen=True)
class VAR(LayerRange):
    """Take attention from sink tokens and give it to the visual tokens that are not sinks."""

    p: float = param(0.6, "share of the sinks' attention that is taken; the released code takes 0.4")
    rho: float = param(0.5, "heads act where non-sinks have at least this share of the visual attention")
    min_visual: float = param(0.2, "heads act where the image has at least this much of a row's attention")
    tau: float | None = param(
        None, "a token is a sink above this strength; None: 0.3125 * sqrt(width), 20 at width 4096"
    )
    sinks: tuple[int, ...] | None = param(None, "hidden dimensions of the sinks; None: the checkpoint's preset")
    first_layer: int | None = param(2, "first decoder layer that is edited")
    last_layer: int | None = param(None, "last decoder layer that is edited; None: the last but one")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        for name in ("p", "rho", "min_visual"):
            self._number(name, "a share in [0, 1]", lambda value: 0 <= value <= 1)
        if self.tau is not None:
            self._number("tau", "a positive number, or None", lambda value: value > 0)
        if self.sinks is not None:
            listed = isinstance(self.sinks, (list, tuple))
            if not listed or not all(type(dim) is int and dim >= 0 for dim in self.sinks):
                raise SpecError(f"var.sinks={self.sinks!r}: expected hidden dimensions such as [1415, 2533]")
            object.__setattr__(self, "sinks", tuple(self.sinks))

    @property
    def needs(self) -> frozenset[str]:
        """The checkpoint's sink dimensions, unless they are given."""
        return frozenset() if self.sinks is not None else frozenset({"sink_dims"})

    @property
    def is_noop(self) -> bool:
        """True where nothing can be taken."""
        return self.p == 0 or self.sinks == ()

    def disabled(self) -> VAR:
        """The same edit with p = 0."""
        return dataclasses.replace(self, p=0.0)

    def paper_layers(self, num_layers: int) -> tuple[int, int]:
        """All but the last."""
        return 0, num_layers - 2

    def tags(self, view: LayerView) -> Tags:
        """Sinks by strength; a sample without a visual sink in this layer is left alone."""
        dims = view.sink_dims if self.sinks is None else self.sinks
        if dims and max(dims) >= view.hidden.shape[-1]:
            raise SpecError(f"{self}: this model has {view.hidden.shape[-1]} hidden dimensions, counting from 0")
        tau = 0.3125 * math.sqrt(view.hidden.shape[-1]) if self.tau is None else self.tau
        sink = sink_strength(view.hidden, dims) > tau if dims else torch.zeros_like(view.real)
        tag = view.visual.to(torch.uint8) * VISUAL + sink.to(torch.uint8) * TEXT_SINK
        return Tags(torch.where(view.real, tag, NOT_A_KEY).to(torch.uint8), (tag == VISUAL_SINK).any(1))

    def edit(self, layer: int) -> AttnEdit:
        """Take p from both kinds of sinks, give to visual non-sinks, behind the two gates."""
        return AttnEdit(take=(0.0, self.p, 0.0, self.p), give=VISUAL, min_visual=self.min_visual, min_share=self.rho)
