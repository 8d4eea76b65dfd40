"""The Qwens beside Qwen2.5-VL: what they declare against transformers, and DeepStack under whatever moves rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import oracle
import pytest
import tiny
import torch
from torch import Tensor

import vlmattn
from vlmattn.check import check_inputs
from vlmattn.errors import UnsupportedModelError
from vlmattn.methods.views import Look, View
from vlmattn.patches import deepstack, tower
from vlmattn.patches.decoder import Decoder
from vlmattn.patches.families import find
from vlmattn.spans import Raster, Span

pytestmark = pytest.mark.usefixtures("no_grad")

# the parameter is not called `family`: these tests belong to the default suite, see conftest.py
every = pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl"])
EVERYTHING = (
    "random(keep=0.7, before_layer=0) + fastv(keep=0.5, before_layer=2) + "
    "var(sinks=[1, 2, 3], tau=1.5, rho=0.2, min_visual=0.05, first_layer=1) + vhr"
)


def mixed(model_type: str, seed: int = 0) -> dict[str, Tensor]:
    """One prompt with a video of two frames (4 x 4 tokens each) and an image (4 x 6)."""
    torch.manual_seed(seed)
    frame, image = [tiny.VIDEO] * 16, [tiny.IMAGE] * 24
    # a timestamp stands before every frame of a Qwen3-VL
    video = [92, *frame, *frame, 93] if model_type == "qwen2_vl" else [70, 92, *frame, 93, 71, 92, *frame, 93]
    ids = torch.tensor([[1, *video, 5, 6, 92, *image, 93, 7, 8, 9]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == tiny.IMAGE).long() + 2 * (ids == tiny.VIDEO).long(),
        "pixel_values": torch.randn(96, 1176),
        "image_grid_thw": torch.tensor([[1, 8, 12]]),
        "pixel_values_videos": torch.randn(128, 1176),
        "video_grid_thw": torch.tensor([[2, 8, 8]]),
    }


@contextmanager
def seen(module: Any, into: list[dict[str, Any]]) -> Iterator[None]:
    """Note what a module is called with by name, the first argument as `hidden_states`."""

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        into.append(kwargs | ({"hidden_states": args[0]} if args else {}))

    handle = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# Facts


@every
def test_everything_is_proved(model_type):
    """Pruning at the entry and inside, edits and head gains: no-op, removal, generation, backends and undo."""
    inputs = tiny.single(tiny.prompts(model_type), 1)
    result = check_inputs(tiny.MODELS[model_type](), inputs, EVERYTHING)
    assert {row.name: row.verdict for row in result.rows if row.verdict != "pass"} == {}
    assert result.visual_tokens == 24


@every
def test_spans_and_grids(model_type):
    """A video is one span of Qwen2-VL, and of Qwen3-VL one a frame; images lie as their positions say."""
    model, batch = tiny.MODELS[model_type](), mixed(model_type)
    with vlmattn.wrap(model, "uniform(keep=4, before_layer=0, mode='2d')") as session:
        model(**batch)
        spans = session._engine.last.spans[0]
        kept = [len(image) for image in session.report().stages[0].kept[0]]
    if model_type == "qwen2_vl":
        assert spans == (Span(2, 32, 0, (Raster((2, 4, 4)),)), Span(38, 24, 1, (Raster((1, 4, 6)),))) and kept == [4, 4]
    else:
        frames = (Span(3, 16, 0, (Raster((1, 4, 4)),)), Span(22, 16, 1, (Raster((1, 4, 4)),)))
        assert spans == (*frames, Span(42, 24, 2, (Raster((1, 4, 6)),))) and kept == [4, 4, 4]
    grids = find(model).input_grids(model.config, batch)
    assert list(grids) == [(1, 4, 6)]


@every
@pytest.mark.parametrize("layer", range(tiny.LAYERS))
def test_scores_are_the_eager_attentions(model_type, layer):
    """Recomputed queries and keys, normed and rotated as the model does it."""
    model, batch = tiny.MODELS[model_type](attention="eager"), tiny.prompts(model_type)
    entering: list[dict[str, Any]] = []
    with seen(model.model.language_model.layers[layer], entering):
        probabilities = model(**batch, output_attentions=True).attentions[layer]
    given = entering[0]
    rows = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    rows[:, -3:] = True
    decoder = Decoder(model, find(model), 4)
    score = {"rows": rows, "over": None, "heads": True}
    found = decoder.scores(layer, given["hidden_states"], given["position_embeddings"], given["attention_mask"], score)
    torch.testing.assert_close(found, probabilities[:, :, -3:].mean(2), atol=1e-6, rtol=1e-4)


@every
def test_positions_cannot_be_renumbered(model_type):
    with pytest.raises(UnsupportedModelError, match="one-dimensional positions"):
        vlmattn.wrap(tiny.MODELS[model_type](), "random(keep=0.5, positions=compact)")


@every
@pytest.mark.parametrize("method", ["get_image_features", "get_video_features"])
def test_looks_at_frames_are_those_at_images(method, model_type):
    """Frames go through the tower apart, so a video's look equals that at its frames as images."""
    model, batch = tiny.MODELS[model_type](), mixed(model_type)
    family, found = find(model), {}
    looks = Look("attention"), Look("keys"), Look("features"), Look("entropy")
    pixels, grids = batch["pixel_values_videos"], torch.tensor([[1, 8, 8], [1, 8, 8]])
    plain = tower.looking(model.model.get_image_features, family.tower(model), frozenset(looks), found.update)
    plain(pixels, grids)
    frames, found = found, {}
    own = tower.looking(getattr(model.model, method), family.tower(model), frozenset(looks), found.update)
    own(pixels, batch["video_grid_thw"])
    for look in looks:
        images = [16, 16] if model_type == "qwen3_vl" else [32]
        assert [len(image) for image in found[look]] == images
        torch.testing.assert_close(torch.cat(found[look]), torch.cat(frames[look]), atol=1e-6, rtol=1e-5)


@every
def test_each_image_is_known_by_its_own_pixels(model_type):
    """Where videos go through the method of images, neither takes the other's place."""
    model, kept = tiny.MODELS[model_type](), []
    for other in (None, "pixel_values_videos", "pixel_values"):
        batch = mixed(model_type)
        if other is not None:
            batch[other] = batch[other].flip(0)
        with vlmattn.wrap(model, "random(keep=6)") as session:
            model(**batch)
            kept.append(session.report().stages[0].kept[0])
    first, video, image = kept
    assert video[-1] == first[-1] and video[:-1] != first[:-1]
    assert image[:-1] == first[:-1] and image[-1] != first[-1]


@every
def test_videos_and_images_are_looked_at_and_shared(model_type):
    model, batch, store = tiny.MODELS[model_type](), mixed(model_type), vlmattn.VisionStore()
    before = set(model.model.__dict__)
    for text in ("hired(keep=8)", "visionzip(keep=6)", "vflowopt(keep=0.4, alpha=0.3)"):
        with vlmattn.wrap(model, text):
            assert model(**batch).logits.shape[1] < batch["input_ids"].shape[1]
    with vlmattn.wrap(model, "random(keep=6)") as session:
        once = model(**batch).logits
        session.share_vision(store)
        assert torch.equal(model(**batch).logits, once) and torch.equal(model(**batch).logits, once)
    assert len(store) == 2 and store.hits == 2
    assert set(model.model.__dict__) == before


# DeepStack


def test_a_video_with_beams_and_padding():
    model, batch = tiny.qwen3_vl(), mixed("qwen3_vl")
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [tiny.IMAGE, tiny.VIDEO, 92, 93]}
    padded = dict(batch)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        padded[name] = torch.nn.functional.pad(batch[name], (3, 0))
    for text in ("random(keep=5, before_layer=0)", "fastv(keep=5, before_layer=1) + vhr"):
        with vlmattn.wrap(model, text):
            greedy, beams = (model.generate(**batch, **options, num_beams=n)[:, -4:] for n in (1, 3))
            assert torch.equal(model.generate(**padded, **options)[:, -4:], greedy)
            assert torch.equal(model.generate(**padded, **options, num_beams=3)[:, -4:], beams)


@pytest.mark.parametrize("layers", [(0,), (1,), (2,), (3,), (0, 1), (1, 2)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_features_follow_what_is_left(attention, layers):
    """Before, between and behind the layers that features are added behind: pruning is masking."""
    model, batch = tiny.qwen3_vl(attention=attention), tiny.prompts("qwen3_vl", images=(2, 1))
    text = " + ".join(f"random(keep={0.7 - layer / 10}, before_layer={layer})" for layer in layers)
    with vlmattn.wrap(model, text) as session:
        pruned, report = model(**batch).logits, session.report()
    stages: dict[int, list[list[int]]] = {}
    for stage in report.stages:
        stages[stage.before_layer] = []
        for row, images in enumerate(stage.kept):
            visual, real = batch["input_ids"][row] == tiny.IMAGE, batch["attention_mask"][row].bool()
            starts = (visual & ~visual.roll(1)).nonzero()[:, 0].tolist()
            kept = [start + i for start, image in zip(starts, images, strict=True) for i in image]
            stages[stage.before_layer].append(sorted([*(real & ~visual).nonzero()[:, 0].tolist(), *kept]))
    masked = oracle.masked_forward(model, batch, stages)
    for row, columns in enumerate(report.positions):
        torch.testing.assert_close(pruned[row, -len(columns) :], masked[row, columns], atol=1e-4, rtol=0)


def test_features_are_added_as_the_model_adds_them():
    """To the last bit, and not at all where nothing acts."""
    model, batch = tiny.qwen3_vl(), tiny.prompts("qwen3_vl")
    plain, entering = model(**batch).logits, []
    with vlmattn.wrap(model, "none") as session, seen(model.model.language_model, entering):
        model(**batch)
        session.record()
        assert torch.equal(model(**batch).logits, plain)
    assert len(entering[0]["deepstack_visual_embeds"]) == 2


def test_missing_features_would_be_noticed(monkeypatch):
    """The tests above compare with a model that needs them."""
    model, batch = tiny.qwen3_vl(), tiny.prompts("qwen3_vl")
    plain = model(**batch).logits
    monkeypatch.setattr(deepstack, "add", lambda plan, layer, stage, hidden: hidden)
    with vlmattn.wrap(model, "none") as session:
        session.record()
        assert (model(**batch).logits - plain).abs().max() > 0.1


@pytest.mark.parametrize("layer", [0, 1])
def test_pooling_pools_features_that_come_later(layer):
    """A model whose visual rows and features are pooled by hand, the others masked."""
    model, one = tiny.qwen3_vl(), tiny.single(tiny.prompts("qwen3_vl"), 0)
    text, start = model.model.language_model, one["input_ids"][0].tolist().index(tiny.IMAGE)
    centres = [0, 2, 8, 10]  # the upper left token of every 2 x 2 of a grid of 4 x 4

    def by_hand(rows: Tensor) -> Tensor:
        cells = rows.view(2, 2, 2, 2, -1).mean((1, 3)).flatten(0, 1)
        rows = rows.clone()
        rows[centres] = cells
        return rows

    def features(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        later = [x if index < layer else by_hand(x) for index, x in enumerate(kwargs["deepstack_visual_embeds"])]
        return args, kwargs | {"deepstack_visual_embeds": later}

    def rows(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        hidden[0, start : start + 16] = by_hand(hidden[0, start : start + 16])
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    with vlmattn.wrap(model, f"pool(size=2, before_layer={layer})") as session:
        pooled, report = model(**one).logits, session.report()
    assert report.stages[0].kept == [[centres]]
    handles = [
        text.register_forward_pre_hook(features, with_kwargs=True),
        text.layers[layer].register_forward_pre_hook(rows, with_kwargs=True),
    ]
    expected = oracle.masked_forward(model, one, {layer: report.positions})
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(pooled[0], expected[0, report.positions[0]], atol=1e-4, rtol=0)


def test_rearranged_tokens_take_their_features_along():
    """A merged token stands at its target and takes the target's features, unless the order is another."""
    x = torch.arange(6.0)[None, :, None]
    looks = {"attention": torch.tensor([[[5.0], [1], [4], [0], [2], [3]]]), "keys": torch.ones(1, 6, 1, 2)}
    view = View(
        layer=0,
        image=torch.zeros(1, 6, dtype=torch.long),
        counts=torch.tensor([[6]]),
        spans=((Span(1, 6, 0),),),
        index=torch.arange(6)[None],
        hidden=x,
        vision=looks | {"features": x},
        project=lambda features: features,
    )
    method = vlmattn.spec.parse("visionzip(keep=3, contextual=0.34, order='code')")[0]
    keep = method.select(view)
    assert keep.mask.tolist() == [[True, True, True, False, False, False]]  # 0 and 2 are dominant, 1 a target
    assert keep.merge is not None
    assert keep.merge(10 * x)[keep.mask][:, 0].tolist() == [0, 20, 10]
    assert vlmattn.spec.parse("visionzip(keep=3)")[0].select(view).merge is None


def test_the_text_stream_gets_no_features():
    """The second stream of head reinforcement is the prompt's text alone."""
    model, batch = tiny.qwen3_vl(), tiny.prompts("qwen3_vl", images=(1, 2))
    layer, entering = model.model.language_model.layers[2], []
    with vlmattn.wrap(model, "vhr(first_layer=None, depth=1)"), seen(layer, entering):
        model(**batch)
    streams = entering[0]["hidden_states"]
    assert len(streams) == 4
    wrapping = torch.tensor([92, 93, tiny.IMAGE])
    for row in range(2):
        real = batch["attention_mask"][row].bool() & ~torch.isin(batch["input_ids"][row], wrapping)
        alone: list[dict[str, Any]] = []
        with seen(layer, alone):
            model(input_ids=batch["input_ids"][row : row + 1, real])
        torch.testing.assert_close(streams[2 + row, -1], alone[0]["hidden_states"][0, -1], atol=1e-4, rtol=0)


def test_too_few_layers_are_refused():
    model = tiny.qwen3_vl(layers=2)
    with vlmattn.wrap(model, "random(keep=0.5)"), pytest.raises(UnsupportedModelError, match="behind 2 decoder layers"):
        model(**tiny.prompts("qwen3_vl"))
