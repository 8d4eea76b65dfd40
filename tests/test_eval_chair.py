"""CHAIR: both word normalisers against what the metric's code prints, the word table, gold, repetition."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from vlmattn.errors import DataError
from vlmattn.eval.benchmarks import chair, repetition, scenes
from vlmattn.eval.items import Item, Said

DATA = Path(__file__).parent / "data"
TABLE = DATA / "chair_words.json"
ORACLE = json.loads((DATA / "chair_oracle.json").read_text())
WORDS = chair.Words.read(TABLE)
TOY = chair.Words.of({"classes": {"dog": ["puppy"], "cat": [], "toilet": [], "chair": ["seat"]}, "word_pairs": {}})

# What WordNet makes of the oracle's words: a lemma by part of speech; everything else stays as it is.
LEMMAS = {
    ("seated", "v"): "seat",
    ("skiing", "v"): "ski",
    ("women", "n"): "woman",
    ("buses", "n"): "bus",
    ("oranges", "n"): "orange",
    ("lights", "n"): "light",
    ("glasses", "n"): "glass",
    ("horses", "n"): "horse",
    ("ties", "n"): "tie",
    ("phones", "n"): "phone",
    ("skis", "n"): "ski",
    ("bears", "n"): "bear",
    ("passengers", "n"): "passenger",
    ("plants", "n"): "plant",
}


def oracle_run() -> tuple[list[Item], list[Said]]:
    items, said = [], []
    for number, row in enumerate(ORACLE["captions"]):
        gold = {"objects": ORACLE["gold"][str(row["image_id"])]}
        items.append(Item(f"caption/{number}", str(row["image_id"]), "Describe.", "", "caption", gold))
        said.append(Said(f"caption/{number}", row["caption"]))
    return items, said


def run(texts: list[str], gold: list[list[str]]) -> tuple[list[Item], list[Said]]:
    items = [Item(str(n), f"{n}.png", "Describe.", "", "caption", {"objects": mine}) for n, mine in enumerate(gold)]
    return items, [Said(str(n), text) for n, text in enumerate(texts)]


@pytest.fixture
def wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """NLTK as if its data were there, for the words of the oracle."""
    nltk = pytest.importorskip("nltk")
    verbs = {word for word, tag in LEMMAS if tag == "v"}
    tags = {"poor": "JJ", "quickly": "RB", "the": "DT", **dict.fromkeys(verbs, "VBG")}
    monkeypatch.setattr(nltk, "pos_tag", lambda tokens: [(token, tags.get(token, "NNS")) for token in tokens])

    class Lemmatizer:
        def lemmatize(self, word: str, pos: str) -> str:
            assert pos == {"poor": "a", "quickly": "r", **dict.fromkeys(verbs, "v")}.get(word, "n")
            return LEMMAS.get((word, pos), word)

    monkeypatch.setattr("nltk.stem.WordNetLemmatizer", Lemmatizer)


def test_oracle_numbers_official_with_the_table_given_as_a_path() -> None:
    values = chair.scorer(TABLE).score(*oracle_run())["values"]
    expected = ORACLE["pattern"]["overall"]
    assert values["caption.chair_s"] == pytest.approx(expected["CHAIRs"], abs=1e-15)
    assert values["caption.chair_i"] == pytest.approx(expected["CHAIRi"], abs=1e-15)
    assert values["caption.recall"] == pytest.approx(expected["Recall"], abs=1e-15)
    assert values["caption.length"] == sum(ORACLE["pattern"]["len_words_after_merge"]) / 6
    assert chair.scorer(str(TABLE)).score(*oracle_run())["values"] == values


def test_oracle_numbers_wordnet(wordnet: None) -> None:
    values = chair.scorer(WORDS, "wordnet").score(*oracle_run())["values"]
    expected = ORACLE["wordnet"]["overall"]
    assert values["caption.chair_s"] == pytest.approx(expected["CHAIRs"], abs=1e-15)
    assert values["caption.chair_i"] == pytest.approx(expected["CHAIRi"], abs=1e-15)
    assert values["caption.recall"] == pytest.approx(expected["Recall"], abs=1e-15)
    assert values["caption.length"] == pytest.approx(100 * expected["Len"])


@pytest.mark.parametrize("number", range(len(ORACLE["captions"])))
def test_oracle_mentions_and_lengths_per_caption(number: int, wordnet: None) -> None:
    text = ORACLE["captions"][number]["caption"]
    for name, tokens in (("pattern", chair.tokens_official), ("wordnet", chair.tokens_wordnet)):
        found = chair.find(tokens(text), WORDS)
        assert list(found.mentions) == ORACLE[name]["nodes"][number]
        assert found.length == ORACLE[name]["len_words_after_merge"][number]


@pytest.mark.parametrize("row", ORACLE["word_level"], ids=lambda row: row["caption"])
def test_oracle_word_level(row: dict[str, Any], wordnet: None) -> None:
    assert list(chair.find(chair.tokens_official(row["caption"]), WORDS).mentions) == row["pattern"]
    assert list(chair.find(chair.tokens_wordnet(row["caption"]), WORDS).mentions) == row["wordnet"]


def test_wordnet_looks_words_up_by_their_part_of_speech(wordnet: None) -> None:
    assert chair.tokens_wordnet("The poor dog, quickly seated.") == ["the", "poor", "dog", ",", "quickly", "seat", "."]


def test_wordnet_without_its_data_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    nltk = pytest.importorskip("nltk")

    def no_data(tokens: list[str]) -> None:
        raise LookupError("Resource not found")

    monkeypatch.setattr(nltk, "pos_tag", no_data)
    with pytest.raises(DataError, match=r"python -m nltk\.downloader averaged_perceptron_tagger_eng wordnet"):
        chair.scorer(TOY, "wordnet").score(*run(["a dog"], [["dog"]]))


def test_pairs_join_left_to_right_once_and_a_toilet_takes_the_seats_away() -> None:
    table = {"classes": {"hot dog": [], "dog": [], "chair": ["seat"], "toilet": []}}
    words = chair.Words.of(table | {"word_pairs": {"hot dog": "hot dog", "dog dog": "dog", "a b c": "dog"}})
    assert chair.find("hot dog dog dog".split(), words) == (("hot dog", "dog"), 2)
    assert chair.find("a b c".split(), words) == ((), 3)
    assert chair.find("a seat a seat".split(), words) == (("chair", "chair"), 4)
    assert chair.find("seat toilet seat".split(), words) == (("toilet",), 3), "the length is taken before seats go"


def test_quirks_of_the_table_stay() -> None:
    motor_bike = chair.tokens_official("A motor bike and an iPhone.")
    assert chair.find(motor_bike, WORDS) == ((), 6), "it joins to a word that the table has with a leading blank"


def test_numbers_by_hand() -> None:
    texts = ["A puppy, a dog and a cat.", "A cat. A cat.", "Nothing here.", ""]
    items, said = run(texts, [["dog"], ["cat", "chair"], [], ["dog"]])
    said[0] = said[0]._replace(truncated=True)
    score = chair.scorer(TOY, "plain").score(items, said)
    found = score["groups"]["caption"]
    assert found["chair_s"] == 1 / 4 and found["chair_i"] == 1 / 5
    assert found["recall"] == 2 / 4 and found["f1"] == pytest.approx(2 * 2 / (3 + 4))
    assert found["length"] == (9 + 6 + 3) / 4 and found["truncated"] == 1 / 4
    assert score["unparsed"] == 1 and score["undefined"] == []


def test_captions_of_one_image_count_each() -> None:
    items, said = run(["a dog", "a cat"], [["dog"], ["dog"]])
    items[1] = Item("1", "0.png", "Describe.", "", "caption", {"objects": ["dog"]})
    tally = chair.scorer(TOY, "plain").tally(items, said)
    assert tally.images == ("0.png",) and tally.values()["caption.chair_s"] == 0.5
    assert tally.marks == {"0": True, "1": False}, "a caption is right where it hallucinates nothing"
    assert tally.verdicts == {"0": "dog", "1": "(not there: cat)"}


def test_nothing_mentioned_is_undefined_not_faultless() -> None:
    scorer, (items, said) = chair.scorer(TOY, "plain"), run(["a sky"], [["dog"]])
    score = scorer.score(items, said)
    assert score["undefined"] == ["caption.chair_i", "caption.repeated_4"]
    tally = scorer.tally(items, said)
    assert math.isnan(tally.metric("caption.chair_i").raw(tally.sums.sum(axis=0)))
    with pytest.raises(ZeroDivisionError, match=r"caption\.chair_i"):
        scorer.score(items, said, strict=True)


def test_directions_and_units() -> None:
    better = {formula.name: formula.better for formula in chair.FORMULAS}
    assert [name for name, way in better.items() if way == "lower"] == ["chair_s", "chair_i", "truncated", "repeated_4"]
    assert [name for name, way in better.items() if way == "neither"] == ["length"]
    assert [formula.name for formula in chair.FORMULAS if not formula.percent] == ["length"]


def test_order_of_answers_changes_nothing_and_sums_add_up_over_images() -> None:
    scorer, (items, said) = chair.scorer(TABLE), oracle_run()
    whole = scorer.tally(items, said)
    assert scorer.score(items, said[::-1]) == scorer.score(items, said)
    parts = [scorer.tally([item], [answer]).sums.sum(axis=0) for item, answer in zip(items, said, strict=True)]
    assert sum(parts) == pytest.approx(whole.sums.sum(axis=0))


@pytest.mark.parametrize(
    ("gold", "words"),
    [
        ({}, "item 7 .image 7.png. has no gold 'objects'"),
        ({"objects": "dog"}, "expected a list of class names, found 'dog'"),
        ({"objects": [1]}, "expected a list of class names"),
        ({"objects": ["dog", "giraffe"]}, "giraffe not among the classes"),
    ],
)
def test_gold_that_does_not_fit_is_an_error(gold: dict[str, Any], words: str) -> None:
    item = Item("7", "7.png", "Describe.", "", "caption", gold)
    with pytest.raises(DataError, match=words):
        chair.scorer(TOY, "plain").score([item], [Said("7", "a dog")])


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ([], ("expected an object with 'classes', found list",)),
        ({"words": {}}, ("field 'classes': missing", "words")),
        ({"classes": ["dog"]}, ("field 'classes': expected an object, found list",)),
        ({"classes": {}}, ("field 'classes': empty",)),
        ({"classes": {"dog": "puppy"}}, ("field 'classes', 'dog': expected a list of words",)),
        ({"classes": {"dog": [1]}}, ("field 'classes', 'dog': expected words, found 1",)),
        ({"classes": {"dog": [""]}}, ("field 'classes', 'dog': expected words",)),
        ({"classes": {"dog": ["pet"], "cat": ["pet"]}}, ("'cat'", "'pet' already belongs to 'dog'")),
        ({"classes": {"dog": []}, "word_pairs": []}, ("field 'word_pairs': expected an object",)),
        ({"classes": {"dog": []}, "word_pairs": {"dog": "dog"}}, ("field 'word_pairs', 'dog'", "two words")),
        ({"classes": {"dog": []}, "word_pairs": {"hot dog": 1}}, ("field 'word_pairs', 'hot dog'",)),
    ],
)
def test_a_malformed_table_names_file_and_field(tmp_path: Path, table: Any, words: tuple[str, ...]) -> None:
    path = tmp_path / "words.json"
    path.write_text(json.dumps(table))
    with pytest.raises(DataError) as caught:
        chair.scorer(path)
    assert all(word in str(caught.value) for word in ("words.json", *words)), str(caught.value)


def test_a_table_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json: cannot be read"):
        chair.Words.read(tmp_path / "nowhere.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match=r"broken\.json: not JSON"):
        chair.Words.read(tmp_path / "broken.json")


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(DataError, match="'pattern' is unknown; there are official, wordnet, plain"):
        chair.scorer(TOY, "pattern")


def test_the_world_s_own_table_reads_its_captions() -> None:
    words = scenes.world_words()
    assert len(words.names) == 64
    found = chair.find(chair.tokens_plain("A red circle, an orange star and a circle."), words)
    assert found.mentions == ("red circle", "orange star")


def test_words_and_distinct_1() -> None:
    assert repetition.words("The dog's ball -- it\u2019s RED!") == ["the", "dog's", "ball", "it\u2019s", "red"]
    assert repetition.distinct_1(["a", "b", "a", "a"]) == 0.5
    assert math.isnan(repetition.distinct_1([]))


def test_repeated_grams_are_those_that_were_there_before() -> None:
    assert repetition.repeated_grams("a b c d".split()) == (0, 1)
    assert repetition.repeated_grams("a b c".split()) == (0, 0)
    assert repetition.repeated_grams("a a a a a a".split()) == (2, 3)
    assert repetition.repeated_grams("a b a b a b".split(), 2) == (3, 5)


def test_repetition_of_a_run() -> None:
    texts = ["a dog, a dog, a dog, a dog", "one two three four five", "..."]
    score = chair.scorer(TOY, "plain").score(*run(texts, [["dog"], [], []]))["groups"]["caption"]
    assert score["distinct_1"] == pytest.approx((2 / 8 + 1) / 2), "a caption without words has no such share"
    assert score["repeated_4"] == pytest.approx(3 / 7), "grams of all captions together"
    assert score["counts"]["worded"] == 2


def test_without_the_libraries_the_profiles_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textblob.en.inflect", None)
    chair._singular.cache_clear()
    with pytest.raises(DataError, match=r"needs TextBlob: pip install 'vlmattn\[eval\]'"):
        chair.tokens_official("a dog")
    monkeypatch.setitem(sys.modules, "nltk.tokenize", None)
    with pytest.raises(DataError, match=r"needs NLTK: pip install 'vlmattn\[eval\]'"):
        chair.tokens_wordnet("a dog")
    assert chair.tokens_plain("A dog.") == ["a", "dog", "."]
