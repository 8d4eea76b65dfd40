"""The Qwen2.5-VL family (arXiv:2502.13923): a genuine ``Qwen2_5_VLForConditionalGeneration``.

Its tower has no learned positions but a rotary embedding along rows and columns, most layers attend inside windows, 2x2
patches are merged into a visual token, and the decoder's rotary positions run along time, rows and columns (M-RoPE).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLVisionConfig,
)

from .decoder import Affine, SlotGroups, affine, rms_norm, rotary, rotate, slot_positions
from .text import BOS_ID, EOS_ID, IMAGE_ID, PAD_ID, VIDEO_ID, VISION_END_ID, VISION_START_ID, WORDS
from .versions import Version, Visual

WINDOW_TOKENS = 4
"""Visual tokens per row and column of an attention window."""
TEMPORAL_PATCH = 2
"""Frames of a video that share their visual tokens; an image is shown twice."""
TIME_STEP = 2
"""Positions from one pair of frames to the next: Qwen2.5-VL's tokens per second, with a second per pair."""
_EPS = 1e-6
_TOWER = "model.visual."


def build(version: Version) -> Qwen2_5_VLForConditionalGeneration:
    """A freshly initialised model in fp32, from torch's global random state.

    Every second layer of the tower attends to the whole picture. The rotary frequencies of a decoder's head turn with
    time, row and column in turn, as Qwen3-VL has it (arXiv:2511.21631): Qwen2.5-VL's sections leave the slowest ones to
    the columns, and of a head of 32 those do not turn at all across a small picture.

    Args:
        version: its architecture.
    """
    sizes = version.architecture
    head = sizes.hidden // sizes.heads
    vision = Qwen2_5_VLVisionConfig(
        depth=sizes.vision_layers,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.mlp,
        num_heads=sizes.heads,
        patch_size=sizes.patch_size,
        spatial_merge_size=sizes.merge,
        temporal_patch_size=TEMPORAL_PATCH,
        tokens_per_second=TIME_STEP,
        window_size=WINDOW_TOKENS * sizes.merge * sizes.patch_size,
        out_hidden_size=sizes.hidden,
        fullatt_block_indexes=list(range(1, sizes.vision_layers, 2)),
        initializer_range=0.05,
    )
    special = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    text = Qwen2_5_VLTextConfig(
        vocab_size=len(WORDS),
        hidden_size=sizes.hidden,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.decoder_layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": _sections(head // 2)},
        rms_norm_eps=1e-5,
        initializer_range=0.05,
        tie_word_embeddings=True,
        **special,
    )
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=VISION_START_ID,
        vision_end_token_id=VISION_END_ID,
        tie_word_embeddings=True,
        **special,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _sections(frequencies: int) -> list[int]:
    """Lengths of the runs of frequencies that turn with time, row, column, time and so on: as short as possible, but a
    whole number of rounds."""
    rounds = frequencies // 3
    return [1] * (3 * rounds - 1) + [frequencies - 3 * rounds + 1]


def mrope_positions(version: Version, visuals: tuple[Visual, ...]) -> tuple[list[tuple[int, int, int]], int]:
    """Positions of a prompt's prefix, and the one behind it.

    A text token has the same position along time, rows and columns; the tokens of a visual input count along the three
    from the position behind the text before it, and the text goes on behind its longer side.

    Args:
        version: its tokens' size.
        visuals: the visual inputs in order.

    Returns:
        (time, row, column) of every token of ``version.prefix(*visuals)``, and the next position.
    """
    places: list[tuple[int, int, int]] = []
    start = 0
    first, *others = version.texts(len(visuals))
    for visual, text in zip((None, *visuals), (first, *others), strict=True):
        if visual is not None:
            time, rows, columns = version.grid(visual)
            cells = ((t, r, c) for t in range(time) for r in range(rows) for c in range(columns))
            places += [(start + t * TIME_STEP, start + r, start + c) for t, r, c in cells]
            start += max(rows, columns)
        places += [(start + step,) * 3 for step in range(len(text))]
        start += len(text)
    return places, start


class VisionWeights(NamedTuple):
    """Parameters of one layer of the tower."""

    norm1: Tensor
    qkv: Affine
    out: Affine
    norm2: Tensor
    gate: Affine
    up: Affine
    down: Affine


def _vision_weights(layer: Any) -> VisionWeights:
    return VisionWeights(
        norm1=layer.norm1.weight,
        qkv=affine(layer.attn.qkv),
        out=affine(layer.attn.proj),
        norm2=layer.norm2.weight,
        gate=affine(layer.mlp.gate_proj),
        up=affine(layer.mlp.up_proj),
        down=affine(layer.mlp.down_proj),
    )


def vision_layer(x: Tensor, w: VisionWeights, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """One layer of the tower over windows that do not see each other.

    Args:
        x: (B, windows, L, D).
        w: its parameters.
        cos: (windows, L, d).
        sin: (windows, L, d).
        heads: attention heads.

    Returns:
        (B, windows, L, D).
    """
    h = F.linear(rms_norm(x, w.norm1, _EPS), *w.qkv).unflatten(-1, (3, heads, -1)).movedim(-2, -4)
    query, key, value = h.unbind(-2)
    cos, sin = cos[:, None], sin[:, None]
    query = rotate(query, cos, sin) * query.shape[-1] ** -0.5
    attention = torch.softmax(query @ rotate(key, cos, sin).transpose(-1, -2), -1)
    x = x + F.linear((attention @ value).transpose(-2, -3).flatten(-2), *w.out)
    h = rms_norm(x, w.norm2, _EPS)
    return x + F.linear(F.silu(F.linear(h, *w.gate)) * F.linear(h, *w.up), *w.down)


class QwenParts:
    """What :class:`~vlmattn.scenes.model.PackedForward` and the training stages need of a Qwen2.5-VL.

    Args:
        model: the model; its parameters are used, not copied.
        version: of the model.
        wrap: applied to the layer function.
    """

    place_layers = 2

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, version: Version, wrap: Callable) -> None:
        self.version = version
        self.decoder, self.tower = model.model.language_model, model.model.visual
        self.heads = model.config.vision_config.num_heads
        self.full = frozenset(model.config.vision_config.fullatt_block_indexes)
        self.sections = model.config.text_config.rope_parameters["mrope_section"]
        self._layer = wrap(vision_layer)
        self._angles = cache(self._vision_rotary)

    def _vision_rotary(self, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (windows, L, d), of the patches of a frame of so many visual tokens."""
        merge = self.version.architecture.merge
        down, right = torch.meshgrid(torch.arange(rows * merge), torch.arange(columns * merge), indexing="ij")
        places = _windows(torch.stack((down, right))[None, None], merge, 1)[0]
        frequencies = self.tower.rotary_pos_emb.inv_freq
        positions = places.repeat_interleave(len(frequencies), -1)
        cos, sin = rotary(positions, frequencies.repeat(2))
        return cos.to(dtype), sin.to(dtype)

    def features(self, pixels: Tensor) -> Tensor:
        """Visual tokens of images (B, 3, H, W) or videos (B, frames, 3, H, W), (B, tokens, D), in raster order.

        Raises:
            ValueError: the input cannot be divided into whole windows.
        """
        frames = pixels if pixels.dim() == 5 else pixels[:, None].expand(-1, TEMPORAL_PATCH, -1, -1, -1)
        _, count, _, height, width = frames.shape
        time, rows, columns = self.version.grid(Visual(height, width, count))
        if rows % WINDOW_TOKENS or columns % WINDOW_TOKENS:
            raise ValueError(f"{rows}x{columns} visual tokens cannot be divided into windows of {WINDOW_TOKENS}")
        pairs = frames.unflatten(1, (time, TEMPORAL_PATCH)).flatten(0, 1)
        sizes = self.version.architecture
        x = F.linear(_windows(pairs, sizes.merge, sizes.patch_size), self.tower.patch_embed.proj.weight.flatten(1))
        angles = self._angles(rows, columns, x.dtype)
        whole = tuple(angle.flatten(0, 1)[None] for angle in angles)
        for index, layer in enumerate(self.tower.blocks):
            if index in self.full:
                x = self._layer(x.flatten(1, 2)[:, None], _vision_weights(layer), *whole, self.heads)[:, 0]
                x = x.unflatten(1, (len(angles[0]), -1))
            else:
                x = self._layer(x, _vision_weights(layer), *angles, self.heads)
        merger = self.tower.merger
        x = merger.mlp(rms_norm(x, merger.ln_q.weight, _EPS).unflatten(2, (-1, sizes.merge**2)).flatten(3))
        x = x.unflatten(2, (WINDOW_TOKENS, -1)).unflatten(1, (rows // WINDOW_TOKENS, -1)).transpose(2, 3)
        return x.flatten(1, 4).unflatten(0, (-1, time)).flatten(1, 2)

    def tokens(self, features: Tensor) -> Tensor:
        """The features themselves: the merger, the last part of the tower, makes visual tokens."""
        return features

    def rotary(self, visuals: tuple[Visual, ...], slot_groups: SlotGroups) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (L, d), of prefix and slots."""
        places, start = mrope_positions(self.version, visuals)
        places += [(position,) * 3 for position in slot_positions(start, slot_groups)]
        axes = (torch.arange(len(self.sections)) % 3).repeat_interleave(torch.tensor(self.sections))
        return rotary(torch.tensor(places)[:, axes], self.decoder.rotary_emb.inv_freq)

    def pretrained(self, name: str) -> bool:
        """Whether stage 0 trains a parameter: of the tower, or of the decoder layers that bring in places."""
        layers = (f"model.language_model.layers.{index}." for index in range(self.place_layers))
        return name.startswith((_TOWER, *layers))

    def rate(self, name: str) -> float:
        """Factor on a parameter's learning rate behind stage 0."""
        return 0.3 if name.startswith(_TOWER) and "merger" not in name else 1.0


def _windows(frames: Tensor, merge: int, patch: int) -> Tensor:
    """Cut pairs of frames into patches, ordered as the tower attends.

    Args:
        frames: (N, frames, channels, H, W).
        merge: patches per row and column of a visual token.
        patch: width and height of a patch.

    Returns:
        (N, windows, patches of a window, channels * frames * patch * patch): windows in raster order, in them the
        visual tokens in raster order, in those the patches in raster order.
    """
    sides = (-1, WINDOW_TOKENS, merge, patch)
    x = frames.unflatten(4, sides).unflatten(3, sides)
    return x.permute(0, 3, 7, 4, 8, 5, 9, 2, 1, 6, 10).flatten(7).flatten(3, 6).flatten(1, 2)
