"""Turn a training run into a packaged model: ``python -m vlmattn.scenes.export --run DIR --out FOLDER``.

The folder is an ordinary Hugging Face checkpoint: bf16 safetensors, config, generation config, tokenizer, processor and
chat template; ``training.json`` keeps the settings, versions and curves of the run, and which share of its last stage
went into the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlmattn.errors import VlmattnError

from . import qwen_processor, runs
from .model import build_model
from .stages import Settings
from .text import (
    BOS,
    BOS_ID,
    CHAT_TEMPLATE,
    EOS,
    EOS_ID,
    IMAGE,
    PAD,
    PAD_ID,
    QWEN_TOKENS,
    SPECIAL_TOKENS,
    UNKNOWN,
    WORDS,
)
from .versions import QWEN, Version

WEIGHTS_FILE, TRAINING_FILE = "model.safetensors", "training.json"


def build_tokenizer(version: Version) -> PreTrainedTokenizerFast:
    """The word-level tokenizer; equal to :func:`vlmattn.scenes.text.encode` on plain text."""
    words = list(WORDS)
    special = list(SPECIAL_TOKENS)
    if version.family == QWEN:
        for word, number in QWEN_TOKENS.items():
            words[number] = word
        special = [word for word in special if word != IMAGE] + list(QWEN_TOKENS)
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=UNKNOWN))
    core.normalizer = normalizers.Lowercase()
    split = [
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Punctuation(),
        pre_tokenizers.Digits(individual_digits=True),
    ]
    core.pre_tokenizer = pre_tokenizers.Sequence(split)
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    core.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[word for word in special if word not in (PAD, UNKNOWN, BOS, EOS)],
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_processor(version: Version) -> ProcessorMixin:
    """Tokenizer, image processor and chat template."""
    if version.family == QWEN:
        return qwen_processor.build(version, build_tokenizer(version))
    side = dict(zip(("height", "width"), version.world.size, strict=True))
    images = CLIPImageProcessorPil(
        do_resize=True,
        size=side,
        do_center_crop=False,
        crop_size=side,
        do_rescale=True,
        do_normalize=True,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(version),
        patch_size=version.architecture.patch_size,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def run_settings(run: Path) -> Settings:
    """The settings of a run; raises DataError if the folder has none."""
    return Settings(**runs.settings(run))


def trained_model(run: Path, habit_share: float = 1.0) -> PreTrainedModel:
    """The fp32 model of a finished run, with a share of what its last stage changed.

    Raises:
        DataError: the run is not finished, or the share is outside 0..1.
        ValueError: the weights do not fit the settings.
    """
    settings = run_settings(run)
    model = build_model(settings.subject, settings.seed)
    missing, unexpected = model.load_state_dict(runs.weights(run, habit_share), strict=False)
    wrong = [n for n in missing if "lm_head" not in n and "post_layernorm" not in n] + list(unexpected)
    if wrong:
        raise ValueError(f"the weights in {run} do not fit its settings: {', '.join(wrong[:3])}")
    model.tie_weights()
    return model.eval()


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_processor(version: Version, folder: Path) -> None:
    """Write the files of a version's processor."""
    build_processor(version).save_pretrained(folder)
    pin = qwen_processor.pin if version.family == QWEN else _pin_image_processor
    pin(folder / qwen_processor.PROCESSOR_FILE)


def _pin_image_processor(file: Path) -> None:
    """Name the PIL image processor outright, so that the pixels do not depend on whether torchvision is installed.

    ``save_pretrained`` writes the name of the backend-neutral class instead.
    """
    config = json.loads(file.read_text())
    config["image_processor"]["image_processor_type"] = CLIPImageProcessorPil.__name__
    file.write_text(json.dumps(config, indent=2) + "\n")


def _training_record(run: Path, habit_share: float, weights: Path, parameters: int) -> dict[str, Any]:
    """What goes into training.json."""
    return {
        **runs.record(run),
        "habit_share": habit_share,
        "choice": runs.choice(run),
        "parameters": parameters,
        "weights_sha256": file_sha256(weights),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
        },
    }


def export(run: Path, out: Path, habit_share: float | None = None) -> None:
    """Write the checkpoint folder of a finished run; raises as :func:`trained_model` does.

    Args:
        run: folder of the run.
        out: the folder to write.
        habit_share: share of what the last stage changed; None for the one that choose.py found, or else all of it.
    """
    version = run_settings(run).subject
    share = runs.choice(run).get("habit_share", 1.0) if habit_share is None else habit_share
    model = trained_model(run, share).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        max_new_tokens=version.lessons.lengths[-1],
        do_sample=False,
    )
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    save_processor(version, out)
    record = _training_record(run, share, out / WEIGHTS_FILE, model.num_parameters())
    (out / TRAINING_FILE).write_text(json.dumps(record, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Command line of :func:`export`."""
    parser = argparse.ArgumentParser(
        prog="python -m vlmattn.scenes.export", description="Package a finished training run as a checkpoint folder."
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished vlmattn.scenes.train")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder to write")
    parser.add_argument(
        "--habit-share",
        type=float,
        help="share of what the last training stage changed (default: as vlmattn.scenes.choose found, or else 1)",
    )
    options = parser.parse_args(arguments)
    try:
        export(options.run, options.out, options.habit_share)
    except VlmattnError as error:
        parser.error(str(error))
    for file in sorted(options.out.iterdir()):
        print(f"{file.stat().st_size:>9}  {file.name}")


if __name__ == "__main__":
    main()
