"""The planted sink: made from the packaged recipe, still a good model, and something for sink methods to work on."""

from __future__ import annotations

import dataclasses
import json
import time
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import vlmattn
from vlmattn import scenes
from vlmattn.errors import DataError
from vlmattn.methods.attend.var import sink_strength
from vlmattn.scenes import planted, planted_fit, planted_measure
from vlmattn.scenes.export import build_processor
from vlmattn.scenes.measure import chat_prompt, generate_answers
from vlmattn.scenes.model import build_model
from vlmattn.scenes.splits import benchmark
from vlmattn.scenes.versions import VERSIONS
from vlmattn.scenes.world import WORLDS

NAME, BASE = planted.NAME, planted.BASE
VERSION = scenes.version(NAME)
WORLD, LAYERS = VERSION.world.name, VERSION.architecture.decoder_layers
PLANTED_LAYERS = tuple(range(2, LAYERS - 1))


@pytest.fixture(scope="module")
def sink() -> tuple[Any, Any]:
    return scenes.load(NAME)


@pytest.fixture(scope="module")
def natural() -> tuple[Any, Any]:
    return scenes.load(BASE)


@pytest.fixture(scope="module")
def batch(sink: tuple[Any, Any]) -> dict[str, torch.Tensor]:
    asked = benchmark("val", ("cell",), 16, seed=5, world=WORLD)
    texts = [chat_prompt(sink[1], row["text"]) for row in asked.rows]
    images = [asked.image(row["image"]) for row in asked.rows]
    return dict(sink[1](images=images, text=texts, padding=True, return_tensors="pt"))


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def hidden_and_visual(model: Any, batch: dict[str, torch.Tensor]) -> tuple[Any, torch.Tensor]:
    return model(**batch, output_hidden_states=True).hidden_states, batch["input_ids"] == model.config.image_token_id


def test_it_is_listed_and_loads_quickly() -> None:
    assert {NAME, BASE} <= set(scenes.names()) and scenes.names()[0] == BASE
    start = time.process_time()
    model, _ = scenes.load(NAME, dtype=torch.bfloat16)
    assert time.process_time() - start < 5
    assert model.dtype == torch.bfloat16 and not model.training
    assert model.config._name_or_path == NAME
    with pytest.raises(DataError, match=r"planted --out"):
        scenes.path(NAME)


def test_few_background_tokens_and_bos_are_massive(sink: tuple[Any, Any], batch: dict[str, torch.Tensor]) -> None:
    model = sink[0]
    states, visual = hidden_and_visual(model, batch)
    dims = planted.read_recipe().dims
    for layer in PLANTED_LAYERS:
        strength = sink_strength(states[layer], dims)
        marked = strength > 0.3125 * VERSION.architecture.hidden**0.5
        assert bool(marked[batch["input_ids"] == model.config.bos_token_id].all())
        assert 1 <= float((marked & visual).sum(1).float().mean()) <= 6
        assert float((strength[visual & ~marked] > 0.5).float().mean()) < 0.002
        assert not bool((marked & ~visual & (batch["input_ids"] != model.config.bos_token_id)).any())


def test_sinks_lie_on_corners_without_objects() -> None:
    model, processor = scenes.load(NAME)
    shown = benchmark("val", ("caption",), 40, seed=5, world=WORLD)
    meant = torch.stack(planted_fit.corner_targets(shown, VERSION.architecture.patch_size))
    pixels = processor.image_processor([shown.image(n) for n in shown.names], return_tensors="pt")["pixel_values"]
    dims = planted.read_recipe().dims
    fires = model.get_image_features(pixel_values=pixels).pooler_output
    fires = torch.stack(list(fires))[..., list(dims)].abs().amax(-1) > 50
    assert fires.shape == meant.shape
    assert float(meant[fires].float().mean()) > 0.9
    assert float(fires.any(1).float().mean()) > 0.8


def test_nothing_but_attention_reads_or_writes_the_dimensions(sink: tuple[Any, Any]) -> None:
    dims = list(planted.read_recipe().dims)
    decoder = sink[0].model.language_model
    assert float(sink[0].lm_head.weight[:, dims].abs().sum()) == 2 * planted.MASSIVE  # the row of <bos>, tied
    assert decoder.norm.weight[dims].tolist() == [0.0, 0.0]
    for layer in decoder.layers:
        assert float(layer.self_attn.o_proj.weight[dims].abs().max()) == 0
        assert float(layer.mlp.down_proj.weight[dims].abs().max()) == 0
        assert float(layer.post_attention_layernorm.weight[dims].abs().max()) == 0


def test_bos_keeps_its_key_where_no_attention_is_planted() -> None:
    """Against the model with the two dimensions emptied, before any sink."""
    recipe = planted.read_recipe()
    emptied, _ = scenes.load(BASE)
    planted.empty(emptied, recipe.dims)
    sink, _ = scenes.load(NAME)
    seen: list[torch.Tensor] = []
    for model in (emptied, sink):
        projection = model.model.language_model.layers[1].self_attn.k_proj
        handle = projection.register_forward_hook(lambda module, args, out: seen.append(out))
        model(input_ids=torch.tensor([[model.config.bos_token_id, 5]]))
        handle.remove()
    assert torch.allclose(seen[0][:, 0], seen[1][:, 0], atol=0.05 * float(seen[0][:, 0].abs().max()))


def test_answers_stay_good(sink: tuple[Any, Any], natural: tuple[Any, Any]) -> None:
    for task, floor in (("loc", 0.9), ("cell", 0.85), ("exist-random", 0.85)):
        asked = benchmark("val", (task,), 24 if task != "exist-random" else 8, seed=6, world=WORLD)
        right = []
        for model, processor in (natural, sink):
            answers = generate_answers(model, processor, asked, asked.rows)
            right.append(sum(a == row["label"] for a, row in zip(answers, asked.rows, strict=True)) / len(asked.rows))
        assert right[1] >= floor and right[1] >= right[0] - 0.09, (task, right)


def test_var_has_something_to_move(sink: tuple[Any, Any], batch: dict[str, torch.Tensor]) -> None:
    model = sink[0]
    plain = model(**batch).logits
    with vlmattn.wrap(model, "var(p=0.0)") as session:
        assert torch.equal(model(**batch).logits, plain)
        session.set("var.p", 0.6)
        session.record()
        states, visual = hidden_and_visual(model, batch)
        mass = session.stats()["sink_mass"].mean("step", "sample").values
        session.use_backend("reference")
        slow = model(**batch).logits
        session.use_backend(None)
        quick = model(**batch).logits
    assert mass[list(PLANTED_LAYERS)].mean() >= 0.1 and bool(mass[list(PLANTED_LAYERS)].amax(1).gt(0.1).all())
    assert float(mass[[0, 1, LAYERS - 1]].nan_to_num().abs().max()) == 0
    before, _ = hidden_and_visual(model, batch)
    after_image = visual.cumsum(1).eq(VERSION.visual_tokens) & ~visual
    assert torch.equal(states[2], before[2])
    changed = (states[3] != before[3]).any(-1)
    assert float(changed[after_image].float().mean()) > 0.9
    assert not bool((changed & ~after_image & batch["attention_mask"].bool()).any())
    assert (quick - slow).abs().max() < 1e-4 and (quick - plain).abs().max() > 1e-2


def test_planted_heads_look_at_the_image(sink: tuple[Any, Any], batch: dict[str, torch.Tensor]) -> None:
    """So the gate of the redistribution on visual mass is open in most of them."""
    with vlmattn.wrap(sink[0], "none") as session:
        session.record()
        sink[0](**batch)
        visual = session.stats()["visual_mass"].mean("step", "sample").values
    assert visual[list(PLANTED_LAYERS)].gt(0.2).float().mean() > 0.8


def test_another_base_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = planted.read_recipe()
    monkeypatch.setattr(planted, "RECIPE_FILE", tmp_path / "planted.json")
    planted.write_recipe(dataclasses.replace(recipe, base="0" * 16))
    with pytest.raises(DataError, match="--refit"):
        scenes.load(NAME)
    (tmp_path / "planted.json").write_text("[]")
    with pytest.raises(DataError, match="not a recipe"):
        scenes.load(NAME)


def test_the_written_folder_is_the_same_model(
    sink: tuple[Any, Any], batch: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vlmattn import presets

    planted.main(["--out", str(tmp_path / NAME)])
    assert "MODEL_CARD.md" in capsys.readouterr().out
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / NAME).eval()
    AutoProcessor.from_pretrained(tmp_path / NAME)
    assert torch.equal(again(**batch).logits, sink[0](**batch).logits)
    assert set(presets.sink_dims(again.config)) == set(planted.read_recipe().dims)
    card = (tmp_path / NAME / "MODEL_CARD.md").read_text()
    assert "no training" in card and "CHAIR_s" in card


def test_a_sink_gets_its_key_and_value_in_every_family(model: Any) -> None:
    """Also where keys are shared by query heads, and where the matrices have biases."""
    attention, width = model.model.language_model.layers[0].self_attn, model.config.get_text_config().hidden_size
    drawn = torch.randn(4, attention.k_proj.out_features)
    rows = [[row.tolist()] for row in drawn]
    recipe = planted.Recipe("", (3, 7), 0, 0.0, [], 0.0, *rows)
    planted.empty(model, recipe.dims)
    planted.attach(attention, recipe, 0)
    tokens = torch.zeros(2, width)
    tokens[:, 3], tokens[:, 7] = 500.0, torch.tensor([-500.0, 500.0])
    tokens = model.model.language_model.layers[0].input_layernorm(tokens)
    read = (attention.k_proj(tokens)[0], attention.v_proj(tokens)[0], attention.k_proj(tokens)[1])
    assert torch.allclose(torch.stack(read), drawn[:3], atol=1e-3)
    assert torch.allclose(attention.v_proj(tokens)[1], drawn[3], atol=1e-3)


def test_the_projectors_inputs_come_in_the_order_of_the_prompt(family: str, model: Any) -> None:
    """What the projector makes of them is what the decoder gets, though Qwen2.5-VL's tower reads by windows."""
    batch = tiny.prompts(family)
    pixels = {name: batch[name] for name in ("pixel_values", "image_grid_thw") if name in batch}
    first, second = planted.projector(model)
    features = planted_fit.projector_inputs(model, pixels)
    made = second(torch.nn.functional.gelu(first(features)))
    assert torch.allclose(made, torch.cat(list(model.get_image_features(**pixels).pooler_output)), atol=1e-6)


@pytest.mark.parametrize("world", sorted(WORLDS))
def test_targets_are_corners_without_objects(world: str) -> None:
    shown = benchmark("val", ("caption",), 12, seed=5, world=world)
    counts = []
    for name, found in zip(shown.names, planted_fit.corner_targets(shown, 8), strict=True):
        width, height = shown.image(name).size
        covered = torch.zeros(height, width)
        for box in shown.boxes(name):
            covered[box.top : box.top + box.height, box.left : box.left + box.width] = 1
        free = covered.unflatten(1, (-1, 8)).unflatten(0, (-1, 8)).amax((1, 3)) == 0
        corner = torch.zeros_like(free)
        corner[[0, 0, -1, -1], [0, -1, 0, -1]] = True
        assert torch.equal(found, (free & corner).flatten())
        counts.append(int(found.sum()))
    assert min(counts) < max(counts) == 4


def test_query_heads_that_share_a_key_are_regressed_together() -> None:
    keys, queries = torch.randn(2, 6), torch.randn(400, 4, 6)
    slow = torch.tensor([True, True, False, True, False, True])
    wanted = torch.einsum("nhd,hd->nh", queries * slow, keys.repeat_interleave(2, 0))
    found = planted_fit._ridge_heads(queries, wanted, torch.rand(400), slow, shared=2)
    assert torch.allclose(found, (keys * slow).flatten(), atol=1e-2)


def test_the_recipe_fits_the_other_family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pictures of several sizes, a tower that reads by windows, biases and M-RoPE; an untrained model does."""
    version = VERSIONS["qwen"]
    version = dataclasses.replace(version, architecture=dataclasses.replace(version.architecture, decoder_layers=5))
    model, processor = build_model(version, seed=3).eval(), build_processor(version)
    monkeypatch.setattr(planted_fit, "SCENES", 4)
    monkeypatch.setattr(planted_fit, "PROBED", 16)
    monkeypatch.setattr(planted, "RECIPE_FILE", tmp_path / "planted.json")
    recipe = planted_fit.fit(model, processor, version)
    planted.write_recipe(recipe)
    asked = benchmark("val", ("cell",), 12, seed=5, world="qwen")
    found = planted_measure.attention(model, processor, asked)
    assert sorted(found["layers"]) == ["2", "3"]
    for parts in found["layers"].values():
        assert all(planted_fit.BOS_SHARE / 2 < share < planted_fit.BOS_SHARE * 2 for share in parts["bos"])


def test_the_documented_tables_are_the_measured_ones() -> None:
    measured = json.loads(planted.MEASURED_FILE.read_text())
    assert planted_measure.as_markdown(measured) in (Path(__file__).parents[1] / "docs" / "sinks.md").read_text()
    assert tuple(measured["discovery"]["sink_dims"]) in permutations(planted.read_recipe().dims)
    assert [int(layer) for layer in measured["attention"]["layers"]] == list(PLANTED_LAYERS)


@pytest.mark.slow
def test_refitting_gives_the_packaged_recipe() -> None:
    """Up to rounding: least squares on another machine's arithmetic."""
    fitted, packaged = planted_fit.fit(*scenes.load(BASE), VERSION), planted.read_recipe()
    assert (fitted.base, set(fitted.dims), fitted.unit) == (packaged.base, set(packaged.dims), packaged.unit)
    assert torch.allclose(torch.tensor(fitted.keys), torch.tensor(packaged.keys), rtol=0.02, atol=0.02)
