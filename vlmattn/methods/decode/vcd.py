"""VCD: what the model says of a noised image as well is its language prior, and is subtracted.

Idea: run the prompt a second time with an image that has gone through the forward process of a diffusion model, and
contrast the logits of both at every token. Leng et al., "Mitigating Object Hallucinations in Large Vision-Language
Models through Visual Contrastive Decoding", arXiv 2311.16922, equations 2 to 4.

Deviations: alpha = 0 leaves the model alone, the cutoff included; noise is drawn in fp32 by a seed and the image's
pixels, so that it depends neither on the batch nor on what `generate` draws. The paper's gains are for sampling at
temperature 1; against greedy decoding they largely vanish (issues 4 and 15 of the released code), so compare with both.

Cost: a second vision tower and prefill, twice the keys and values; both branches decode in one batch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.errors import SpecError
from vlmattn.methods.base import param, register
from vlmattn.methods.calibrate import Branch, Contrast, Pixels

STEPS = 1000


@functools.cache
def schedule() -> tuple[Tensor, Tensor]:
    """`(1000,)` fp64 factors of the image and of the noise at every step, `sqrt(abar)` and `sqrt(1 - abar)`."""
    beta = torch.linspace(-6, 6, STEPS, dtype=torch.float64).sigmoid() * (0.005 - 1e-5) + 1e-5
    kept = (1 - beta).cumprod(0)
    return kept.sqrt(), (1 - kept).sqrt()


@register(
    "vcd",
    title="Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive Decoding",
    paper="2311.16922",
)
@dataclass(frozen=True)
class VCD(Contrast):
    """Subtract the logits that the model has with a noised image."""

    noise_step: int = param(500, "step of the diffusion process, 0 (hardly any noise) to 999 (noise alone)")
    seed: int = param(0, "seed of the noise")

    def __post_init__(self) -> None:
        """Validate the fields."""
        super().__post_init__()
        if type(self.noise_step) is not int or not 0 <= self.noise_step < STEPS:
            raise SpecError(f"vcd.noise_step={self.noise_step!r}: expected an int from 0 to {STEPS - 1}")
        self._count("seed", 0)

    @property
    def branch(self) -> Branch:
        """The same prompt with noised pixels."""
        return Branch(pixels=self.noised)

    def noised(self, pixels: Pixels) -> Tensor:
        """The pixels of one image after `noise_step` steps of the forward process."""
        image, noise = (float(factors[self.noise_step]) for factors in schedule())
        generator = torch.Generator().manual_seed((pixels.key * 1_000_003 + self.seed) % 2**63)
        drawn = torch.randn(pixels.values.shape, generator=generator).to(pixels.values.device)
        return (image * pixels.values.float() + noise * drawn).to(pixels.values.dtype)
