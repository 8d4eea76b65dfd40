"""What happens inside the vision tower, for methods that look there: attention, keys and features of visual tokens.

Hooks keep the inputs of the few attention layers that are looked at; the rows a method wants are computed from them
afterwards, block by block, so that the tower itself runs as it always does.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmattn.errors import LayerError, SpecError, UnsupportedModelError
from vlmattn.methods.base import Look
from vlmattn.spans import Raster, Span

AT_A_LAYER = ("attention", "joined", "received", "weighted", "keys")
WHAT = (*AT_A_LAYER, "features", "cls", "states", "entropy")
"""What a look may be at."""

BLOCK = 2**24
"""Attention logits that are held at a time."""


Normal = tuple[Sequence[float], Sequence[float]]
"""Mean and deviation by which a processor normalises red, green and blue, for values in [0, 1]."""


def normal_of(processor: Any) -> Normal | None:
    """How the image processor of `processor` normalises; None where there is none that says."""
    images = getattr(processor, "image_processor", None)
    if getattr(images, "do_normalize", None) is False:
        return (0.0,) * 3, (1.0,) * 3
    mean, std = (getattr(images, name, None) for name in ("image_mean", "image_std"))
    return None if mean is None or std is None else (mean, std)


@dataclass(frozen=True)
class Rows:
    """One tower layer's queries and keys. A segment is what attends to itself: an image, or a frame of one.

    Attributes:
        query: `(S, H, N, D)`; only the CLS row, `(S, H, 1, D)`, where there is one.
        key: `(S, H, N, D)`.
        plain: `(S, H, N, D)` keys before rotation.
        scale: of the logits.
        token: `(S, N)` long, the visual token that a tower row ends up in, counted over all images; -1 for CLS.
        real: `(S, N)` bool, False where a segment is shorter.
        lengths: visual tokens of each image.
    """

    query: Tensor
    key: Tensor
    plain: Tensor
    scale: float
    token: Tensor
    real: Tensor
    lengths: tuple[int, ...]


def _listed(output: Any, arguments: Mapping[str, Any]) -> Sequence[Tensor]:
    """Embedding rows of each image where the feature method lists them so."""
    rows: Sequence[Tensor] = output.pooler_output
    return rows


@dataclass(frozen=True)
class TowerParts:
    """Where looks find things in one model.

    Attributes:
        tower: the vision tower; `rows` gets its arguments.
        attentions: the attention module of every layer.
        whole: the layers that see a whole image at once, ascending.
        feature_layer: the layer whose output the projector reads.
        rows: `(attention module, its arguments, the tower's arguments, whether all queries are needed)` to `Rows`.
        projector: the module that maps tower rows one by one to embedding rows; None if it joins several of them, so
            that its output counts as the features.
        cls: the feature method's output to the CLS rows of the features, `(images, 1, C)`; None: the tower has no CLS
            token. Where it has one, it is the first row of a segment.
        gray: `(the feature method's arguments, how its pixels are normalised or None for the family's way)` to the gray
            values, `(n, patches, pixels)` in [0, 255], of the tokens of each image.
        arrange: rows of the tower's tokens `(pictures, n, ...)` and the feature method's arguments to those of the
            visual tokens in the prompt, `(n_i, ...)` an image; None: every picture is an image, its tokens are these.
        blocks: the layers, whose outputs `(images, N, C)` end in the rows of the visual tokens; none where tokens have
            no rows of their own.
        images: the feature method's output and its arguments to the embedding rows `(n_i, C)` of each image.
    """

    tower: nn.Module
    attentions: Sequence[nn.Module]
    whole: Sequence[int]
    feature_layer: int
    rows: Callable[[nn.Module, Mapping[str, Any], Mapping[str, Any], bool], Rows]
    projector: nn.Module | None
    cls: Callable[[Any], Tensor] | None
    gray: Callable[[Mapping[str, Any], Normal | None], Sequence[Tensor]]
    blocks: Sequence[nn.Module]
    images: Callable[[Any, Mapping[str, Any]], Sequence[Tensor]] = _listed
    arrange: Callable[[Tensor, Mapping[str, Any]], list[Tensor]] | None = None

    def layer(self, wanted: int | None) -> int:
        """The layer that a look at `wanted` goes to: it, or the next one behind it that sees whole images.

        Raises:
            LayerError: the tower has no such layer.
        """
        depth = len(self.attentions)
        index = self.feature_layer if wanted is None else wanted + depth * (wanted < 0)
        if not 0 <= index < depth:
            raise LayerError(f"vision layer {wanted} does not exist: this tower has {depth} layers, 0 to {depth - 1}")
        return next((layer for layer in self.whole if layer >= index), self.whole[-1])


def looking(
    original: Callable[..., Any],
    parts: TowerParts,
    looks: frozenset[Look],
    put: Callable[[dict[Look, list[Tensor]]], None],
    layout: Callable[[Mapping[str, Any]], Sequence[tuple[Raster, ...]]] | None = None,
    normal: Callable[[], Normal | None] = lambda: None,
    timed: Callable[[torch.device], AbstractContextManager[None]] = lambda device: nullcontext(),
) -> Callable[..., Any]:
    """`original`, a feature method, with a look inside the tower.

    Args:
        original: the method, bound.
        parts: of the model.
        looks: what is wanted.
        put: receives, after every call, for every look one tensor `(n_i, ...)` an image of the batch, its rows the
            visual tokens in the prompt's order: `attention` `(n, H)` fp32 what the CLS row gives (without CLS: what is
            received), `joined` `(n,)` the same as if all heads were one, `received` `(n, H)` the mean over the rows of
            visual tokens, `weighted` `(n,)` their mean by weights, over heads; `keys` `(n, H, D)` before rotation;
            `features` `(n, C)` the rows that `project` maps to embeddings; `cls` `(n, C)` the CLS row of these, the
            same for every token; `states` `(n, C)` what the layer gives; `entropy` `(n,)` bits of the gray values, mean
            over the patches of a token, or what `weigh` makes of them.
        layout: from the method's arguments the grids of each image, if there are newline tokens among its features.
        normal: how pixels are normalised, asked for at every call; None: the family's way.
        timed: entered around what is done beside the tower's own pass.

    The attention that a token of several tower rows gets is the sum of theirs, the one it gives and its keys their
    mean.

    Raises:
        LayerError, SpecError, UnsupportedModelError: a look at what there is not.
    """
    absent = {name for name, part in (("cls", parts.cls), ("states", parts.blocks)) if not part}
    for look in looks:
        if look.what not in WHAT:
            raise SpecError(f"{look}: expected a look at one of {', '.join(WHAT)}")
        if look.what in absent:
            raise UnsupportedModelError(
                f"{look}: a {type(parts.tower).__name__} has no such rows, take a method that does not look at them"
            )
    layers = {look: parts.layer(look.layer) for look in looks}
    attention = {layer: parts.attentions[layer] for look, layer in layers.items() if look.what in AT_A_LAYER}
    signatures = {module: inspect.signature(module.forward) for module in (parts.tower, *attention.values())}

    own = inspect.signature(original)

    @functools.wraps(original)
    @torch.compiler.disable  # hooks come and go with every call
    def features(*args: Any, **kwargs: Any) -> Any:
        seen: dict[nn.Module, dict[str, Any]] = {}
        thread = threading.get_ident()

        def keep(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            if threading.get_ident() == thread:
                arguments = dict(signatures[module].bind_partial(*given, **named).arguments)
                seen[module] = arguments | arguments.pop("kwargs", {})

        def keep_features(module: nn.Module, given: tuple[Any, ...]) -> None:
            if threading.get_ident() == thread:
                seen[module] = {"features": given[0]}

        def keep_states(module: nn.Module, given: tuple[Any, ...], states: Any) -> None:
            if threading.get_ident() == thread:
                seen[module] = {"states": states[0] if isinstance(states, tuple) else states}

        with ExitStack() as stack:
            for look in looks:
                if look.what == "states":
                    stack.callback(parts.blocks[layers[look]].register_forward_hook(keep_states).remove)
            for module in signatures:
                stack.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
            if parts.projector is not None:
                stack.callback(parts.projector.register_forward_pre_hook(keep_features).remove)
            output = original(*args, **kwargs)
        arguments = own.bind(*args, **kwargs).arguments
        projected = _projected(parts.images(output, arguments), layout and layout(arguments))
        with timed(projected[0].device):
            found = _collect(parts, layers, attention, seen, projected, output)
            for look in looks:
                if look.what == "entropy":
                    found[look] = _entropies(parts.gray(arguments, normal()), look)
                if parts.arrange is not None and (look.what != "features" or parts.projector is not None):
                    found[look] = parts.arrange(torch.stack(found[look]), arguments)
        put(found)
        return output

    return features


def _collect(
    parts: TowerParts,
    layers: Mapping[Look, int],
    attention: Mapping[int, nn.Module],
    seen: Mapping[nn.Module, Mapping[str, Any]],
    projected: list[Tensor],
    output: Any,
) -> dict[Look, list[Tensor]]:
    """Every look's tensors, one a picture that the tower sees; of `projected` `(n_i, C)` one an image."""
    found: dict[Look, list[Tensor]] = {}
    features = projected if parts.projector is None else list(seen[parts.projector]["features"])
    for layer, module in attention.items():
        mine = [look for look, at in layers.items() if at == layer and look.what in AT_A_LAYER]
        every = parts.cls is None or any(look.what in ("received", "weighted") for look in mine)
        rows = parts.rows(module, seen[module], seen[parts.tower], every)
        for look in mine:
            found[look] = _at_layer(rows, look, parts.cls is not None)
    for look in layers:
        if look.what == "features":
            found[look] = features
        elif look.what == "cls" and parts.cls is not None:
            found[look] = [row.expand(len(image), -1) for row, image in zip(parts.cls(output), features, strict=True)]
        elif look.what == "states":
            behind = seen[parts.blocks[layers[look]]]["states"]
            found[look] = [rows[-len(image) :] for rows, image in zip(behind, features, strict=True)]
    return {look: [tensor.detach() for tensor in images] for look, images in found.items()}


def _projected(images: Sequence[Tensor], layout: Sequence[tuple[Raster, ...]] | None) -> list[Tensor]:
    """Embedding rows of each image, `(n_i, C)`, without newline tokens."""
    if layout is None:
        return list(images)
    lines = [[column for column, _ in Span(0, 0, 0, rasters).lines()] for rasters in layout]
    kept = [
        torch.ones(len(image), dtype=torch.bool).index_fill(0, torch.tensor(at, dtype=torch.long), False)
        for image, at in zip(images, lines, strict=True)
    ]
    return [image[there.to(image.device)] for image, there in zip(images, kept, strict=True)]


def _entropies(gray: Sequence[Tensor], look: Look) -> list[Tensor]:
    """Bits of the histogram over 256 values, per token."""
    images = []
    for patches in gray:
        value = patches.float().round().clamp(0, 255).long()
        share = torch.zeros(*value.shape[:-1], 256, device=value.device).scatter_add(
            -1, value, torch.ones_like(value, dtype=torch.float32)
        )
        share = share / value.shape[-1]
        images.append(-torch.xlogy(share, share).sum(-1).mean(-1) / math.log(2))
    if look.weigh is None:
        return images
    padded, present = _padded(images)
    return [row[there] for row, there in zip(look.weigh(padded, present), present, strict=True)]


def _padded(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """`(I, W)` numbers of the tokens of images, and which there are."""
    padded = nn.utils.rnn.pad_sequence(images, batch_first=True)
    lengths = torch.tensor([len(image) for image in images], device=padded.device)[:, None]
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths


def _at_layer(rows: Rows, look: Look, has_cls: bool) -> list[Tensor]:
    if look.what == "keys":
        return _to_tokens(rows.plain.permute(0, 2, 1, 3), rows, mean=True)
    if look.what == "weighted":
        return _weighted(rows, look)
    if look.what == "joined":
        rows = dataclasses.replace(rows, query=_one_head(rows.query), key=_one_head(rows.key), scale=_one_scale(rows))
    if has_cls and look.what != "received":
        given = attention_given(rows.query[:, :, :1], rows, rows.real.new_ones(len(rows.real), 1).float())
    else:
        visual = (rows.token >= 0) & rows.real
        given = attention_given(rows.query, rows, visual / visual.sum(1, keepdim=True))
    images = _to_tokens(given.permute(0, 2, 1), rows, mean=False)
    return [image[:, 0] for image in images] if look.what == "joined" else images


def _one_head(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)[:, None]


def _one_scale(rows: Rows) -> float:
    return (rows.key.shape[1] * rows.key.shape[3]) ** -0.5


def _weighted(rows: Rows, look: Look) -> list[Tensor]:
    """The mean over heads of what the visual tokens give, weighted by a function of what they receive."""
    if look.weigh is None:
        raise SpecError(f"{look}: a weighted look needs weigh(received, present)")
    visual = (rows.token >= 0) & rows.real
    given = attention_given(rows.query, rows, visual / visual.sum(1, keepdim=True)).mean(1)
    received, present = _padded(_to_tokens(given, rows, mean=False))
    weight = look.weigh(received, present)[present]
    parts = torch.zeros_like(weight).index_add(0, rows.token[visual], torch.ones_like(rows.token[visual]).to(weight))
    per_row = torch.where(visual, (weight / parts)[rows.token.clamp_min(0)], 0.0)
    return _to_tokens(attention_given(rows.query, rows, per_row).mean(1), rows, mean=False)


def attention_given(query: Tensor, rows: Rows, weight: Tensor) -> Tensor:
    """`(S, H, N)` fp32, the attention that weighted rows give to every row: the sum of `weight` times probability.

    Args:
        query: `(S, H, R, D)`.
        rows: their keys.
        weight: `(S, R)` fp32.
    """
    key = rows.key.float().mT
    segments, heads, total, _ = query.shape
    block = max(BLOCK // (segments * heads * key.shape[-1]), 1)
    given = key.new_zeros(segments, heads, key.shape[-1])
    for start in range(0, total, block):
        part = slice(start, start + block)
        logits = (query[:, :, part].float() @ key) * rows.scale
        shares = logits.masked_fill(~rows.real[:, None, None], -torch.inf).softmax(-1)
        given += (weight[:, None, None, part] @ shares)[:, :, 0]
    return given


def _to_tokens(x: Tensor, rows: Rows, mean: bool) -> list[Tensor]:
    """`(S, N, ...)` of tower rows to `(n_i, ...)` of visual tokens an image: the sum or the mean of their rows."""
    visual = (rows.token >= 0) & rows.real
    token, values = rows.token[visual], x[visual].float()
    total = values.new_zeros(sum(rows.lengths), *values.shape[1:]).index_add(0, token, values)
    if mean:
        shape = (-1, *[1] * (values.ndim - 1))
        total = total / torch.bincount(token, minlength=len(total)).view(shape)
    return list(total.split(rows.lengths))
