"""What a model is like inside: where its attention goes, and how large its activations are, by layer.

Attention sinks and massive activations (arXiv 2402.17762, 2309.17453) are what several methods on visual tokens rely
on; these tables say whether a checkpoint has them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

KINDS = ("first", "special", "visual", "word")
"""Of tokens: the first of the prompt, other special tokens, visual tokens, and all others."""
FIRST, SPECIAL, VISUAL, WORD = range(len(KINDS))
_BATCH = 25


class _Reading:
    """One forward pass over a batch of prompts.

    Attributes:
        ids: token ids, (B, N).
        kinds: index in KINDS of each token, (B, N), -1 for padding.
        attentions: of each layer, (B, H, N, N) fp32.
        hidden: input of each layer, (B, N, D) fp32.
    """

    def __init__(self, model: Any, processor: Any, prompts: Sequence[str], images: Sequence[Image]) -> None:
        inputs = processor(images=list(images), text=list(prompts), padding=True, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        with torch.inference_mode():
            out = model(**inputs, output_hidden_states=True, output_attentions=True, use_cache=False)
        self.attentions = [attention.float().cpu() for attention in out.attentions]
        self.hidden = [hidden.float().cpu() for hidden in out.hidden_states[: len(self.attentions)]]
        self.ids, shown = inputs["input_ids"].cpu(), inputs["attention_mask"].bool().cpu()
        special = torch.isin(self.ids, torch.tensor(processor.tokenizer.all_special_ids))
        self.kinds = torch.where(special, SPECIAL, WORD)
        self.kinds[self.ids == model.config.image_token_id] = VISUAL
        self.kinds[shown & (shown.cumsum(1) == 1)] = FIRST
        self.kinds[~shown] = -1

    @property
    def asking(self) -> Tensor:
        """Tokens behind the image, (B, N)."""
        visual = self.kinds == VISUAL
        return (visual.cumsum(1) == visual.sum(1, keepdim=True)) & ~visual & (self.kinds >= 0)


def statistics(model: Any, processor: Any, prompts: Sequence[str], images: Sequence[Image]) -> dict[str, Any]:
    """Attention and activations of a model on some questions.

    Args:
        model: a model in evaluation mode; it is switched to eager attention for the time being.
        processor: its processor, which pads on the left.
        prompts: texts of the chat template, with a placeholder for one image each.
        images: one per prompt.

    Returns:
        A JSON-able dict with ``questions``; ``attention``, by layer, all of rows behind the image: ``visual`` and
        ``visual_last``, the mean share per head that all these rows and that the last one spends on visual tokens,
        ``first``, the same on the first token, and ``most``, the largest share of the visual attention of a picture,
        over heads and rows, that a single visual token gets, mean over pictures; ``activations``, by layer, of its
        input: ``median`` of all absolute values, and of each kind of token the ``largest`` one, its ``ratio`` to the
        median, its ``dimension``, the share ``agreeing`` of the kind's tokens that are largest in that dimension, and
        its ``token``.
    """
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation("eager")
    try:
        readings = [
            _Reading(model, processor, prompts[start : start + _BATCH], images[start : start + _BATCH])
            for start in range(0, len(prompts), _BATCH)
        ]
    finally:
        model.set_attn_implementation(before)
    layers = range(len(readings[0].attentions))
    return {
        "questions": len(prompts),
        "attention": [_attention(readings, layer) for layer in layers],
        "activations": [_activations(readings, layer, processor.tokenizer) for layer in layers],
    }


def _attention(readings: list[_Reading], layer: int) -> dict[str, Any]:
    """Shares of attention in one layer."""
    asked, last, first, most = [], [], [], []
    for reading in readings:
        weights, asking, visual = reading.attentions[layer], reading.asking, (reading.kinds == VISUAL).float()
        # (B, N, H)
        on_visual = torch.einsum("bhnk,bk->bnh", weights, visual)
        on_first = torch.einsum("bhnk,bk->bnh", weights, (reading.kinds == FIRST).float())
        asked.append(on_visual[asking])
        first.append(on_first[asking])
        last.append(on_visual[:, -1])
        # (B, N): the visual attention of all asking rows and heads of a picture, by the token that gets it
        received = torch.einsum("bhnk,bn->bk", weights, asking.float()) * visual
        most.append(received.amax(1) / received.sum(1))
    per_head = {"visual": asked, "visual_last": last, "first": first}
    shares = {name: [round(x, 4) for x in torch.cat(parts).mean(0).tolist()] for name, parts in per_head.items()}
    return shares | {"most": round(float(torch.cat(most).mean()), 4)}


def _activations(readings: list[_Reading], layer: int, tokenizer: Any) -> dict[str, Any]:
    """Largest absolute values at the input of one layer."""
    shown = torch.cat([reading.hidden[layer][reading.kinds >= 0] for reading in readings]).abs()
    kinds = torch.cat([reading.kinds[reading.kinds >= 0] for reading in readings])
    names = [name for reading in readings for name in _names(reading, tokenizer)]
    median = float(shown.median())
    found: dict[str, Any] = {"median": _rounded(median)}
    for kind, title in enumerate(KINDS):
        places = (kinds == kind).nonzero()[:, 0]
        if not len(places):
            continue
        values, dimensions = shown[places].max(1)
        at = int(values.argmax())
        found[title] = {
            "largest": _rounded(float(values[at])),
            "ratio": _rounded(float(values[at]) / median),
            "dimension": int(dimensions[at]),
            "agreeing": round(float((dimensions == dimensions[at]).float().mean()), 3),
            "token": names[int(places[at])],
        }
    return found


def _rounded(value: float) -> float:
    """Four significant digits: embeddings are hundreds of times smaller than what deep layers add."""
    return float(f"{value:.4g}")


def _names(reading: _Reading, tokenizer: Any) -> Iterator[str]:
    """A name for every token that is no padding: a visual token's is its number in the prompt."""
    for ids, kinds in zip(reading.ids.tolist(), reading.kinds.tolist(), strict=True):
        seen: Counter[int] = Counter()
        for token, kind in zip(ids, kinds, strict=True):
            if kind >= 0:
                yield f"visual {seen[VISUAL]}" if kind == VISUAL else str(tokenizer.convert_ids_to_tokens(token))
            seen[kind] += 1
