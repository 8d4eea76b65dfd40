"""PINE: what a model says does not depend on the order in which several images are shown.

Idea: causal masking favours what stands late, rotary positions what stands near; so segments (images, options,
documents) see each other fully, and for every query, in every head, they are ordered by the model's own attention, the
most important nearest to it. Wang et al., "Eliminating Position Bias of Language Models: A Mechanistic Approach", arXiv
2407.01100.

A prompt is a prefix, segments and a suffix; all segments end at the same position E, that of the suffix's first token.
The importance of segment j for a token is its share of softmax(q k^T / sqrt(d)) over the keys of all segments, queries
and keys without rotation, divided by its tokens; for a segment as a query the own keys are left out and the shares of
its tokens added up, and itself comes last. Sorted by importance, a segment is moved back by the extent of those before
it. A segment's token attends to the prefix, to all other segments and causally to its own; everything behind attends
to all before it. Keys are cached without rotation.

Deviations from the released code: instead of a rotated copy of the keys for every query, the query is rotated by the
shift, which gives the same scores and needs no key tensor per query; batches of any size. Use with images is our
reconstruction (the paper has text only), so this method is experimental: a segment is an image with the tokens that
wrap it, its extent under M-RoPE is that of its positions, and text between images counts as prefix. Labels such as
"Image 1:" must be inside their segment to mean anything: say so with `session.segments`. Questions about the order
("the first image") become meaningless. One image, or none, leaves the model as it is.

Cost: with J segments about J + 2 times the attention of a layer, in fp32, in blocks of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmattn.edits import AttnEdit
from vlmattn.methods.base import register
from vlmattn.methods.segments import Segmenter


@register("pine", title="Eliminating Position Bias of Language Models: A Mechanistic Approach", paper="2407.01100")
@dataclass(frozen=True)
class PINE(Segmenter):
    """Let the images of a prompt stand side by side, ordered for every query by its own attention."""

    def disabled(self) -> None:
        """It has no strength."""

    def edit(self, layer: int) -> AttnEdit:
        """Nothing beside the order."""
        return AttnEdit()

    def positions(self, given: Tensor, segment: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """The prefix counted on, every segment up to E, what follows as it was."""
        first, extent = spans(given, segment)
        behind = real & (segment.flip(1).cummax(1).values < 0).flip(1)
        start = given[0].masked_fill(~real, torch.iinfo(given.dtype).max).amin(1, keepdim=True)
        prefix = real & (segment < 0) & ~behind
        counted = start + prefix.long().cumsum(1) - 1
        end = start + prefix.sum(1, keepdim=True) + extent.sum(1, keepdim=True)
        own = segment.clamp_min(0)
        stacked = given - first.gather(1, own) + end - extent.gather(1, own)
        placed = torch.where(prefix, counted, given)
        return torch.where(segment >= 0, stacked, placed), extent

    def shifts(self, importance: Tensor, extent: Tensor) -> Tensor:
        """The extents of all more important segments; equal ones keep their order."""
        order = torch.argsort(importance, dim=-1, descending=True, stable=True)
        sizes = extent[:, None, None].expand_as(importance).gather(-1, order)
        return torch.zeros_like(sizes).scatter(-1, order, sizes.cumsum(-1) - sizes)


def spans(given: Tensor, segment: Tensor) -> tuple[Tensor, Tensor]:
    """`(B, J)` long each: the first position of every segment, and how many positions it takes; 0 where there is none.

    Args:
        given: `(A, B, N)` long positions, on one axis or three.
        segment: `(B, N)` long, -1 for tokens of no segment.
    """
    first, extent = [], []
    for number in range(max(int(segment.max()) + 1, 1)):
        own, there = segment == number, (segment == number).any(1)
        low = given.amin(0).masked_fill(~own, torch.iinfo(given.dtype).max).amin(1)
        high = given.amax(0).masked_fill(~own, -1).amax(1)
        first.append(torch.where(there, low, 0))
        extent.append(torch.where(there, high + 1 - low, 0))
    return torch.stack(first, 1), torch.stack(extent, 1)
