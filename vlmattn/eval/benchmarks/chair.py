"""CHAIR: which objects of a caption are not in the image.

Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018 (arXiv 1809.02156). Over all captions:

- CHAIR_i: hallucinated mentions / mentions; repeated mentions count. Undefined where nothing is mentioned.
- CHAIR_s: captions with a hallucinated object / captions.
- recall: right objects / gold objects, objects counted once a caption, sums over captions.
- object F1: of recall and of right objects / mentioned objects, likewise: 2 right / (mentioned + gold).
- length: tokens a caption, punctuation included, a joined word pair being one; truncated: captions cut at the limit.

A short caption lowers CHAIR, so length and recall belong beside it. From a caption to its objects:

1. lower case, split into tokens;
2. normalise every token (the profile);
3. join word pairs, left to right, two tokens at a time;
4. drop every "seat" if there is also a "toilet";
5. keep the words of the table, as the names of their classes.

Profiles of steps 1 and 2: `official`, tokens of NLTK's tree-bank rules and the singular by the rules of the `pattern`
library, as TextBlob has them ("bus" becomes "bu" and is lost); `wordnet`, the same tokens and WordNet lemmas by tagged
part of speech (the variant of OPERA; needs NLTK data); `plain`, words as they are, for captions of rendered scenes.

Deviations: sentences are split after . ! ? and a blank instead of by a trained model; an item without gold objects is
an error (the scripts call every mention hallucinated).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from vlmattn.errors import DataError
from vlmattn.eval.benchmarks import repetition
from vlmattn.eval.items import Item, Said, some
from vlmattn.eval.tally import Formula, Kind, Scorer, Sums, ratio, share

PAPER = "1809.02156"
COLUMNS = (
    "total",
    "hallucinated",
    "mentions",
    "wrong_mentions",
    "right_objects",
    "objects",
    "gold",
    "tokens",
    "truncated",
    "unparsed",
    *repetition.COLUMNS,
)
_TOTAL, _HALLUCINATED, _MENTIONS, _WRONG, _RIGHT, _OBJECTS, _GOLD, _TOKENS, _TRUNCATED = range(9)
_KEPT = 65536
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_PLAIN = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*|[^\w\s]|_")
_WORDNET_DATA = ("averaged_perceptron_tagger_eng", "wordnet")
_EXTRA = "pip install 'vlmattn[eval]'"


@dataclass(frozen=True)
class Words:
    """The objects a caption can mention, and the words for them.

    Attributes:
        names: of the classes, in the order of the table.
        classes: word -> name of its class; a name is a word of its class.
        pairs: two words with a blank between -> the word that replaces them.
    """

    names: tuple[str, ...]
    classes: Mapping[str, str]
    pairs: Mapping[str, str]

    @classmethod
    def of(cls, table: Any, where: str = "word table") -> Words:
        """Check a table {"classes": {name: [words]}, "word_pairs": {"two words": replacement}}.

        Other fields are notes. `word_pairs` may be missing.

        Args:
            table: what JSON holds.
            where: what errors call it.

        Raises:
            DataError: the table breaks the schema; the field is named.
        """
        if not isinstance(table, Mapping):
            raise DataError(f"{where}: expected an object with 'classes', found {type(table).__name__}")
        classes: dict[str, str] = {}
        for name, listed in _object(table, "classes", where).items():
            place = f"{where}, field 'classes', {name!r}"
            if not isinstance(listed, Sequence) or isinstance(listed, str):
                raise DataError(f"{place}: expected a list of words, found {listed!r}")
            for word in (name, *listed):
                if not isinstance(word, str) or not word.strip():
                    raise DataError(f"{place}: expected words, found {word!r}")
                if classes.setdefault(word, name) != name:
                    raise DataError(f"{place}: {word!r} already belongs to {classes[word]!r}; a word has one class")
        if not classes:
            raise DataError(f"{where}, field 'classes': empty; expected at least one class")
        pairs = _object(table, "word_pairs", where) if "word_pairs" in table else {}
        for pair, word in pairs.items():
            if not isinstance(word, str) or not word.strip() or len(pair.split()) < 2:
                raise DataError(
                    f"{where}, field 'word_pairs', {pair!r}: {word!r}; expected two words and what replaces them"
                )
        return cls(tuple(table["classes"]), classes, dict(pairs))

    @classmethod
    def read(cls, path: str | Path) -> Words:
        """Read a JSON file of the form `of` checks; DataError names the file."""
        try:
            table = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); expected a JSON word table") from None
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error}); expected a word table") from None
        return cls.of(table, str(path))


class Found(NamedTuple):
    """What a caption mentions.

    Attributes:
        mentions: class names in the order of the caption, repeated ones too.
        length: tokens after word pairs were joined.
    """

    mentions: tuple[str, ...]
    length: int


def find(tokens: Sequence[str], words: Words) -> Found:
    """Steps 3 to 5: normalised tokens -> mentioned classes."""
    joined, place = [], 0
    while place < len(tokens):
        word = words.pairs.get(" ".join(tokens[place : place + 2]))
        joined.append(tokens[place] if word is None else word)
        place += 1 if word is None else 2
    kept = [word for word in joined if word != "seat"] if "toilet" in joined else joined
    return Found(tuple(words.classes[word] for word in kept if word in words.classes), len(joined))


def tokens_official(text: str) -> list[str]:
    """Steps 1 and 2 of `official`: singulars by noun rules, whatever the part of speech."""
    singular = _singular()
    return [singular(token) for token in _treebank(text)]


def tokens_wordnet(text: str) -> list[str]:
    """Steps 1 and 2 of `wordnet`: lemmas by tagged part of speech; anything but a verb, an adjective or an adverb is
    looked up as a noun.

    Raises:
        DataError: NLTK or its data are missing.
    """
    tokens = _treebank(text)
    try:
        import nltk
        from nltk.stem import WordNetLemmatizer

        lemma = WordNetLemmatizer().lemmatize
        classes = {"J": "a", "V": "v", "N": "n", "R": "r"}
        return [lemma(token, classes.get(tag[:1], "n")) for token, tag in nltk.pos_tag(tokens)]
    except LookupError:
        names = " ".join(_WORDNET_DATA)
        raise DataError(
            f"profile 'wordnet' needs the NLTK data {', '.join(_WORDNET_DATA)}, and not all of it is there; fetch it "
            f"once with `python -m nltk.downloader {names}`, or use profile 'official'"
        ) from None


def tokens_plain(text: str) -> list[str]:
    """Lower-cased words and punctuation marks as they are."""
    return _PLAIN.findall(text.lower())


PROFILES: dict[str, Callable[[str], list[str]]] = {
    "official": tokens_official,
    "wordnet": tokens_wordnet,
    "plain": tokens_plain,
}


def gold_objects(item: Item, words: Words) -> frozenset[str]:
    """The classes that are in the image, `gold["objects"]`.

    Raises:
        DataError: there is no such list, or it has a name that is no class of the table; the item is named.
    """
    if "objects" not in item.gold:
        raise DataError(f"item {item.id} (image {item.image}) has no gold 'objects'; expected a list of class names")
    objects = item.gold["objects"]
    if not isinstance(objects, (list, tuple)) or not all(isinstance(name, str) for name in objects):
        raise DataError(f"item {item.id}, gold 'objects': expected a list of class names, found {objects!r}")
    if strange := [name for name in objects if name not in words.names]:
        raise DataError(f"item {item.id}, gold 'objects': {some(strange)} not among the classes of the word table")
    return frozenset(objects)


def _f1(sums: Sums) -> Sums:
    return ratio(2 * sums[..., _RIGHT], sums[..., _OBJECTS] + sums[..., _GOLD])


FORMULAS = (
    Formula("chair_s", "CHAIR_s", share(_HALLUCINATED, _TOTAL), "lower", of_marks=True),
    Formula("chair_i", "CHAIR_i", share(_WRONG, _MENTIONS), "lower"),
    Formula("recall", "recall", share(_RIGHT, _GOLD)),
    Formula("f1", "object F1", _f1),
    Formula("length", "length", share(_TOKENS, _TOTAL), "neither", percent=False),
    Formula("truncated", "truncated", share(_TRUNCATED, _TOTAL), "lower"),
    *repetition.formulas(COLUMNS.index(repetition.COLUMNS[0])),
)


def kind(words: Words, profile: str = "official") -> Kind:
    """The kind "caption". A caption is right where it hallucinates nothing.

    Columns: captions, those with a hallucinated object, mentions and hallucinated ones, objects (once a caption) that
    are right, mentioned and gold, tokens, captions cut at the limit, captions without a token ("unparsed"), and those
    of `repetition`.

    Raises:
        DataError: an unknown profile; while counting, what `gold_objects` and the profile raise.
    """
    if profile not in PROFILES:
        raise DataError(f"caption profile {profile!r} is unknown; there are {', '.join(PROFILES)}")
    tokens = PROFILES[profile]

    @lru_cache(_KEPT)
    def found(text: str) -> Found:
        return find(tokens(text), words)

    def count(pairs: Sequence[tuple[Item, Said]]) -> list[float]:
        row = [0] * (_TRUNCATED + 2)
        for item, said in pairs:
            gold, (mentions, length) = gold_objects(item, words), found(said.text)
            wrong, objects = sum(name not in gold for name in mentions), set(mentions)
            one = (1, wrong > 0, len(mentions), wrong, len(objects & gold), len(objects), len(gold), length)
            row = [a + b for a, b in zip(row, (*one, said.truncated, not length), strict=True)]
        return [*row, *repetition.count(said.text for _, said in pairs)]

    def verdict(item: Item, said: Said) -> str:
        gold, objects = gold_objects(item, words), dict.fromkeys(found(said.text).mentions)
        right, wrong = ([name for name in objects if (name in gold) == there] for there in (True, False))
        return " ".join(filter(None, (", ".join(right), f"(not there: {', '.join(wrong)})" if wrong else "")))

    def faithful(item: Item, said: Said) -> bool:
        return gold_objects(item, words).issuperset(found(said.text).mentions)

    return Kind(
        name="caption",
        columns=COLUMNS,
        count=count,
        formulas=FORMULAS,
        mark=faithful,
        verdict=verdict,
    )


def scorer(words: Words | str | Path, profile: str = "official") -> Scorer:
    """CHAIR's numbers per group.

    Args:
        words: the word table, or the path of its JSON file.
        profile: a name in `PROFILES`.

    Raises:
        DataError: an unknown profile, or a word table that cannot be read.
    """
    captions = kind(words if isinstance(words, Words) else Words.read(words), profile)
    return Scorer(name="chair", profile=profile, kind=lambda group: captions)


def _object(table: Mapping[str, Any], field: str, where: str) -> Mapping[str, Any]:
    if field not in table:
        raise DataError(f"{where}, field {field!r}: missing (there are {', '.join(map(str, table)) or 'no fields'})")
    if not isinstance(table[field], Mapping):
        raise DataError(f"{where}, field {field!r}: expected an object, found {type(table[field]).__name__}")
    return table[field]


def _treebank(text: str) -> list[str]:
    try:
        from nltk.tokenize import NLTKWordTokenizer
    except ImportError:
        raise DataError(f"this caption profile needs NLTK: {_EXTRA}") from None
    split = NLTKWordTokenizer().tokenize
    return [token for sentence in _SENTENCE_END.split(text.lower().strip()) for token in split(sentence)]


@cache
def _singular() -> Callable[[str], str]:
    try:
        from textblob.en.inflect import singularize
    except ImportError:
        raise DataError(f"caption profile 'official' needs TextBlob: {_EXTRA}") from None
    return lru_cache(_KEPT)(singularize)
