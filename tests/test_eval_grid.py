"""Specs from few words: which spec takes which value, values as they are typed, and what is said when nothing fits."""

from __future__ import annotations

import pytest

from vlmattn.errors import BudgetError, DataError, LayerError, SpecError, UnknownMethodError
from vlmattn.eval import grid


def test_specs_are_split_and_made_canonical() -> None:
    found = grid.expand("none; fastv( keep = 0.25 ) ;; fastv(keep=0.25)")
    assert found == {"none": "none", "fastv(keep=0.25)": "fastv( keep = 0.25 )"}
    with pytest.raises(UnknownMethodError, match="fastv"):
        grid.expand("none; fastvv")
    with pytest.raises(SpecError):
        grid.expand("fastv(")
    with pytest.raises(DataError, match="names no method"):
        grid.expand(" ; ")


def test_a_value_fills_only_specs_that_have_the_field_and_leave_it_open() -> None:
    found = grid.expand("none; fastv; vhr; random(keep=0.11)", {"keep": [0.5, 0.25]})
    assert list(found.values()) == ["none", "fastv(keep=0.5)", "fastv(keep=0.25)", "vhr", "random(keep=0.11)"]
    assert list(found) == ["none", "fastv", "fastv(keep=0.25)", "vhr", "random(keep=0.11)"]


def test_in_a_composition_only_the_open_methods_are_filled() -> None:
    found = grid.expand("fastv(keep=0.5, before_layer=2) + random + vhr", {"keep": [64]})
    assert list(found.values()) == ["fastv(keep=0.5, before_layer=2) + random(keep=64) + vhr"]
    both = grid.expand("fastv + random(before_layer=3)", {"keep": [0.25]})
    assert list(both) == ["fastv(keep=0.25) + random(keep=0.25, before_layer=3)"]


def test_several_fields_make_a_grid_and_a_method_can_be_named() -> None:
    found = grid.expand("fastv; vhr", {"keep": [0.5, 0.25], "before_layer": [1, 2]})
    assert list(found.values())[:4] == [
        f"fastv(keep={keep}, before_layer={layer})" for keep in (0.5, 0.25) for layer in (1, 2)
    ]
    assert len(found) == 5
    named = grid.expand("fastv; random", {"random.keep": [0.25], "fastv.before_layer": [1]})
    assert list(named) == ["fastv(before_layer=1)", "random(keep=0.25)"]


def test_a_range_may_stand_in_a_spec() -> None:
    assert list(grid.expand("fastv(before_layer=1..3); vhr")) == [
        *(f"fastv(before_layer={layer})" for layer in (1, 2, 3)),
        "vhr",
    ]
    found = grid.expand("fastv(keep=0.25..0.5:0.25, before_layer=1..2)")
    assert len(found) == 4 and "fastv(keep=0.25, before_layer=2)" in found


def test_the_same_spec_runs_once_whatever_it_is_called() -> None:
    assert list(grid.expand("fastv; fastv(keep=0.5)", {"keep": [0.5]})) == ["fastv"]
    assert list(grid.expand("fastv", {"keep": [0.5, 0.5]})) == ["fastv"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5,0.25", [0.5, 0.25]),
        ("64", [64]),
        ("64, 1.0", [64, 1.0]),
        ("1..4", [1, 2, 3, 4]),
        ("4..1", [4, 3, 2, 1]),
        ("16..64:16", [16, 32, 48, 64]),
        ("0.1..0.7:0.1", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),
        ("0.5..1:0.25", [0.5, 0.75, 1.0]),
        ("1..2:0.5", [1.0, 1.5, 2.0]),
        ("0.9..0.5:0.2", [0.9, 0.7, 0.5]),
        ("1..7:3", [1, 4, 7]),
        ("2,4..6", [2, 4, 5, 6]),
        ("all_text,None", ["all_text", None]),
        ("[0.5,0.25],0.5", [[0.5, 0.25], 0.5]),
    ],
)
def test_values_as_they_are_typed(text: str, expected: list) -> None:
    found = grid.values(text, "keep")
    assert found == expected
    assert [type(value) for value in found] == [type(value) for value in expected]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no values"),
        ("0.25..0.75", "needs a step"),
        ("1..4:0", "must be above 0"),
        ("1..4000", "4000 values"),
        ("0.25..0.75:0.2", r"end at 0\.65 and do not reach 0\.75; write 0\.25\.\.0\.65:0\.2"),
        ("5..1:3", r"end at 2 and do not reach 1"),
        ("0..1e9999999:0.1", "makes sense"),
        ("0..1:1e-9999999", "makes sense"),
        ("1..x", "not a range"),
        ("1.5.2", "not a value"),
        ("a b", "not a value"),
    ],
)
def test_values_that_cannot_be_read(text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        grid.values(text, "keep")


def test_options_become_fields() -> None:
    assert grid.fields(None, []) == {}
    assert grid.fields("0.5,64", ["before_layer = 1..2", "fastv.query=all_text"]) == {
        "keep": [0.5, 64],
        "before_layer": [1, 2],
        "fastv.query": ["all_text"],
    }
    with pytest.raises(DataError, match="not FIELD=VALUES"):
        grid.fields(None, ["1..4"])
    with pytest.raises(DataError, match="keep is given twice"):
        grid.fields("0.5", ["keep=0.25"])


@pytest.mark.parametrize("names", [("keep", "fastv.keep"), ("fastv.keep", "keep")])
def test_a_field_of_one_method_goes_before_the_general_one_whatever_the_order(names: tuple[str, str]) -> None:
    fields = {"keep": [0.5, 0.25], "fastv.keep": [0.75]}
    found = grid.expand("fastv; random", {name: fields[name] for name in names})
    assert list(found.values()) == ["fastv(keep=0.75)", "random(keep=0.5)", "random(keep=0.25)"]
    both = grid.expand("fastv + random", {name: fields[name] for name in names})
    assert sorted(both.values()) == [f"fastv(keep=0.75) + random(keep={keep})" for keep in (0.25, 0.5)]


@pytest.mark.parametrize("names", [("keep", "fastv.keep"), ("fastv.keep", "keep")])
def test_a_field_that_others_leave_nothing_to_is_refused(names: tuple[str, str]) -> None:
    with pytest.raises(DataError, match=r"keep has no effect: fastv\.keep fills it in every spec of 'none; fastv'"):
        grid.expand("none; fastv", {name: [0.5] for name in names})


@pytest.mark.parametrize(("text", "meant"), [("0,5", "0.5"), ("0,5,0,25", "0.5,0.25"), (" 0,75 ", "0.75")])
def test_a_decimal_comma_is_answered_with_the_point(text: str, meant: str) -> None:
    for keep, ranges in ((text, []), (None, [f"keep={text}"]), (None, [f"random.keep={text}"])):
        with pytest.raises(DataError, match=rf"a decimal point is meant: .*{meant}"):
            grid.fields(keep, ranges)
    assert grid.fields("0.5,0.25,10,5", ["before_layer=0,5"]) == {"keep": [0.5, 0.25, 10, 5], "before_layer": [0, 5]}


def test_a_field_that_no_spec_takes_names_the_specs_and_what_they_have() -> None:
    with pytest.raises(DataError, match=r"no spec takes kep: none has no parameters; fastv has keep, before_layer"):
        grid.expand("none; fastv", {"kep": [0.5]})
    with pytest.raises(DataError, match=r"every spec .* that has this parameter writes it"):
        grid.expand("none; fastv(keep=0.5)", {"keep": [0.25]})


def test_a_value_out_of_range_is_an_error() -> None:
    with pytest.raises(BudgetError, match=r"1\.5"):
        grid.expand("fastv", {"keep": [1.5]})
    with pytest.raises(LayerError, match="too early"):
        grid.expand("fastv(before_layer=0..2)")
