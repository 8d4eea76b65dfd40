"""An oracle for calibrated decoding: two plain forward passes a step, without a cache, a row at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny
import torch
from torch import Tensor

import vlmattn

Inputs = dict[str, Any]
WRAPPERS = (92, 93)


def generate(model: Any, batch: Inputs, steps: int = 6, **options: Any) -> Any:
    return model.generate(
        **batch,
        max_new_tokens=steps,
        return_dict_in_generate=True,
        output_logits=True,
        suppress_tokens=[tiny.IMAGE, tiny.VIDEO, *WRAPPERS],  # an answer without images
        **({"do_sample": False} | options),
    )


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference; infinite where one is cut off and the other is not."""
    assert torch.equal(a.isneginf(), b.isneginf())
    return (a - b).masked_fill(a.isneginf(), 0.0).abs().max().item()


def text_only(one: Inputs) -> Inputs:
    """One unpadded prompt without its image."""
    ids = one["input_ids"]
    stays = ~torch.isin(ids, torch.tensor([tiny.IMAGE, *WRAPPERS]))
    return {"input_ids": ids[stays][None], "attention_mask": torch.ones(1, int(stays.sum()), dtype=torch.long)}


def inserted(one: Inputs, words: list[int], where: str) -> Inputs:
    """One unpadded prompt with words beside its image and what wraps it."""
    ids = one["input_ids"][0].tolist()
    around = [place for place, token in enumerate(ids) if token in (tiny.IMAGE, *WRAPPERS)]
    place = around[0] if where == "before" else around[-1] + 1
    ids = torch.tensor([ids[:place] + words + ids[place:]])
    new = one | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return new | ({"mm_token_type_ids": (ids == tiny.IMAGE).long()} if "mm_token_type_ids" in one else {})


def extended(one: Inputs, answer: list[int]) -> Inputs:
    """One prompt with an answer behind it."""
    longer = dict(one)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in one:
            tail = {"input_ids": answer, "attention_mask": [1] * len(answer)}.get(name, [0] * len(answer))
            longer[name] = torch.cat([one[name], torch.tensor([tail], dtype=torch.long)], 1)
    return longer


@torch.no_grad()
def two_forwards(
    model: Any,
    first: Inputs,
    second: Inputs,
    combine: Callable[[Tensor, Tensor, int], Tensor],
    steps: int = 6,
    rest: Any = None,
) -> tuple[list[int], list[Tensor]]:
    """Greedy tokens and their logits.

    Args:
        combine: from the raw logits `(W,)` of both branches, and the number of the token counting from 1, to new ones.
        rest: other methods that act in both branches.
    """
    answer: list[int] = []
    found = []
    banned = [tiny.IMAGE, tiny.VIDEO, *WRAPPERS]
    with vlmattn.wrap(model, rest) as session:
        for number in range(1, steps + 1):
            raw = []
            for prompt in (first, second):
                model.model.rope_deltas = None
                with session.prompt(prompt["input_ids"].shape[1]):
                    raw.append(model(**extended(prompt, answer), use_cache=False).logits[0, -1])
            new = combine(raw[0], raw[1], number)
            found.append(new)
            answer.append(int(new.index_fill(0, torch.tensor(banned), -torch.inf).argmax()))
    return answer, found
