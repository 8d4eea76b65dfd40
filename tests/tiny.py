"""Tiny random models of every family, and prompts for them. The weights are spread so that attention is far from
uniform."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

IMAGE = 90
VIDEO = 91
LAYERS = 4


def _spread(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        factor = 1.0
        if "language_model" in name and ("q_proj.weight" in name or "k_proj.weight" in name):
            factor = 12.0
        elif "language_model" in name and ("v_proj" in name or "o_proj" in name or "mlp" in name):
            factor = 4.0
        elif "embed_tokens" in name or "lm_head" in name:
            factor = 10.0
        elif "multi_modal_projector" in name or "merger" in name:
            factor = 4.0
        parameter.data.mul_(factor)


def _finish(model: Any) -> Any:
    _spread(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().float()


def llava(seed: int = 0, layers: int = LAYERS, attention: str = "sdpa", kv_heads: int = 4) -> Any:
    """LLaVA: 16 visual tokens an image (4 x 4)."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=7,
            projection_dim=32,
        ),
        text_config=LlamaConfig(
            vocab_size=100,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        image_seq_length=16,
    )
    return _finish(LlavaForConditionalGeneration._from_config(config, attn_implementation=attention))


def qwen2_5_vl(seed: int = 0, layers: int = LAYERS, attention: str = "sdpa") -> Any:
    """Qwen2.5-VL with grouped queries (4 / 2)."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
            "in_channels": 3,
        },
        text_config={
            "vocab_size": 100,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    return _finish(Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=attention))


def _qwen(
    model_class: Any, layers: int, attention: str, seed: int, vision: dict[str, Any], text: dict[str, Any]
) -> Any:
    """The other Qwens: the same sizes, what differs in `vision` and `text`."""
    torch.manual_seed(seed)
    config = model_class.config_class(
        vision_config={"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, **vision},
        text_config={
            "vocab_size": 100,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **text,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    return _finish(model_class._from_config(config, attn_implementation=attention))


def qwen2_vl(seed: int = 0, layers: int = LAYERS, attention: str = "sdpa") -> Any:
    """Qwen2-VL: the tower's `hidden_size` is the decoder's."""
    from transformers import Qwen2VLForConditionalGeneration

    vision = {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    return _qwen(Qwen2VLForConditionalGeneration, layers, attention, seed, vision, {})


def qwen3_vl(seed: int = 0, layers: int = LAYERS, attention: str = "sdpa") -> Any:
    """Qwen3-VL: what both tower layers give is added again, and heads are wider than `hidden_size / heads`."""
    from transformers import Qwen3VLForConditionalGeneration

    vision = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}
    vision |= {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]}
    text = {
        "head_dim": 24,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 3, 3]},
    }
    return _qwen(Qwen3VLForConditionalGeneration, layers, attention, seed, vision, text)


CORE = {"llava": llava, "qwen2_5_vl": qwen2_5_vl}
MODELS = {**CORE, "qwen2_vl": qwen2_vl, "qwen3_vl": qwen3_vl}
"""Tests that ask for every family run in the default suite with those of `CORE`, see conftest.py."""


def pad_left(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask `(B, N)`, zeros on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def words(generator: torch.Generator, n: int) -> list[int]:
    """`n` random text tokens."""
    return torch.randint(3, 80, (n,), generator=generator).tolist()


def prompts(family: str, seed: int = 0, images: tuple[int, ...] = (1, 1)) -> dict[str, Tensor]:
    """A left-padded batch, one row per entry of `images`, with that many images in the row.

    Rows differ in length; the images of the M-RoPE family also differ in size (4 x 4 and 4 x 6 tokens in turn).
    """
    generator = torch.Generator().manual_seed(seed)
    rows, grids = [], []
    for row, count in enumerate(images):
        ids = [1, *words(generator, 2 * row)]
        for _ in range(count):
            wide = family != "llava" and len(grids) % 2 == 1
            grids.append([1, 8, 12 if wide else 8])
            placeholders = [IMAGE] * (24 if wide else 16)
            ids += placeholders if family == "llava" else [92, *placeholders, 93]
            ids += words(generator, 2)
        rows.append(ids + words(generator, 9 - 4 * (row % 2)))
    ids, mask = pad_left(rows)
    batch: dict[str, Tensor] = {"input_ids": ids, "attention_mask": mask}
    if not grids:
        return batch
    if family == "llava":
        return batch | {"pixel_values": torch.randn(len(grids), 3, 28, 28, generator=generator)}
    grid = torch.tensor(grids)
    return batch | {
        "pixel_values": torch.randn(int(grid.prod(-1).sum()), 1176, generator=generator),
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


def single(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch with one image a row, without its padding."""
    real = batch["attention_mask"][row].bool()
    one = {
        name: batch[name][row : row + 1, real]
        for name in ("input_ids", "attention_mask", "mm_token_type_ids")
        if name in batch
    }
    if "image_grid_thw" in batch:
        sizes = batch["image_grid_thw"].prod(-1).tolist()
        one["pixel_values"] = batch["pixel_values"].split(sizes)[row]
        one["image_grid_thw"] = batch["image_grid_thw"][row : row + 1]
    else:
        one["pixel_values"] = batch["pixel_values"][row : row + 1]
    return one
