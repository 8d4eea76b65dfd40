"""Ask a wrapped model: images and questions in, raw texts and their cost out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from vlmattn.errors import DataError, VlmattnError
from vlmattn.eval.models import Loaded, out_of_memory

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmattn import Report, Session


@dataclass(frozen=True)
class Answers:
    """What came back for one batch.

    Attributes:
        texts: raw text per question, without special tokens.
        costs: per question, deterministic: visual tokens and KV bytes.
        times: of the whole batch, in milliseconds, and `new_tokens`, the steps of the longest answer.
        inputs: what the processor made, for pictures.
        report: what the session did.
    """

    texts: list[str]
    costs: list[dict[str, Any]]
    times: dict[str, float]
    inputs: Mapping[str, Any]
    report: Report


class Clock(LogitsProcessor):
    """Notes when the first logits of a generation arrive, that is when the prefill (vision tower included) is over."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self._now()
        self.first: float | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Pass the scores (B, vocabulary) through."""
        if self.first is None:
            self.first = self._now()
        return scores

    def milliseconds(self, new_tokens: int) -> dict[str, float]:
        """Prefill time, time of all later steps together, and how many tokens the longest answer has."""
        end = self._now()
        first = self.first if self.first is not None else end
        return {"prefill_ms": 1e3 * (first - self.start), "decode_ms": 1e3 * (end - first), "new_tokens": new_tokens}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Asker:
    """Greedy answers of one session, batched, padded on the left.

    Args:
        loaded: the model and its processor.
        session: the session installed on it.
        max_new_tokens: where an answer is cut.
    """

    def __init__(self, loaded: Loaded, session: Session, max_new_tokens: int) -> None:
        self.loaded = loaded
        self.session = session
        self.max_new_tokens = max_new_tokens

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> Answers:
        """Answer prompts[i] about images[i].

        Raises:
            VlmattnError: the processor has no chat template, the device is full, or a method refuses the call.
        """
        inputs = encode(self.loaded, images, prompts)
        clock = Clock(torch.device(self.loaded.device))
        tokenizer = self.loaded.processor.tokenizer
        extra = {} if tokenizer.pad_token_id is None else {"pad_token_id": tokenizer.pad_token_id}
        try:
            with torch.inference_mode():
                tokens = self.loaded.model.generate(
                    **inputs,
                    **extra,
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    logits_processor=LogitsProcessorList([clock]),
                )
        except torch.OutOfMemoryError as error:
            raise (out_of_memory(error) or error) from None
        new = tokens[:, inputs["input_ids"].shape[1] :]
        times = clock.milliseconds(new.shape[1])
        report = self.session.report()
        return Answers(
            tokenizer.batch_decode(new, skip_special_tokens=True), _costs(report, len(prompts)), times, inputs, report
        )

    def warm_up(self, images: Sequence[Image], prompts: Sequence[str]) -> None:
        """Answer once and forget it: the first call of a process pays for allocation and kernel choice."""
        self(images, prompts)


def encode(loaded: Loaded, images: Sequence[Image], prompts: Sequence[str]) -> Any:
    """Model inputs for one image and one prompt a row, on the model's device and in its dtype.

    Raises:
        DataError: the processor has no chat template.
    """
    processor = loaded.processor
    texts = []
    for prompt in prompts:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        try:
            texts.append(processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False))
        except ValueError as error:
            raise DataError(
                f"{loaded.name} has no chat template ({error}); use the chat version of the checkpoint"
            ) from None
    bos = processor.tokenizer.bos_token
    # A template that writes the first token itself must not get a second one from the tokenizer.
    options = {"add_special_tokens": False} if bos and texts[0].startswith(bos) else {}
    inputs = processor(images=[[image] for image in images], text=texts, padding=True, return_tensors="pt", **options)
    return inputs.to(loaded.device, dtype=getattr(torch, loaded.dtype))


def _costs(report: Report, count: int) -> list[dict[str, Any]]:
    shared = {
        "kv_bytes": report.kv_bytes / count,
        "kv_bytes_full": report.kv_bytes_full / count,
        "prefill_macs": report.prefill_macs / count,
        "prefill_macs_full": report.prefill_macs_full / count,
    }
    if not len(report.visual_tokens) == len(report.visual_per_layer) == count:
        raise VlmattnError(f"the report describes {len(report.visual_tokens)} samples, the batch had {count}")
    return [
        {"prompt_tokens": prompt, "visual_tokens": visual, "visual_per_layer": list(layers), **shared}
        for prompt, visual, layers in zip(
            report.prompt_tokens, report.visual_tokens, report.visual_per_layer, strict=True
        )
    ]
