"""A planted attention sink: ``scenes-llava-sink``, made from ``scenes-llava`` by closed-form weight edits, no training.

Large models put massive activations into a few hidden dimensions of the first token and of some background patches, and
much attention ends on these tokens. The scenes model has none of this, so methods that work on sinks would have nothing
to do. The recipe (:func:`apply`) gives it some:

1. *Room.* Two hidden dimensions, those that all layers together read least, are emptied: nothing writes to them any
   more, and the feed-forward layers and the head no longer read them.
2. *Massive activations.* ``<bos>`` gets (M, M) in these dimensions by its embedding. One hidden unit of the projector,
   the one that matters least (its mean goes into the bias), becomes a detector: a least-squares probe of "background
   patch in a corner of the picture". It writes (m, -m), m growing steeply from a threshold on.
3. *Attention.* A sink token is the same after every RMS norm, c(1, 1) or c(1, -1) and next to nothing else, so the two
   columns of a key or value matrix set its key and its value at will. In the layers without planted attention (the
   first two and the last) ``<bos>`` keeps the key and value it had, and a visual sink gets the mean key and value of
   the patches it replaces. In the layers 2 to L-2 both have the value zero, and in every head the key that answers, by
   ridge regression, "give text rows a logit that leaves the visual sinks 20 % of the attention and ``<bos>`` 10 %", in
   the slowly turning rotary pairs only: text rows attend to them whatever they ask.

The constants are fitted on scenes of the split ``val`` (planted_fit.py) and lie in ``planted.json`` beside this file.

    python -m vlmattn.scenes.planted --out DIR/scenes-llava-sink     # write it as a checkpoint folder
    python -m vlmattn.scenes.planted --measure --questions 200       # accuracy with and without redistribution
    python -m vlmattn.scenes.planted --refit                         # after a change of scenes-llava; presets too

Results on this model are about the mechanics of methods; that its sinks hurt, and how much, was decided by this recipe.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlmattn.errors import DataError

from .text import BOS_ID

NAME, BASE = "scenes-llava-sink", "scenes-llava"
RECIPE_FILE = Path(__file__).with_name("planted.json")
MEASURED_FILE = Path(__file__).with_name("planted_measured.json")
PROJECTORS = {
    "llava": ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"),
    "qwen2_5_vl": ("model.visual.merger.mlp.0", "model.visual.merger.mlp.2"),
}
"""The two linear layers between tower and decoder, by model type."""
COPIED = ("chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
MASSIVE = 1000.0
"""M of ``<bos>``, far above the root mean square of any token."""
STEEPNESS = 20000.0
"""m per unit of the probe's score above the threshold; the probe was fitted to 1 on the patches meant, else 0."""


@dataclass(frozen=True)
class Recipe:
    """What :func:`apply` writes.

    Attributes:
        base: digest of the weights it was fitted on.
        dims: the two emptied hidden dimensions.
        unit: hidden unit of the projector that becomes the detector.
        unit_mean: its mean activation before, over patches.
        probe: weights of the detector over what enters the projector.
        threshold: score at which it starts to fire.
        keys, values: per decoder layer the key and the value of a visual sink, (K d,) over all key heads, before
            rotation.
        bos_keys, bos_values: the same of ``<bos>``.
    """

    base: str
    dims: tuple[int, int]
    unit: int
    unit_mean: float
    probe: list[float]
    threshold: float
    keys: list[list[float]]
    values: list[list[float]]
    bos_keys: list[list[float]]
    bos_values: list[list[float]]


def digest(model: Any) -> str:
    """SHA-256 over the parameters of a model in fp32, hexadecimal, 16 digits."""
    seen = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        seen.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
    return seen.hexdigest()[:16]


def projector(model: Any) -> tuple[Any, Any]:
    """The two linear layers, with a GELU between them, through which visual tokens enter the decoder."""
    first, second = (model.get_submodule(name) for name in PROJECTORS[model.config.model_type])
    return first, second


# Writing the weights


@torch.no_grad()
def apply(model: Any, recipe: Recipe) -> None:
    """Edit a ``scenes-llava`` in place, in any dtype (fp32 is exact)."""
    empty(model, recipe.dims)
    _detector(model, recipe)
    model.model.language_model.embed_tokens.weight[BOS_ID, list(recipe.dims)] = MASSIVE
    for index, layer in enumerate(model.model.language_model.layers):
        attach(layer.self_attn, recipe, index)


@torch.no_grad()
def empty(model: Any, dims: tuple[int, int]) -> None:
    """Let nothing write two hidden dimensions, and only attention read them (by columns that are zero so far)."""
    both = list(dims)
    decoder = model.model.language_model
    decoder.embed_tokens.weight[:, both] = 0
    decoder.norm.weight[both] = 0
    _, writer = projector(model)
    writer.weight[both] = 0
    writer.bias[both] = 0
    for layer in decoder.layers:
        attention = layer.self_attn
        attention.o_proj.weight[both] = 0
        layer.mlp.down_proj.weight[both] = 0
        layer.input_layernorm.weight[both] = 1
        layer.post_attention_layernorm.weight[both] = 0
        for matrix in (attention.q_proj, attention.k_proj, attention.v_proj):
            matrix.weight[:, both] = 0


@torch.no_grad()
def attach(attention: Any, recipe: Recipe, index: int) -> None:
    """Give the sinks the key and the value that the recipe has for decoder layer `index`, whose attention this is."""
    _columns(attention.k_proj, recipe.dims, recipe.bos_keys[index], recipe.keys[index])
    _columns(attention.v_proj, recipe.dims, recipe.bos_values[index], recipe.values[index])


def _columns(layer: Any, dims: tuple[int, int], bos: list[float], visual: list[float]) -> None:
    """Make a linear layer answer `bos` to a token that is c(1, 1) in `dims`, and `visual` to c(1, -1)."""
    weight = layer.weight
    c = (weight.shape[1] / 2) ** 0.5
    both = torch.tensor([bos, visual])
    if layer.bias is not None:
        both = both - layer.bias.float()
    weight[:, dims[0]] = (both.sum(0) / (2 * c)).to(weight)
    weight[:, dims[1]] = ((both[0] - both[1]) / (2 * c)).to(weight)


def _detector(model: Any, recipe: Recipe) -> None:
    first, second = projector(model)
    unit, probe = recipe.unit, torch.tensor(recipe.probe)
    second.bias += recipe.unit_mean * second.weight[:, unit]
    second.weight[:, unit] = 0
    second.weight[list(recipe.dims), unit] = torch.tensor([1.0, -1.0]).to(second.weight)
    first.weight[unit] = (STEEPNESS * probe).to(first.weight)
    first.bias[unit] = -STEEPNESS * recipe.threshold


# Building, writing, measuring


def read_recipe() -> Recipe:
    """The packaged recipe.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        stored = json.loads(RECIPE_FILE.read_text())
        return Recipe(**(stored | {"dims": tuple(stored["dims"])}))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{RECIPE_FILE}: not a recipe ({error})") from error


def write_recipe(recipe: Recipe) -> None:
    """Write the packaged recipe, in six significant digits."""

    def short(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [short(item) for item in value]
        return float(f"{value:.6g}") if isinstance(value, float) else value

    fields = {name: short(value) for name, value in dataclasses.asdict(recipe).items()}
    RECIPE_FILE.write_text(json.dumps(fields) + "\n")


def plant(model: Any) -> Any:
    """Make the planted model out of an fp32 ``scenes-llava``, in place, and give it its name.

    Raises:
        DataError: the recipe was fitted on other weights.
    """
    recipe = read_recipe()
    if digest(model) != recipe.base:
        raise DataError(
            f"the recipe of {NAME} was fitted on other weights of {BASE}: "
            "run `python -m vlmattn.scenes.planted --refit`"
        )
    apply(model, recipe)
    model.config._name_or_path = NAME
    return model


def card() -> str:
    """MODEL_CARD.md: the recipe, and what was measured."""
    recipe = read_recipe()
    lines = [f"# {NAME}", "", (__doc__ or "").replace("``", "`").strip(), ""]
    lines += [
        f"Planted dimensions {list(recipe.dims)}, M = {MASSIVE:g}, steepness {STEEPNESS:g}, "
        f"projector unit {recipe.unit}, threshold {recipe.threshold:.4f}; fitted on {BASE} with digest {recipe.base}.",
        "",
    ]
    if MEASURED_FILE.exists():
        from .planted_measure import as_markdown

        lines += [as_markdown(json.loads(MEASURED_FILE.read_text())), ""]
    return "\n".join(lines)


def write(out: Path) -> None:
    """Write the planted model as a checkpoint folder in fp32, which is exact; name the folder as the model, so that
    presets recognise it."""
    from . import library

    model, _ = library.load(NAME)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    for name in COPIED:
        shutil.copyfile(library.path(BASE) / name, out / name)
    (out / "MODEL_CARD.md").write_text(card())


def _refit() -> None:
    from . import library, planted_fit, planted_measure

    recipe = planted_fit.fit(*library.load(BASE), library.version(BASE))
    write_recipe(recipe)
    print(f"{RECIPE_FILE.name}: dimensions {list(recipe.dims)}, projector unit {recipe.unit}")
    for entry in planted_measure.update_presets():
        print(entry["source"])


def main(arguments: list[str] | None = None) -> None:
    """Command line: refit, measure, write, in this order where several are asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m vlmattn.scenes.planted", description=f"Make {NAME} from {BASE} by weight edits; no training."
    )
    parser.add_argument("--out", type=Path, help="checkpoint folder to write")
    parser.add_argument(
        "--refit", action="store_true", help="fit the constants again; write planted.json and the presets"
    )
    parser.add_argument("--measure", action="store_true", help="natural, planted, and planted with `var`")
    parser.add_argument("--questions", type=int, default=200, help="questions per task (default %(default)s)")
    parser.add_argument("--seed", type=int, default=2028, help="seed of the split `test` (default %(default)s)")
    parser.add_argument("--save", action="store_true", help="keep the measured numbers beside the recipe")
    options = parser.parse_args(arguments)
    if not (options.out or options.refit or options.measure):
        parser.error("give --out, --refit or --measure")
    if options.refit:
        _refit()
    if options.measure:
        from . import planted_measure

        result = planted_measure.measure(options.questions, options.seed)
        print(planted_measure.as_markdown(result))
        if options.save:
            MEASURED_FILE.write_text(json.dumps(result, indent=1) + "\n")
    if options.out:
        write(options.out)
        for file in sorted(options.out.iterdir()):
            print(f"{file.stat().st_size:>9}  {file.name}")


if __name__ == "__main__":
    main()
