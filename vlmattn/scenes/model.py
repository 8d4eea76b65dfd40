"""The embedded model, and a packed forward of the same parameters for training.

The model is a genuine ``LlavaForConditionalGeneration`` (llava.py) or ``Qwen2_5_VLForConditionalGeneration`` (qwen.py);
versions.py has their sizes. :class:`PackedForward` computes what they compute, for the visual inputs of one prompt and
many independent questions at once (packing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from vlmattn.errors import TrainingError

from . import library, llava, qwen
from .decoder import SlotGroups, causal_masks, decoder_layer, decoder_weights, rms_norm
from .several_kinds import Kind
from .versions import LLAVA, QWEN, Version, Visual

_DECODER = "model.language_model."
"""What the names of the decoder's parameters begin with, in all families."""
_MOST_VARIANTS = 64
"""Of a compiled layer: one for each shape, with and without gradients."""


class Parts(Protocol):
    """What differs between families.

    Attributes:
        decoder: the module with ``embed_tokens``, ``layers`` and ``norm``.
        place_layers: decoder layers behind which a visual token knows where it is; 0 if it does in the tower.
    """

    decoder: Any
    place_layers: int

    def features(self, pixels: Tensor) -> Tensor:
        """What the tower says about each visual token, (B, tokens, D)."""

    def tokens(self, features: Tensor) -> Tensor:
        """Visual tokens as they enter the decoder, (B, tokens, D)."""

    def rotary(self, visuals: tuple[Visual, ...], slot_groups: SlotGroups) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (L, d), of prefix and slots."""

    def pretrained(self, name: str) -> bool:
        """Whether stage 0 trains a parameter."""

    def rate(self, name: str) -> float:
        """Factor on a parameter's learning rate behind stage 0; 0 for one that is not used."""


_BUILD = {LLAVA: llava.build, QWEN: qwen.build}
_PARTS: dict[str, Callable[[Any, Version, Callable], Parts]] = {LLAVA: llava.LlavaParts, QWEN: qwen.QwenParts}


def build_model(version: Version, seed: int) -> Any:
    """A freshly initialised model in fp32.

    Args:
        version: its architecture and the size of its pictures.
        seed: seed of the initialisation (sets torch's global seed).
    """
    torch.manual_seed(seed)
    return _BUILD[version.family](version)


def load_decoder(model: Any, source: str) -> None:
    """Start a model from the trained decoder of another one: embeddings, attention, feed-forward layers and norms.

    Biases that the other decoder does not have become zero.

    Args:
        model: the model; its decoder is changed.
        source: name of a packaged model, or the folder of an exported model or of a finished training run, or a
            safetensors file of such a run.

    Raises:
        TrainingError: there is no such model, or its decoder does not fit.
    """
    found = _trained_weights(source)
    there = {name: weight for name, weight in found.items() if name.startswith(_DECODER)}
    here = {name: weight for name, weight in model.named_parameters() if name.startswith(_DECODER)}
    wrong = [name for name in here if not name.endswith("bias") and name not in there]
    wrong += [name for name, weight in there.items() if name not in here or here[name].shape != weight.shape]
    if wrong:
        raise TrainingError(f"decoder_from={source!r} does not fit the decoder: {', '.join(sorted(wrong)[:3])}")
    with torch.no_grad():
        for name, weight in here.items():
            weight.copy_(there.get(name, torch.zeros(())))


def _trained_weights(source: str) -> dict[str, Tensor]:
    """Parameters by name of what :func:`load_decoder` calls a source."""
    place = library.path(source) if source in library.names() else Path(source)
    if (place / "config.json").exists():
        other = AutoModelForImageTextToText.from_pretrained(place, dtype=torch.float32, local_files_only=True)
        return dict(other.named_parameters())
    file = place / "model.safetensors" if place.is_dir() else place
    if not file.exists():
        raise TrainingError(
            f"decoder_from={source!r}: there is no {file}; expected a finished run, an exported model or one of "
            f"{', '.join(library.names()) or 'no packaged models'}"
        )
    return load_file(file)


def normalized_pixels(images: Tensor) -> Tensor:
    """uint8 (..., H, W, 3) to float32 (..., 3, H, W) in -1..1; computed as the exported image processor does."""
    return (images.movedim(-1, -3).to(torch.float32) * (1 / 255) - 0.5) / 0.5


def packed_inputs(
    pixels: np.ndarray, kind: Kind | None, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], SlotGroups | None]:
    """What :class:`PackedForward` takes besides the ids.

    Args:
        pixels: of a batch (packing.py, several_packing.py), uint8.
        kind: what a prompt shows; None for one picture.
        dtype: of the model.

    Returns:
        The visual inputs of a prompt, and the slot groups of its questions; None for those of the version's lessons.
    """
    shown = normalized_pixels(torch.from_numpy(pixels)).to(dtype)
    return (kind.inputs(shown), kind.course.slot_groups) if kind else ((shown,), None)


class Layout(NamedTuple):
    """Constants of packed sequences of one shape: prefix length, cosines and sines (L, d), additive masks."""

    prefix: int
    cos: Tensor
    sin: Tensor
    masks: tuple[Tensor, ...]


class PackedForward:
    """Forward of a model for packed questions (packing.py); parity with the stock forward is tested to 1e-5.

    Args:
        model: the model; its parameters are used, not copied.
        version: of the model; its lessons say where the slots are.
        compile: compile the layer functions (pays off after about a hundred steps).
    """

    def __init__(self, model: Any, version: Version, compile: bool = False) -> None:
        self.model, self.version = model, version
        wrap: Callable = _compiled if compile else lambda function: function
        self.parts = _PARTS[version.family](model, version, wrap)
        self._decoder_layer = wrap(decoder_layer)
        text = model.config.text_config
        self.heads = (text.num_attention_heads, text.num_key_value_heads)
        self.layout = cache(self._layout)

    def _layout(self, visuals: tuple[Visual, ...], slot_groups: SlotGroups, dtype: torch.dtype) -> Layout:
        prefix = len(self.version.prefix(*visuals))
        cos, sin = (x.to(dtype) for x in self.parts.rotary(visuals, slot_groups))
        masks = causal_masks([prefix, *(length for _, length in slot_groups)])
        return Layout(prefix, cos, sin, tuple(mask.to(dtype) for mask in masks))

    def dense(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """What dense targets are read from: one vector for each visual token.

        Args:
            pixels: pictures (B, 3, H, W), normalised, in the model's dtype.

        Returns:
            (B, tokens, D) for what is there, and (B, tokens, D) for where that is: the tower's features both times, or
            the second time visual tokens behind the first decoder layers, if only these bring in places. Nothing is
            backpropagated into the embeddings of words.
        """
        features = self.parts.features(pixels)
        if not self.parts.place_layers:
            return features, features
        layout = self.layout((_visual(pixels),), (), pixels.dtype)
        first, last = (text.detach() for text in self._texts(1, len(pixels)))
        x = torch.cat((first, self.parts.tokens(features), last), 1)
        for layer in self.parts.decoder.layers[: self.parts.place_layers]:
            x = self._layer(x, layer, layout, ())
        start = first.shape[1]
        return features, F.rms_norm(x[:, start : start + features.shape[1]], x.shape[-1:])

    def _texts(self, visuals: int, prompts: int) -> list[Tensor]:
        """Embeddings of the text around so many visual inputs, (prompts, tokens, D) each."""
        texts = (torch.tensor(text, dtype=torch.long) for text in self.version.texts(visuals))
        return [self.parts.decoder.embed_tokens(text).expand(prompts, -1, -1) for text in texts]

    def _layer(self, x: Tensor, layer: Any, layout: Layout, slot_groups: SlotGroups) -> Tensor:
        weights = decoder_weights(layer)
        return self._decoder_layer(x, weights, layout.cos, layout.sin, layout.masks, slot_groups, self.heads)

    def __call__(
        self,
        pixels: Tensor | Sequence[Tensor],
        ids: Tensor,
        tap: int | None = None,
        slot_groups: SlotGroups | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of packed questions.

        Args:
            pixels: one picture (B, 3, H, W), normalised, in the model's dtype; or the visual inputs of a prompt in
                order: images (B, 3, H, W) and videos (B, frames, 3, H, W).
            ids: (B, packed_length) token ids.
            tap: also return the output of this decoder layer.
            slot_groups: (slots, tokens per slot) of each group of ``ids``; None for those of the version's lessons.

        Returns:
            Logits (B, packed_length, vocabulary), and the tapped hidden states (B, packed_length, D) or None.
        """
        inputs = (pixels,) if isinstance(pixels, Tensor) else tuple(pixels)
        groups = slot_groups or self.version.lessons.slot_groups
        layout = self.layout(tuple(map(_visual, inputs)), groups, inputs[0].dtype)
        first, *others = self._texts(len(inputs), len(ids))
        pieces = [first]
        for visual, text in zip(inputs, others, strict=True):
            pieces += [self.parts.tokens(self.parts.features(visual)), text]
        decoder = self.parts.decoder
        x = torch.cat((*pieces, decoder.embed_tokens(ids)), 1)
        tapped = None
        for index, layer in enumerate(decoder.layers):
            x = self._layer(x, layer, layout, groups)
            if index == tap:
                tapped = x[:, layout.prefix :]
        return self.model.lm_head(rms_norm(x[:, layout.prefix :], decoder.norm.weight)), tapped


def _visual(pixels: Tensor) -> Visual:
    """What kind of input images (B, 3, H, W) or videos (B, frames, 3, H, W) are."""
    *_, height, width = pixels.shape
    return Visual(height, width, pixels.shape[1] if pixels.dim() == 5 else 0)


def _compiled(function: Callable) -> Callable:
    """A compiled function that keeps a variant for each shape: one for each size of pictures."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_VARIANTS)
    return torch.compile(function, dynamic=False)
