"""Methods that look inside the vision tower, through the engine: every token gets what the tower says about it."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from test_vision_tower import look

import vlmattn
from vlmattn.methods.prune.vflowopt import VFlowOpt
from vlmattn.methods.views import Look

pytestmark = pytest.mark.usefixtures("no_grad")
FAMILIES = sorted(tiny.MODELS)
KEPT = 5


def best(scores: torch.Tensor) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i].item(), i))[:KEPT]


def expected(model: Any, batch: dict[str, torch.Tensor], rows: tuple[int, ...]) -> list[list[list[int]]]:
    """Per row and image the tokens that receive most, from the tower's own attention."""
    (images,) = look(model, batch, Look("attention")).values()
    chosen = iter([sorted(best(image.sum(-1))) for image in images])
    return [[next(chosen) for _ in range(count)] for count in rows]


def kept(session: Any) -> list[list[list[int]]]:
    (stage,) = session.report().stages
    return stage.kept


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [(2, 1, 1), (1, 0, 3)])
def test_several_images(family, rows):
    model, batch = tiny.MODELS[family](), tiny.prompts(family, images=rows)
    with vlmattn.wrap(model, f"hired(keep={KEPT})") as session:
        model(**batch)
        assert [[image for image in row if image] for row in kept(session)] == expected(model, batch, rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_and_returned_sequences(family):
    """The oldest transformers gives every beam its own copy of the images, the newest runs the tower once a sample."""
    model, rows = tiny.MODELS[family](), (1, 1, 1)
    batch = tiny.prompts(family, images=rows)
    right = expected(model, batch, rows)
    with vlmattn.wrap(model, f"hired(keep={KEPT})") as session:
        model.generate(**batch, max_new_tokens=3, do_sample=False, num_beams=3, num_return_sequences=2)
        assert kept(session) == [row for row in right for _ in range(3)]
        torch.manual_seed(0)
        model.generate(**batch, max_new_tokens=3, do_sample=True, num_return_sequences=2)
        assert kept(session) == [row for row in right for _ in range(2)]


@pytest.mark.parametrize("text", ["hired(keep=5)", "visionzip(keep=5)", "prumerge", "vflowopt(keep=0.4, alpha=0.3)"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_keeps_the_same_tokens_wherever_it_is(family, text):
    """Whatever the question, the padding and the other images of the batch."""
    model, batch = tiny.MODELS[family](), tiny.prompts(family, images=(1, 1))
    longer = {name: value.clone() for name, value in batch.items()}
    longer["input_ids"][:, -2:] = torch.tensor([7, 8])
    with vlmattn.wrap(model, text) as session:
        found = []
        for given in (batch, longer, tiny.single(batch, 1)):
            model(**given)
            found.append([stage.kept[-1] for stage in session.report().stages])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, 0.5, 0.5),
        ({"image_mean": [0.1] * 3, "image_std": [0.9] * 3, "do_normalize": False}, 0.0, 1.0),
    ],
)
def test_entropies_are_those_of_the_pictures_that_the_processor_normalised(monkeypatch, settings, mean, std):
    """Dark and bright patches of few and of many values; CLIP's constants would push most of them beyond [0, 255]."""
    seen = []
    monkeypatch.setattr(VFlowOpt, "softmax", lambda self, entropy, present: seen.append(entropy) or entropy)
    torch.manual_seed(0)
    values = torch.randint(0, 256, (1, 1, 28, 28))
    values[..., :14] = values[..., :14] // 250
    batch = tiny.single(tiny.prompts("llava"), 0) | {"pixel_values": (values.expand(-1, 3, -1, -1) / 255 - mean) / std}
    processor = SimpleNamespace(image_processor=SimpleNamespace(**settings))
    model = tiny.llava()
    with vlmattn.wrap(model, "vflowopt(keep=0.4, alpha=0.3, threshold=1.0)", processor=processor):
        model(**batch)
    patches = values[0, 0].unfold(0, 7, 7).unfold(1, 7, 7).reshape(16, 49)
    counts = torch.stack([torch.bincount(patch, minlength=256) for patch in patches]) / 49
    assert torch.allclose(seen[0][0], -torch.xlogy(counts, counts).sum(-1) / math.log(2), atol=1e-4)


def test_a_video_and_an_image_in_one_prompt():
    model = tiny.qwen2_5_vl()
    ids = torch.tensor([[1, 92, *[tiny.VIDEO] * 32, 93, 5, 6, 92, *[tiny.IMAGE] * 16, 93, 7, 8, 9]])
    torch.manual_seed(0)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == tiny.IMAGE).long() + 2 * (ids == tiny.VIDEO).long(),
        "pixel_values_videos": torch.randn(128, 1176),
        "video_grid_thw": torch.tensor([[2, 8, 8]]),
        "pixel_values": torch.randn(64, 1176),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
    }
    video = {"pixel_values": batch["pixel_values_videos"], "image_grid_thw": batch["video_grid_thw"]}
    ((clip,),) = look(model, video, Look("attention")).values()
    frames = [sorted(best(frame.sum(-1))) for frame in clip.split(16)]
    with vlmattn.wrap(model, f"hired(keep={2 * KEPT})") as session:
        model(**batch)
        ((first, second),) = kept(session)
    assert first == [*frames[0], *[16 + i for i in frames[1]]]
    (picture,) = expected(model, batch, (1,))[0]
    assert set(picture) <= set(second)
    with vlmattn.wrap(model, "vflowopt(keep=0.4, alpha=0.3)") as session:
        model(**batch)
        assert session.report().visual_per_layer[0][0] < 48


@pytest.mark.parametrize("text", ["visionzip(keep=6)", "prumerge(keep=6)"])
def test_merged_rows_reach_the_decoder(text):
    """The layer input is what the method made: other logits than those of the same tokens unmerged."""
    model, batch = tiny.llava(), tiny.prompts("llava", images=(1,))
    entering = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: entering.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    projected = model.model.get_image_features(
        batch["pixel_values"],
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
    ).pooler_output[0]
    with vlmattn.wrap(model, text) as session:
        model(**batch)
        (chosen,) = kept(session)[0]
    hook.remove()
    start = batch["input_ids"][0].tolist().index(tiny.IMAGE)
    rows = entering[-1][0, start : start + len(chosen)]
    same = (rows == projected[chosen]).all(1)
    assert 0 < int((~same).sum()) <= len(chosen)
    assert bool(same.any()) == text.startswith("visionzip")


def test_precomputed_features_cannot_be_looked_at():
    model, batch = tiny.llava(), tiny.prompts("llava")
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this transformers takes no precomputed features")
    features = model.model.get_image_features(
        batch.pop("pixel_values"),
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
    )
    with vlmattn.wrap(model, "hired"), pytest.raises(vlmattn.VlmattnError, match="looks into the vision tower"):
        model(**batch, mm_encoder_outputs={"image": features})


@pytest.mark.parametrize("text", ["visionzip(keep=6, keep_cls=True)", "prumerge", "divprune(keep=6)", "vflowopt"])
def test_half_precision(text):
    """Scores are fp32, rows come back in the model's dtype."""
    model, batch = tiny.llava().bfloat16(), tiny.prompts("llava")
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    with vlmattn.wrap(model, text) as session:
        logits = model(**batch).logits
        assert session.report().visual_per_layer[0][0] < 16
    assert logits.dtype == torch.bfloat16 and bool(logits.isfinite().all())
