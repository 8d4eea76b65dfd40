"""The embedded model, and a packed forward of the same parameters for training.

The model is a genuine ``LlavaForConditionalGeneration``: a CLIP tower with its class token, the stock projector and a
Llama decoder; versions.py has its sizes. :class:`PackedForward` computes what it computes, for one picture and many
independent questions at once (packing.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from .text import BOS_ID, EOS_ID, IMAGE_ID, PAD_ID, USER_ID
from .versions import Version

_MASKED = -1e4


def build_model(version: Version, seed: int) -> LlavaForConditionalGeneration:
    """A freshly initialised model in fp32.

    Four heads of 32 with a rotary base of 1e6 leave enough slowly turning pairs to match content across 150 positions;
    the initialiser of 0.05 is what this depth trains from quickly.

    Args:
        version: its architecture and the size of its pictures.
        seed: seed of the initialisation (sets torch's global seed).
    """
    sizes = version.architecture
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=sizes.hidden,
        intermediate_size=4 * sizes.hidden,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.heads,
        image_size=version.world.image_size,
        patch_size=sizes.patch_size,
        projection_dim=sizes.hidden,
        hidden_act="quick_gelu",
    )
    special = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    text = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.decoder_layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.hidden // sizes.heads,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-5,
        initializer_range=0.05,
        tie_word_embeddings=True,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_ID,
        image_seq_length=version.visual_tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
        **special,
    )
    return LlavaForConditionalGeneration(config)


def normalized_pixels(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W) in -1..1; computed as the exported image processor does."""
    return (images.permute(0, 3, 1, 2).to(torch.float32) * (1 / 255) - 0.5) / 0.5


def vision_modules(model: LlavaForConditionalGeneration) -> Any:
    """The module of the CLIP tower that holds ``embeddings``, ``pre_layrnorm`` and ``encoder``."""
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


class VisionWeights(NamedTuple):
    """Parameters of one CLIP layer."""

    norm1: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]
    key: tuple[Tensor, Tensor]
    value: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    norm2: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]


class DecoderWeights(NamedTuple):
    """Parameters of one Llama layer."""

    norm1: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    norm2: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, D) to (B, H, L, D/H)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def vision_layer(x: Tensor, w: VisionWeights, heads: int) -> Tensor:
    """One CLIP encoder layer, (B, L, D) to (B, L, D).

    Plain softmax attention: on CPUs the backward of the fused kernel is slower at this size.
    """
    width = x.shape[-1:]
    h = F.layer_norm(x, width, *w.norm1, eps=1e-5)
    query = _split_heads(F.linear(h, *w.query), heads) * (x.shape[-1] // heads) ** -0.5
    attention = torch.softmax(query @ _split_heads(F.linear(h, *w.key), heads).transpose(-1, -2), -1)
    mixed = attention @ _split_heads(F.linear(h, *w.value), heads)
    x = x + F.linear(mixed.transpose(1, 2).flatten(2), *w.out)
    h = F.linear(F.layer_norm(x, width, *w.norm2, eps=1e-5), *w.up)
    return x + F.linear(h * torch.sigmoid(1.702 * h), *w.down)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Llama's RMS norm with eps 1e-5, computed in fp32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


SlotGroups = tuple[tuple[int, int], ...]


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, masks: tuple[Tensor, ...], slot_groups: SlotGroups
) -> Tensor:
    """Causal attention of a prefix and of slots that see the prefix and themselves only.

    Args:
        query: (B, H, L, d), scaled.
        key: (B, H, L, d).
        value: (B, H, L, d).
        masks: additive causal masks, (P, P) of the prefix and (l, l) of each slot group.
        slot_groups: (slots, tokens per slot) of each group.

    Returns:
        (B, H, L, d).
    """
    prefix = masks[0].shape[0]
    near_key, near_value = key[:, :, :prefix], value[:, :, :prefix]
    scores = query[:, :, :prefix] @ near_key.transpose(-1, -2) + masks[0]
    out = [torch.softmax(scores, -1) @ near_value]
    start = prefix
    for (slots, length), mask in zip(slot_groups, masks[1:], strict=True):
        part = slice(start, start + slots * length)
        start += slots * length
        q, k, v = (x[:, :, part].unflatten(2, (slots, length)) for x in (query, key, value))
        own = (q @ k.transpose(-1, -2) + mask).flatten(2, 3)
        shared = query[:, :, part] @ near_key.transpose(-1, -2)
        weights = torch.softmax(torch.cat((shared, own), -1), -1)
        mixed = (weights[..., prefix:].unflatten(2, (slots, length)) @ v).flatten(2, 3)
        out.append(weights[..., :prefix] @ near_value + mixed)
    return torch.cat(out, 2)


def decoder_layer(
    x: Tensor,
    w: DecoderWeights,
    cos: Tensor,
    sin: Tensor,
    masks: tuple[Tensor, ...],
    slot_groups: SlotGroups,
    heads: tuple[int, int],
) -> Tensor:
    """One Llama layer over a packed sequence, (B, L, D) to (B, L, D), with ``heads`` of queries and of keys."""
    h = rms_norm(x, w.norm1)
    many, few = heads
    query = _rotate(_split_heads(F.linear(h, w.query), many), cos, sin) * (x.shape[-1] // many) ** -0.5
    key = _rotate(_split_heads(F.linear(h, w.key), few), cos, sin).repeat_interleave(many // few, 1)
    value = _split_heads(F.linear(h, w.value), few).repeat_interleave(many // few, 1)
    mixed = packed_attention(query, key, value, masks, slot_groups)
    x = x + F.linear(mixed.transpose(1, 2).flatten(2), w.out)
    h = rms_norm(x, w.norm2)
    return x + F.linear(F.silu(F.linear(h, w.gate)) * F.linear(h, w.up), w.down)


def _affine(module: Any) -> tuple[Tensor, Tensor]:
    return module.weight, module.bias


def _vision_weights(layer: Any) -> VisionWeights:
    attention, mlp = layer.self_attn, layer.mlp
    return VisionWeights(
        norm1=_affine(layer.layer_norm1),
        query=_affine(attention.q_proj),
        key=_affine(attention.k_proj),
        value=_affine(attention.v_proj),
        out=_affine(attention.out_proj),
        norm2=_affine(layer.layer_norm2),
        up=_affine(mlp.fc1),
        down=_affine(mlp.fc2),
    )


def _decoder_weights(layer: Any) -> DecoderWeights:
    attention, mlp = layer.self_attn, layer.mlp
    return DecoderWeights(
        norm1=layer.input_layernorm.weight,
        query=attention.q_proj.weight,
        key=attention.k_proj.weight,
        value=attention.v_proj.weight,
        out=attention.o_proj.weight,
        norm2=layer.post_attention_layernorm.weight,
        gate=mlp.gate_proj.weight,
        up=mlp.up_proj.weight,
        down=mlp.down_proj.weight,
    )


class PackedForward:
    """Forward of a model for packed questions (packing.py); parity with the stock forward is tested to 1e-5.

    Args:
        model: the model; its parameters are used, not copied.
        version: of the model; its lessons say where the slots are.
        compile: compile the two layer functions (pays off after about a hundred steps).
    """

    def __init__(self, model: LlavaForConditionalGeneration, version: Version, compile: bool = False) -> None:
        self.model, self.version = model, version
        self.decoder = model.model.language_model
        self.tower = vision_modules(model)
        text = model.config.text_config
        self.heads = (text.num_attention_heads, text.num_key_value_heads)
        self.slot_groups = version.lessons.slot_groups
        self.vision_heads = model.config.vision_config.num_attention_heads
        wrap: Callable = (lambda f: torch.compile(f, dynamic=False)) if compile else (lambda f: f)
        self._vision_layer, self._decoder_layer = wrap(vision_layer), wrap(decoder_layer)
        self.prefix = prefix = len(version.prefix)
        positions = list(range(prefix))
        for slots, length in self.slot_groups:
            positions += list(range(prefix, prefix + length)) * slots
        cos, sin = self.decoder.rotary_emb(torch.zeros(1), position_ids=torch.tensor([positions]))
        self.cos, self.sin = cos[0], sin[0]
        sizes = (prefix, *(length for _, length in self.slot_groups))
        self.masks = tuple(torch.full((n, n), _MASKED).triu(1) for n in sizes)

    def vision(self, pixels: Tensor) -> Tensor:
        """Patch features in front of the projector, (B, 3, H, W) to (B, patches, D); the class token is dropped."""
        embeddings = self.tower.embeddings
        side, patch = self.version.patches_per_side, self.version.architecture.patch_size
        patches = pixels.reshape(-1, 3, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = F.linear(patches, embeddings.patch_embedding.weight.flatten(1))
        x = torch.cat((embeddings.class_embedding.expand(len(x), 1, -1), x), 1) + embeddings.position_embedding.weight
        x = self.tower.pre_layrnorm(x)
        for layer in self.tower.encoder.layers:
            x = self._vision_layer(x, _vision_weights(layer), self.vision_heads)
        return x[:, 1:]

    def __call__(self, pixels: Tensor, ids: Tensor, tap: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits of packed questions.

        Args:
            pixels: (B, 3, H, W), normalised, in the model's dtype.
            ids: (B, packed_length) token ids.
            tap: also return the output of this decoder layer.

        Returns:
            Logits (B, packed_length, vocabulary), and the tapped hidden states (B, packed_length, D) or None.
        """
        visual = self.model.model.multi_modal_projector(self.vision(pixels))
        embed = self.decoder.embed_tokens
        opening = embed(torch.tensor([BOS_ID, USER_ID])).expand(len(ids), -1, -1)
        x = torch.cat((opening, visual, embed(ids)), 1)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        masks = tuple(mask.to(x.dtype) for mask in self.masks)
        tapped = None
        for index, layer in enumerate(self.decoder.layers):
            x = self._decoder_layer(x, _decoder_weights(layer), cos, sin, masks, self.slot_groups, self.heads)
            if index == tap:
                tapped = x[:, self.prefix :]
        return self.model.lm_head(rms_norm(x[:, self.prefix :], self.decoder.norm.weight)), tapped
