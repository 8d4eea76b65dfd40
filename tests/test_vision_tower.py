"""Looks inside the vision tower against the attention that the tower itself reports when it runs eagerly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AttentionInterface

from vlmattn.errors import LayerError, SpecError, UnsupportedModelError
from vlmattn.methods.views import Look
from vlmattn.patches import tower
from vlmattn.patches.families import find
from vlmattn.patches.families.base import PIXEL_MEAN, PIXEL_STD

pytestmark = pytest.mark.usefixtures("no_grad")


def look(model: Any, batch: dict[str, Tensor], *looks: Look) -> dict[Look, list[Tensor]]:
    family, found = find(model), {}
    features = tower.looking(model.model.get_image_features, family.tower(model), frozenset(looks), found.update)
    features(**inputs(model, batch))
    return found


def inputs(model: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
    given = {name: batch[name] for name in ("pixel_values", "image_grid_thw") if name in batch}
    if "image_grid_thw" not in given:
        given["vision_feature_layer"] = model.config.vision_feature_layer
        given["vision_feature_select_strategy"] = model.config.vision_feature_select_strategy
    return given


def clip(seed: int = 0, **changes: Any) -> tuple[Any, dict[str, Tensor]]:
    model = tiny.llava(seed, attention="eager")
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model, tiny.prompts("llava", images=(2, 1))


def llava_attention(model: Any, batch: dict[str, Tensor], layer: int) -> Tensor:
    """`(images, H, N, N)` as the tower computes it."""
    return model.model.vision_tower(batch["pixel_values"], output_attentions=True).attentions[layer]


def test_cls_rows_are_the_towers_own():
    model, batch = clip()
    given = Look("attention", -1), Look("attention"), Look("attention", 0)
    found = look(model, batch, *given)
    for wanted, layer in zip(given, (1, 0, 0), strict=True):  # the projector reads what layer 0 of 2 gives
        rows = llava_attention(model, batch, layer)[:, :, 0, 1:]
        torch.testing.assert_close(torch.stack(found[wanted]), rows.mT)


def test_all_heads_as_one():
    model, batch = clip()
    (found,) = look(model, batch, Look("joined", -1)).values()
    layer = model.model.vision_tower.encoder.layers[1]
    hidden = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states[1]
    normed = layer.layer_norm1(hidden)
    logits = layer.self_attn.q_proj(normed[:, :1]) @ layer.self_attn.k_proj(normed).mT / 32**0.5
    torch.testing.assert_close(torch.stack(found), logits.softmax(-1)[:, 0, 1:])


@pytest.mark.parametrize("block", [1, 40, tower.BLOCK])
def test_received_attention_in_blocks(monkeypatch, block):
    monkeypatch.setattr(tower, "BLOCK", block)
    model, batch = clip()
    (found,) = look(model, batch, Look("received", -1)).values()
    expected = llava_attention(model, batch, 1)[:, :, 1:, 1:].mean(2)
    torch.testing.assert_close(torch.stack(found), expected.mT)


def test_keys_and_features():
    model, batch = clip()
    found = look(model, batch, Look("keys"), Look("features"), Look("cls"), Look("states", -1))
    hidden = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
    first = model.model.vision_tower.encoder.layers[0]
    keys = first.self_attn.k_proj(first.layer_norm1(hidden[0])).view(3, 17, 2, 16)
    torch.testing.assert_close(torch.stack(found[Look("keys")]), keys[:, 1:])
    features = torch.stack(found[Look("features")])
    assert torch.equal(features, hidden[-2][:, 1:])
    assert torch.equal(torch.stack(found[Look("cls")]), hidden[-2][:, :1].expand_as(features))
    assert torch.equal(torch.stack(found[Look("states", -1)]), hidden[-1][:, 1:])
    projected = model.model.get_image_features(**inputs(model, batch)).pooler_output
    assert torch.equal(find(model).project(model)(features), torch.stack(list(projected)))


def test_a_tower_whose_cls_is_a_visual_token():
    model, batch = clip(vision_feature_select_strategy="full", vision_feature_layer=[-2, -1])
    model.model.multi_modal_projector.linear_1 = torch.nn.Linear(64, 64)
    found = look(model, batch, Look("attention", -1), Look("features"), Look("cls"))
    expected = llava_attention(model, batch, 1)[:, :, 0]
    torch.testing.assert_close(torch.stack(found[Look("attention", -1)]), expected.mT)
    features = torch.stack(found[Look("features")])
    assert features.shape == (3, 17, 64) and torch.equal(torch.stack(found[Look("cls")])[:, 5], features[:, 0])


def caught(visual: Any, batch: dict[str, Tensor]) -> tuple[dict[Any, list[Tensor]], list[int]]:
    """The softmax of every segment of every attention module, and the visual token that each 4 rows end in."""
    probabilities: dict[Any, list[Tensor]] = {}

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, scaling: float, **_: Any) -> Any:
        weights = (q @ k.mT * scaling).softmax(-1)
        probabilities.setdefault(module, []).append(weights[0])
        return (weights @ v).transpose(1, 2), weights

    before, windowed = visual.config._attn_implementation, []
    hook = visual.merger.register_forward_hook(lambda module, args, out: windowed.append(out))
    AttentionInterface.register("caught_by_a_test", attend)
    visual.config._attn_implementation = "caught_by_a_test"
    try:
        raster = visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).pooler_output
    finally:
        hook.remove()
        visual.config._attn_implementation = before
        AttentionInterface._global_mapping.pop("caught_by_a_test")
    return probabilities, [int((raster == row).all(1).nonzero()[0, 0]) for row in windowed[0]]


def by_token(segments: list[Tensor], order: list[int]) -> list[Tensor]:
    """`(H, n, n)` a segment, raster order: the mean over the rows and the sum over the columns of a token's patches."""
    found, start = [], 0
    for probabilities in segments:
        tokens = probabilities.shape[-1] // 4
        place = torch.tensor(order[start : start + tokens]) - start
        merged = probabilities.unflatten(-1, (tokens, 4)).sum(-1).unflatten(-2, (tokens, 4)).mean(-2)
        found.append(torch.empty_like(merged))
        found[-1][:, place[:, None], place] = merged
        start += tokens
    return found


@pytest.mark.parametrize("frames", [1, 2])
def test_a_tower_with_windows_and_merged_patches(frames):
    model, batch = tiny.qwen2_5_vl(), tiny.prompts("qwen2_5_vl", images=(2, 1))
    batch["image_grid_thw"][:, 0] = frames
    batch["pixel_values"] = torch.randn(int(batch["image_grid_thw"].prod(-1).sum()), 1176)
    segments, order = caught(model.model.visual, batch)
    expected = by_token(segments[model.model.visual.blocks[1].attn], order)
    assert [len(x[0]) for x in expected] == [16] * frames + [24] * frames + [16] * frames
    looks = Look("received", 0), Look("attention"), Look("keys")
    found = look(model, batch, *looks)
    received = [torch.cat([x.mean(1).T for x in expected[i : i + frames]]) for i in range(0, 3 * frames, frames)]
    for wanted in looks[:2]:  # layer 0 has windows: the next whole layer stands for it
        for image, reference in zip(found[wanted], received, strict=True):
            torch.testing.assert_close(image, reference)
    assert [image.shape for image in found[looks[2]]] == [(n * frames, 2, 16) for n in (16, 24, 16)]


def test_keys_and_features_of_merged_patches():
    model, batch = tiny.qwen2_5_vl(), tiny.prompts("qwen2_5_vl", images=(2, 1))
    visual, hidden = model.model.visual, []
    hook = visual.blocks[1].norm1.register_forward_hook(lambda module, args, out: hidden.append(out))
    _, order = caught(visual, batch)
    hook.remove()
    keys = visual.blocks[1].attn.qkv(hidden[0])[:, 32:64].unflatten(0, (-1, 4)).mean(1).view(-1, 2, 16)
    found = look(model, batch, Look("keys"), Look("features"))
    torch.testing.assert_close(torch.cat(found[Look("keys")]), keys[torch.tensor(order).argsort()])
    features = model.model.get_image_features(**inputs(model, batch)).pooler_output
    assert all(torch.equal(*pair) for pair in zip(found[Look("features")], features, strict=True))
    assert find(model).project(model)(features[0]) is features[0]


@pytest.mark.parametrize("name", sorted(tiny.MODELS))
def test_rows_weighted_by_what_they_receive(name):
    """Only the two tokens of an image that receive most give."""

    def weigh(received: Tensor, present: Tensor) -> Tensor:
        best = received.masked_fill(~present, -1).topk(2, 1).indices
        return torch.zeros_like(received).scatter(1, best, 0.5)

    model = tiny.MODELS[name](attention="eager")
    batch = tiny.prompts(name, images=(2, 1))
    found = look(model, batch, Look("weighted", -1, weigh))
    if name == "llava":
        matrices = list(llava_attention(model, batch, 1).mean(1)[:, 1:, 1:])
    else:
        segments, order = caught(model.model.visual, batch)
        matrices = [x.mean(0) for x in by_token(segments[model.model.visual.blocks[1].attn], order)]
    for image, matrix in zip(*found.values(), matrices, strict=True):
        best = matrix.mean(0).topk(2).indices
        torch.testing.assert_close(image, matrix[best].mean(0))


def test_looks_that_cannot_be():
    model, batch = clip()
    with pytest.raises(LayerError, match="vision layer 2 does not exist: this tower has 2 layers"):
        look(model, batch, Look("keys", 2))
    with pytest.raises(SpecError, match="expected a look at one of attention"):
        look(model, batch, Look("key"))
    with pytest.raises(SpecError, match="needs weigh"):
        look(model, batch, Look("weighted"))
    for what in ("cls", "states"):
        with pytest.raises(UnsupportedModelError, match="has no such rows"):
            look(tiny.qwen2_5_vl(), tiny.prompts("qwen2_5_vl"), Look(what))


def test_nothing_stays_on_the_tower():
    model, batch = clip()
    look(model, batch, Look("attention"), Look("features"))
    assert not any(module._forward_pre_hooks for module in model.modules())
    batch["pixel_values"] = batch["pixel_values"][:, :2]
    with pytest.raises(RuntimeError):
        look(model, batch, Look("attention"))
    assert not any(module._forward_pre_hooks for module in model.modules())


def bits(values: Tensor) -> float:
    share = torch.bincount(values.clamp(0, 255).long().flatten(), minlength=256) / values.numel()
    return -sum(p * math.log2(p) for p in share.tolist() if p)


@pytest.mark.parametrize("name", sorted(tiny.MODELS))
def test_entropy_of_pixels(name):
    """Of pictures whose gray values are known before they are normalised."""
    torch.manual_seed(0)
    constants = ((0.5,) * 3, (0.5,) * 3) if name == "qwen3_vl" else (PIXEL_MEAN, PIXEL_STD)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in constants)
    model, batch = tiny.MODELS[name](), tiny.prompts(name, images=(2, 1))
    if name == "llava":
        gray = torch.randint(0, 256, (3, 28, 28)).float()
        batch["pixel_values"] = (gray[:, None].expand(-1, 3, -1, -1) / 255 - mean) / std
        expected = [
            [bits(image[7 * row : 7 * row + 7, 7 * column : 7 * column + 7]) for row in range(4) for column in range(4)]
            for image in gray
        ]
    else:
        gray = torch.randint(0, 256, (len(batch["pixel_values"]), 2 * 14 * 14)).float()
        pixels = (gray[:, None, :, None] / 255 - mean[:, :, :, None].view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
        batch["pixel_values"] = pixels.reshape(len(gray), -1)
        per_patch = torch.tensor([bits(patch) for patch in gray])
        expected = [x.tolist() for x in per_patch.unflatten(0, (-1, 4)).mean(1).split([16, 24, 16])]
    (found,) = look(model, batch, Look("entropy")).values()
    for image, values in zip(found, expected, strict=True):
        assert image.tolist() == pytest.approx(values, abs=1e-4)
    (scaled,) = look(model, batch, Look("entropy", None, lambda x, there: x.masked_fill(~there, 0) * 2)).values()
    assert torch.equal(torch.cat(scaled), 2 * torch.cat(found))
