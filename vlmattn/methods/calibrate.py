"""Calibrated decoding: what the next token's logits are compared with, and what becomes of them.

A calibration acts on the raw logits of the answer's tokens, before any processor or warper of `generate`. Most compare
them with those of a second branch: the same text model on another version of the prompt, with keys and values of its
own, that gets the same answer tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from vlmattn.errors import SpecError
from vlmattn.methods.base import Method, Selector, param
from vlmattn.methods.checks import Checks

PLACES = ("before", "after")


@dataclass(frozen=True)
class Pixels:
    """The pixels of one image or video as they enter the vision tower.

    Attributes:
        values: normalised, in the family's own layout, in the model's dtype.
        key: an int that depends on the values only, for reproducible draws whatever the batch.
        grid: `(t, h, w)` of its visual tokens, if known.
        attended: `(L, n)` fp32, mean over heads: what the last prompt token of the first branch pays to each of its
            tokens in every layer; None unless `Branch.attention`.
        blacken: from a function of height and width to the `(H, W)` bool pixels that stay visible, to `values` with the
            others black; None where the family cannot.
    """

    values: Tensor
    key: int
    grid: tuple[int, int, int] | None = None
    attended: Tensor | None = None
    blacken: Callable[[Callable[[int, int], Tensor]], Tensor] | None = None


@dataclass(frozen=True)
class Hide:
    """Visual keys that are masked without leaving the cache, chosen anew by every row.

    Attributes:
        before_layer: from a model's number of layers to the first layer in which keys are hidden; the choice is made by
            the attention in the layer before.
        choose: from the attention `(B, q, N)` fp32, mean over heads, that rows pay to the columns of the prompt, and
            `(B, N)` bool, which of these are visual, to `(B, q, N)` bool, which are hidden from each row.
    """

    before_layer: Callable[[int], int]
    choose: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Branch:
    """How the second branch differs from the prompt. All methods of the session act in it as well.

    Attributes:
        text_only: it has no images, nor the tokens that wrap them, and counts its positions from 0.
        insert: text, or token ids, that it has beside its first image; the rest moves on by as many positions.
        where: `before` or `after` the first image and the tokens that wrap it.
        pixels: from the pixels of one image to others of the same shape.
        selector: a selector that acts in this branch alone.
        hide: keys that are hidden in this branch alone.
        attention: whether the selector or `pixels` need the attention that the last prompt token of the first branch
            pays in every layer.
    """

    text_only: bool = False
    insert: str | Sequence[int] = ()
    where: str = "before"
    pixels: Callable[[Pixels], Tensor] | None = None
    selector: Selector | None = None
    hide: Hide | None = None
    attention: bool = False


@dataclass(frozen=True)
class Step:
    """The logits that choose `q` tokens of the answer: one while decoding, several while guesses are verified.

    Attributes:
        logits: `(B, q, W)` fp32, raw, over a vocabulary of W.
        other: `(B, q, W)` fp32, those of the second branch; None if there is none.
        number: `(q,)` long, which token of the answer they choose, counting from 1.
        lens: `(J, B, q, W)` fp32, what the head makes of the inputs of the layers of `Calibration.lens`.
    """

    logits: Tensor
    other: Tensor | None
    number: Tensor
    lens: Tensor | None = None


class Calibration(Checks, Method):
    """Changes the logits that choose the answer's tokens.

    A subclass is a frozen dataclass with a field `beta`, implements `combine`, and `branch` or `lens` for what it
    compares with. Prompts without an image are left alone.
    """

    kind: ClassVar[str] = "decode"

    beta: float

    @property
    def requires(self) -> frozenset[str]:
        """What a model must have, by the names that families use for their capabilities."""
        return frozenset()

    @property
    def branch(self) -> Branch | None:
        """The second branch; None: there is only one."""
        return None

    def lens(self, num_layers: int) -> tuple[int, ...]:
        """Decoder layers whose inputs go through the final norm and the head as well, in a model of that depth.

        Raises:
            LayerError: the model has no such layer.
        """
        return ()

    def plausible(self, logits: Tensor) -> Tensor:
        """`(B, q, W)` bool, the tokens that may be chosen: those with at least beta times the largest probability."""
        floor = math.log(self.beta) if self.beta > 0 else -math.inf
        return logits >= logits.amax(-1, keepdim=True) + floor

    def combine(self, step: Step) -> Tensor:
        """`(B, q, W)` fp32, the new logits before the cutoff."""
        raise NotImplementedError(f"{type(self).__name__} must implement combine(step)")

    def calibrated(self, step: Step) -> Tensor:
        """`(B, q, W)` fp32, the new logits; -inf where a token is not plausible by the raw ones."""
        return self.combine(step).masked_fill(~self.plausible(step.logits), -torch.inf)

    def _check_beta(self) -> None:
        self._number("beta", "a number in [0, 1]; 0 cuts nothing off", lambda value: 0 <= value <= 1)


@dataclass(frozen=True)
class Contrast(Calibration):
    """The usual contrast of two branches, `(1 + alpha) * logits - alpha * other`."""

    alpha: float = param(1.0, "how much of the second branch is subtracted; 0 changes nothing")
    beta: float = param(0.1, "tokens below this share of the largest probability cannot be chosen; 0: all can")

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            SpecError: alpha is negative or infinite, or beta outside [0, 1].
        """
        self._number("alpha", "a finite number >= 0", lambda value: 0 <= value < math.inf)
        self._check_beta()

    @property
    def is_noop(self) -> bool:
        """True for alpha = 0, also where beta would cut tokens off."""
        return self.alpha == 0

    def disabled(self) -> Self:
        """The same contrast with alpha = 0."""
        return dataclasses.replace(self, alpha=0.0)

    def combine(self, step: Step) -> Tensor:
        """What the first branch says, and again what it says more loudly than the second."""
        assert step.other is not None
        return (1 + self.alpha) * step.logits - self.alpha * step.other


def instruction(method: Method, given: str | Sequence[int]) -> str | tuple[int, ...]:
    """A text or token ids as a field of `method`, checked; lists become tuples.

    Raises:
        SpecError: it is neither, or empty.
    """
    if isinstance(given, str) and given.strip():
        return given
    if isinstance(given, list | tuple) and given and all(type(token) is int and token >= 0 for token in given):
        return tuple(given)
    raise SpecError(f"{method.name}: {given!r} is no instruction: give a text, or a list of token ids")
