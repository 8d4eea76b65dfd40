"""The vocabulary and the prompt layout, in plain Python.

Training encodes text with :func:`encode`; the exported Hugging Face tokenizer and chat template give the same ids, and
a test holds them together.
"""

from __future__ import annotations

import re
from functools import lru_cache

from .world import COLOR_NAMES, SHAPE_NAMES, WORLD_2

PAD, UNKNOWN, BOS, EOS, IMAGE, USER, ASSISTANT = (
    "<pad>",
    "<unk>",
    "<bos>",
    "<eos>",
    "<image>",
    "<|user|>",
    "<|assistant|>",
)
SPECIAL_TOKENS = (PAD, UNKNOWN, BOS, EOS, IMAGE, USER, ASSISTANT)
NUMBER_NAMES = tuple("zero one two three four five six seven eight nine ten eleven twelve".split())
SHAPE_PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPE_NAMES}
_WORDS = (
    "? . , a an the is there in image what where how many are of color shape describe left or right above below "
    "yes no nothing none digits shown object objects"
).split()
_MORE_WORDS = "just same different first second third between moved up down still frame images video and".split()
_COMPASS = "northwest north northeast west center east southwest south southeast".split()
"""No question names these directions; the tokens behind them keep their ids all the same."""


def _vocabulary() -> dict[str, int]:
    """Word to id. Checkpoints are trained on these ids, so a new word takes the place of an unused entry."""
    unused = [f"<unused_{number}>" for number in range(28)]
    words = [*SPECIAL_TOKENS, *COLOR_NAMES, *SHAPE_NAMES, *SHAPE_PLURALS.values(), *NUMBER_NAMES[:10]]
    words += [*_COMPASS, *_WORDS, *"0123456789", *unused[:4]]
    words += [*NUMBER_NAMES[10:], *" ".join(WORLD_2.cell_names).split(), *_MORE_WORDS, *unused[4:]]
    return {word: number for number, word in enumerate(dict.fromkeys(words))}


VOCABULARY = _vocabulary()
"""Word to token id."""
WORDS = tuple(VOCABULARY)
"""Token id to word."""
PAD_ID, UNKNOWN_ID, BOS_ID, EOS_ID, IMAGE_ID, USER_ID, ASSISTANT_ID = (VOCABULARY[word] for word in SPECIAL_TOKENS)
QWEN_TOKENS = {
    "<|image_pad|>": IMAGE_ID,
    "<|video_pad|>": VOCABULARY["<unused_0>"],
    "<|vision_start|>": VOCABULARY["<unused_1>"],
    "<|vision_end|>": VOCABULARY["<unused_2>"],
}
"""What the tokenizer of a Qwen model calls the image token and three unused entries."""
_, VIDEO_ID, VISION_START_ID, VISION_END_ID = QWEN_TOKENS.values()

_PIECES = re.compile(r"[a-z]+|[0-9]|[^\sa-z0-9]")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|user|>' if message['role'] == 'user' else '<|assistant|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] != 'user' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Jinja chat template of the exported processor: ``<bos> <|user|> <image> question <|assistant|> answer <eos>``."""
QWEN_CHAT_TEMPLATE = CHAT_TEMPLATE.replace(
    "== 'image' %}<image>{%",
    "== 'image' %}<|vision_start|><|image_pad|><|vision_end|>{%"
    " elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{%",
)
"""The same for a Qwen model, whose images and videos stand between marks."""


@lru_cache(maxsize=100_000)
def encode(text: str) -> tuple[int, ...]:
    """Token ids of plain text: lower case, words, single digits and single punctuation marks."""
    return tuple(VOCABULARY.get(piece, UNKNOWN_ID) for piece in _PIECES.findall(text.lower()))


def article(name: str) -> str:
    """``name`` with its indefinite article, for example ``an orange star``."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
