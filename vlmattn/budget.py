"""From `keep` to whole numbers of visual tokens.

`keep` is a share (float in (0, 1]) or a number of tokens (int >= 1): `keep=1.0` keeps everything, `keep=1` one token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vlmattn.errors import BudgetError

KeepValue = float | int


def check(keep: object, where: str = "keep") -> KeepValue:
    """Return `keep` if it is a float in (0, 1] or an int >= 1.

    Raises:
        BudgetError: anything else, with the value, what is expected and the way out.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise BudgetError(
            f"{where}={keep!r} is not a number: give a share such as 0.5 or a number of tokens such as 64"
        )
    if isinstance(keep, int):
        if keep < 1:
            raise BudgetError(f"{where}={keep} keeps nothing: give at least 1 token, or a share in (0, 1]")
        return keep
    if not (math.isfinite(keep) and 0.0 < keep <= 1.0):
        raise BudgetError(
            f"{where}={keep!r} is outside (0, 1]: a float is the share of visual tokens that stays, "
            "an int (such as 64) is their number"
        )
    return keep


def count(total: int, keep: KeepValue) -> int:
    """How many of `total` visual tokens stay: `floor(total * keep + 0.5)` for a share, clamped to [1, total].

    Raises:
        BudgetError: `keep` is not a valid budget or `total` is not positive.
    """
    check(keep)
    if total < 1:
        raise BudgetError(f"cannot keep a share of {total} visual tokens: there must be at least one")
    wanted = math.floor(total * keep + 0.5) if isinstance(keep, float) else keep
    return min(max(wanted, 1), total)


def per_layer(total: int, keep: KeepValue | Sequence[KeepValue], num_layers: int, before_layer: int = 0) -> list[int]:
    """Visual tokens in each decoder layer, `num_layers` ints.

    A single `keep` acts from `before_layer` on; a sequence is a schedule with one value a layer, which must not grow.

    Raises:
        BudgetError: a schedule of the wrong length, or one that grows.
    """
    if isinstance(keep, (int, float)):
        kept = count(total, keep)
        return [total if layer < before_layer else kept for layer in range(num_layers)]
    if len(keep) != num_layers:
        raise BudgetError(f"a schedule of {len(keep)} values does not fit {num_layers} layers: give one value a layer")
    counts = [count(total, value) for value in keep]
    for layer in range(1, num_layers):
        if counts[layer] > counts[layer - 1]:
            raise BudgetError(
                f"the schedule grows from {counts[layer - 1]} to {counts[layer]} tokens at layer {layer}: "
                "a dropped token cannot come back"
            )
    return counts
