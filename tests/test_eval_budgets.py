"""Matched budgets: the same visual tokens per layer, on average, for methods that prune at different layers."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import pytest

from vlmattn import spec
from vlmattn.errors import DataError, LayerError
from vlmattn.eval.budgets import Match, match_average_tokens
from vlmattn.methods import base


def matched(text: str, levels: Any = None, layers: int = 32, visual: int = 576) -> list[Match]:
    return match_average_tokens(text, levels, num_layers=layers, visual_tokens=visual)


def test_fastv_gets_the_budget_of_the_closed_form() -> None:
    (match,) = matched("fastv(before_layer=2)", [0.5])
    tokens = round((0.5 * 32 - 2) / 30 * 576)
    assert tokens == 269
    assert match.average == (2 * 576 + 30 * tokens) / 32 == 288.1875
    assert match.spec == "fastv(keep=0.467, before_layer=2)"  # two digits would give 271 tokens
    assert spec.parse(match.spec)[0].expected_tokens(576, 32) == [576] * 2 + [tokens] * 30


@pytest.mark.parametrize("layers, visual", [(32, 576), (28, 1225), (4, 144), (24, 81)])
@pytest.mark.parametrize("text", ["fastv", "uniform", "uniform(mode='2d')", "random(before_layer=1)"])
def test_no_other_number_of_tokens_is_nearer(text: str, layers: int, visual: int) -> None:
    (method,) = spec.parse(text)
    for match in matched(text, [0.9, 0.5, 0.35], layers, visual):
        target = match.level * visual  # type: ignore[operator]
        counts = [dataclasses.replace(method, keep=n).expected_tokens(visual, layers) for n in range(1, visual + 1)]  # type: ignore[call-arg]
        best = min(abs(sum(count) / layers - target) for count in counts)
        assert match.spec is not None
        found = spec.parse(match.spec)[0].expected_tokens(visual, layers)
        assert sum(found) / layers == match.average
        assert abs(match.average - target) == pytest.approx(best, abs=1e-9)


def test_default_levels_depend_on_where_the_method_prunes() -> None:
    assert [match.level for match in matched("fastv")] == [0.75, 0.5, 0.35]
    assert [match.level for match in matched("random(before_layer=3)")] == [0.75, 0.5, 0.35]
    assert [match.level for match in matched("uniform")] == [0.5, 0.25, 0.11]
    assert [match.average for match in matched("uniform")] == [288, 144, 63]
    assert [match.level for match in matched("uniform", [0.2])] == [0.2]


def test_a_level_below_the_floor_has_no_spec_but_the_floor() -> None:
    high, low, lower = matched("fastv(keep=0.3, before_layer=2)", layers=4, visual=144)
    assert high.spec == "fastv(before_layer=2)" and high.label == "fastv(keep=0.5, before_layer=2)"
    assert high.average == 108
    for match, level in ((low, 0.5), (lower, 0.35)):
        assert match.spec is None and match.average is None
        assert match.floor == (2 * 144 + 2) / 4 and match.floor_share == pytest.approx(0.503, abs=5e-4)
        assert match.label == f"fastv(before_layer=2) at {level}"
        assert match.floor_text.startswith(
            f"level {level} cannot be reached: with its smallest budget the method leaves"
        )
        assert match.floor_text.endswith(
            "72.5 of 144 visual tokens a layer on average; the floor is 50.3 % of the visual tokens"
        )
    assert high.floor_text == ""


@pytest.mark.parametrize(
    "text, label",
    [("fastv(keep=0.25)", "fastv at 0.1"), ("fastv(query=all_text) + var", "fastv(query=all_text) + var at 0.1")],
)
def test_below_the_floor_the_label_has_no_budget(text: str, label: str) -> None:
    (match,) = matched(text, [0.1], layers=4, visual=144)
    assert match.spec is None and match.label == label
    assert matched("var")[0].floor_text == ""


def test_a_floor_that_rounds_to_the_level_is_no_floor() -> None:
    one_token = 1 / 100
    assert matched("uniform", [one_token], 4, 100)[0].average == 1
    assert matched("uniform", [0.6 * one_token], 4, 100)[0].average == 1
    assert matched("uniform", [0.4 * one_token], 4, 100)[0].spec is None


def test_all_tokens_is_the_method_switched_off() -> None:
    (match,) = matched("fastv(keep=0.25)", [1.0])
    assert match.spec == "fastv(keep=1.0)" and match.average == 576


@pytest.mark.parametrize("text, average", [("none", 576), ("vhr", 576), ("noimage(before_layer=8)", 144)])
def test_specs_without_a_budget_stay_as_they_are(text: str, average: float) -> None:
    (match,) = matched(text)
    assert match.spec == match.label == text and match.level is None
    assert match.average == match.floor == average


def test_the_rest_of_a_composition_stays() -> None:
    (match,) = matched("fastv(query=all_text) + var", [0.5])
    assert match.spec == "fastv(keep=0.467, query=all_text) + var"


@dataclass(frozen=True)
class Halving(base.Pruner):
    """Not registered: three stages from one budget, as a schedule of a paper would have."""

    name = "halving"

    def expected_tokens(self, visual: int, num_layers: int, grid: Any = None) -> list[int]:
        kept = self.left(visual)
        stages = (visual, kept, max(1, kept // 2), max(1, kept // 4))
        return [stages[layer * 4 // num_layers] for layer in range(num_layers)]


def test_a_method_with_several_stages_is_matched_by_its_own_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(base.REGISTRY, "halving", Halving)
    (match,) = matched("halving", [0.5])
    assert match.average == pytest.approx(288, abs=0.5)
    assert match.floor == (8 * 576 + 24) / 32


def test_what_cannot_be_matched_is_refused() -> None:
    with pytest.raises(DataError, match=r"2 pruners.*match specs with one pruner"):
        matched("fastv + uniform(before_layer=4)")
    with pytest.raises(DataError, match=r"level 1\.5 is outside"):
        matched("fastv", [0.5, 1.5])
    with pytest.raises(DataError, match="level nan is outside"):
        matched("fastv", [math.nan])
    with pytest.raises(DataError, match="0 visual tokens"):
        matched("fastv", visual=0)
    with pytest.raises(LayerError, match="4 decoder layers"):
        matched("fastv(before_layer=7)", layers=4)


def test_a_method_that_takes_only_shares_is_matched() -> None:
    (match,) = matched("vflowopt", [0.5], 28, 576)
    assert match.spec is not None and match.average == pytest.approx(288, abs=2)
    assert sum(spec.parse(match.spec)[0].expected_tokens(576, 28)) / 28 == match.average


@pytest.mark.parametrize(
    "text, average",
    [
        ("pool(size=2)", 36),
        ("pyramiddrop(before_layer=(1, 2), ratios=(0.5, 0.25))", (144 + 72 + 2 * 36) / 4),
        ("schedule(shares=(1.0, 0.5, 0.5, 0.25))", (144 + 72 + 72 + 36) / 4),
    ],
)
def test_a_method_whose_tokens_another_parameter_fixes_has_no_levels(text: str, average: float) -> None:
    (match,) = matched(text, [0.75, 0.5], 4, 144)
    assert match.level is None and match.spec == match.label == text
    assert match.average == match.floor == average
