"""VHR: heads that react to the image are made louder.

Idea: compare the output of every head at the last prompt token with and without the image (VHD, vision-aware head
divergence) and multiply the outputs of the more divergent half by alpha, in this and every later step. He et al.,
"Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", arXiv 2412.13949, equations 4 to 7,
algorithm 1.

Deviations: none known from the paper. Where it is silent we chose: the text-only prompt also loses the tokens that
wrap an image; both streams are scaled; unbiased standard deviation, lower median, distances in fp32; scaling holds at
all positions; in a second turn the heads of the first one stay.

T-VHD, the paper's signal of hallucinated tokens, is `total_divergence(session.token_divergence(...).values, top)`.

Cost: the text-only prompt goes through the prefill beside the prompt, padded to its width, so the decoder's prefill
takes more than twice as long; later steps cost the scaling only.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.errors import LayerError, SpecError
from vlmattn.methods.base import HeadGain, param, register


def divergence(image: Tensor, text: Tensor, outlier_rule: bool = True) -> Tensor:
    """`(B, H)` fp32 VHD: distance of the head outputs `(B, H, D)`; 0 for heads that the outlier rule rejects.

    The rule rejects heads whose divergence and whose text-only energy both exceed mean + standard deviation over heads.
    """
    vhd = (image.float() - text.float()).norm(dim=-1)
    if not outlier_rule:
        return vhd
    energy = text.float().square().sum(-1)

    def above(x: Tensor) -> Tensor:
        return x > x.mean(-1, keepdim=True) + x.std(-1, keepdim=True)

    return vhd.masked_fill(above(vhd) & above(energy), 0.0)


def total_divergence(vhd: Tensor, top: int) -> Tensor:
    """T-VHD: of every layer the sum of the `top` largest divergences, summed over layers.

    Args:
        vhd: `(T, L, B, H)` fp32, as `session.token_divergence` gives it.
        top: heads of a layer that count, between 1 and H.

    Returns:
        `(T, B)` fp32; a low value marks a token that hardly depends on the image.

    Raises:
        SpecError: `top` is no such number.
    """
    if type(top) is not int or not 1 <= top <= vhd.shape[-1]:
        raise SpecError(f"top={top!r}: expected an int between 1 and the {vhd.shape[-1]} heads of a layer")
    return vhd.topk(top, -1).values.sum((1, 3))


@register(
    "vhr", title="Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", paper="2412.13949"
)
@dataclass(frozen=True)
class VHR(HeadGain):
    """Multiply the outputs of the half of the heads that react most to the image."""

    alpha: float = param(2.0, "factor of the chosen heads")
    first_layer: int | None = param(1, "an early layer that is reinforced too, or None")
    depth: int | float = param(0.44, "how many of the last layers: a number, or a share of all (14 of 32 in the paper)")
    outlier_rule: bool = param(True, "reject heads that diverge because of their large text-only output")

    def __post_init__(self) -> None:
        """Validate the fields."""
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not 0 <= self.alpha < math.inf:
            raise SpecError(f"vhr.alpha={self.alpha!r}: expected a number >= 0; 1 changes nothing, the paper has 2")
        if isinstance(self.depth, bool) or not isinstance(self.depth, (int, float)) or self.depth < 0:
            raise SpecError(f"vhr.depth={self.depth!r}: expected a number of layers or a share of all")
        if isinstance(self.depth, float) and self.depth > 1:
            raise SpecError(f"vhr.depth={self.depth!r}: a share cannot exceed 1; give an int for a number of layers")
        first = self.first_layer
        if first is not None and (isinstance(first, bool) or not isinstance(first, int)):
            raise LayerError(f"vhr.first_layer={first!r} is not a layer: give an int, or None")
        if not isinstance(self.outlier_rule, bool):
            raise SpecError(f"vhr.outlier_rule={self.outlier_rule!r}: expected True or False")

    @property
    def needs(self) -> frozenset[str]:
        """A second stream without the image, in lockstep, and head outputs."""
        return frozenset({"text_stream"})

    @property
    def is_noop(self) -> bool:
        """True for alpha = 1."""
        return self.alpha == 1

    def disabled(self) -> VHR:
        """The same reinforcement with alpha = 1."""
        return dataclasses.replace(self, alpha=1.0)

    def layers(self, num_layers: int) -> list[int]:
        """The early layer and the last ones."""
        count = self.depth if isinstance(self.depth, int) else math.floor(self.depth * num_layers + 0.5)
        if count > num_layers or (self.first_layer is not None and not 0 <= self.first_layer < num_layers):
            raise LayerError(f"{self}: this model has {num_layers} decoder layers")
        if count == 0 and self.first_layer is None:
            raise LayerError(f"{self}: no layer of {num_layers} is left to reinforce; raise depth or name first_layer")
        early = set() if self.first_layer is None else {self.first_layer}
        return sorted(early | set(range(num_layers - count, num_layers)))

    def gain(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """alpha for heads above the median divergence of their layer, 1 for the others."""
        vhd = divergence(image, text, self.outlier_rule)
        chosen = vhd > vhd.median(-1, keepdim=True).values
        return torch.where(chosen, float(self.alpha), 1.0), vhd
