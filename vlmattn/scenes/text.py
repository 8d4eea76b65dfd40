"""The 96-word vocabulary and the prompt layout, in plain Python.

Training encodes text with :func:`encode`; the exported Hugging Face tokenizer and chat template give the same ids, and
a test holds them together.
"""

from __future__ import annotations

import re
from functools import lru_cache

from .world import CELL_NAMES, COLOR_NAMES, SHAPE_NAMES

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
NUMBER_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHAPE_PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPE_NAMES}
_OTHER_WORDS = (
    "? . , a an the is there in image what where how many are of color shape describe left or right above below "
    "yes no nothing none digits shown object objects"
).split()
VOCABULARY_SIZE = 96


def _vocabulary() -> dict[str, int]:
    """Word to id, filled up with unused entries to VOCABULARY_SIZE."""
    words = [*SPECIAL_TOKENS, *COLOR_NAMES, *SHAPE_NAMES, *SHAPE_PLURALS.values(), *NUMBER_NAMES, *CELL_NAMES]
    words += [*_OTHER_WORDS, *"0123456789"]
    words += [f"<unused_{number}>" for number in range(VOCABULARY_SIZE - len(words))]
    return {word: number for number, word in enumerate(words)}


VOCABULARY = _vocabulary()
"""Word to token id; 96 entries."""
WORDS = tuple(VOCABULARY)
"""Token id to word."""
PAD_ID, UNKNOWN_ID, BOS_ID, EOS_ID, IMAGE_ID, USER_ID, ASSISTANT_ID = (VOCABULARY[word] for word in SPECIAL_TOKENS)

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


@lru_cache(maxsize=100_000)
def encode(text: str) -> tuple[int, ...]:
    """Token ids of plain text: lower case, words, single digits and single punctuation marks."""
    return tuple(VOCABULARY.get(piece, UNKNOWN_ID) for piece in _PIECES.findall(text.lower()))


def article(name: str) -> str:
    """``name`` with its indefinite article, for example ``an orange star``."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
