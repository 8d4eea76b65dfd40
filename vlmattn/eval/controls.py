"""Controls: what a method must beat, and what marks a row whose numbers cannot be compared.

Random and empty rows at the same layer tell what the choice of tokens adds; a threshold tuned on other images tells how
much of a gain on yes/no questions is no more than a shifted bias; the collapse guard marks captions that repeat
themselves or changed their length, because such captions may even score well on hallucination.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlmattn.errors import DataError
from vlmattn.eval import budgets
from vlmattn.eval.items import some
from vlmattn.eval.tally import Tally

if TYPE_CHECKING:
    from vlmattn.eval.runs import Run

BLIND = "noimage(before_layer=0)"
"""The model without any visual token in any layer."""
REPEATED, LENGTH = "repeated_4", "length"
REPEATED_TIMES = 3.0
"""How many times the baseline's share of repeated 4-grams marks a collapse."""
REPEATED_FLOOR = 0.02
"""A share of repeated 4-grams up to this is never a collapse, whatever the baseline has; our choice."""
LENGTH_SHARE = 0.25
"""How far the mean length of captions may move either way, as a share of the baseline's."""


class Control(NamedTuple):
    """A run whose yes/no answers were decided with another threshold.

    Attributes:
        bias: what was added to the margin (logit of "yes" minus logit of "no").
        run: the answers with that bias, labelled "threshold(logit +0.37)".
        images: how many images the bias was tuned on.
    """

    bias: float
    run: Run
    images: int

    @property
    def note(self) -> str:
        """What a table says about it: "tuned on 200 validation images"."""
        return f"tuned on {self.images} validation image{'' if self.images == 1 else 's'}"


def specs_for(
    specs: Iterable[str], *, num_layers: int, visual_tokens: int, seeds: int = 1, even: bool = False
) -> dict[str, str]:
    """Control specs at the layers where the given specs prune.

    For every spec with pruners: `random` before the first layer where it prunes, once a seed, with as many visual
    tokens per layer, on average, and `noimage` before that layer. The random row has the method's own `keep` where that
    gives its average, else the share that does, to the nearest whole token. Several pruners become as many random
    stages if each has the average of its `keep`. Editors of attention and methods that evict from the cache are not
    repeated in its controls, and a spec of those alone has none: its prefill sees every token. No random row: pruners
    that are controls themselves or keep everything, those without `keep` that leave a number which depends on the
    image, and several pruners of which one has another average than its `keep`. With `even`, each random row has one of
    `uniform` tokens beside it. The fully blind model, `noimage(before_layer=0)`, is always among them: what it scores,
    the questions alone give away.

    Args:
        specs: spec texts that are run.
        num_layers: decoder layers of the model, to tell a paper's layer from the depth.
        visual_tokens: of an image, to count what a method leaves.
        seeds: how many random rows.
        even: whether evenly spread tokens are a control, too.

    Returns:
        Canonical spec text -> label with layer and budget, also where they are the defaults: random rows first, then
        uniform ones, the blind one last, each once, without those that are in `specs` already.

    Raises:
        SpecError, LayerError: a spec cannot be read, or does not fit the depth.
    """
    from vlmattn import spec as language

    parsed = [language.parse(spec) for spec in specs]
    random: list[str] = []
    spread: list[str] = []
    empty: list[str] = []
    for methods in parsed:
        pruners: list[Any] = [method for method in methods if _has_layer(method) and not method.is_noop]
        if not pruners or "noimage" in [pruner.name for pruner in pruners]:
            continue
        layers = [pruner.resolve_layer(num_layers) for pruner in pruners]
        empty.append(f"noimage(before_layer={min(layers)})")
        if all(pruner.name == "random" for pruner in pruners):
            continue
        keeps: list[Any] = [_keep(pruner, num_layers, visual_tokens) for pruner in pruners]
        own = [getattr(pruner, "keep", None) for pruner in pruners]
        if None in keeps or (len(pruners) > 1 and keeps != own):
            continue
        stages = list(zip(pruners, keeps, layers, strict=True))
        random += [" + ".join(_stand_in("random", *stage, seed) for stage in stages) for seed in range(seeds)]
        if even:
            spread.append(" + ".join(_stand_in("uniform", *stage) for stage in stages))
    known = {_resolved(methods, num_layers) for methods in parsed}
    empty = [label for label in empty if label != BLIND]
    wanted = {resolved(label, num_layers): label for label in (*random, *spread, *empty, BLIND)}
    return {text: label for text, label in wanted.items() if text not in known}


def resolved(spec: str, num_layers: int) -> str:
    """Canonical text with every pruner's layer written out: equal for specs that do the same in this depth.

    Args:
        spec: spec text.
        num_layers: decoder layers of the model.

    Raises:
        SpecError, UnknownMethodError, LayerError: the spec cannot be read, or does not fit the depth.
    """
    from vlmattn import spec as language

    return _resolved(language.parse(spec), num_layers)


def threshold(base: Run, validation: Run) -> Control:
    """What a constant added to the yes/no margin does: tuned on the validation images, applied to the run.

    The bias is the one with the best mean accuracy over the yes/no groups of `validation`; of equally good ones the one
    nearest to 0. In the returned run the answers to yes/no questions are "Yes" where margin + bias > 0, else "No";
    everything else is as in `base`, times included.

    Args:
        base: a run whose yes/no records have margins.
        validation: the same model, spec and prompt on other images.

    Raises:
        DataError: no yes/no questions, margins are missing, or the two runs share data or differ in more than that.
    """
    for name in ("spec", "model", "prompt", "sink_dims"):
        if base.identity.get(name) != validation.identity.get(name):
            raise DataError(
                f"the threshold of {base.label} cannot be tuned on a run with another {name}: "
                f"{validation.identity.get(name)!r}, expected {base.identity.get(name)!r}"
            )
    _check_apart(base, validation)
    _margins(base)
    bias = best_bias(*_margins(validation))
    records = [_decided(base, record, bias) for record in base.records]
    run = dataclasses.replace(base, folder="", label=f"threshold(logit {bias:+.3g})", records=records)
    asked = _yes_no(validation) - set(validation.failed)
    return Control(bias, run, len({item.image for item in validation.items if item.id in asked}))


def best_bias(margins: ArrayLike, gold: ArrayLike, groups: Sequence[str]) -> float:
    """The constant that, added to the margins, gives the best mean accuracy over groups.

    An answer is yes where margin + bias > 0. The accuracy only changes where the threshold crosses a margin, so the
    candidates are 0, the middles between neighbouring margins, and 1 beyond the lowest and the highest.

    Args:
        margins: (N,) logit of "yes" minus logit of "no".
        gold: (N,) bool, whether "yes" is right.
        groups: N names.

    Returns:
        The bias; of equally good ones the nearest to 0.
    """
    m, yes = np.asarray(margins, dtype=np.float64), np.asarray(gold, dtype=bool)
    names, place = np.unique(np.asarray(groups), return_inverse=True)
    weight: NDArray[np.float64] = 1.0 / (len(names) * np.bincount(place)[place])
    values = np.unique(m)
    middles = (values[:-1] + values[1:]) / 2
    biases = np.concatenate([[0.0], -middles, [1 - values[0], -1 - values[-1]]])

    # The weights that a threshold below the i-th lowest margin loses and wins, added up once for all candidates.
    order = np.argsort(m, kind="stable")
    turned = np.concatenate([[0.0], np.cumsum(np.where(yes, -weight, weight)[order])])
    scores = weight @ yes + turned[np.searchsorted(m[order], -biases, side="right")]
    best = biases[scores >= scores.max() - 1e-12]
    return float(best[np.argmin(np.abs(best))])


def collapse(base: Tally, other: Tally) -> dict[str, str]:
    """Caption group -> why it cannot be compared with the baseline's; groups that can are left out.

    A caption group has collapsed if its share of repeated 4-grams is over three times the baseline's and over 2 %, or
    if the mean length of its captions moved by more than a quarter.
    """
    before, after = base.values(), other.values()
    undefined = {*base.undefined(), *other.undefined()}
    reasons: dict[str, list[str]] = {}
    for metric in base.metrics:
        key, (_, _, name) = metric.key, metric.key.rpartition(".")
        if not metric.group or key in undefined or key not in after:
            continue
        was, now = before[key], after[key]
        if name == REPEATED and now > max(REPEATED_TIMES * was, REPEATED_FLOOR):
            reasons.setdefault(metric.group, []).append(f"{now:.1%} of 4-grams repeated, {was:.1%} in the baseline")
        if name == LENGTH and abs(now - was) > LENGTH_SHARE * was:
            moved = f" ({now / was - 1:+.0%})" if was else ""
            reasons.setdefault(metric.group, []).append(
                f"mean length {now:.1f} words, {was:.1f} in the baseline{moved}"
            )
    return {group: f"{group}: {'; '.join(told)}" for group, told in reasons.items()}


def _resolved(methods: Iterable[Any], num_layers: int) -> str:
    from vlmattn import spec as language

    return language.text([method.resolved(num_layers) if _has_layer(method) else method for method in methods])


def _has_layer(method: Any) -> bool:
    """Whether a method prunes before a decoder layer; those that evict from the cache do not."""
    return method.kind == "prune" and hasattr(method, "resolve_layer")


def _keep(pruner: Any, num_layers: int, visual_tokens: int) -> float | int | None:
    """What a random stage at the pruner's first layer must keep to have its average of visual tokens per layer.

    Returns:
        None where nothing does: the number depends on the image, or no token is dropped.
    """
    own = getattr(pruner, "keep", None)
    if own is None and pruner.adaptive:
        return None
    first = pruner.resolve_layer(num_layers)
    tokens = math.floor(fmean(pruner.expected_tokens(visual_tokens, num_layers)[first:]) + 0.5)
    if own is not None and budgets.left(visual_tokens, own) == tokens:
        return own
    return budgets.shortest_share(tokens, visual_tokens) if tokens < visual_tokens else None


def _stand_in(name: str, pruner: Any, keep: float | int, layer: int, seed: int = 0) -> str:
    """Spec text of the stage, random or uniform, that stands in for a pruner."""
    scope = (
        ""
        if name == "uniform" or getattr(pruner, "budget_scope", "image") == "image"
        else f", budget_scope={pruner.budget_scope}"
    )
    draw = f", seed={seed}" if seed else ""
    return f"{name}(keep={keep!r}, before_layer={layer}{scope}{draw})"


def _check_apart(base: Run, validation: Run) -> None:
    """Raise DataError if the two runs are about the same images."""
    same = base.identity["data"]["sha256"] == validation.identity["data"]["sha256"]
    where = base.info.get("pictures")
    if not same and where and where == validation.info.get("pictures"):
        same = bool({item.image for item in base.items} & {item.image for item in validation.items})
    if same:
        raise DataError(
            f"the threshold of {base.label} would be tuned on the images it is tested on: give a run on other images, "
            "such as the validation split"
        )


def _yes_no(run: Run) -> set[str]:
    """Ids of the yes/no questions of a run."""
    return {item.id for item in run.items if run.scorer.kind(item.group).name == "yes_no"}


def _margins(run: Run) -> tuple[list[float], list[bool], list[str]]:
    """Margins, gold answers and groups of the answered yes/no questions.

    Raises:
        DataError: there are none, or an answer has no margin.
    """
    asked = _yes_no(run)
    margins = {answer.id: answer.margin for answer in run.said if answer.id in asked}
    if not margins:
        raise DataError(f"{run.label} has no answers to yes/no questions, so there is no threshold to move")
    lacking = [key for key, margin in margins.items() if margin is None]
    if lacking:
        raise DataError(
            f"{len(lacking)} yes/no answers of {run.label} have no margin ({some(lacking)}): "
            "run it again, into a new folder"
        )
    items = [item for item in run.items if item.id in margins]
    return (
        [float(margins[item.id] or 0.0) for item in items],
        [item.label.strip().lower() == "yes" for item in items],
        [item.group for item in items],
    )


def _decided(run: Run, record: Any, bias: float) -> Any:
    """The record with the answer that the biased margin gives; others as they are."""
    if record.get("status") != "ok" or run.scorer.kind(record["group"]).name != "yes_no":
        return record
    return {**record, "text": "Yes" if record["margin"] + bias > 0 else "No"}
