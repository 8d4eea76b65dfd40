"""The Qwen model: its packed forward, prompts with several images and videos, its processor, and its warm start."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from vlmattn.errors import DataError, TrainingError
from vlmattn.eval import models
from vlmattn.scenes.export import export, save_processor, trained_model
from vlmattn.scenes.library import load_processor
from vlmattn.scenes.model import PackedForward, build_model, load_decoder, normalized_pixels
from vlmattn.scenes.packing import training_batch
from vlmattn.scenes.qwen import mrope_positions
from vlmattn.scenes.splits import benchmark
from vlmattn.scenes.stages import Settings
from vlmattn.scenes.text import ASSISTANT_ID, EOS_ID, IMAGE_ID, VIDEO_ID, encode
from vlmattn.scenes.train import CURVE, WEIGHTS, Running, train
from vlmattn.scenes.versions import VERSION_2, VERSION_QWEN, Visual

SMALL = {"hidden": 32, "decoder_layers": 3, "vision_layers": 2, "heads": 2, "kv_heads": 1, "mlp": 64}
VERSION = replace(VERSION_QWEN, architecture=replace(VERSION_QWEN.architecture, **SMALL))
TINY = Settings(
    version="qwen",
    pretraining_steps=4,
    pretraining_batch=2,
    steps=6,
    habit_steps=2,
    batch=2,
    compile=False,
    model=SMALL,
)
QUESTION = "Is there a red circle in the image?"
LAYOUTS = {
    "96x96": (Visual(96, 96),),
    "96x128": (Visual(96, 128),),
    "128x96": (Visual(128, 96),),
    "128x128": (Visual(128, 128),),
    "two images": (Visual(96, 96), Visual(64, 96)),
    "video": (Visual(96, 96, 4),),
    "long video": (Visual(64, 64, 8),),
    "video and image": (Visual(64, 64, 2), Visual(96, 64)),
}
every_layout = pytest.mark.parametrize("visuals", LAYOUTS.values(), ids=LAYOUTS)


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model(VERSION, seed=3).eval()


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("processor")
    save_processor(VERSION_QWEN, folder)
    return load_processor(folder)


def drawn(visuals: tuple[Visual, ...], prompts: int = 1) -> list[np.ndarray]:
    """Random pixels, (prompts, [frames,] height, width, 3), of each visual input."""
    rng = np.random.RandomState(0)
    shapes = [(prompts, *(v.frames,) * bool(v.frames), v.height, v.width, 3) for v in visuals]
    return [rng.randint(0, 256, shape).astype(np.uint8) for shape in shapes]


def asked(processor: Any, visuals: tuple[Visual, ...], text: str = QUESTION) -> str:
    """A prompt with one placeholder for each visual input."""
    content = [{"type": "video" if visual.frames else "image"} for visual in visuals]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    return processor.apply_chat_template(messages, add_generation_prompt=True)


def prompt(processor: Any, visuals: tuple[Visual, ...], pictures: list[np.ndarray], text: str = QUESTION) -> Any:
    """Model inputs of one prompt by the processor."""
    images = [Image.fromarray(x) for x, visual in zip(pictures, visuals, strict=True) if not visual.frames]
    videos = [list(map(Image.fromarray, x)) for x, visual in zip(pictures, visuals, strict=True) if visual.frames]
    words = asked(processor, visuals, text)
    return processor(text=words, images=images or None, videos=videos or None, return_tensors="pt")


@every_layout
def test_packed_forward_equals_the_stock_forward(model: Any, processor: Any, visuals: tuple[Visual, ...]) -> None:
    """For every visual layout, with the processor's inputs for the stock model and plain pixels for the packed one."""
    pictures = drawn(visuals, prompts=2)
    texts = ("Where is the red circle?", "How many objects are there?", "Describe the image.")
    words = [(*encode(text), ASSISTANT_ID) for text in texts]
    groups = ((2, 8), (1, 5))
    ids = torch.tensor([[x for text, n in zip(words, (8, 8, 5), strict=True) for x in (*text, *[0] * (n - len(text)))]])
    pixels = [normalized_pixels(torch.from_numpy(x)) for x in pictures]
    with torch.no_grad():
        packed, _ = PackedForward(model, VERSION)(pixels, ids.expand(2, -1), slot_groups=groups)
        for row in range(2):
            for text, ids_of_text, at in zip(texts, words, (0, 8, 16), strict=True):
                stock = model(**prompt(processor, visuals, [x[row] for x in pictures], text)).logits
                away = stock[0, -len(ids_of_text) :] - packed[row, at : at + len(ids_of_text)]
                assert away.abs().max() < 1e-5


def test_packed_training_batch_equals_the_stock_forward() -> None:
    """At full size, for one of the training sizes and all slots."""
    model = build_model(VERSION_QWEN, seed=3).eval()
    batch = training_batch(VERSION_QWEN, seed=5, first=0, count=1, size=(96, 128))
    pixels, ids = normalized_pixels(torch.from_numpy(batch.pixels)), torch.from_numpy(batch.ids)
    prefix, compared, start = VERSION_QWEN.prefix(Visual(96, 128)), 0, 0
    with torch.no_grad():
        packed, _ = PackedForward(model, VERSION_QWEN)(pixels, ids)
        for slots, length in VERSION_QWEN.lessons.slot_groups:
            for at in range(start, start + slots * length, length):
                words = ids[0, at : at + length].tolist()
                if EOS_ID not in words:
                    continue
                words = words[: words.index(EOS_ID) + 1]
                full = torch.tensor([[*prefix, *words]])
                patches = stock_patches(pixels)
                kinds = (full == IMAGE_ID).int()
                grid = torch.tensor([[1, 24, 32]])
                stock = model(full, pixel_values=patches, image_grid_thw=grid, mm_token_type_ids=kinds).logits
                away = stock[0, len(prefix) :] - packed[0, at : at + len(words)]
                assert away.abs().max() < 1e-5
                compared += 1
            start += slots * length
    assert compared > 15


def stock_patches(pixels: torch.Tensor) -> torch.Tensor:
    """Patches as the stock image processor orders them, written out: 2x2 blocks of 4x4 pixels, every patch twice."""
    _, _, height, width = pixels.shape
    found = []
    for row in range(0, height, 8):
        for column in range(0, width, 8):
            for down, right in ((0, 0), (0, 4), (4, 0), (4, 4)):
                patch = pixels[0, :, row + down : row + down + 4, column + right : column + right + 4]
                found.append(torch.stack((patch, patch), 1).flatten())
    return torch.stack(found)


@every_layout
def test_positions_equal_those_of_the_stock_model(model: Any, processor: Any, visuals: tuple[Visual, ...]) -> None:
    inputs = prompt(processor, visuals, [x[0] for x in drawn(visuals)])
    grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
    kinds = inputs["mm_token_type_ids"]
    theirs, _ = model.model.get_rope_index(inputs["input_ids"], mm_token_type_ids=kinds, **grids)
    mine, start = mrope_positions(VERSION, visuals)
    mine += [(start + step,) * 3 for step in range(len(encode(QUESTION)) + 1)]
    assert torch.equal(theirs[:, 0].T, torch.tensor(mine))


@every_layout
def test_prompts_equal_the_training_layout(processor: Any, visuals: tuple[Visual, ...]) -> None:
    inputs = prompt(processor, visuals, [x[0] for x in drawn(visuals)])
    expected = [*VERSION_QWEN.prefix(*visuals), *encode(QUESTION), ASSISTANT_ID]
    assert inputs["input_ids"].tolist() == [expected]
    kinds = [{IMAGE_ID: 1, VIDEO_ID: 2}.get(token, 0) for token in expected]
    assert inputs["mm_token_type_ids"].tolist() == [kinds]


@pytest.mark.parametrize("size", VERSION_QWEN.world.sizes)
def test_processor_keeps_sizes_and_pixels(processor: Any, size: tuple[int, int]) -> None:
    pictures = training_batch(VERSION_QWEN, 3, 0, 1, size=size).pixels
    theirs = processor.image_processor([Image.fromarray(pictures[0])], return_tensors="pt")
    assert theirs["image_grid_thw"].tolist() == [[1, size[0] // 4, size[1] // 4]]
    mine = stock_patches(normalized_pixels(torch.from_numpy(pictures)))
    assert (theirs["pixel_values"] - mine).abs().max() < 1e-6


def test_prompts_of_different_images_share_a_batch(model: Any, processor: Any) -> None:
    """Padded on the left, they get the answers that they get alone."""
    visuals = [(Visual(96, 96),), (Visual(64, 96), Visual(96, 64))]
    pictures = [[x[0] for x in drawn(v)] for v in visuals]
    alone = [prompt(processor, v, p) for v, p in zip(visuals, pictures, strict=True)]
    images = [Image.fromarray(x) for group in pictures for x in group]
    batch = processor(text=[asked(processor, v) for v in visuals], images=images, padding=True, return_tensors="pt")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    together = model.generate(**batch, **options)[:, -6:]
    for row, inputs in enumerate(alone):
        assert torch.equal(model.generate(**inputs, **options)[0, -6:], together[row])


def test_videos_of_arrays_and_of_an_odd_number_of_frames(processor: Any) -> None:
    [frames] = drawn((Visual(64, 64, 4),))
    text = asked(processor, (Visual(64, 64, 4),))
    pictures, array = (processor(text=text, videos=[x]) for x in (list(map(Image.fromarray, frames[0])), frames[0]))
    assert torch.equal(pictures["pixel_values_videos"], array["pixel_values_videos"])
    odd = processor(text=text, videos=[frames[0][:3]])
    padded = processor(text=text, videos=[frames[0][[0, 1, 2, 2]]])
    assert odd["video_grid_thw"].tolist() == [[2, 16, 16]]
    assert torch.equal(odd["pixel_values_videos"], padded["pixel_values_videos"])


def test_processor_says_what_does_not_fit(processor: Any) -> None:
    picture = Image.fromarray(drawn((Visual(64, 64),))[0][0])
    with pytest.raises(DataError, match=r"hold 0 <\|image_pad\|>, but 1 were given"):
        processor(text=QUESTION, images=picture)
    with pytest.raises(DataError, match=r"hold 1 <\|video_pad\|>, but 0 were given"):
        processor(text="<|video_pad|>" + QUESTION)
    with pytest.raises(DataError, match="text=None"):
        processor(images=picture)


def test_sizes_that_cannot_be_divided_are_refused(model: Any) -> None:
    forward = PackedForward(model, VERSION)
    with pytest.raises(ValueError, match="tokens of 8x8 pixels"):
        forward.parts.features(torch.zeros(1, 3, 100, 96))
    with pytest.raises(ValueError, match="9x12 visual tokens cannot be divided into windows of 4"):
        forward.parts.features(torch.zeros(1, 3, 72, 96))
    with pytest.raises(ValueError, match="pairs of frames"):
        VERSION.prefix(Visual(96, 96, 3))


def test_pictures_of_a_step_share_a_size_and_sizes_take_turns() -> None:
    world = VERSION_QWEN.world
    assert [world.size_at(step) for step in range(len(world.sizes) + 1)] == [*world.sizes, world.sizes[0]]
    for size in world.sizes:
        assert training_batch(VERSION_QWEN, 1, 0, 2, size=size).pixels.shape == (2, *size, 3)


def test_training_starts_from_another_decoder(tmp_path: Path) -> None:
    """From a run's folder, from a file and from an exported model; new biases are zero, the tower stays as it was."""
    llava = build_model(replace(VERSION_2, architecture=replace(VERSION_2.architecture, **SMALL)), seed=1)
    weights = {name: weight.detach().clone() for name, weight in llava.named_parameters()}
    save_file(weights, tmp_path / WEIGHTS)
    llava.save_pretrained(tmp_path / "exported")
    fresh = build_model(VERSION, seed=5)
    for source in (tmp_path, tmp_path / WEIGHTS, tmp_path / "exported"):
        model = build_model(VERSION, seed=5)
        load_decoder(model, str(source))
        for name, weight in model.named_parameters():
            if name.startswith("model.visual"):
                assert torch.equal(weight, fresh.get_parameter(name))
            else:
                assert torch.equal(weight, weights.get(name, torch.zeros_like(weight)))
    with pytest.raises(TrainingError, match=r"there is no .*nowhere; expected"):
        load_decoder(model, str(tmp_path / "nowhere"))
    with pytest.raises(TrainingError, match=r"does not fit the decoder: .*embed_tokens"):
        load_decoder(build_model(VERSION_QWEN, seed=5), str(tmp_path))


def test_a_run_is_warm_started_resumed_and_packaged(tmp_path: Path) -> None:
    llava = build_model(replace(VERSION_2, architecture=replace(VERSION_2.architecture, **SMALL)), seed=1)
    source = tmp_path / "decoder.safetensors"
    save_file({name: weight.detach().clone() for name, weight in llava.named_parameters()}, source)
    settings = replace(TINY, decoder_from=str(source))
    running = Running(tmp_path / "run", processes=1, checkpoint_every=2, monitor_scenes=2)
    train(settings, running)
    train(settings, replace(running, out=tmp_path / "broken", stop_after=5))
    train(settings, replace(running, out=tmp_path / "broken"))
    train(TINY, replace(running, out=tmp_path / "cold"))
    warm, broken, cold = (load_file(tmp_path / name / WEIGHTS) for name in ("run", "broken", "cold"))
    assert all(torch.equal(warm[name], broken[name]) for name in warm)
    name = "model.language_model.layers.2.mlp.up_proj.weight"
    start = llava.get_parameter(name)
    assert (warm[name] - start).norm() < start.norm() / 2 < (cold[name] - start).norm()
    assert trained_model(tmp_path / "run").config.model_type == "qwen2_5_vl"
    assert len((tmp_path / "run" / CURVE).read_text().splitlines()) == 6
    export(tmp_path / "run", tmp_path / "scenes-qwen")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor = load_processor(tmp_path / "scenes-qwen")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "scenes-qwen", dtype=torch.float32)
    assert type(processor).__name__ == "ScenesQwenProcessor" and model.config.model_type == "qwen2_5_vl"
    assert type(models.load(str(tmp_path / "scenes-qwen")).processor) is type(processor)
    assert models.world(str(tmp_path / "scenes-qwen")) == VERSION_QWEN.world.name
    stored = load_file(tmp_path / "run" / WEIGHTS)
    assert all(torch.equal(weight, stored[name].bfloat16().float()) for name, weight in model.named_parameters())
    scene = benchmark("test", ("color",), 1, world="qwen")
    [row] = scene.rows
    inputs = processor(
        text=asked(processor, (Visual(96, 96),), row["text"]), images=scene.image(row["image"]), return_tensors="pt"
    )
    assert processor.batch_decode(model.generate(**inputs))
