"""Processor of the Qwen model that needs no torchvision; the stock one reads the same folder where torchvision works.

The stock ``Qwen2_5_VLProcessor`` cannot even be built without torchvision, because it insists on a video processor.
This one differs in that alone: frames of videos go through the image processor.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerFast, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlmattn.errors import DataError

from .qwen import TEMPORAL_PATCH
from .text import QWEN_CHAT_TEMPLATE
from .versions import Version

PROCESSOR_FILE = "processor_config.json"
_IMAGE, _VIDEO = 1, 2
"""Kinds of tokens in ``mm_token_type_ids``; text has 0."""


class ScenesQwenProcessor(Qwen2_5_VLProcessor):
    """Tokenizer and image processor as in ``Qwen2_5_VLProcessor``; videos are sequences of frames.

    Args:
        image_processor: cuts images and frames into patches.
        tokenizer: its vocabulary has the placeholders of images and videos.
        chat_template: Jinja template of conversations.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Sequence[Any] | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Model inputs for prompts with their images and videos, in the order of their placeholders.

        Args:
            images: a picture (PIL, or array of height, width and 3 colours) or a list, possibly nested, of them.
            text: one prompt or several.
            videos: one entry per video: a sequence of its frames, or an array of them; every two frames, a second
                apart, share their tokens, the last one is repeated where their number is odd.
            options: of the tokenizer.

        Returns:
            ``input_ids``, ``attention_mask`` and ``mm_token_type_ids``, each (prompts, tokens); ``pixel_values`` with
            ``image_grid_thw`` and ``pixel_values_videos`` with ``video_grid_thw`` where there are images and videos.

        Raises:
            DataError: no text, or the placeholders do not match the images and videos.
        """
        if text is None:
            raise DataError("text=None; expected at least one prompt")
        prompts = [text] if isinstance(text, str) else list(text)
        visual: dict[str, Tensor] = {}
        if images is not None and len(pictures := _flat(images)):
            visual |= self.image_processor(pictures, return_tensors="pt")
        if videos is not None and len(videos):
            clips = [self._video(clip) for clip in videos]
            visual["pixel_values_videos"] = torch.cat([patches for patches, _ in clips])
            visual["video_grid_thw"] = torch.tensor([grid for _, grid in clips])
        for token, grids in ((self.image_token, "image_grid_thw"), (self.video_token, "video_grid_thw")):
            prompts = self._expanded(prompts, token, visual.get(grids, torch.zeros(0, 3, dtype=torch.long)))
        options.pop("return_mm_token_type_ids", None)
        tensors = options.pop("return_tensors", None)
        words = self.tokenizer(prompts, **options)
        kinds = {self.image_token_id: _IMAGE, self.video_token_id: _VIDEO}
        words["mm_token_type_ids"] = [[kinds.get(token, 0) for token in row] for row in words["input_ids"]]
        return BatchFeature({**words, **visual}, tensor_type=tensors)

    def _expanded(self, prompts: list[str], token: str, grids: Tensor) -> list[str]:
        """Prompts in which every placeholder is repeated for each token of its image or video."""
        asked = sum(prompt.count(token) for prompt in prompts)
        if asked != len(grids):
            raise DataError(f"the prompts hold {asked} {token}, but {len(grids)} were given; expected one for each")
        counts = iter((grids.prod(-1) // self.image_processor.merge_size**2).tolist())
        expanded = []
        for prompt in prompts:
            first, *others = prompt.split(token)
            expanded.append(first + "".join(token * next(counts) + part for part in others))
        return expanded

    def _video(self, frames: Any) -> tuple[Tensor, list[int]]:
        """Patches (N, channels * 2 * patch * patch) of a video, and its grid of pairs of frames, rows and columns."""
        pictures = _flat(frames)
        pictures += pictures[-1:] * (len(pictures) % TEMPORAL_PATCH)
        cut = self.image_processor(pictures, return_tensors="pt")
        _, rows, columns = cut["image_grid_thw"][0].tolist()
        side = self.image_processor.patch_size
        patches = cut["pixel_values"].view(-1, TEMPORAL_PATCH, rows * columns, 3, TEMPORAL_PATCH, side, side)
        pairs = torch.stack([patches[:, place, :, :, 0] for place in range(TEMPORAL_PATCH)], 3)
        return pairs.flatten(0, 1).flatten(1), [len(pictures) // TEMPORAL_PATCH, rows, columns]


def _flat(images: Any) -> list[Any]:
    """Single pictures of a picture, of a stack of them or of nested sequences."""
    if isinstance(images, Image.Image) or (isinstance(images, np.ndarray | Tensor) and images.ndim == 3):
        return [images]
    return [picture for part in images for picture in _flat(part)]


def build(version: Version, tokenizer: PreTrainedTokenizerFast) -> ScenesQwenProcessor:
    """The processor of a version; pictures of between one window and sixteen times the world's largest keep their size
    where it can be divided into whole tokens."""
    sizes = version.architecture
    largest = max(height * width for height, width in version.world.sizes)
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": (4 * sizes.patch_size * sizes.merge) ** 2, "longest_edge": 16 * largest},
        patch_size=sizes.patch_size,
        temporal_patch_size=TEMPORAL_PATCH,
        merge_size=sizes.merge,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return ScenesQwenProcessor(images, tokenizer, chat_template=QWEN_CHAT_TEMPLATE)


def pin(file: Path) -> None:
    """Make a saved ``processor_config.json`` one that the stock processor can read, too.

    Names the stock classes and adds the video processor's settings, which are those of the images.
    """
    config = json.loads(file.read_text())
    images = config["image_processor"]
    shared = ("size", "patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
    config["image_processor"]["image_processor_type"] = Qwen2VLImageProcessorPil.__name__
    config["video_processor"] = {
        "video_processor_type": "Qwen2VLVideoProcessor",
        "do_sample_frames": False,
        **{name: images[name] for name in shared},
    }
    config["processor_class"] = Qwen2_5_VLProcessor.__name__
    file.write_text(json.dumps(config, indent=2) + "\n")
