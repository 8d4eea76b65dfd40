"""Parameters that stand in place of `keep`: a `keep` beside them would do nothing."""

from __future__ import annotations

import pytest

from vlmattn import spec
from vlmattn.errors import BudgetError
from vlmattn.eval import lineup

FIXED = ["pool(size=2)", "pyramiddrop(ratios=(0.5, 0.25, 0.125))", "schedule(shares=(1.0, 0.5))"]


@pytest.mark.parametrize("text", FIXED)
def test_a_keep_that_would_do_nothing_is_refused(text: str) -> None:
    name, _, rest = text.partition("(")
    field = rest.partition("=")[0]
    with pytest.raises(BudgetError, match=rf"{name}\.keep=0\.25 .*{name}\.{field}=.*leave one of them out"):
        spec.parse(f"{name}(keep=0.25, {rest}")


@pytest.mark.parametrize("text", FIXED)
def test_without_keep_they_stay_as_they_are(text: str) -> None:
    (method,) = spec.parse(text)
    assert method.fixed and str(method) == text and lineup.written_out(text) == text
    assert not method.disabled().fixed and method.disabled().is_noop
