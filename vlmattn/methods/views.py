"""What methods may see of a prompt, and what they may ask to see."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlmattn.edits import NOT_A_KEY, VISUAL
from vlmattn.errors import SpecError
from vlmattn.spans import Raster, Span

ROWS = ("last", "text", "after", "all", "own")
WATCHED = ("last", "text", "after", "all", "chunks")


@dataclass(frozen=True)
class Attention:
    """Attention of the decoder that a pruner ranks by, averaged over query rows.

    Attributes:
        rows: the query rows that count: the `last` prompt token, all `text`, the text `after` the last image (the last
            token where there is none), `all` tokens, or the method's `own` choice, see `Selector.query_rows`.
        layer: `before`: in the layer before the pruned one, as that layer computed it; `upcoming`: in the pruned layer
            itself, on the tokens that arrive there.
        rotary: whether queries and keys are rotated by their positions.
        over: the keys of the softmax: `all`, or `visual` ones only.
        heads: whether heads are kept apart instead of averaged.
        once: whether the scores of the first stage serve all later ones.
    """

    rows: str = "last"
    layer: str = "before"
    rotary: bool = True
    over: str = "all"
    heads: bool = False
    once: bool = False

    @property
    def is_free(self) -> bool:
        """Whether the layer before computes these queries and keys anyway."""
        return self.layer == "before" and self.rotary


@dataclass(frozen=True)
class Look:
    """One thing of the vision tower, a row per visual token.

    Attributes:
        what: its name, such as `attention`, `keys` or `features`; see `vlmattn.patches.tower.looking`.
        layer: of the tower, 0-indexed, from the end where negative; None: the one whose output the projector reads. On
            a tower that attends in windows the next one behind it that sees the whole image.
        weigh: for `weighted`: the attention that the tokens of `P` images receive, `(P, W)` fp32, and which of them
            there are, `(P, W)` bool, to the weights `(P, W)` of their own rows; for `entropy`: the entropies to what is
            made of them.
        tiled: whether only images of several grids are looked at for it; of families that have none it is left out.
    """

    what: str
    layer: int | None = None
    weigh: Callable[[Tensor, Tensor], Tensor] | None = None
    tiled: bool = False


@dataclass(frozen=True)
class Text:
    """The text rows of a prompt before a decoder layer, in order, padded at the end.

    Attributes:
        real: `(B, T)` bool, False at padding.
        after: `(B, T)` bool, text behind the last visual token: the question and what follows it.
        hidden: `(B, T, C)` their rows of the layer input, in the model's dtype.
        layer_keys: `(B, T, Hkv, D)` their keys in layer `layer - 1`, rotated; None if `layer_keys` is not needed.
    """

    real: Tensor
    after: Tensor
    hidden: Tensor
    layer_keys: Tensor | None = None


@dataclass(frozen=True)
class Paired:
    """The questions of a batch in the space that the vision tower shares with its text tower.

    Attributes:
        text: `(B, S, P)` embeddings of the segments of each question, padded at the end.
        segments: `(B, S)` bool, which there are.
        last: `(B, P)` the last position of the first segment, padded to its full length.
        patches: rows of the vision tower `(..., C')`, the look `states`, to the same space `(..., P)`; with False
            instead of True without the tower's last norm.
    """

    text: Tensor
    segments: Tensor
    last: Tensor
    patches: Callable[[Tensor, bool], Tensor]

    def rows(self, index: Tensor) -> Paired:
        """The questions `index` `(n,)` long, in that order."""
        index = index.to(self.text.device)
        return Paired(self.text[index], self.segments[index], self.last[index], self.patches)


@dataclass(frozen=True)
class View:
    """What a pruner sees of a batch just before decoder layer `layer`: visual tokens only, in order, padded at the end.

    Attributes:
        layer: the decoder layer whose input is pruned; 0 is the entry of the text model.
        image: `(B, V)` long, index of the image within the sample, -1 at padding.
        counts: `(B, G)` long, visual tokens of each image that arrive.
        spans: per sample the spans as they stood in the prompt.
        index: `(B, V)` long, index of the token within its image as it stood in the prompt.
        stage: which of the method's stages this is, counting from 0.
        num_layers: decoder layers of the model.
        hidden: `(B, V, C)` the visual rows of the layer input, in the model's dtype; None if `layer_input` is not
            needed. Before layer 0 these are the projected features.
        scores: `(B, V)` fp32, or `(B, H, V)` with the heads apart: the attention received that `Selector.attention`
            asks for, 0 at padding; None if it asks for none.
        layer_keys: `(B, V, Hkv, D)` the keys of layer `layer - 1`, rotated; None if `layer_keys` is not needed.
        text: the rest of the prompt; None if `text_rows` is not needed.
        vision: what `Selector.looks` asks for, `(B, V, ...)` by name; zeros at padding.
        project: the model's projector, from tower features `(..., C')` to embedding rows `(..., C)`; None if
            `projector` is not needed.
        paired: the question beside the vision tower; None unless `text_tower` is required.
        norms: `final`, the norm behind the last layer, and `layer`, the one at the entry of this layer; empty if
            `norms` is not needed.
        attended: `(B, L, V)` fp32, mean over heads: what the last prompt token of the first branch pays to each token
            in every layer; None outside second branches that need it.
        keys: per sample and image an int that depends only on the sample's text and the image's pixels, for
            reproducible draws whatever the batch; None if `content_key` is not needed.
    """

    layer: int
    image: Tensor
    counts: Tensor
    spans: tuple[tuple[Span, ...], ...]
    index: Tensor
    stage: int = 0
    num_layers: int = 1
    hidden: Tensor | None = None
    scores: Tensor | None = None
    layer_keys: Tensor | None = None
    text: Text | None = None
    vision: Mapping[str, Tensor] = field(default_factory=dict)
    project: Callable[[Tensor], Tensor] | None = None
    paired: Paired | None = None
    norms: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    attended: Tensor | None = None
    keys: tuple[tuple[int, ...], ...] | None = None

    @property
    def lengths(self) -> list[list[int]]:
        """Per sample the visual tokens of each image as it stood in the prompt; 0 where a sample has fewer images."""
        images = self.counts.shape[1]
        return [[span.length for span in row] + [0] * (images - len(row)) for row in self.spans]

    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """`(B, V)` long each: rows and columns of the frame that a token stands in, and its place there, counted row by
        row. An image whose grids are not known is one row."""
        rasters = [[span.rasters or (Raster((1, 1, span.length)),) for span in row] for row in self.spans]
        most = max((len(image) for row in rasters for image in row), default=1)
        table = torch.ones(*self.counts.shape, most, 3, dtype=torch.long)
        table[..., 0] = torch.iinfo(torch.long).max  # no token is behind the start of a grid that there is not
        for row, images in enumerate(rasters):
            for number, image in enumerate(images):
                start = itertools.accumulate((raster.length for raster in image), initial=0)
                facts = [(first, *raster.grid[1:]) for first, raster in zip(start, image, strict=False)]
                table[row, number, : len(facts)] = torch.tensor(facts)
        mine = table.to(self.image.device)[torch.arange(len(self.image))[:, None], self.image.clamp_min(0)]
        grid = ((self.index[..., None] >= mine[..., 0]).sum(-1) - 1).clamp_min(0)
        first, height, width = mine.gather(2, grid[..., None, None].expand(-1, -1, 1, 3))[:, :, 0].unbind(-1)
        return height, width, (self.index - first) % (height * width)


@dataclass(frozen=True)
class LayerView:
    """What an editor sees of a prompt when it enters a decoder layer, after pruning.

    Attributes:
        hidden: `(B, S, C)` the layer's input, in the model's dtype.
        visual: `(B, S)` bool.
        real: `(B, S)` bool, False at padding.
        sink_dims: hidden dimensions that carry massive activations in this checkpoint; None if `sink_dims` is not
            needed.
        vision: what `Editor.looks` asks for, `(B, V, ...)` by name, over all visual tokens of the prompt, those that
            were pruned too; zeros at padding.
        grid: `(B, V)` long, index of their grid (an image, or one of several pictures of it) within the sample, -1 at
            padding.
        token: `(B, S)` long, which of them a slot holds; -1 for text, newline tokens and padding.
    """

    hidden: Tensor
    visual: Tensor
    real: Tensor
    sink_dims: tuple[int, ...] | None = None
    vision: Mapping[str, Tensor] = field(default_factory=dict)
    grid: Tensor | None = None
    token: Tensor | None = None

    @property
    def tag(self) -> Tensor:
        """`(B, S)` uint8, `TEXT`, `VISUAL` or `NOT_A_KEY`."""
        return torch.where(self.real, self.visual.to(torch.uint8) * VISUAL, NOT_A_KEY).to(torch.uint8)

    @property
    def before(self) -> Tensor:
        """`(B, S)` bool, text before the first visual token."""
        return self.real & (self.visual.cumsum(1) == 0)

    @property
    def after(self) -> Tensor:
        """`(B, S)` bool, text behind the last visual token."""
        return self.real & (self.visual.flip(1).cumsum(1) == 0).flip(1)


@dataclass(frozen=True)
class Watch:
    """Attention that the keys of a layer receive in one pass, as that layer computes it.

    Attributes:
        rows: the query rows that count: in the prefill the `last` prompt token, all `text`, the text `after` the last
            image (the last token where there is none), `all` tokens, or `chunks`: apart for every image, or frame of a
            video, the rows of its tokens. Later `last` is the last token of the pass, and everything is text.
        heads: whether heads are kept apart instead of averaged.
        total: whether rows are summed instead of averaged.
    """

    rows: str = "last"
    heads: bool = False
    total: bool = False

    def __post_init__(self) -> None:
        """Refuse rows that there are not."""
        if self.rows not in WATCHED:
            raise SpecError(f"Watch(rows={self.rows!r}): expected one of {', '.join(WATCHED)}")


@dataclass(frozen=True)
class CacheView:
    """What a method sees of the cache of one decoder layer after a pass.

    Slots are in order of the conversation; where rows hold unequal numbers of tokens some at the start are empty.

    Attributes:
        layer: the decoder layer.
        num_layers: decoder layers of the model.
        step: tokens after the prompt so far, this pass's included; 0 after the prefill.
        new: tokens of this pass, the last slots; in the prefill all of them.
        column: `(B, S)` long, place of the token in the padded conversation, counting from 0.
        real: `(B, S)` bool, False where a slot holds no token.
        visual: `(B, S)` bool.
        image: `(B, S)` long, index of the image within the sample, -1 for text.
        chunk: `(B, S)` long, index of the image, or frame of a video, within the sample, -1 for text.
        spans: per sample the spans of its images, as they stood in the prompt.
        scores: what `Evictor.watched` asks for, fp32 `(B, S)` by name, `(B, H, S)` with the heads apart; with rows by
            `chunks` `(B, G, S)` or `(B, G, H, S)` for G chunks. 0 for slots without a token or hidden in this pass.
        state: what the last decision about this layer left, see `Eviction`; empty after the prefill.
    """

    layer: int
    num_layers: int
    step: int
    new: int
    column: Tensor
    real: Tensor
    visual: Tensor
    image: Tensor
    chunk: Tensor
    spans: tuple[tuple[Span, ...], ...]
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)
