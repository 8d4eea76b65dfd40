"""Tiny random models of every family, and prompts for them. The weights are spread so that attention is far from
uniform."""

from __future__ import annotations

import functools
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


def llava_next(seed: int = 0, layers: int = LAYERS, attention: str = "sdpa") -> Any:
    """LLaVA-NeXT: 16 visual tokens for the whole image, and a mosaic of two to four tiles of 28 pixels."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    torch.manual_seed(seed)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(image_size=28, patch_size=7, projection_dim=32, **TOWER),
        text_config=LlamaConfig(num_hidden_layers=layers, num_key_value_heads=4, **DECODER),
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]],
        image_token_index=IMAGE,
    )
    return _finish(LlavaNextForConditionalGeneration._from_config(config, attn_implementation=attention))


def llava_onevision(seed: int = 0, layers: int = LAYERS, attention: str = "sdpa") -> Any:
    """LLaVA-OneVision: 25 tokens a crop of 38 pixels, of which the tower sees 35; mosaics shrink to twice that many."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    torch.manual_seed(seed)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(image_size=38, patch_size=7, vision_use_head=False, **TOWER),
        text_config=Qwen2Config(num_hidden_layers=layers, num_key_value_heads=2, **DECODER),
        image_grid_pinpoints=[[38 * rows, 38 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)],
        vision_aspect_ratio="anyres_max_2",
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    return _finish(LlavaOnevisionForConditionalGeneration._from_config(config, attn_implementation=attention))


TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = {
    **{"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4},
    **{"max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
ANYRES = {"llava_next": llava_next, "llava_onevision": llava_onevision}
"""Families whose images have several grids and newline tokens; see `visual`."""


@functools.cache
def _plain(family: str) -> Any:
    """A model that nobody wraps."""
    return ANYRES[family]()


def visual(family: str, batch: dict[str, Tensor]) -> Tensor:
    """`(B, N)` bool, visual tokens of a batch; newline tokens are none, told by what the text model gets for them."""
    flags = (batch["input_ids"] == IMAGE) | (batch["input_ids"] == VIDEO)
    if family not in ANYRES:
        return flags
    model, seen = _plain(family), {}
    text_model = model.model.language_model
    handle = text_model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return flags & ~(seen["inputs_embeds"] == model.model.image_newline).all(-1)


SIZES = [(40, 66), (70, 20), (38, 38), (20, 90)]
"""Height and width of images in turn."""


def tiled_prompts(
    family: str, seed: int = 0, images: tuple[int, ...] = (1, 1), frames: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """As `prompts`, of images in tiles, and behind them in each row a video of so many frames; 0: none."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    model, generator = _plain(family), torch.Generator().manual_seed(seed)
    side, points = model.config.vision_config.image_size, model.config.image_grid_pinpoints
    sizes = [SIZES[n % len(SIZES)] for n in range(sum(images))]
    batch: dict[str, Tensor] = {}
    features: list[Tensor] = []
    if sizes:
        together = [count for count in images for _ in range(count)]
        several = family == "llava_onevision"
        crops = [
            1 if several and n > 1 else image_size_to_num_patches(size, points, side)
            for size, n in zip(sizes, together, strict=True)
        ]
        pixels = torch.zeros(len(sizes), max(crops), 3, side, side)
        for image, count in enumerate(crops):
            pixels[image, :count] = torch.randn(count, 3, side, side, generator=generator)
        batch = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
        if several and max(images) > 1:
            batch["batch_num_images"] = torch.tensor([count for count in images if count])
        with torch.no_grad():
            features = list(model.model.get_image_features(**batch).pooler_output)
    waiting = iter(features)
    rows = []
    for row, count in enumerate(images):
        ids = [1, *words(generator, 2 * row)]
        for _ in range(count):
            ids += [IMAGE] * len(next(waiting)) + words(generator, 2)
        if row < len(frames) and frames[row]:
            side_tokens = -(-(side // model.config.vision_config.patch_size) // 2)
            ids += [VIDEO] * (frames[row] * side_tokens**2 + 1) + words(generator, 1)
        rows.append(ids + words(generator, 9 - 4 * (row % 2)))
    videos = [count for count in frames if count]
    if videos:
        batch["pixel_values_videos"] = torch.randn(len(videos), videos[0], 3, side, side, generator=generator)
    ids, mask = pad_left(rows)
    return {"input_ids": ids, "attention_mask": mask} | batch


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
    if family in ANYRES:
        return tiled_prompts(family, seed, images)
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
    if "image_sizes" in batch:
        real = (one["pixel_values"][0] != 0).flatten(1).any(1)
        one |= {"pixel_values": one["pixel_values"][:, real], "image_sizes": batch["image_sizes"][row : row + 1]}
    return one


def answered(batch: dict[str, Tensor], sequences: Tensor) -> dict[str, Tensor]:
    """The inputs of one pass over prompts and what was generated, `sequences` `(B, N + T)`, as generation has them."""
    new = sequences.shape[1] - batch["input_ids"].shape[1]
    longer = batch | {"input_ids": sequences}
    for name in ("attention_mask", "mm_token_type_ids"):
        if name in batch:
            fill = batch[name].new_full((len(sequences), new), int(name == "attention_mask"))
            longer[name] = torch.cat([batch[name], fill], 1)
    if "mm_token_type_ids" not in batch:
        longer["position_ids"] = (longer["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return longer
