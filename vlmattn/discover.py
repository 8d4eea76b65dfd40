"""Find the hidden dimensions that carry attention sinks in an unknown checkpoint, or that there are none.

Some models put massive activations into a few hidden dimensions of their first token, and the same dimensions mark
visual tokens that soak up attention (arXiv 2402.17762, 2503.03321). `discover` looks at the first tokens of a few
prompts for such dimensions, and at the visual tokens of a few images for whether they are marked. A dimension that is
large everywhere, or on no visual token, is not a sink dimension, and then the answer is "no visual sinks found".
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmattn import chat, presets
from vlmattn.errors import CallError, DataError, LayerError
from vlmattn.methods.attend.var import sink_strength
from vlmattn.patches import families

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPTS = (
    "What is shown in the image?",
    "Is there a red circle in the image?",
    "How many objects are there in the image?",
    "Describe the image.",
)
ANCHORS = 4
"""The anchor of a layer is the token with the largest activation among so many first ones."""
MAX_DIMS = 4
PROFILE_SHARE = 0.25
"""A candidate reaches this share of sqrt(width), the most that a dimension can reach, ..."""
PROFILE_RATIO = 50.0
"""... and this multiple of the median dimension."""
TAU_SHARE = 0.3125
FLAGGED = (0.001, 0.15)
"""Share of the visual tokens of the middle layers that sinks may be."""
FOUND, NONE = "visual sinks found", "no visual sinks found"
_WORDS = ((0.9, "high"), (0.6, "moderate"), (0.0, "low"))


@dataclass(frozen=True)
class LayerEvidence:
    """Sink strength of the visual tokens at the input of one layer.

    Attributes:
        layer: decoder layer.
        flagged: share above tau.
        median, q95, largest: of the strength; at most sqrt(width).
        separated: 95th percentile below tau / 2, and a plausible share flagged.
    """

    layer: int
    flagged: float
    median: float
    q95: float
    largest: float
    separated: bool


@dataclass(frozen=True)
class Discovery:
    """What was found.

    Attributes:
        names: last part of the checkpoint's name, lower case; what a preset matches.
        hidden_size, num_layers: of the decoder.
        verdict: `FOUND` or `NONE`.
        reason: why, in a sentence.
        sink_dims: hidden dimensions, strongest first; empty without visual sinks.
        candidates: dimensions that are massive on the first token, whether or not they mark visual tokens.
        tau: strength above which a token is a sink.
        profile: (dimension, median strength on the anchor token) of the eight strongest.
        threshold: what a candidate must reach.
        flagged: share of the visual tokens of the middle layers above tau.
        layers: the same and more by layer; empty without candidates.
        confidence: share of the single measurements (layer and prompt, middle layer, image) that agree with the
            verdict; of the three shares the smallest.
        confidence_word: high (0.9 or more), moderate (0.6 or more) or low.
        prompts, images: how many of each were shown.
        pictures: where the images came from.
        weights: digest of a sample of the weights.
    """

    names: list[str]
    hidden_size: int
    num_layers: int
    verdict: str
    reason: str
    sink_dims: list[int]
    candidates: list[int]
    tau: float
    profile: list[tuple[int, float]]
    threshold: float
    flagged: float
    layers: list[LayerEvidence]
    confidence: float
    confidence_word: str
    prompts: int
    images: int
    pictures: str
    weights: str

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return dataclasses.asdict(self)

    def preset(self, command: str) -> dict[str, Any]:
        """An entry for a preset file, see `vlmattn.presets`.

        Args:
            command: how it was made; date and versions are added.
        """
        import transformers

        made = (
            f"{command} on {datetime.date.today().isoformat()} (torch {torch.__version__.split('+')[0]}, "
            f"transformers {transformers.__version__}, python {platform.python_version()}): {self.verdict}, "
            f"confidence {self.confidence_word} ({self.confidence:.2f})"
        )
        entry = self.to_dict()
        fields = {name: entry.pop(name) for name in presets.FIELDS if name != "source"}
        return fields | {"source": made, "evidence": entry}

    def write(self, file: Path, command: str) -> None:
        """Write a preset file with this one entry; `vlmattn.presets.add(file)` uses it."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([self.preset(command)], indent=1) + "\n")


_Reading = dict[int, Tensor]
"""What was measured at the input of each layer in one forward pass."""


def discover(
    model: Any,
    processor: Any,
    prompts: Sequence[str] = PROMPTS,
    images: Sequence[Image] | None = None,
    pictures: str = "given",
) -> Discovery:
    """Look for sink dimensions. The model is run `len(prompts) + 2 * len(images)` times and not changed.

    Args:
        model: a supported vision-language model in eval mode, not wrapped by a session that prunes.
        processor: its processor, with a chat template.
        prompts: short texts; each is shown alone, and they accompany the images in turn.
        images: PIL images; None for four simple generated pictures.
        pictures: where the images came from, for the record.

    Raises:
        UnsupportedModelError: no family describes the model.
        LayerError: it has fewer than four decoder layers.
        CallError: no prompts or images, or the model is pruned.
        DataError: the processor has no chat template.
    """
    family = families.find(model)
    text = model.config.get_text_config()
    width, count = text.hidden_size, text.num_hidden_layers
    if count < 4:
        raise LayerError(f"sinks are looked for in layers 2 to L - 2, and this model has {count} decoder layers")
    if images is None:
        images, pictures = generated_pictures(), "generated"
    if not prompts or not images:
        raise CallError("discover needs at least one prompt and one image")
    middle = range(max(2, count // 4), min(count - 2, 3 * count // 4) + 1)
    shown = [(prompts[i % len(prompts)], image) for i, image in enumerate(images)]
    asked = [*((prompt, None) for prompt in prompts), *shown]
    readings = _read(family, model, processor, asked, _anchor)
    # (prompts, layers, D)
    anchors = torch.stack([torch.stack(list(reading.values())) for reading in readings])
    profile = anchors.flatten(0, 1).median(0).values
    candidates = _candidates(profile, width)
    tau = TAU_SHARE * math.sqrt(width)
    layers: list[LayerEvidence] = []
    seen: list[_Reading] = []
    if candidates:
        dims = tuple(candidates)
        seen = _read(family, model, processor, shown, lambda hidden, visual: sink_strength(hidden, dims)[visual].cpu())
        layers = [_evidence(i, torch.cat([reading[i] for reading in seen]), tau) for i in seen[0]]
    pooled = [torch.cat([reading[i] for i in middle]) for reading in seen]
    overall = _evidence(-1, torch.cat(pooled), tau) if pooled else None
    found = overall is not None and overall.separated
    separated = sum(e.separated for e in layers if e.layer in middle) / len(middle)
    votes = _votes(anchors, candidates, width)
    if found:
        confidence = min(votes, separated, sum(bool((x > tau).any()) for x in pooled) / len(pooled))
    else:
        confidence = 1 - separated if candidates else votes
    name = Path(str(getattr(model.config, "_name_or_path", "") or "")).name.lower()
    best = profile.topk(min(8, width))
    return Discovery(
        names=[name] if name else [],
        hidden_size=width,
        num_layers=count,
        verdict=FOUND if found else NONE,
        reason=_reason(overall, candidates, tau),
        sink_dims=candidates if found else [],
        candidates=candidates,
        tau=round(tau, 4),
        profile=[(int(d), round(float(v), 3)) for v, d in zip(*best, strict=True)],
        threshold=round(_threshold(profile, width), 3),
        flagged=0.0 if overall is None else overall.flagged,
        layers=layers,
        confidence=round(confidence, 4),
        confidence_word=next(word for least, word in _WORDS if confidence >= least),
        prompts=len(prompts),
        images=len(images),
        pictures=pictures,
        weights=weights_digest(model),
    )


def _read(
    family: families.Family,
    model: Any,
    processor: Any,
    asked: Sequence[tuple[str, Image | None]],
    measure: Callable[[Tensor, Tensor], Tensor],
) -> list[_Reading]:
    """`measure(hidden (1, N, C) fp32, visual (1, N))` at the input of layers 2 to L - 2, for every prompt."""
    layers = getattr(family.part(model, "text_model"), family.layers)
    readings = []
    for prompt, image in asked:
        images = [] if image is None else [image]
        inputs = chat.encode(model, processor, images, [chat.turn("user", prompt, len(images))])
        readings.append(_run(family, model, inputs, layers, measure))
    return readings


@torch.inference_mode()
def _run(
    family: families.Family, model: Any, inputs: Any, layers: Any, measure: Callable[[Tensor, Tensor], Tensor]
) -> _Reading:
    ids = inputs["input_ids"]
    visual = torch.isin(ids, torch.tensor(family.placeholders(model.config), device=ids.device))
    reading: _Reading = {}

    def hook(index: int) -> Callable[..., None]:
        def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.shape[:2] != ids.shape:
                raise CallError("tokens are missing: discover looks at the plain model, call session.remove() first")
            reading[index] = measure(hidden.float(), visual.to(hidden.device))

        return look

    handles = [layers[i].register_forward_pre_hook(hook(i), with_kwargs=True) for i in range(2, len(layers) - 1)]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return reading


def _anchor(hidden: Tensor, visual: Tensor) -> Tensor:
    """`(C,)` |x| / RMS of the strongest of the first tokens."""
    first = hidden[0, :ANCHORS]
    strength = first.abs() / (first.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return strength[strength.amax(-1).argmax()].cpu()


def _threshold(profile: Tensor, width: int) -> float:
    return max(PROFILE_SHARE * math.sqrt(width), PROFILE_RATIO * float(profile.median()))


def _candidates(profile: Tensor, width: int) -> list[int]:
    order = profile.argsort(descending=True)[:MAX_DIMS]
    return [int(d) for d in order if float(profile[d]) >= _threshold(profile, width)]


def _votes(anchors: Tensor, candidates: list[int], width: int) -> float:
    """Share of (prompt, layer) pairs that by themselves would find all candidates, or none if there are none."""
    agree = []
    for profile in anchors.flatten(0, 1):
        alone = _candidates(profile, width)
        agree.append(set(candidates) <= set(alone) if candidates else not alone)
    return sum(agree) / len(agree)


def _evidence(layer: int, strength: Tensor, tau: float) -> LayerEvidence:
    flagged = float((strength > tau).float().mean())
    # torch.quantile refuses more than 2 ** 24 values
    ordered = strength.sort().values
    median, q95 = (float(ordered[math.ceil(share * (len(ordered) - 1))]) for share in (0.5, 0.95))
    separated = q95 < tau / 2 and FLAGGED[0] <= flagged <= FLAGGED[1]
    return LayerEvidence(
        layer, round(flagged, 5), round(median, 3), round(q95, 3), round(float(ordered[-1]), 3), separated
    )


def _reason(overall: LayerEvidence | None, candidates: list[int], tau: float) -> str:
    if overall is None:
        return "no hidden dimension of the first tokens is massive"
    said = f"dimensions {candidates} are massive on the first token, and "
    if overall.separated:
        return (
            f"{said}{overall.flagged:.1%} of the visual tokens in the middle layers carry them (strength above "
            f"{tau:.1f}), clearly apart from the rest (95 % below {overall.q95:.2f})"
        )
    if overall.flagged < FLAGGED[0]:
        return f"{said}visual tokens do not carry them (largest strength {overall.largest:.1f}, tau {tau:.1f})"
    return (
        f"{said}visual tokens do not fall into two kinds ({overall.flagged:.1%} above {tau:.1f}, 95th percentile "
        f"{overall.q95:.1f}; expected {FLAGGED[0]:.1%} to {FLAGGED[1]:.0%}, and a percentile below {tau / 2:.1f})"
    )


def weights_digest(model: Any) -> str:
    """Sixteen hexadecimal digits over up to 256 evenly spaced values of every weight, in fp32: tells checkpoints
    apart without reading gigabytes."""
    digest = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        flat = value.detach().flatten()
        picked = flat[:: max(1, flat.numel() // 256)][:256]
        digest.update(f"{name}{tuple(value.shape)}".encode() + picked.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def generated_pictures() -> list[Image]:
    """Four simple pictures, always the same: discs, stripes, blocks and clouds on smooth colour."""
    import numpy as np
    from PIL import Image as images

    y, x = np.meshgrid(np.linspace(0, 1, 336), np.linspace(0, 1, 336), indexing="ij")
    rng = np.random.RandomState(0)
    coarse = rng.uniform(0, 255, (8, 8, 3)).astype(np.uint8)
    clouds = np.asarray(images.fromarray(coarse).resize((336, 336), images.Resampling.BICUBIC)) / 255
    ground = np.stack([0.3 + 0.4 * x, 0.5 + 0.3 * y, 0.8 - 0.4 * x * y], -1)
    disc = ((x - 0.35) ** 2 + (y - 0.6) ** 2 < 0.03)[..., None]
    bars = (np.floor(x * 12) % 2 == 0)[..., None] & (y > 0.5)[..., None]
    blocks = (np.floor(x * 4) + np.floor(y * 4))[..., None] % 3 == 0
    drawn = [np.where(disc, [0.9, 0.1, 0.1], ground), np.where(bars, [0.1, 0.1, 0.1], ground)]
    drawn += [np.where(blocks, [0.95, 0.9, 0.3], ground), clouds]
    return [images.fromarray((picture * 255).astype(np.uint8)) for picture in drawn]


def load_images(files: Sequence[Path]) -> list[Image]:
    """Open image files.

    Raises:
        DataError: one cannot be read.
    """
    from PIL import Image as images

    opened = []
    for file in files:
        try:
            opened.append(images.open(file).convert("RGB"))
        except OSError as error:
            raise DataError(f"{file}: cannot be read as an image ({error})") from error
    return opened


def scene_pictures(count: int = 4, name: str | None = None) -> list[Image]:
    """Rendered scenes of the kind that the embedded model `name` (None: the first) was trained on, from the split
    `val`."""
    from vlmattn import scenes

    world = scenes.version(name or scenes.names()[0]).world.name
    chosen = scenes.benchmark("val", ("caption",), count, world=world)
    return [chosen.image(name) for name in chosen.names]


def tables(found: Discovery) -> Iterator[Any]:
    """What the command prints: Rich renderables."""
    from rich import box
    from rich.table import Table

    colour = "green" if found.verdict == FOUND else "yellow"
    yield (
        f"[bold {colour}]{found.verdict}[/]: {found.reason}.\n"
        f"Confidence [bold]{found.confidence_word}[/]: {found.confidence:.0%} of the single measurements agree "
        f"({found.prompts} prompts, {found.images} {found.pictures} images, "
        f"layers 2 to {found.num_layers - 2} of {found.num_layers})."
    )
    strongest = ", ".join(f"{dim}: {value:.2f}" for dim, value in found.profile[:5])
    yield f"Strongest dimensions of the first token (a candidate needs {found.threshold:.2f}): {strongest}"
    if found.layers:
        view = Table(title="visual tokens by layer", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
        for name in ("layer", "flagged", "median", "95 %", "largest", "two kinds"):
            view.add_column(name, justify="right")
        for e in found.layers:
            row = (str(e.layer), f"{e.flagged:.1%}", f"{e.median:.2f}", f"{e.q95:.2f}", f"{e.largest:.2f}")
            view.add_row(*row, "yes" if e.separated else "no")
        yield view
    if found.verdict == NONE:
        yield "A preset with sink_dims [] makes methods that need sinks do nothing on this checkpoint, and say so."
