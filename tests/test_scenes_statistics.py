"""Statistics of a model: attention shares and largest activations against sums by hand, and a planted sink."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlmattn import scenes
from vlmattn.scenes import card, figures
from vlmattn.scenes.measure import chat_prompt
from vlmattn.scenes.statistics import KINDS, statistics

NAME = "scenes-llava"


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return scenes.load(NAME)


@pytest.fixture(scope="module")
def asked(loaded: tuple[Any, Any]) -> tuple[list[str], list[Any]]:
    """Prompts of different lengths, so that a batch of them is padded."""
    chosen = scenes.benchmark("val", ("rel", "caption"), 3, world=scenes.version(NAME).world.name)
    assert len({row["task"] for row in chosen.rows}) == 2
    return [chat_prompt(loaded[1], row["text"]) for row in chosen.rows], [chosen.image(r["image"]) for r in chosen.rows]


@pytest.fixture(scope="module")
def found(loaded: tuple[Any, Any], asked: tuple[list[str], list[Any]]) -> dict[str, Any]:
    return statistics(*loaded, *asked)


def test_attention_equals_sums_over_single_prompts(
    loaded: tuple[Any, Any], asked: tuple[list[str], list[Any]], found: dict[str, Any]
) -> None:
    model, processor = loaded
    layer, rows, last, first, most = 1, [], [], [], []
    model.set_attn_implementation("eager")
    try:
        for prompt, image in zip(*asked, strict=True):
            inputs = processor(images=[image], text=[prompt], return_tensors="pt")
            with torch.no_grad():
                weights = model(**inputs, output_attentions=True).attentions[layer][0]
            visual = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
            behind = weights[:, visual[-1] + 1 :]
            rows.append(behind[..., visual].sum(-1))
            last.append(behind[:, -1, visual].sum(-1))
            first.append(behind[..., 0])
            received = behind[..., visual].sum((0, 1))
            most.append(received.max() / received.sum())
    finally:
        model.set_attn_implementation("sdpa")
    shares = found["attention"][layer]
    assert shares["visual"] == pytest.approx(torch.cat(rows, 1).mean(1).tolist(), abs=1e-3)
    assert shares["visual_last"] == pytest.approx(torch.stack(last).mean(0).tolist(), abs=1e-3)
    assert shares["first"] == pytest.approx(torch.cat(first, 1).mean(1).tolist(), abs=1e-3)
    assert shares["most"] == pytest.approx(float(torch.stack(most).mean()), abs=1e-3)
    assert max(shares["visual"]) > 0.1


def test_activations_equal_the_largest_of_single_prompts(
    loaded: tuple[Any, Any], asked: tuple[list[str], list[Any]], found: dict[str, Any]
) -> None:
    model, processor = loaded
    layer, values, ids = 2, [], []
    for prompt, image in zip(*asked, strict=True):
        inputs = processor(images=[image], text=[prompt], return_tensors="pt")
        with torch.no_grad():
            values.append(model(**inputs, output_hidden_states=True).hidden_states[layer][0].abs())
        ids.append(inputs["input_ids"][0])
    everything, seen = torch.cat(values), torch.cat(ids)
    visual = everything[seen == model.config.image_token_id]
    told = found["activations"][layer]
    assert told["median"] == pytest.approx(float(everything.median()), rel=1e-2)
    assert told["visual"]["largest"] == pytest.approx(float(visual.max()), rel=1e-3)
    dimension = int(visual.amax(0).argmax())
    assert told["visual"]["dimension"] == dimension
    assert told["visual"]["agreeing"] == pytest.approx(float((visual.argmax(1) == dimension).float().mean()), abs=0.01)
    assert told["visual"]["token"].startswith("visual ")
    assert told["first"]["token"] == "<bos>" and told["first"]["largest"] == pytest.approx(
        max(float(value[0].max()) for value in values), rel=1e-3
    )
    assert set(told) == {"median", *KINDS}


def test_the_model_is_left_as_it_was(loaded: tuple[Any, Any], asked: tuple[list[str], list[Any]]) -> None:
    before = loaded[0].config.get_text_config()._attn_implementation
    with pytest.raises(ValueError):
        statistics(*loaded, ["no image here"], asked[1][:1])
    assert loaded[0].config.get_text_config()._attn_implementation == before


def test_a_planted_sink_shows(asked: tuple[list[str], list[Any]], found: dict[str, Any]) -> None:
    planted = statistics(*scenes.load(f"{NAME}-sink"), *asked)
    natural, sink = ([layer["first"]["ratio"] for layer in result["activations"]] for result in (found, planted))
    assert max(sink) > 5 * max(natural)


def test_tables_and_pictures(found: dict[str, Any]) -> None:
    text = card.statistics_tables(found)
    layers, heads = len(found["attention"]), len(found["attention"][0]["visual"])
    assert text.count("\n| ") == 2 * (layers + 2) and "No massive activations" in text
    massive = [
        layer | {"first": layer["first"] | {"ratio": 1500.0, "largest": 120.0}} for layer in found["activations"]
    ]
    told = card.statistics_tables(found | {"activations": massive})
    assert f"occur in {layers} of these cells" in told
    axes = figures.attention(found["attention"]).axes
    assert axes[0].get_title() and len(axes[0].texts) == layers * heads
    assert len(figures.activations(found["activations"]).axes[0].lines) == len(KINDS)
