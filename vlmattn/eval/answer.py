"""Ask a wrapped model: images and questions in; raw texts, their cost, yes/no margins and kept tokens out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from vlmattn import chat
from vlmattn.errors import VlmattnError
from vlmattn.eval.models import Loaded, out_of_memory
from vlmattn.eval.records import pack_tokens

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmattn import Report, Session, VisionStore

YES, NO = ("yes", "Yes", "YES"), ("no", "No", "NO")


@dataclass(frozen=True)
class Answers:
    """What came back for one batch.

    Attributes:
        texts: raw text per question, without special tokens.
        truncated: per question, whether the answer was cut at `max_new_tokens` before an end token came.
        margins: per question the logit of "yes" minus that of "no" at the first answer token, as the model gives them,
            before a repetition penalty or the like of its generation settings; None where the tokenizer has no token
            that tells them apart.
        seen: per question what is recorded about its visual tokens: `kept` (a list of stages, see
            `vlmattn.eval.records.kept_tokens`) and `geometry` (`Geometry.as_dict`); empty where nothing was pruned.
        costs: per question, deterministic: visual tokens and KV bytes.
        times: of the whole batch, in milliseconds: `prefill_ms` (vision tower included, also where its features came
            from a store), `vision_ms` (how much of that the store saved), `decode_ms`; and `new_tokens`, the steps of
            the longest answer.
        inputs: what the processor made, for pictures.
        report: what the session did.
    """

    texts: list[str]
    truncated: list[bool]
    margins: list[float] | list[None]
    seen: list[dict[str, Any]]
    costs: list[dict[str, Any]]
    times: dict[str, float]
    inputs: Mapping[str, Any]
    report: Report


class FirstLogits(LogitsProcessor):
    """Notes when the first logits of a generation arrive, that is when the prefill (vision tower included) is over, and
    what they say about yes and no.

    Args:
        device: where the model is.
        words: ids of the tokens that begin a yes, and of those that begin a no; None if nothing tells them apart.
    """

    def __init__(self, device: torch.device, words: Sequence[Tensor] | None) -> None:
        self.device = device
        self.words = words
        self.margins: Tensor | None = None
        self.first: float | None = None
        self.start = self._now()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Pass the scores (B, vocabulary) through."""
        if self.first is None:
            self.first = self._now()
        return scores

    def look(self, model: torch.nn.Module, given: Any, output: Any) -> None:
        """Forward hook of the model: takes the margins from its logits (B, L, vocabulary), which no processor of the
        checkpoint's generation settings has touched. In a prefill of several chunks the last one counts."""
        if self.first is None and self.words is not None:
            yes, no = (output.logits[:, -1, ids].amax(dim=1).float() for ids in self.words)
            self.margins = yes - no

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
        store: vision features shared with other sessions; None to compute them anew.

    Attributes:
        peak_memory_bytes: the most a GPU held while answering, without what the store holds; None elsewhere.
    """

    def __init__(self, loaded: Loaded, session: Session, max_new_tokens: int, store: VisionStore | None = None) -> None:
        self.loaded = loaded
        self.session = session
        self.max_new_tokens = max_new_tokens
        self.store = store
        self.peak_memory_bytes: int | None = None
        session.share_vision(store)
        ids = yes_no_tokens(loaded.processor.tokenizer)
        device = torch.device(loaded.device)
        self._words = None if ids is None else [torch.tensor(side, device=device) for side in ids]
        ends = loaded.model.generation_config.eos_token_id
        self._ends = torch.tensor([] if ends is None else ends).flatten()

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> Answers:
        """Answer prompts[i] about images[i].

        Raises:
            VlmattnError: the processor has no chat template, the device is full, or a method refuses the call.
        """
        tokenizer = self.loaded.processor.tokenizer
        saved = self.store.saved_ms if self.store is not None else 0.0
        with self.session.images(images) as seen:
            inputs = encode(self.loaded, seen, prompts)
            held = self._begin()
            clock = FirstLogits(torch.device(self.loaded.device), self._words)
            try:
                with torch.inference_mode():
                    new = self._generate(seen, prompts, inputs, clock).cpu()
            except torch.OutOfMemoryError as error:
                raise (out_of_memory(error) or error) from None
        times = clock.milliseconds(new.shape[1])
        self._end(held)
        times["vision_ms"] = self.store.saved_ms - saved if self.store is not None else 0.0
        times["prefill_ms"] += times["vision_ms"]
        report = self.session.report()
        return Answers(
            texts=tokenizer.batch_decode(new, skip_special_tokens=True),
            truncated=self._truncated(new),
            margins=[None] * len(prompts) if clock.margins is None else clock.margins.tolist(),
            seen=self._seen(images, inputs, report),
            costs=_costs(report, len(prompts)),
            times=times,
            inputs=inputs,
            report=report,
        )

    def _generate(self, images: Sequence[Image], prompts: Sequence[str], inputs: Any, clock: FirstLogits) -> Tensor:
        """The new tokens (B, n), under the clock."""
        with self._timed(clock) as options:
            tokens = self.loaded.model.generate(**inputs, **options)
        return tokens[:, inputs["input_ids"].shape[1] :]

    @contextmanager
    def _timed(self, clock: FirstLogits) -> Iterator[dict[str, Any]]:
        """Inside, the clock hears the model; gives the options of a greedy generation."""
        pad = self.loaded.processor.tokenizer.pad_token_id
        hook = self.loaded.model.register_forward_hook(clock.look)
        try:
            yield {
                **({} if pad is None else {"pad_token_id": pad}),
                "max_new_tokens": self.max_new_tokens,
                "do_sample": False,
                "num_beams": 1,
                "logits_processor": LogitsProcessorList([clock]),
            }
        finally:
            hook.remove()

    def _begin(self) -> int:
        """Start watching memory; returns how many bytes the store holds on the device."""
        if not self.loaded.device.startswith("cuda"):
            return 0
        torch.cuda.reset_peak_memory_stats(self.loaded.device)
        return self.store.stored_bytes if self.store is not None else 0

    def _end(self, held: int) -> None:
        if self.loaded.device.startswith("cuda"):
            peak = torch.cuda.max_memory_allocated(self.loaded.device) - held
            self.peak_memory_bytes = max(peak, self.peak_memory_bytes or 0)

    def _truncated(self, new: Tensor) -> list[bool]:
        if new.shape[1] < self.max_new_tokens:
            return [False] * len(new)
        return (~torch.isin(new, self._ends).any(dim=1)).tolist()

    def _seen(self, images: Sequence[Image], inputs: Any, report: Report) -> list[dict[str, Any]]:
        if not report.stages:
            return [{} for _ in images]
        found = []
        for row, geometry in enumerate(self.session.geometry(images, inputs)):
            kept = [
                {
                    "method": stage.method,
                    "before_layer": stage.before_layer,
                    "mask": pack_tokens(stage.kept[row][0], geometry.num_tokens),
                }
                for stage in report.stages
            ]
            found.append({"kept": kept, "geometry": geometry.as_dict()})
        return found


def yes_no_tokens(tokenizer: Any) -> tuple[list[int], list[int]] | None:
    """Ids of the tokens with which an answer can begin to say yes, and no.

    The first tokens of yes, Yes, YES with and without a blank before, and the same for no. Ids on both sides (a lone
    blank, say) and the unknown token are left out; None if a side is empty then.
    """

    def first(words: Sequence[str]) -> set[int]:
        texts = [blank + word for word in words for blank in ("", " ")]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return {entry[0] for entry in ids if entry} - {tokenizer.unk_token_id}

    yes, no = first(YES), first(NO)
    if not yes - no or not no - yes:
        return None
    return sorted(yes - no), sorted(no - yes)


def encode(loaded: Loaded, images: Sequence[Image], prompts: Sequence[str]) -> dict[str, Tensor]:
    """Model inputs for one image and one prompt a row, on the model's device and in its dtype.

    Raises:
        DataError: the processor has no chat template.
    """
    turns = [[chat.turn("user", prompt, 1)] for prompt in prompts]
    return chat.encode_batch(loaded.model, loaded.processor, [[image] for image in images], turns)


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
