"""The LLaVA family: a genuine ``LlavaForConditionalGeneration`` with a CLIP tower and a Llama decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from .decoder import Affine, SlotGroups, affine, rotary, slot_positions, split_heads
from .text import BOS_ID, EOS_ID, IMAGE_ID, PAD_ID, WORDS
from .versions import Version, Visual


def build(version: Version) -> LlavaForConditionalGeneration:
    """A freshly initialised model in fp32, from torch's global random state.

    Four heads of 32 with a rotary base of 1e6 leave enough slowly turning pairs to match content across 150 positions;
    the initialiser of 0.05 is what this depth trains from quickly.

    Args:
        version: its architecture and the size of its pictures.
    """
    sizes = version.architecture
    vision = CLIPVisionConfig(
        hidden_size=sizes.hidden,
        intermediate_size=4 * sizes.hidden,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.heads,
        image_size=version.picture.height,
        patch_size=sizes.patch_size,
        projection_dim=sizes.hidden,
        hidden_act="quick_gelu",
    )
    special = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    text = LlamaConfig(
        vocab_size=len(WORDS),
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


def vision_modules(model: LlavaForConditionalGeneration) -> Any:
    """The module of the CLIP tower that holds ``embeddings``, ``pre_layrnorm`` and ``encoder``."""
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


class VisionWeights(NamedTuple):
    """Parameters of one CLIP layer."""

    norm1: Affine
    query: Affine
    key: Affine
    value: Affine
    out: Affine
    norm2: Affine
    up: Affine
    down: Affine


def vision_layer(x: Tensor, w: VisionWeights, heads: int) -> Tensor:
    """One CLIP encoder layer, (B, L, D) to (B, L, D)."""
    width = x.shape[-1:]
    h = F.layer_norm(x, width, *w.norm1, eps=1e-5)
    query = split_heads(F.linear(h, *w.query), heads) * (x.shape[-1] // heads) ** -0.5
    attention = torch.softmax(query @ split_heads(F.linear(h, *w.key), heads).transpose(-1, -2), -1)
    mixed = attention @ split_heads(F.linear(h, *w.value), heads)
    x = x + F.linear(mixed.transpose(1, 2).flatten(2), *w.out)
    h = F.linear(F.layer_norm(x, width, *w.norm2, eps=1e-5), *w.up)
    return x + F.linear(h * torch.sigmoid(1.702 * h), *w.down)


def _vision_weights(layer: Any) -> VisionWeights:
    attention, mlp = layer.self_attn, layer.mlp
    return VisionWeights(
        norm1=affine(layer.layer_norm1),
        query=affine(attention.q_proj),
        key=affine(attention.k_proj),
        value=affine(attention.v_proj),
        out=affine(attention.out_proj),
        norm2=affine(layer.layer_norm2),
        up=affine(mlp.fc1),
        down=affine(mlp.fc2),
    )


class LlavaParts:
    """What :class:`~vlmattn.scenes.model.PackedForward` and the training stages need of a LLaVA.

    Args:
        model: the model; its parameters are used, not copied.
        version: of the model.
        wrap: applied to the layer function.
    """

    place_layers = 0

    def __init__(self, model: LlavaForConditionalGeneration, version: Version, wrap: Callable) -> None:
        self.model, self.version = model, version
        self.decoder = model.model.language_model
        self.tower = vision_modules(model)
        self.heads = model.config.vision_config.num_attention_heads
        self._layer = wrap(vision_layer)

    def features(self, pixels: Tensor) -> Tensor:
        """Patch features in front of the projector, (B, 3, H, W) to (B, patches, D); the class token is dropped."""
        embeddings = self.tower.embeddings
        _, rows, columns = self.version.grid(Visual(*pixels.shape[-2:]))
        patches = pixels.unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 1, 3, 5)
        x = F.linear(patches.flatten(3).flatten(1, 2), embeddings.patch_embedding.weight.flatten(1))
        x = torch.cat((embeddings.class_embedding.expand(len(x), 1, -1), x), 1) + embeddings.position_embedding.weight
        x = self.tower.pre_layrnorm(x)
        for layer in self.tower.encoder.layers:
            x = self._layer(x, _vision_weights(layer), self.heads)
        return x[:, 1:]

    def tokens(self, features: Tensor) -> Tensor:
        """Visual tokens made of the features, (B, patches, D)."""
        return self.model.model.multi_modal_projector(features)

    def rotary(self, visuals: tuple[Visual, ...], slot_groups: SlotGroups) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (L, d), of prefix and slots."""
        prefix = len(self.version.prefix(*visuals))
        positions = torch.tensor([*range(prefix), *slot_positions(prefix, slot_groups)])
        return rotary(positions[:, None], self.decoder.rotary_emb.inv_freq)

    def pretrained(self, name: str) -> bool:
        """Whether stage 0 trains a parameter."""
        return "vision_tower" in name

    def rate(self, name: str) -> float:
        """Factor on a parameter's learning rate behind stage 0; CLIP's last norm acts on the class token only."""
        if "post_layernorm" in name:
            return 0.0
        return 0.3 if self.pretrained(name) else 1.0
