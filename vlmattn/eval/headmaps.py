"""What the heads of every layer do while one question is answered: what `vlmattn show --heads` draws."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from vlmattn.errors import DataError
from vlmattn.eval.models import Loaded

if TYPE_CHECKING:
    from PIL.Image import Image

RECORDED = ("visual_mass", "sink_mass", "entropy", "max")


@dataclass(frozen=True)
class HeadMaps:
    """One answer and its maps.

    Attributes:
        text: the raw answer.
        maps: `(layers, heads)` fp32 by statistic, the mean over the prompt's last row and all generated tokens;
            `sink_mass` only where a method tags sinks.
    """

    text: str
    maps: dict[str, NDArray[np.float32]]


def measure(loaded: Loaded, spec: str, image: Image, question: str, max_new_tokens: int) -> HeadMaps:
    """Answer once while recording, then go over the answer once more with and without the image.

    Raises:
        VlmattnError: the spec does not fit the model, or a method refuses the call.
    """
    from vlmattn import wrap
    from vlmattn.eval.answer import encode

    inputs = dict(encode(loaded, [image], [question]))
    with wrap(loaded.model, spec, processor=loaded.processor) as session, torch.inference_mode():
        session.record()
        sequences = loaded.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        recorded = session.stats()
        maps = {name: recorded[name].mean("step", "sample") for name in RECORDED}
        if not bool(recorded["sink_mass"].values.any()):  # no method of this spec tags sinks
            del maps["sink_mass"]
        maps["divergence"] = session.token_divergence(inputs, sequences).mean("token", "sample")
    new = sequences[0, inputs["input_ids"].shape[1] :]
    text = loaded.processor.tokenizer.decode(new, skip_special_tokens=True)
    return HeadMaps(text, {name: statistic.values.numpy() for name, statistic in maps.items()})


def draw(found: HeadMaps, spec: str, question: str, path: Path) -> Path:
    """Write the maps as a picture.

    Raises:
        DataError: the picture cannot be written.
    """
    from vlmattn.viz import heads

    title = f"{spec} · {question[:60]} · {found.text.strip()[:60]}"
    try:
        return heads.save(heads.draw(found.maps, title), path)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write the picture {path}: {error}") from None


def lines(found: HeadMaps) -> list[str]:
    """For every statistic its mean, and the layer and head where it is largest."""
    told = []
    for name, values in found.maps.items():
        layer, head = np.unravel_index(int(np.nanargmax(values)), values.shape)
        peak = f"largest {values[layer, head]:.3f} in layer {layer}, head {head}"
        told.append(f"{name}: mean {np.nanmean(values):.3f}, {peak}")
    return told
