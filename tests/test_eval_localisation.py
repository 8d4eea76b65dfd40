"""Localisation: boxes read from text against what the scorers print, and places given by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmattn.errors import DataError
from vlmattn.eval.benchmarks import localisation, scenes
from vlmattn.eval.items import Item, Said
from vlmattn.eval.tally import Scorer
from vlmattn.scenes.world import WORLDS, World

ORACLE = json.loads((Path(__file__).parent / "data" / "refcoco_oracle.json").read_text())
IOU = {"feather": "feather_iou", "lmms_eval": "lmms_rec_iou"}
GOLD = {"box": ORACLE["gold"]}
PLACES = {"left": (0.0, 0.0, 0.5, 1.0), "right": (0.5, 0.0, 1.0, 1.0)}


def oracle_run() -> tuple[list[Item], list[Said]]:
    items = [Item(str(n), "1.png", "Where?", "", "val", GOLD) for n in range(len(ORACLE["items"]))]
    return items, [Said(str(n), row["pred"]) for n, row in enumerate(ORACLE["items"])]


def places() -> Scorer:
    kind = localisation.place_kind(PLACES)
    return Scorer("toy", "exact", lambda group: kind)


@pytest.mark.parametrize("profile", localisation.PROFILES)
@pytest.mark.parametrize("row", ORACLE["items"], ids=lambda row: row["pred"])
def test_oracle_iou_per_answer(row: dict, profile: str) -> None:
    item, expected = Item("a", "1.png", "Where?", "", "val", GOLD), row[IOU[profile]]
    assert localisation.answer_iou(item, row["pred"], profile) == pytest.approx(expected or 0.0, abs=1e-12)
    if profile == "feather":
        assert (localisation.parse(row["pred"], profile) is None) == (expected is None)
    else:
        assert list(localisation.parse(row["pred"], profile) or (0, 0, 0, 0)) == row["lmms_rec_box"]


def test_oracle_rates() -> None:
    feather = localisation.scorer("feather").score(*oracle_run())["groups"]["val"]
    assert feather["accuracy"] == 2 / 16 and feather["invalid"] == 13 / 16
    assert feather["iou"] == pytest.approx(sum(row["feather_iou"] or 0 for row in ORACLE["items"]) / 16)
    lmms_eval = localisation.scorer("lmms_eval").score(*oracle_run())["groups"]["val"]
    assert lmms_eval["accuracy"] == 4 / 16 and lmms_eval["counts"]["unparsed"] == 5
    assert lmms_eval["iou"] == pytest.approx(sum(row["lmms_rec_iou"] for row in ORACLE["items"]) / 16)


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("[0, 0, 1, 1]", True),
        (" [0.1, 0.2, 0.5, 0.6,]\n", True),
        ("[1e-1, .2, 5E-1, +0.6]", True),
        ("(0.1, 0.2, 0.5, 0.6)", False),
        ("[0.1, 0.2, 0.1, 0.6]", False),
        ("[0.1, 0.2, 0.5, 0.6, 0.7]", False),
        ("[0.1, 0.2, 0.5, 1.01]", False),
        ("[-0.1, 0.2, 0.5, 0.6]", False),
        ("[0.1, 0.2, 0.5, '0.6']", False),
        ("[0.1, 0.2, 0.5, True]", False),
        ("[01, 0.2, 0.5, 0.6]", False),
        ("[0.1.2, 0.2, 0.5, 0.6]", False),
        ("[1e999, 0.2, 0.5, 0.6]", False),
        ("[[0.1, 0.2], 0.5, 0.6]", False),
        ("[" * 5000, False),
    ],
)
def test_a_feather_box_is_exactly_a_list_of_four(text: str, valid: bool) -> None:
    assert (localisation.parse_feather(text) is not None) == valid


def test_only_feather_rounds_the_gold_box() -> None:
    item = Item("a", "1.png", "?", "", "val", {"box": [0.104, 0.196, 0.504, 0.604]})
    assert localisation.answer_iou(item, "[0.1, 0.2, 0.5, 0.6]", "feather") == pytest.approx(1.0)
    assert localisation.answer_iou(item, "[0.1, 0.2, 0.5, 0.6]", "lmms_eval") < 0.98


def test_iou_of_half_is_a_hit() -> None:
    item = Item("a", "1.png", "?", "", "val", {"box": [0, 0, 1, 1]})
    tally = localisation.scorer().tally([item], [Said("a", "[0, 0, 0.5, 1]")])
    assert tally.marks == {"a": True} and tally.values()["val.iou"] == 0.5
    assert tally.verdicts == {"a": "[0, 0, 0.5, 1]"}
    assert localisation.scorer().tally([item], [Said("a", "there")]).verdicts == {"a": "invalid"}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0, 0, 1, 1), (0, 0, 1, 1), 1.0),
        ((0, 0, 0.5, 0.5), (0.5, 0.5, 1, 1), 0.0),
        ((0, 0, 0.5, 1), (0.25, 0, 0.75, 1), 1 / 3),
        ((0.5, 0.6, 0.1, 0.2), (0.1, 0.2, 0.5, 0.6), 0.0),
        ((0, 0, 0, 0), (0, 0, 1, 1), 0.0),
    ],
)
def test_iou(first: localisation.Box, second: localisation.Box, expected: float) -> None:
    assert localisation.iou(first, second) == localisation.iou(second, first) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("gold", "words"),
    [
        ({}, "item a has no gold 'box'; expected"),
        ({"box": [0.1, 0.2, 0.5]}, "item a, gold 'box': .0.1, 0.2, 0.5."),
        ({"box": [64, 96, 320, 288]}, "as shares of width and height"),
        ({"box": [0.5, 0.6, 0.1, 0.2]}, "x0 < x1"),
        ({"box": [0, 0, True, 1]}, "gold 'box'"),
        ({"box": "0 0 1 1"}, "gold 'box'"),
    ],
)
def test_a_malformed_gold_box_is_an_error(gold: dict[str, Any], words: str) -> None:
    item = Item("a", "1.png", "?", "", "val", gold)
    with pytest.raises(DataError, match=words):
        localisation.scorer().score([item], [Said("a", "[0, 0, 1, 1]")])


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(DataError, match="'pixels' is unknown; there are feather, lmms_eval"):
        localisation.scorer("pixels")


def test_places_by_name() -> None:
    gold = {"box": [0.1, 0.0, 0.35, 1.0]}
    items = [Item(str(n), f"{n}.png", "Where?", "left", "loc", gold) for n in range(4)]
    items.append(Item("4", "4.png", "Where?", "right", "loc"))
    said = [Said("0", "Left."), Said("1", "right"), Said("2", "le ft"), Said("3", "under it"), Said("4", "right")]
    score = places().score(items, said)
    found = score["groups"]["loc"]
    assert found["hit"] == 3 / 5 and found["invalid"] == 1 / 5
    assert found["iou"] == pytest.approx((0.5 + 0 + 0.5 + 0) / 4), "averaged over the items with a box"
    assert score["unparsed"] == 1
    tally = places().tally(items, said)
    assert tally.metric("loc.hit").of_marks and [tally.marks[str(n)] for n in range(5)] == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert tally.verdicts["3"] == "underit"


def test_places_without_boxes_have_no_iou() -> None:
    score = places().score([Item("0", "0.png", "Where?", "left", "loc")], [Said("0", "left")])
    assert score["undefined"] == ["loc.iou"] and score["values"]["loc.hit"] == 1.0


def test_a_label_that_is_no_place_is_an_error() -> None:
    with pytest.raises(DataError, match="item 0: label 'behind' is none of the places left, right"):
        places().score([Item("0", "0.png", "Where?", "behind", "loc")], [Said("0", "left")])


@pytest.mark.parametrize("world", WORLDS.values(), ids=lambda world: world.name)
def test_the_scenes_places_tile_the_image(world: World) -> None:
    found = scenes.places(world)
    assert list(found) == list(world.cell_names)
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in found.values())
    assert area == pytest.approx(1.0)
    boxes = list(found.values())
    assert all(localisation.iou(one, other) == 0.0 for one in boxes for other in boxes if one is not other)


def test_a_place_is_the_same_rectangle_in_all_worlds() -> None:
    assert all(scenes.PLACES[name] == box for world in WORLDS.values() for name, box in scenes.places(world).items())
    assert scenes.PLACES["upper midright"] == (0.5, 0.25, 0.75, 0.5)
