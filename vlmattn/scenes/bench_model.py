"""The bench model: genuine classes of a supported family with random weights, large enough that time is arithmetic.

Its vision tower is a token factory, one CLIP layer of width 32 over 2 x 2 pixel patches: the bench is about the
decoder, and the tower's share is measured and printed beside it. A second layer runs behind it, which the projector
does not read, as in the released checkpoints: some methods look there.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAME = "bench-llava"
IMAGE_ID, PAD_ID, BOS_ID, EOS_ID = 1, 0, 2, 3
VOCABULARY = 1024
PATCH = 2
TOWER_WIDTH = 32
HEAD_DIM = 64
TEXT_TOKENS = 60
MAX_IMAGES = 8


@dataclass(frozen=True)
class Shape:
    """Sizes of a bench model and of its prompt.

    Attributes:
        layers, dim, heads, mlp: of the decoder.
        images: images of the prompt; side: visual tokens along a side of each.
        text: text tokens of the prompt.
    """

    layers: int
    dim: int
    heads: int
    mlp: int
    images: int
    side: int
    text: int = TEXT_TOKENS

    @classmethod
    def of(cls, layers: int, dim: int, tokens: int, text: int = TEXT_TOKENS) -> Shape:
        """The shape with `tokens` visual tokens: heads of 64 and the MLP of 2.75 x `dim` that Llama has at 1024.

        Raises:
            ValueError: `dim` is no multiple of 128, or `tokens` does not make up to 8 square images.
        """
        if layers < 4 or dim < 2 * HEAD_DIM or dim % (2 * HEAD_DIM):
            raise ValueError(f"layers={layers}, dim={dim}: expected at least 4 layers and a multiple of {2 * HEAD_DIM}")
        for images in range(1, MAX_IMAGES + 1):
            side = math.isqrt(tokens // images)
            if side > 1 and images * side * side == tokens:
                return cls(layers, dim, dim // HEAD_DIM, 11 * dim // 4, images, side, text)
        raise ValueError(
            f"tokens={tokens} is not made of up to {MAX_IMAGES} equal square images: try 128, 576, 1024, 2048 or 4096"
        )

    @property
    def visual(self) -> int:
        """Visual tokens of the prompt."""
        return self.images * self.side * self.side


def build(shape: Shape, seed: int = 0, initializer_range: float = 0.02) -> Any:
    """A model of this shape with random weights, fp32, in eval mode.

    Args:
        shape: sizes.
        seed: of the weights (sets torch's global seed).
        initializer_range: standard deviation of the weights; small models need more for attention that is not flat.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=TOWER_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=PATCH * shape.side,
        patch_size=PATCH,
        projection_dim=TOWER_WIDTH,
    )
    special = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.dim,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.visual + shape.text + 512,
        initializer_range=initializer_range,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_ID,
        image_seq_length=shape.side**2,
        vision_feature_layer=-1,
        initializer_range=initializer_range,
        **special,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval().float()
    _add_last_layer(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD_ID
    return model


def _add_last_layer(model: Any) -> None:
    """Put a copy of the tower's layer behind it; the projector goes on reading what it read."""
    layers = model.model.vision_tower.encoder.layers
    layers.append(copy.deepcopy(layers[0]))
    model.config.vision_config.num_hidden_layers = len(layers)
    model.config.vision_feature_layer = -2


def prompt(shape: Shape, seed: int = 0) -> dict[str, Tensor]:
    """One unpadded prompt: a few words, the images, and the question; `text` text tokens in all."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(4, VOCABULARY, (shape.text - 1,), generator=generator)
    images = torch.full((shape.visual,), IMAGE_ID)
    ids = torch.cat([torch.tensor([BOS_ID]), words[:4], images, words[4:]])[None]
    pixels = torch.randn(shape.images, 3, PATCH * shape.side, PATCH * shape.side, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def encode_images(model: Any, inputs: dict[str, Tensor]) -> Any:
    """What the vision tower and the projector do for a prompt, alone, so that it can be timed apart."""
    return model.model.get_image_features(inputs["pixel_values"])
