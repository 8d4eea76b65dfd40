"""Measure which decoder layers of a checkpoint change least what goes through them.

`layer_scores` runs a few prompts with images and compares what enters every layer with what leaves it;
`redundant_layers` makes of that the list that `layerskip` takes. Three measures, lower is more redundant:

- `angular_last`: arccos(cos) / pi at the last prompt token, the angular distance of arXiv 2412.12785's pruning;
- `bi`: 1 - cos, mean over all tokens (block influence);
- `bi_multimodal`: 1 - cos, where visual and text tokens weigh the same however many they are.

The paper's released scripts call something else angular distance: there the WEIGHTS of the tuned model are compared
with those of its language model. That needs a second checkpoint and is not what is measured here.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmattn import check
from vlmattn.errors import CallError, SpecError, VlmattnWarning
from vlmattn.methods.skip.layerskip import LayerSkip
from vlmattn.patches import families
from vlmattn.session import wrap

if TYPE_CHECKING:
    from PIL.Image import Image

SCORES = ("angular_last", "bi", "bi_multimodal")


@dataclass(frozen=True)
class Redundancy:
    """Layers to leave out, and why.

    Attributes:
        score: the measure.
        scores: one a layer, of the whole model; lower is more redundant.
        layers: what `layerskip(layers=...)` should leave out, ascending.
        order: the same in the order in which they were chosen.
        protected: layers that were not to be chosen, beside the first and the last.
        prompts: how many were measured.
    """

    score: str
    scores: tuple[float, ...]
    layers: tuple[int, ...]
    order: tuple[int, ...]
    protected: tuple[int, ...]
    prompts: int

    @property
    def spec(self) -> str:
        """The method that leaves them out."""
        return str(LayerSkip(layers=self.layers))

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return dataclasses.asdict(self) | {"spec": self.spec}


def angular_distance(entering: Tensor, leaving: Tensor) -> Tensor:
    """`(...)` fp64 in [0, 1]: arccos(cos) / pi of hidden states `(..., C)`."""
    return _cosine(entering, leaving).arccos() / torch.pi


def block_influence(entering: Tensor, leaving: Tensor) -> Tensor:
    """`(...)` fp64 in [0, 2]: 1 - cos of hidden states `(..., C)`."""
    return 1 - _cosine(entering, leaving)


def _cosine(entering: Tensor, leaving: Tensor) -> Tensor:
    # fp64: near 1 the angle is the root of what fp32 rounds away
    return torch.nn.functional.cosine_similarity(entering.double(), leaving.double(), dim=-1).clamp(-1, 1)


def layer_scores(model: Any, prompts: Sequence[Mapping[str, Any]], score: str = "angular_last") -> tuple[float, ...]:
    """How much every decoder layer changes the prompts, mean over them.

    Args:
        model: a supported model in eval mode; it may carry a session as long as that drops no tokens.
        prompts: model inputs of one unpadded prompt each, with an image.
        score: one of `SCORES`.

    Returns:
        A number a layer.

    Raises:
        UnsupportedModelError: no family describes the model.
        SpecError: there is no such score.
        CallError: there are no prompts, one has several rows, padding or no image, or tokens were dropped.
    """
    if score not in SCORES:
        raise SpecError(f"score={score!r}: expected one of {', '.join(SCORES)}")
    if not prompts:
        raise CallError("there is nothing to measure with: give at least one prompt with an image")
    family = families.find(model)
    measured = [_measure(model, family, prompt, score) for prompt in prompts]
    return tuple(torch.tensor(measured, dtype=torch.float64).mean(0).tolist())


def redundant_layers(
    model: Any,
    prompts: Sequence[Mapping[str, Any]],
    n_drop: int = 1,
    *,
    score: str = "angular_last",
    region: tuple[int, ...] | str | None = None,
    adjacent: bool = True,
    iterative: bool = False,
) -> Redundancy:
    """The layers that `layerskip` should leave out, measured on the prompts.

    Args:
        model: a supported model in eval mode, without a session.
        prompts: as for `layer_scores`; 32 to 128 with images like those it will see.
        n_drop: how many layers.
        score: one of `SCORES`.
        region, adjacent: as in `layerskip`.
        iterative: whether the scores are measured anew after each choice, with the layers so far left out.

    Raises:
        LayerError: there are not so many layers to choose from.
        CallError, SpecError, UnsupportedModelError: as `layer_scores`.
    """
    first = layer_scores(model, prompts, score)
    rule = LayerSkip(scores=first, n_drop=n_drop, region=region, adjacent=adjacent)
    protected, layers = rule.protected(len(first)), rule.skipped(len(first))
    order = tuple(sorted(layers, key=lambda layer: (first[layer], layer)))
    if iterative:
        order = _iterate(model, prompts, score, rule)
    return Redundancy(score, first, tuple(sorted(order)), order, protected, len(prompts))


def _iterate(model: Any, prompts: Sequence[Mapping[str, Any]], score: str, rule: LayerSkip) -> tuple[int, ...]:
    """The layers in the order in which they go, one at a time."""
    assert rule.scores is not None
    scores = rule.scores
    gone: tuple[int, ...] = ()
    count = len(scores)
    while len(gone) < rule.n_drop:
        near = {layer + step for layer in gone for step in ((0,) if rule.adjacent else (-1, 0, 1))}
        kept = tuple(sorted({*rule.protected(count), *(layer for layer in near if 0 <= layer < count)}))
        gone = (*gone, *LayerSkip(scores=scores, n_drop=1, region=kept).skipped(count))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VlmattnWarning)  # nobody uses it yet
            with wrap(model, [LayerSkip(layers=gone)]):
                scores = layer_scores(model, prompts, score)
    return gone


@torch.inference_mode()
def _measure(model: Any, family: families.Family, prompt: Mapping[str, Any], score: str) -> list[float]:
    """The score of every layer on one prompt."""
    ids = prompt["input_ids"]
    visual = torch.isin(ids, torch.tensor(family.placeholders(model.config), device=ids.device))
    mask = prompt.get("attention_mask")
    if len(ids) != 1 or not bool(visual.any()) or (mask is not None and not bool(mask.bool().all())):
        raise CallError("layers are measured with one unpadded prompt with an image at a time: give such prompts")
    text_model = family.part(model, "text_model")
    layers = getattr(text_model, family.layers)
    entering: list[Tensor] = [torch.empty(0)] * len(layers)
    leaving: list[Tensor] = []

    def enter(index: int) -> Callable[..., None]:
        def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering[index] = _whole(args[0] if args else kwargs["hidden_states"], ids)

        return look

    handles = [layer.register_forward_pre_hook(enter(i), with_kwargs=True) for i, layer in enumerate(layers)]
    # before the final norm, which is not the layer's work
    last = layers[-1].register_forward_hook(lambda module, args, output: leaving.append(_whole(output, ids)))
    try:
        model(**prompt)
    finally:
        for handle in (*handles, last):
            handle.remove()
    pairs = zip(entering, [*entering[1:], *leaving], strict=True)
    return [_score(before, after, visual[0], score) for before, after in pairs]


def _whole(hidden: Any, ids: Tensor) -> Tensor:
    """`(N, C)` of a layer's input or output `(1, N, C)`."""
    hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    if hidden.shape[:2] != ids.shape:
        raise CallError("tokens are missing: layers are measured without pruning, call session.remove() first")
    return hidden[0]


def _score(entering: Tensor, leaving: Tensor, visual: Tensor, score: str) -> float:
    leaving = leaving.to(entering.device)
    if score == "angular_last":
        return float(angular_distance(entering[-1], leaving[-1]))
    influence = block_influence(entering, leaving)
    if score == "bi":
        return float(influence.mean())
    visual = visual.to(influence.device)
    return float((influence[visual].mean() + influence[~visual].mean()) / 2)


def prepare(model: Any, processor: Any, images: Sequence[Image], questions: Sequence[str]) -> list[Mapping[str, Any]]:
    """Model inputs, one prompt an image; the questions are asked in turn.

    Raises:
        CallError: there are no images or questions.
        DataError: the processor has no chat template.
    """
    if not images or not questions:
        raise CallError("layers are measured with images and questions: give at least one of each")
    return [
        check.prepare(model, processor, image, questions[number % len(questions)])
        for number, image in enumerate(images)
    ]
