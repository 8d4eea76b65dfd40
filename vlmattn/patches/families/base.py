"""What a family declares: where things are in a model and what it has. No algorithms."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlmattn.errors import UnsupportedModelError
from vlmattn.patches.tower import TowerParts
from vlmattn.spans import Geometry, Raster

FAMILIES: dict[str, Family] = {}

Visible = Callable[[int, int], Tensor]
"""From the height and width of an image in pixels to those that stay visible, `(H, W)` bool."""

CAPABILITIES = {
    "cls": "a CLS token in the vision tower",
    "flat_positions": "one-dimensional positions, without which none can be renumbered",
    "own_resolution": "a processor that keeps the size of images, so that a smaller one has fewer tokens",
    "blacken": "pixels that can be blacked out one by one",
    "text_tower": "the text tower of its vision tower's CLIP model (`wrap(text_tower=...)`)",
}
"""What a method may require of a model, in words."""


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: how people call it.
        model_type: the config's `model_type`, the key of the registry.
        model_class: the transformers class to wrap.
        paper: arXiv id.
        multimodal, text_model, layers, vision_tower, projector: attribute paths from the wrapped model; `layers` from
            the text model.
        output_projection: attribute path from a decoder layer to the projection of the joined head outputs.
        feed_forward: attribute path from a decoder layer to its feed-forward network.
        query, key: attribute paths from a decoder layer to its projections, each followed by the norm of heads if any.
        entry_norm: attribute path from a decoder layer to the norm before its attention.
        final_norm, rotary: attribute paths from the text model to the norm behind its layers and its rotary tables.
        wrapper_ids: config attributes with the ids of tokens that only wrap an image.
        placeholder_ids: config attributes that hold the ids of visual placeholder tokens.
        layouts: by feature method from the config and its arguments the grids of each image or video, for families
            whose images have several, or newline tokens among the visual ones; empty: an image is one grid.
        feature_methods: methods of the multimodal model that run the vision tower, to the split of their arguments into
            one pixel tensor per image.
        has_cls: whether the vision tower has a CLS token.
        rope: `1d` or `mrope`.
        position_state: attributes of the multimodal model that say, after a prefill, where later positions go on.
        deepstack: the argument of the text model with features that it adds to its visual rows again, a tensor
            `(visual tokens of the batch, C)` for each of its first layers; "": it adds none.
        grid_rule: how the visual tokens of an image lie, in words.
        tokens_per_image: from the config, the number of visual tokens where it is the same for all images, else None.
        grid: `(config, number of tokens, (3, tokens) M-RoPE positions or None)` of one image to its `(t, h, w)`, if
            known.
        geometry: `(image_processor, (width, height), grid)` to a `Geometry`, `grid` being what `input_grids` gives.
        input_grids: `(config, processor outputs)` to the grids of all images of a batch, or where images have several
            to their rasters.
        token_side: the image processor to the pixels along a side of one visual token, where images keep their size;
            None: the processor brings them all to sizes of its own.
        blacken: `(config, pixels of one image, its (t, h, w), function of height and width to the (H, W) bool pixels
            that stay visible, (3,) black)` to these pixels with the others black; None: nobody can.
        tower_parts: `(config, vision tower, projector)` to where looks inside the tower find things; None: nobody can
            look there.
    """

    name: str
    model_type: str
    model_class: str
    paper: str
    has_cls: bool
    rope: str
    grid_rule: str
    placeholder_ids: tuple[str, ...]
    tokens_per_image: Callable[[Any], int | None]
    grid: Callable[[Any, int, Tensor | None], tuple[int, int, int] | None]
    geometry: Callable[[Any, tuple[int, int], Any], Geometry]
    input_grids: Callable[[Any, Mapping[str, Any]], Sequence[Any]]
    feature_methods: Mapping[str, Callable[[Mapping[str, Any]], Sequence[Tensor]]]
    layouts: Mapping[str, Callable[[Any, Mapping[str, Any]], Sequence[tuple[Raster, ...]]]] = field(
        default_factory=dict
    )
    multimodal: str = "model"
    text_model: str = "model.language_model"
    layers: str = "layers"
    output_projection: str = "self_attn.o_proj"
    feed_forward: str = "mlp"
    query: tuple[str, ...] = ("self_attn.q_proj",)
    key: tuple[str, ...] = ("self_attn.k_proj",)
    entry_norm: str = "input_layernorm"
    final_norm: str = "norm"
    rotary: str = "rotary_emb"
    wrapper_ids: tuple[str, ...] = ()
    vision_tower: str = "model.vision_tower"
    projector: str = "model.multi_modal_projector"
    deepstack: str = ""
    position_state: tuple[str, ...] = ()
    token_side: Callable[[Any], int] | None = None
    blacken: Callable[[Any, Tensor, tuple[int, int, int], Visible, Tensor], Tensor] | None = None
    tower_parts: Callable[[Any, Any, Any], TowerParts] | None = None

    def part(self, model: nn.Module, name: str) -> nn.Module:
        """The module at the declared path `name`, such as `text_model`."""
        return operator.attrgetter(getattr(self, name))(model)

    def tower(self, model: nn.Module) -> TowerParts:
        """Where looks inside the vision tower of `model` find things.

        Raises:
            UnsupportedModelError: the family does not say.
        """
        if self.tower_parts is None:
            raise UnsupportedModelError(
                f"{self.name} does not declare the inside of its vision tower: take a method that does not look there"
            )
        return self.tower_parts(model.config, self.part(model, "vision_tower"), self.part(model, "projector"))

    def project(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """The map from the tower's `features` `(..., C')` to embedding rows `(..., C)`; see `tower.looking`."""
        projector = self.tower(model).projector
        return (lambda features: features) if projector is None else projector

    @property
    def capabilities(self) -> frozenset[str]:
        """What methods may require of every model of this family, of `CAPABILITIES`."""
        facts = {"cls": self.has_cls, "flat_positions": self.rope == "1d", "blacken": self.blacken is not None}
        facts["own_resolution"] = self.token_side is not None
        return frozenset(name for name, holds in facts.items() if holds)

    def placeholders(self, config: Any) -> list[int]:
        """Ids of the visual placeholder tokens of this model."""
        ids = (getattr(config, attribute, None) for attribute in self.placeholder_ids)
        return [token for token in ids if token is not None]

    def wrappers(self, config: Any) -> list[int]:
        """Ids of the tokens that only wrap an image."""
        return [
            token for token in (getattr(config, attribute, None) for attribute in self.wrapper_ids) if token is not None
        ]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able facts for the CLI and the docs."""
        shown = ("name", "model_type", "model_class", "paper", "has_cls", "rope", "grid_rule", "deepstack")
        facts = dataclasses.asdict(self, dict_factory=lambda items: {k: v for k, v in items if k in shown})
        return facts | {"deepstack": bool(self.deepstack), "kind": "family"}


PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
"""How most released processors normalise red, green and blue: CLIP's constants."""


def gray_values(
    pixels: Tensor, channels: int, mean: Sequence[float] = PIXEL_MEAN, std: Sequence[float] = PIXEL_STD
) -> Tensor:
    """The mean of red, green and blue in [0, 255] of normalised `pixels`, whose dimension `channels` has the three.

    A model's config does not say how its processor normalises; where no processor is known either, `mean` and `std` are
    the family's.
    """
    shape = (3, *[1] * (pixels.ndim - channels - 1))
    center, spread = (torch.tensor(x, device=pixels.device).view(shape) for x in (mean, std))
    return (pixels.float() * spread + center).mean(channels) * 255


def register(family: Family) -> Family:
    """Put a family into the registry."""
    FAMILIES[family.model_type] = family
    return family
