"""Finding sink dimensions: the recipe on built activations, real runs, the preset's round trip, the command."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner

import vlmattn
from vlmattn import discover as finder
from vlmattn import presets, scenes
from vlmattn.cli import app
from vlmattn.errors import CallError, LayerError, SpecError, VlmattnWarning
from vlmattn.scenes import planted

SINK, NATURAL = "scenes-llava-sink", "scenes-llava"
LAYERS = scenes.version(SINK).architecture.decoder_layers


@pytest.fixture(scope="module")
def sink() -> tuple[Any, Any]:
    return scenes.load(SINK)


@pytest.fixture(scope="module")
def natural() -> tuple[Any, Any]:
    return scenes.load(NATURAL)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets that a test adds are forgotten after it."""
    monkeypatch.setattr(presets, "_added", [])


def mark(model: Any, dims: tuple[int, ...], share: float, value: float = 500.0) -> None:
    """Write `value` into `dims` of the first token and of a share of the visual tokens, at the decoder's entry."""

    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        hidden = kwargs["inputs_embeds"].clone()
        hidden[:, 0, list(dims)] = value
        count = round(share * 144)
        if hidden.shape[1] > 144:
            hidden[:, 2 : 2 + count, list(dims)] = value
        return args, kwargs | {"inputs_embeds": hidden}

    model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)


def test_finds_exactly_the_planted_dimensions(sink: tuple[Any, Any]) -> None:
    found = finder.discover(*sink, images=finder.scene_pictures())
    assert found.verdict == finder.FOUND and found.confidence_word == "high"
    assert set(found.sink_dims) == {dim for dim, _ in found.profile[:2]} and len(found.sink_dims) == 2
    assert found.tau == pytest.approx(0.3125 * math.sqrt(128), abs=1e-4)
    assert [e.layer for e in found.layers] == list(range(2, found.num_layers - 1)) and all(
        e.separated for e in found.layers
    )
    assert finder.FLAGGED[0] < found.flagged < 0.05
    assert json.loads(json.dumps(found.to_dict()))["sink_dims"] == found.sink_dims


def test_the_natural_model_has_none(natural: tuple[Any, Any]) -> None:
    for images in (finder.scene_pictures(), None):
        found = finder.discover(*natural, images=images)
        assert (found.verdict, found.sink_dims, found.candidates) == (finder.NONE, [], [])
        assert found.confidence_word == "high" and found.layers == []


@pytest.mark.parametrize(("share", "verdict"), [(0.02, finder.FOUND), (0.0, finder.NONE), (0.5, finder.NONE)])
def test_only_a_few_marked_visual_tokens_are_sinks(share: float, verdict: str) -> None:
    model, processor = scenes.load(NATURAL)
    planted.empty(model, (5, 17))
    mark(model, (5, 17), share)
    found = finder.discover(model, processor, images=finder.scene_pictures(2))
    assert sorted(found.candidates) == [5, 17]
    assert found.verdict == verdict
    assert sorted(found.sink_dims) == ([5, 17] if verdict == finder.FOUND else [])


def test_at_most_four_strongest_first() -> None:
    profile = torch.full((256,), 0.01)
    profile[[3, 50, 7, 9, 11]] = torch.tensor([5.0, 9.0, 6.0, 8.0, 4.5])
    assert finder._candidates(profile, 256) == [50, 9, 7, 3]
    profile[:] = 0.2
    profile[3] = 9.0
    assert finder._candidates(profile, 256) == []


def test_the_anchor_is_the_strongest_of_the_first_tokens() -> None:
    hidden = torch.ones(1, 6, 8)
    hidden[0, 2, 3], hidden[0, 5, 4] = -40.0, 900.0
    anchor = finder._anchor(hidden, torch.zeros(1, 6))
    assert int(anchor.argmax()) == 3 and float(anchor[3]) == pytest.approx(40 / math.sqrt((1600 + 7) / 8), abs=1e-4)


def test_refuses_what_it_cannot_look_at(natural: tuple[Any, Any]) -> None:
    with pytest.raises(LayerError, match="3 decoder layers"):
        finder.discover(tiny.llava(layers=3), natural[1])
    with pytest.raises(CallError, match="at least one"):
        finder.discover(*natural, images=[])
    with vlmattn.wrap(natural[0], "random(keep=0.5, before_layer=1)"), pytest.raises(CallError, match="remove"):
        finder.discover(*natural, images=finder.scene_pictures(1))


def test_a_preset_goes_round(sink: tuple[Any, Any], tmp_path: Path, added: None) -> None:
    model, processor = sink
    found = finder.discover(model, processor, images=finder.scene_pictures(2))
    found.write(tmp_path / "sinks.json", "vlmattn discover --model X")
    (entry,) = presets.read(tmp_path / "sinks.json")
    assert entry["sink_dims"] == found.sink_dims and "vlmattn discover --model X on 2" in entry["source"]
    assert entry["evidence"]["weights"] == finder.weights_digest(model)
    before = model.config._name_or_path
    try:
        model.config._name_or_path = "somewhere/Renamed"
        with pytest.raises(SpecError, match="vlmattn discover"):
            vlmattn.wrap(model, "var")
        entry["names"] = ["renamed"]
        (tmp_path / "sinks.json").write_text(json.dumps(entry))
        presets.add(tmp_path / "sinks.json")
        assert presets.sink_dims(model.config) == tuple(found.sink_dims)
        vlmattn.wrap(model, "var").remove()
    finally:
        model.config._name_or_path = before


def test_packaged_entries_are_of_the_packaged_weights(natural: tuple[Any, Any], sink: tuple[Any, Any]) -> None:
    """Fails when the checkpoint changed: run `python -m vlmattn.scenes.planted --refit`."""
    for model, _ in (natural, sink):
        entry = presets.find(model.config)
        assert entry is not None
        assert entry["evidence"]["weights"] == finder.weights_digest(model)
    assert presets.sink_dims(natural[0].config) == () and len(presets.sink_dims(sink[0].config)) == 2


def test_the_packaged_entry_is_found_for_the_folder_too() -> None:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(scenes.path(NATURAL))
    assert presets.sink_dims(model.config) == ()


@torch.no_grad()
def test_inactive_methods_say_so_once_and_change_nothing(natural: tuple[Any, Any]) -> None:
    model, processor = natural
    image = finder.scene_pictures(1)
    inputs = processor(text=["<bos><|user|><image>describe the image.<|assistant|>"], images=image, return_tensors="pt")
    logits = model(**inputs).logits
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with vlmattn.wrap(model, "var") as session:
            session.record()
            session.set("var.p", 0.9)
            assert torch.equal(model(**inputs).logits, logits)
            assert float(session.stats()["sink_mass"].values.nan_to_num().abs().max()) == 0
    ours = [w for w in said if w.category is VlmattnWarning]
    assert len(ours) == 1 and "no visual sinks" in str(ours[0].message)
    assert Path(ours[0].filename).name == Path(__file__).name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vlmattn.wrap(model, "var(sinks=[])").remove()


def test_generated_pictures_are_the_same_every_time() -> None:
    first, second = finder.generated_pictures(), finder.generated_pictures()
    assert len(first) == 4 and all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))
    assert len({a.tobytes() for a in first}) == 4


def test_command(tmp_path: Path, added: None) -> None:
    runner = CliRunner()
    out = tmp_path / "preset.json"
    result = runner.invoke(app, ["discover", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["verdict"] == finder.NONE and told["names"] == [NATURAL] and told["pictures"] == "scenes"
    picture = tmp_path / "blank.png"
    finder.generated_pictures()[0].save(picture)
    result = runner.invoke(app, ["discover", "--model", SINK, "--image", str(picture), "--out", str(out)])
    assert result.exit_code == 0 and finder.FOUND in result.stdout and "Confidence" in result.stdout
    (entry,) = presets.read(out)
    assert f"vlmattn discover --model {SINK} --image blank.png on 2" in entry["source"]
    assert str(tmp_path) not in out.read_text()
    result = runner.invoke(app, ["discover", "--image", str(out)])
    assert result.exit_code == 2 and "cannot be read as an image" in result.stderr


def test_run_takes_a_preset_and_says_that_it_is_idle(tmp_path: Path, added: None) -> None:
    runner = CliRunner()
    none = {"names": [SINK], "hidden_size": 128, "num_layers": LAYERS, "sink_dims": [], "source": "test"}
    (tmp_path / "none.json").write_text(json.dumps(none))
    args = ["run", "scene:3", "--model", SINK, "--methods", "var", "--preset", str(tmp_path / "none.json")]
    result = runner.invoke(app, args)
    assert result.exit_code == 0, result.output
    assert "note: var does nothing" in result.stderr and "no visual sinks" in result.stderr
    result = runner.invoke(app, ["run", "scene:3", "--methods", "var", "--preset", str(tmp_path / "missing.json")])
    assert result.exit_code == 2 and "cannot be read" in result.stderr


@pytest.mark.parametrize("family", sorted(tiny.MODELS))
def test_reads_the_input_of_the_layers_of_every_family(family: str) -> None:
    from vlmattn.patches import families

    model = tiny.MODELS[family](layers=5)
    one = tiny.single(tiny.prompts(family), 0)
    described = families.find(model)
    layers = described.part(model, "text_model").layers
    seen = finder._run(described, model, one, layers, lambda hidden, visual: hidden[visual])
    with torch.no_grad():
        states = model(**one, output_hidden_states=True).hidden_states
    assert sorted(seen) == [2, 3]
    first = 3 if described.deepstack else 2  # states are noted before the model adds features to them
    for layer, hidden in seen.items():
        assert layer < first or torch.equal(hidden, states[layer][one["input_ids"] == tiny.IMAGE])
    assert not any(layer._forward_pre_hooks for layer in layers)
