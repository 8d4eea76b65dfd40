"""Parameters of pruners that are refused, with the value and what is expected."""

from __future__ import annotations

import pytest

from vlmattn import spec
from vlmattn.errors import SpecError

FLAGS = (
    "prumerge.plus prumerge.extra recoverable.merging recoverable.faithful_bugs hired.exact_budget visionzip.keep_cls "
    "dart.exact_budget sparsevlm.recycle vflowopt.recycle feather.rotary schedule.rank_once fastv.shrink_early_layers"
)
NUMBERS = (
    "prumerge.factor recoverable.text_weight recoverable.max_share visionzip.contextual cdpruner.theta vflowopt.alpha "
    "vflowopt.entry vflowopt.middle vflowopt.threshold vflowopt.cell schedule.steepness schedule.floor schedule.ceiling"
)
COUNTS = "prumerge.neighbours recoverable.cluster recoverable.min_tokens dart.image_pivots dart.text_pivots"


def refused(name: str, value: str) -> None:
    method, field = name.split(".")
    with pytest.raises(SpecError, match=rf"{method}\.{field}=.*expected"):
        spec.parse(f"{method}({field}={value})")


@pytest.mark.parametrize("name", FLAGS.split())
def test_flags_are_true_or_false(name):
    """A lower-case word is a string, and a string counts as true."""
    for value in ("false", "true", "0", "1", "None"):
        refused(name, value)


@pytest.mark.parametrize("name", NUMBERS.split())
def test_numbers_are_numbers(name):
    for value in ("x", "True", "[0.5]"):
        refused(name, value)


@pytest.mark.parametrize("name", [name for name in NUMBERS.split() if name != "recoverable.text_weight"])
def test_numbers_have_a_least(name):
    refused(name, "-2.0")


@pytest.mark.parametrize("name", NUMBERS.split())
def test_numbers_are_finite(name):
    refused(name, "1e999")


@pytest.mark.parametrize("name", COUNTS.split())
def test_counts_are_whole(name):
    for value in ("x", "True", "-1", "2.0"):
        refused(name, value)


@pytest.mark.parametrize("name", ["vflowopt.entry", "vflowopt.middle"])
def test_a_stage_of_vflowopt_leaves_something(name):
    refused(name, "0.0")


@pytest.mark.parametrize("shares", ["0.5", "half", "['a', 'b']", "[1.0, True]", "[1.0, 'x']", "1"])
def test_shares_of_a_schedule_are_a_list_of_numbers(shares):
    with pytest.raises(SpecError, match=r"schedule\.shares"):
        spec.parse(f"schedule(shares={shares})")


def test_what_vflowopt_recycles_is_within_an_image():
    with pytest.raises(SpecError, match="recycle=False"):
        spec.parse("vflowopt(budget_scope=sample)")
    (method,) = spec.parse("vflowopt(budget_scope=sample, recycle=False)")
    assert not method.merges and not method.adaptive
