"""AGLA: what the model says of the regions that matter for the prompt is added.

Idea: black out what does not belong to the prompt, and add the logits of this second image, which are about local
evidence, to those of the whole one. An et al., "AGLA: Mitigating Object Hallucinations in Large Vision-Language Models
with Assembly of Global and Local Attention", arXiv 2406.12718.

Deviations: the paper takes the map of relevance from an image-text matching model (BLIP-ITM, by gradients) and keeps
1 - sim / 2 of the pixels, with sim its similarity of image and prompt. Here the map is the attention of the wrapped
model itself, that of the last prompt token, mean over heads and layers, and `keep` says the share; results are not the
paper's. The mask is made at the resolution that the vision tower sees (the code squashes images to 384 x 384 first), so
that both branches have the same tokens. Caches are apart: in the released sampler only the first token sees the second
image, from then on its logits are those of the first branch, which sharpens them by 1 + alpha (`official_quirk`).
alpha = 0 leaves the model alone, the cutoff included.

Cost: a second vision tower and prefill behind the first, twice the keys and values; both branches decode in one batch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vlmattn.methods.base import param, register
from vlmattn.methods.calibrate import Branch, Calibration, Pixels, Step

BLUR = 0.02
"""Standard deviation of the blur, as a share of the side."""


def scaled(relevance: Tensor, height: int, width: int) -> Tensor:
    """`(height, width)` fp32 in [0, 1]: a map `(h, w)` resized and blurred; ones where it is the same everywhere."""
    low, high = relevance.min(), relevance.max()
    if not bool(high > low):
        return torch.ones(height, width, device=relevance.device)
    start = ((relevance.float() - low) / (high - low))[None, None]
    wide = functional.interpolate(start, size=(height, width), mode="bicubic", align_corners=False)
    for side, shape in ((height, (-1, 1)), (width, (1, -1))):
        wide = _blurred(wide, BLUR * side, shape)
    wide = wide[0, 0]
    return (wide - wide.min()) / (wide.max() - wide.min())


def _blurred(image: Tensor, sigma: float, shape: tuple[int, int]) -> Tensor:
    """`(1, 1, H, W)` blurred along one axis, with the edge pixels going on outside."""
    reach = max(int(4 * sigma + 0.5), 1)
    offset = torch.arange(-reach, reach + 1, device=image.device)
    kernel = torch.exp(-(offset**2) / (2 * sigma**2))
    sides = (0, 0, reach, reach) if shape[0] == -1 else (reach, reach, 0, 0)
    padded = functional.pad(image, sides, mode="replicate")
    return functional.conv2d(padded, (kernel / kernel.sum()).view(1, 1, *shape))


def visible(relevance: Tensor, keep: float) -> Tensor:
    """`(H, W)` bool, the pixels at least as relevant as the one of rank `int(H * W * keep)`; of equals all."""
    rank = int(relevance.numel() * min(keep, 1 - 1e-5))
    return relevance >= relevance.flatten().sort(descending=True).values[rank]


@register(
    "agla",
    title="AGLA: Mitigating Object Hallucinations in LVLMs with Assembly of Global and Local Attention",
    paper="2406.12718",
)
@dataclass(frozen=True)
class AGLA(Calibration):
    """Add the logits that the model has when it sees only the regions it looks at."""

    alpha: float = param(2.0, "weight of the second branch's logits, which are added; 0 changes nothing")
    beta: float = param(0.5, "tokens below this share of the largest probability cannot be chosen; 0: all can")
    keep: float = param(0.75, "share of the pixels that stay visible; the paper's at a similarity of 0.5")
    official_quirk: bool = param(False, "from the second token on take the first branch's logits, as the code does")

    def __post_init__(self) -> None:
        """Validate the fields."""
        self._number("alpha", "a finite number >= 0", lambda value: 0 <= value < math.inf)
        self._number("keep", "a share in (0, 1]", lambda value: 0 < value <= 1)
        self._check_beta()
        self._flag("official_quirk")

    @property
    def is_noop(self) -> bool:
        """True for alpha = 0."""
        return self.alpha == 0

    def disabled(self) -> AGLA:
        """The same with alpha = 0."""
        return dataclasses.replace(self, alpha=0.0)

    @property
    def requires(self) -> frozenset[str]:
        """Pixels that can be blacked out one by one."""
        return frozenset({"blacken"})

    @property
    def branch(self) -> Branch:
        """The prompt with the less relevant pixels black, known when the first branch is prefilled."""
        return Branch(pixels=self.masked, attention=True)

    def masked(self, pixels: Pixels) -> Tensor:
        """The pixels of one image of which the share `keep` is visible, by the attention it gets."""
        assert pixels.attended is not None and pixels.grid is not None and pixels.blacken is not None
        relevance = pixels.attended.mean(0).view(pixels.grid).mean(0)
        return pixels.blacken(lambda height, width: visible(scaled(relevance, height, width), self.keep))

    def combine(self, step: Step) -> Tensor:
        """`l + alpha * l_aug`."""
        assert step.other is not None
        other = step.other
        if self.official_quirk:
            other = torch.where((step.number > 1)[:, None], step.logits, other)
        return step.logits + self.alpha * other
