"""Conversations about images as model inputs, by a processor's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vlmattn.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Turns = Sequence[Mapping[str, Any]]


def turn(role: str, text: str, images: int = 0) -> dict[str, Any]:
    """One turn of a conversation, with images before its text."""
    return {"role": role, "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}


def render(processor: Any, turns: Turns) -> str:
    """The conversation as text, up to where the answer begins.

    Raises:
        DataError: the processor has no chat template.
    """
    try:
        return processor.apply_chat_template(list(turns), add_generation_prompt=True, tokenize=False)
    except ValueError as error:
        raise DataError(f"the processor has no chat template ({error}): use the chat version of it") from None


def encode(model: Any, processor: Any, images: Sequence[Image], turns: Turns) -> dict[str, Tensor]:
    """Model inputs of one conversation, on the model's device and in its dtype.

    Raises:
        DataError: the processor has no chat template.
    """
    return encode_batch(model, processor, [images], [turns])


def encode_batch(
    model: Any, processor: Any, images: Sequence[Sequence[Image]], conversations: Sequence[Turns]
) -> dict[str, Tensor]:
    """Model inputs of several conversations, each with its images or all with none, as `encode`; padded by the
    processor.

    Raises:
        DataError: the processor has no chat template.
    """
    texts = [render(processor, turns) for turns in conversations]
    bos = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    # a template that writes the first token itself must not get a second one from the tokenizer
    options: dict[str, Any] = {"add_special_tokens": False} if bos and texts[0].startswith(bos) else {}
    if any(images):
        options["images"] = [list(pictures) for pictures in images]
    if len(texts) > 1:
        options["padding"] = True
    inputs = processor(text=texts, return_tensors="pt", **options)
    weight = model.get_input_embeddings().weight
    return {
        name: value.to(weight.device, weight.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    }


def continuation(processor: Any, turns: Turns, further: Turns) -> list[int]:
    """Token ids of what `further` turns append to a conversation whose answer was about to begin.

    Raises:
        DataError: the template writes the first turns in another way once others follow.
    """
    before, after = render(processor, turns), render(processor, [*turns, *further])
    if not after.startswith(before):
        raise DataError(
            "the chat template writes a conversation anew when it goes on, so that nothing can be appended to what was "
            "read: give the new tokens yourself, context.generate(ids)"
        )
    tokenizer = processor.tokenizer
    first, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after))
    if whole[: len(first)] == first:
        return whole[len(first) :]
    return tokenizer(after[len(before) :], add_special_tokens=False)["input_ids"]
