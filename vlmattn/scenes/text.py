"""The vocabulary and the prompt layout, in plain Python.

Training encodes text with :func:`encode`; the exported Hugging Face tokenizer and chat template give the same ids, and
a test holds them together.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import count

from .world import COLOR_NAMES, SHAPE_NAMES, WORLD_1, WORLD_2

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
_OTHER_WORDS = (
    "? . , a an the is there in image what where how many are of color shape describe left or right above below "
    "yes no nothing none digits shown object objects"
).split()
_LATER_WORDS = "just same different first second third between moved up down still frame image images video and".split()
"""Words of the second vocabulary, some of them for tasks that are yet to come."""
VOCABULARY_SIZES = (96, 144)
"""Entries of the first vocabulary, and of the second, which begins with the first."""


def _vocabulary() -> dict[str, int]:
    """Word to id; each vocabulary is filled up with unused entries."""
    words = [*SPECIAL_TOKENS, *COLOR_NAMES, *SHAPE_NAMES, *SHAPE_PLURALS.values(), *NUMBER_NAMES[:10]]
    words += [*WORLD_1.cell_names, *_OTHER_WORDS, *"0123456789"]
    later = [*NUMBER_NAMES[10:], *(word for name in WORLD_2.cell_names for word in name.split()), *_LATER_WORDS]
    unused = count()
    for size, more in zip(VOCABULARY_SIZES, ([], later), strict=True):
        words += dict.fromkeys(word for word in more if word not in words)
        words += [f"<unused_{next(unused)}>" for _ in range(size - len(words))]
    return {word: number for number, word in enumerate(words)}


VOCABULARY = _vocabulary()
"""Word to token id: the second vocabulary, whose first 96 entries are the first one."""
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
