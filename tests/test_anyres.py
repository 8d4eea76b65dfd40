"""Images of several grids with newline tokens: where their tokens lie, what they cover, and what methods do to them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import test_text_tower as text_tower
import tiny
import torch
from PIL import Image

import vlmattn
from vlmattn import spec
from vlmattn.check import check_inputs
from vlmattn.edits import VISUAL, Keep
from vlmattn.errors import CallError, UnsupportedModelError
from vlmattn.methods.base import Look, Selector, View
from vlmattn.methods.prune import hired
from vlmattn.patches import anyres, families
from vlmattn.spans import Geometry, Raster, Span, in_proportion, lay_out, line_lengths

NEXT, ONEVISION = "llava_next", "llava_onevision"
both = pytest.mark.parametrize("family", [NEXT, ONEVISION])
SIZES = [(90, 90), (200, 130), (131, 301), (97, 64), (64, 97), (20, 90), (301, 60)]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def read(family: str, batch: dict[str, torch.Tensor], text: str = "fastv(keep=0.5, before_layer=2)") -> Any:
    """The report and the plan of one pass under a method."""
    model = tiny.ANYRES[family]()
    with vlmattn.wrap(model, text) as session:
        model(**batch)
        return session.report(), session._engine.last


# Where the tokens lie


def test_spans_of_several_grids():
    rasters = (Raster((1, 2, 2)), Raster((1, 2, 3), line=3))
    span = Span(5, 10, 0, rasters)
    assert span.grid is None and span.grids == ((1, 2, 2), (1, 2, 3)) and span.columns == 12
    assert span.lines() == [(12, 3), (16, 3)]
    assert Span(0, 8, 0, (Raster((2, 2, 2), line=8),)).lines() == [(8, 8)]
    assert line_lengths([[span], []], 18).tolist() == [[0] * 12 + [3, 0, 0, 0, 3, 0], [0] * 18]
    assert in_proportion(7, [4, 10]) == [2, 5] and in_proportion(5, []) == [] and in_proportion(3, [1, 1]) == [1, 2]


def test_images_side_by_side_are_told_apart():
    one, two = (Raster((1, 1, 2), line=2),), (Raster((1, 1, 1)), Raster((1, 1, 1), line=1))
    kinds = torch.tensor([[-1, 0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 0, -1, -1, -1, -1, -1, -1]])
    spans = lay_out(kinds, {0: [one, two, one], 1: [(Raster((1, 1, 2)),)]})
    assert [[(s.start, s.length, s.image, s.rasters) for s in row] for row in spans] == [
        [(1, 2, 0, one), (4, 2, 1, two), (7, 2, 2, (Raster((1, 1, 2)),))],
        [(0, 2, 0, one)],
    ]
    beams = lay_out(kinds[:1].repeat_interleave(3, 0), {0: [one, two], 1: [(Raster((1, 1, 2)),)]})
    assert beams == [spans[0]] * 3
    with pytest.raises(CallError, match="hold 9 visual placeholders, but their images have 6"):
        lay_out(kinds, {0: [one, two]})
    with pytest.raises(CallError, match="row 0 has fewer visual placeholders than its image 1"):
        lay_out(torch.tensor([[0, 0, 0, 0, -1, 0, 0]]), {0: [one, one]})


@both
@pytest.mark.parametrize("size", SIZES)
def test_the_layout_is_the_models(family, size):
    """The model packs numbers that say where they come from as the layout has it."""
    model = tiny.ANYRES[family]()
    most = 2 if family == ONEVISION else None
    picture = anyres.picture(model.config, size[::-1], most)
    n = picture.cells**2
    crops = torch.randn(picture.crops, n, 3)
    strategy = (
        {"vision_feature_select_strategy": "default"} if family == NEXT else {"vision_aspect_ratio": "anyres_max_2"}
    )
    packed = model.model.pack_image_features(
        [crops], torch.tensor([size[::-1]]), image_newline=torch.full((3,), torch.inf), **strategy
    )[0][0]
    newline = packed.isinf().all(-1)
    span = Span(0, sum(raster.length for raster in picture.rasters), 0, picture.rasters)
    assert [column for column, _ in span.lines()] == newline.nonzero()[:, 0].tolist()
    assert torch.equal(picture.arrange(crops), packed[~newline])
    assert picture.mosaic is not None
    down, across = picture.rasters[1].tiles
    assert (sum(down), sum(across)) == picture.mosaic.shown and (len(down), len(across)) == picture.mosaic.tiles
    tile = torch.arange(1.0, picture.crops)[:, None, None].expand(-1, n, 1)
    shown = picture.arrange(torch.cat([torch.zeros(1, n, 1), tile]))[:, 0]
    assert torch.equal(shown.round().long(), hired.crops_of(span)) or most is not None


@both
def test_visual_tokens_of_a_batch(family):
    """Two images in one row and one in the other, sizes unequal, against what the text model gets."""
    batch = tiny.prompts(family, images=(2, 1))
    report, plan = read(family, batch)
    visual = tiny.visual(family, batch)
    assert torch.equal(plan.visual, visual) and report.visual_tokens == visual.sum(1).tolist()
    placeholder = batch["input_ids"] == tiny.IMAGE
    assert torch.equal(plan.newline > 0, placeholder & ~visual)
    assert torch.equal(plan.image >= 0, placeholder) and not bool((plan.text & placeholder).any())
    for row, spans in enumerate(plan.spans):
        kept = report.stages[0].kept[row]
        assert [len(image) for image in kept] == [(span.length + 1) // 2 for span in spans]
        assert all(image == sorted(image) and image[-1] < span.length for image, span in zip(kept, spans, strict=True))


def test_videos_images_and_both():
    """Pooled frames and one newline; an image beside it in tiles, or whole where a sample has several."""
    batch = tiny.tiled_prompts(ONEVISION, images=(1, 1), frames=(3, 3))
    report, plan = read(ONEVISION, batch)
    assert torch.equal(plan.visual, tiny.visual(ONEVISION, batch))
    assert [[span.grid for span in row] for row in plan.spans] == [[None, (3, 3, 3)]] * 2
    assert [row[1].lines()[0][1] for row in plan.spans] == [27, 27]
    assert [[len(image) for image in row][1] for row in report.stages[0].kept] == [14, 14]
    _, plan = read(ONEVISION, tiny.prompts(ONEVISION, images=(2, 1)))
    assert [span.grids for span in plan.spans[0]] == [((1, 5, 5),), ((1, 5, 5),)]
    assert len(plan.spans[1][0].grids) == 2
    only = tiny.tiled_prompts(ONEVISION, images=(0,), frames=(2,))
    for text in ("random(keep=0.5, before_layer=0)", "hired(keep=0.5)", "pool(keep=0.5)"):
        report, _ = read(ONEVISION, only, text)
        assert report.visual_per_layer[0][-1] <= 9, text


@pytest.mark.parametrize("text", ["random(keep=0.5, before_layer=0)", "fastv(keep=0.4, before_layer=2)"])
@pytest.mark.parametrize("frames", [(), (2, 2)], ids=["images", "video"])
def test_removal_of_several_images_equals_masking(text, frames):
    model = tiny.llava_onevision()
    batch = tiny.tiled_prompts(ONEVISION, images=(2, 1), frames=frames)
    with vlmattn.wrap(model, text) as session:
        pruned = model(**batch).logits
        report = session.report()
    masked = oracle.masked_forward(model, batch, {stage.before_layer: stage.positions for stage in report.stages})
    for row, columns in enumerate(report.positions):
        assert (pruned[row, -len(columns) :] - masked[row, columns]).abs().max() < 1e-4


@both
def test_beams_and_returned_sequences(family):
    model, batch = tiny.ANYRES[family](), tiny.prompts(family)
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    with vlmattn.wrap(model, "fastv(keep=0.4, before_layer=1) + vhr"):
        beams = model.generate(**batch, **options)
        for row in range(2):
            alone = model.generate(**tiny.single(batch, row), **options)
            assert torch.equal(beams[2 * row : 2 * row + 2, -4:], alone[:, -4:])


@both
def test_features_alone_do_not_tell_the_layout(family):
    model, batch = tiny.ANYRES[family](), tiny.single(tiny.prompts(family), 0)
    pixels = {name: batch.pop(name) for name in ("pixel_values", "image_sizes")}
    features = model.model.get_image_features(**pixels, return_dict=True)
    with vlmattn.wrap(model, "fastv(keep=0.4, before_layer=1)") as session:
        with pytest.raises(CallError, match="pass pixel_values"):
            model(**batch, mm_encoder_outputs={"image": features})
        session.set("fastv.keep", 1.0)
        assert torch.equal(model(**batch, **pixels).logits, tiny._plain(family)(**batch, **pixels).logits)


# Newline tokens


@both
def test_newlines_are_text_for_pruning(family):
    batch = tiny.prompts(family)
    newline = (batch["input_ids"] == tiny.IMAGE) & ~tiny.visual(family, batch)
    for text, kept in (("random(keep=1, before_layer=0)", True), ("noimage", False), ("hired(keep=1)", False)):
        report, _ = read(family, batch, text)
        for row in range(2):
            columns = set(newline[row].nonzero()[:, 0].tolist())
            left = columns & set(report.positions[row])
            assert left == columns if kept else len(left) <= 1
        tokens = sum(map(len, report.positions))
        dims = vlmattn.cost.Dims.from_config(tiny.ANYRES[family]().config.text_config)
        assert report.kv_bytes == vlmattn.cost.kv_bytes(dims, [tokens] * tiny.LAYERS, 4)


def test_newlines_of_rows_that_keep_a_token():
    batch = tiny.prompts(NEXT)
    for ends in ("rows", "all", "none"):
        report, plan = read(NEXT, batch, f"hired(keep=0.3, line_ends={ends})")
        for row, (span,) in enumerate(plan.spans):
            there = set(report.positions[row])
            for column, line in span.lines():
                row_kept = bool(there & set(range(column - line, column)))
                assert (column in there) == {"rows": row_kept, "all": True, "none": False}[ends]


@both
def test_newlines_are_visual_for_edits(family):
    batch = tiny.prompts(family)
    model = tiny.ANYRES[family]()
    with vlmattn.wrap(model, "fastv(keep=0.5, before_layer=2)") as session:
        session.record()
        model(**batch)
        plan = session._engine.last
    placeholder = batch["input_ids"] == tiny.IMAGE
    assert torch.equal(plan.tags[0].tag == VISUAL, placeholder)
    left = plan.stage(2).positions
    kept = (plan.tags[2].tag == VISUAL).sum(1)
    assert torch.equal(kept, (placeholder.gather(1, left) & plan.stage(2).valid).sum(1))


@both
@pytest.mark.parametrize("text", ["var(sinks=[1, 2], tau=1.5, rho=0.2, min_visual=0.05, first_layer=1)", "vhr"])
def test_edits_of_a_batch_are_those_of_its_rows(family, text):
    model, batch = tiny.ANYRES[family](), tiny.prompts(family)
    plain = model.generate(**batch, max_new_tokens=4, output_logits=True, return_dict_in_generate=True)
    with vlmattn.wrap(model, text):
        together = model.generate(**batch, max_new_tokens=4, output_logits=True, return_dict_in_generate=True)
        assert (together.logits[0] - plain.logits[0]).abs().max() > 1e-4
        for row in range(2):
            one = tiny.single(batch, row)
            alone = model.generate(**one, max_new_tokens=4, output_logits=True, return_dict_in_generate=True)
            assert max((a[row] - b[0]).abs().max() for a, b in zip(together.logits, alone.logits, strict=True)) < 1e-4
    again = model.generate(**batch, max_new_tokens=4, output_logits=True, return_dict_in_generate=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, again.logits, strict=True))


@both
def test_check_passes(family):
    """On one prompt; everything that `vlmattn check` proves."""
    one = tiny.single(tiny.prompts(family), 0)
    for text in (
        "fastv(keep=0.5, before_layer=2) + var(sinks=[1, 2], tau=1.5, first_layer=1) + vhr",
        "hired(keep=0.4)",
        "noimage(before_layer=2)",
    ):
        result = check_inputs(tiny.ANYRES[family](), one, text)
        verdicts = {row.name: row.verdict for row in result.rows}
        assert result.passed and verdicts["removal = masking"] == verdicts["oracle generation"] == "pass", verdicts


# Pixels


def processor_of(family: str, several: bool = False) -> Any:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    config = tiny._plain(family).config
    plain = {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "image_grid_pinpoints": config.image_grid_pinpoints}
    side = config.vision_config.image_size
    if family == NEXT:
        return LlavaNextImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **plain
        )
    return LlavaOnevisionImageProcessorPil(size={"height": side, "width": side}, **plain)


def colours(size: tuple[int, int]) -> Image.Image:
    """Red tells the column and green the row of a pixel, as shares of the image."""
    x, y = (np.arange(length) + 0.5 for length in size)
    red = np.broadcast_to(255 * x[None] / size[0], (size[1], size[0]))
    green = np.broadcast_to(255 * y[:, None] / size[1], (size[1], size[0]))
    return Image.fromarray(np.stack([red, green, np.zeros_like(red)], -1).round().astype(np.uint8))


def seen_colours(picture: anyres.Picture, crops: torch.Tensor) -> torch.Tensor:
    """`(n_i, 3)`, what the processor put behind every visual token."""
    patch = picture.patch
    means = crops.unfold(2, patch, patch).unfold(3, patch, patch).mean((-1, -2))  # (crops, 3, n, n)
    return picture.arrange(means.flatten(2).transpose(1, 2).contiguous())


def check_colours(geometry: Geometry, found: torch.Tensor) -> None:
    """Every token whose rectangle is not cut by the image's edge has the colour of its middle, within 0.4 of a cell."""
    width, height = geometry.size
    assert geometry.num_tokens == len(found)
    checked = 0
    for index, (red, green, _) in enumerate(found.tolist()):
        x0, y0, x1, y1 = geometry.rect(index)
        if min(x0, y0) <= 0 or x1 >= width or y1 >= height:
            continue
        checked += 1
        assert abs(red * width - (x0 + x1) / 2) < 0.4 * (x1 - x0) + 1, index
        assert abs(green * height - (y0 + y1) / 2) < 0.4 * (y1 - y0) + 1, index
    assert checked >= len(found) // 4


@both
@pytest.mark.parametrize("size", SIZES)
def test_geometry_of_a_colour_coded_image(family, size):
    model, processor = tiny.ANYRES[family](), processor_of(family)
    inputs = processor(images=[colours(size)], return_tensors="pt")
    assert inputs["image_sizes"].tolist() == [[size[1], size[0]]]
    with vlmattn.wrap(model, "none", SimpleNamespace(image_processor=processor)) as session:
        (geometry,) = session.geometry([colours(size)], inputs)
    (picture,) = families.find(model).input_grids(model.config, inputs)
    assert len(inputs["pixel_values"][0]) == picture.crops
    check_colours(geometry, seen_colours(picture, inputs["pixel_values"][0]))
    assert Geometry.from_dict(geometry.as_dict()) == geometry


@pytest.mark.parametrize("size", SIZES[:5])
def test_geometry_of_one_of_several_images(size):
    """Padded to a square, not cut into tiles."""
    model, processor = tiny.llava_onevision(), processor_of(ONEVISION)
    images = [colours(size), colours((50, 50))]
    inputs = processor(images=[images], return_tensors="pt")
    with vlmattn.wrap(model, "none", SimpleNamespace(image_processor=processor)) as session:
        geometry, _ = session.geometry(images, inputs)
    picture, _ = families.find(model).input_grids(model.config, inputs)
    assert picture.crops == 1 and geometry.num_tokens == 25
    found, (width, height) = seen_colours(picture, inputs["pixel_values"][0][:1]), size
    for index, (red, green, _) in enumerate(found.tolist()):
        x0, y0, x1, y1 = geometry.rect(index)
        if x0 > 0 and y0 > 0 and x1 < width and y1 < height:
            assert abs(red * width - (x0 + x1) / 2) < 2 and abs(green * height - (y0 + y1) / 2) < 2


@both
def test_the_image_processor_counts_as_the_model_does(family):
    """What the real processor would put into the prompt is as long as the spans."""
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

    config = tiny._plain(family).config
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    stand_in = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=config.image_grid_pinpoints),
        patch_size=patch,
        num_additional_image_tokens=0,
        num_image_tokens=(side // patch) ** 2,
        vision_aspect_ratio="anyres_max_2",
    )
    kind = LlavaNextProcessor if family == NEXT else LlavaOnevisionProcessor
    stand_in._get_unpadded_features = kind._get_unpadded_features.__get__(stand_in)
    for width, height in SIZES:
        picture = anyres.picture(config, (height, width), 2 if family == ONEVISION else None)
        count = Span(0, sum(raster.length for raster in picture.rasters), 0, picture.rasters).columns
        assert kind._get_number_of_features(stand_in, height, width, side, side) == count


# Inside the tower


@dataclass(frozen=True)
class Looking(Selector):
    """Keeps everything and remembers what it saw."""

    before_layer: int = 0
    names: tuple[str, ...] = ("attention", "received", "keys", "features")
    seen: list[View] = None  # type: ignore[assignment]

    def disabled(self) -> None:
        """Nothing."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"layer_input", "projector"})

    @property
    def looks(self) -> dict[str, Look]:
        return {name: Look(name, -1) for name in self.names}

    def select(self, view: View) -> Keep:
        self.seen.append(view)
        return Keep(view.image >= 0)


Looking.name = "looking"


def looked(family: str, batch: dict[str, torch.Tensor], *more: str) -> tuple[Any, View]:
    model, seen = tiny.ANYRES[family](attention="eager"), []
    names = ("attention", "received", "keys", "features", *more)
    with vlmattn.wrap(model, Looking(names=names, seen=seen)):
        model(**batch)
    return model, seen[0]


def packed(model: Any, family: str, batch: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """`(crops, n, C)` of the tower as the model itself packs them for its first image."""
    size = batch["image_sizes"][:1]
    strategy = (
        {"vision_feature_select_strategy": "default"} if family == NEXT else {"vision_aspect_ratio": "anyres_max_2"}
    )
    return model.model.pack_image_features([rows], size, image_newline=None, **strategy)[0][0]


@both
@pytest.mark.parametrize("size", [(40, 66), (20, 90)])
def test_looks_into_the_tower_follow_the_tiles(family, size, monkeypatch):
    monkeypatch.setattr(tiny, "SIZES", [size])
    batch = tiny.prompts(family, images=(1,))
    model, view = looked(family, batch, *(["cls", "states", "entropy"] if family == NEXT else ["entropy"]))
    first = int(family == NEXT)
    tower = model.model.vision_tower(batch["pixel_values"][0], output_attentions=True, output_hidden_states=True)
    attention = tower.attentions[-1]
    received = attention[:, :, first:, first:].mean(2).transpose(1, 2)
    given = attention[:, :, 0, first:].transpose(1, 2) if first else received
    for name, expected in (("received", received), ("attention", given)):
        assert (packed(model, family, batch, expected) - view.vision[name][0]).abs().max() < 1e-5, name
    assert (view.project(view.vision["features"]) - view.hidden).abs().max() < 1e-5
    assert view.vision["keys"].shape[:2] == view.vision["entropy"].shape == view.image.shape
    if first:
        states = tower.hidden_states[-1][:, 1:]
        assert (packed(model, family, batch, states) - view.vision["states"][0]).abs().max() < 1e-5
        base = tower.hidden_states[model.config.vision_feature_layer][:, 0]
        assert torch.allclose(view.vision["cls"][0, 0], base[0]) and not torch.allclose(
            view.vision["cls"][0, -1], base[0]
        )


def test_looks_into_the_tower_follow_pooled_frames():
    batch = tiny.tiled_prompts(ONEVISION, images=(0,), frames=(3,))
    model, view = looked(ONEVISION, batch)
    tower = model.model.vision_tower(batch["pixel_values_videos"][0], output_attentions=True)
    received = tower.attentions[-1].mean(2).transpose(1, 2).contiguous()
    expected = model.model.apply_pooling(received).flatten(0, 1)
    assert (view.vision["received"][0] - expected).abs().max() < 1e-5
    assert torch.equal(view.vision["features"], view.hidden)


def test_what_needs_cls_is_refused_without_it():
    with pytest.raises(UnsupportedModelError, match=r"needs a CLS token.*LLaVA-OneVision has none: use .*fastv"):
        vlmattn.wrap(tiny.llava_onevision(), "visionzip(keep_cls=True)")
    vlmattn.wrap(tiny.llava_next(), "visionzip(keep_cls=True)").remove()


def test_questions_are_compared_with_the_patches_of_tiles():
    """The states of all crops in the prompt's order, in CDPruner beside the text tower."""
    model, batch = tiny.llava_next(), tiny.prompts(NEXT)
    tower = text_tower.TextTower(text_tower.clip(model), text_tower.Letters())
    with vlmattn.wrap(model, "cdpruner(keep=0.3)", processor=text_tower.Processor(), text_tower=tower) as session:
        together, kept = logits_of(model, batch), session.report().stages[0].kept
        for row in range(2):
            alone = logits_of(model, tiny.single(batch, row))
            assert session.report().stages[0].kept[0] == kept[row]
            assert (together[row] - alone[0]).abs().max() < 1e-4
    with pytest.raises(UnsupportedModelError, match="CLIP"):
        vlmattn.wrap(tiny.llava_onevision(), "cdpruner(keep=0.3)", text_tower=tower)


# Methods that look at the grids


def tiled(early: torch.Tensor, final: torch.Tensor) -> View:
    """One image in 2 x 2 tiles of 24 x 24 tokens."""
    rasters = (Raster((1, 24, 24)), Raster((1, 48, 48), line=48, tiles=((24, 24), (24, 24))))
    index = torch.arange(2880)[None]
    vision = {"early": early[None, :, None], "attention": final[None, :, None]}
    spans = ((Span(0, 2880, 0, rasters),),)
    return View(0, torch.zeros_like(index), torch.tensor([[2880]]), spans, index, vision=vision)


def crop_counts(view: View, text: str) -> list[int]:
    mask = spec.parse(text)[0].select(view).mask[0]
    return hired.crops_of(view.spans[0][0])[mask].bincount(minlength=5).tolist()


def test_hired_worked_example_on_tiles():
    """Card: 5 crops, rate .2, alpha .5; early attention falls on 120, 60, 72 and 36 tokens of the four quarters."""
    quarter = (torch.arange(576) // 24 >= 12).long() * 2 + (torch.arange(576) % 24 >= 12).long()
    early = torch.zeros(2880)
    for tile, count in enumerate([120, 60, 72, 36]):
        early[(quarter == tile).nonzero()[:count, 0]] = 1.0
    final = torch.rand(2880)
    view = tiled(early, final)
    assert crop_counts(view, "hired(keep=0.2)") == [288, 120, 60, 72, 36]
    assert crop_counts(view, "hired(keep=0.1)") == [144, 60, 30, 36, 18]
    assert crop_counts(view, "hired(keep=0.2, alpha=0.25, counted=0.5)") == [144, 180, 90, 108, 54]
    kept = spec.parse("hired(keep=0.2)")[0].select(view).mask[0]
    crops = hired.crops_of(view.spans[0][0])
    for crop in range(5):
        inside = final[crops == crop]
        assert inside[kept[crops == crop]].min() > inside[~kept[crops == crop]].max()
    for keep in (0.3, 0.77, 0.99):  # full tiles hand on what they cannot take
        assert sum(crop_counts(view, f"hired(keep={keep})")) == int(2880 * keep + 0.5)


def test_hired_counts_regions_in_space_or_as_the_code_does():
    """Early attention on the left half of the whole image."""
    left = (torch.arange(576) % 24 < 12).float()
    view = tiled(torch.cat([left, torch.zeros(2304)]), torch.rand(2880))
    assert crop_counts(view, "hired(keep=0.2)") == [288, 144, 0, 144, 0]
    assert crop_counts(view, "hired(keep=0.2, region_split=raster)") == [288, 72, 72, 72, 72]


def test_places_in_frames_of_several_grids():
    rasters = (Raster((1, 1, 2)), Raster((2, 2, 2), line=2))
    index = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 1, 2, -1, -1, -1, -1, -1, -1, -1]])
    image = torch.where(index < 0, -1, 0)
    view = View(0, image, torch.tensor([[10], [3]]), ((Span(0, 10, 0, rasters),), (Span(0, 3, 0),)), index)
    height, width, place = view.places()
    assert height[0].tolist() == [1, 1] + [2] * 8 and width[0].tolist() == [2] * 10
    assert place[0].tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 2, 3]
    assert (height[1, :3].tolist(), width[1, :3].tolist(), place[1, :3].tolist()) == ([1] * 3, [3] * 3, [0, 1, 2])


def logits_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the first generated token: under `generate` positions do not count padding."""
    return model.generate(**batch, max_new_tokens=1, output_logits=True, return_dict_in_generate=True).logits[0]


@both
@pytest.mark.parametrize(
    "text",
    ["uniform(keep=0.3, mode='2d', exact_budget=True, before_layer=0)", "pool(keep=0.3)", "rows(keep=0.5)", "hired",
     "oraclebox(box=(0.0, 0.0, 0.5, 0.5))", "feather(keep=0.3, before_layer=1)", "visionzip(keep=0.4)", "prumerge",
     "vflowopt", "divprune", "dart", "sparsevlm", "hired(budget_scope=sample, positions=compact)"],
)  # fmt: skip
def test_pruners_on_images_of_several_grids(family, text):
    """Batch and single rows keep the same; every image keeps something of each grid where a place decides."""
    model, batch = tiny.ANYRES[family](), tiny.prompts(family)
    with vlmattn.wrap(model, text) as session:
        together, report, plan = logits_of(model, batch), session.report(), session._engine.last
        for row in range(2):
            alone = logits_of(model, tiny.single(batch, row))
            assert session.report().stages[0].kept[0] == report.stages[0].kept[row]
            assert (together[row] - alone[0]).abs().max() < 1e-4
    for row, (span,) in enumerate(plan.spans):
        kept = report.stages[0].kept[row][0]
        assert 0 < len(kept) < span.length
        if text.split("(")[0] in ("uniform", "pool", "rows", "oraclebox"):
            first = span.rasters[0].length
            share = sum(index < first for index in kept) / len(kept)
            assert abs(share - first / span.length) < 0.15
