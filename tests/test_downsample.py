"""Images made smaller before the processor: sizes, where it is refused, answers, and the proof that it was done."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

import vlmattn
from vlmattn.errors import BudgetError, CallError, DataError, SpecError, UnsupportedModelError
from vlmattn.eval import summary
from vlmattn.methods.prune.downsample import Downsample, resize_to_tokens
from vlmattn.scenes.export import save_processor
from vlmattn.scenes.library import load_processor
from vlmattn.scenes.model import build_model
from vlmattn.scenes.versions import VERSION_QWEN

SMALL = {"hidden": 32, "decoder_layers": 3, "vision_layers": 2, "heads": 2, "kv_heads": 1, "mlp": 64}
QUESTION = "Is there a red circle in the image?"


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model(replace(VERSION_QWEN, architecture=replace(VERSION_QWEN.architecture, **SMALL)), seed=3).eval()


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("processor")
    save_processor(VERSION_QWEN, folder)
    return load_processor(folder)


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8))


def grid_of(processor: Any, image: Image.Image) -> tuple[int, int]:
    ((_, height, width),) = processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"].tolist()
    merge = processor.image_processor.merge_size
    return height // merge, width // merge


def side_of(processor: Any) -> int:
    return processor.image_processor.patch_size * processor.image_processor.merge_size


@pytest.mark.parametrize(
    ("height", "width", "tokens", "cells"),
    [(24, 24, 144, (12, 12)), (24, 24, 64, (8, 8)), (24, 24, 128, (11, 11)), (12, 16, 48, (6, 8)), (1, 9, 3, (1, 3))],
)
def test_the_cells_of_a_budget(height: int, width: int, tokens: int, cells: tuple[int, int]) -> None:
    assert resize_to_tokens(height, width, tokens) == cells


def test_no_budget_is_exceeded_and_everything_is_everything() -> None:
    for height, width in ((5, 7), (1, 6), (9, 2), (12, 16)):
        for tokens in range(1, height * width + 1):
            rows, columns = resize_to_tokens(height, width, tokens)
            assert 1 <= rows <= height and 1 <= columns <= width and rows * columns <= tokens
        assert resize_to_tokens(height, width, height * width) == (height, width)
    assert Downsample(keep=0.25).expected_tokens(144, 3) == [36] * 3
    assert Downsample(keep=0.25).expected_tokens(192, 2, (1, 12, 16)) == [48] * 2
    assert Downsample(keep=1.0).is_noop and Downsample().disabled().expected_tokens(9, 2) == [9, 9]
    with pytest.raises(BudgetError, match=r"downsample\.keep=1\.5"):
        Downsample(keep=1.5)


def test_a_model_of_one_size_refuses_it() -> None:
    with pytest.raises(UnsupportedModelError, match=r"keeps the size of images.*has none: use .*uniform"):
        vlmattn.wrap(tiny.llava(), "downsample(keep=0.5)")
    vlmattn.wrap(tiny.llava(), "downsample(keep=1.0)").remove()


def test_two_of_them_are_refused(model: Any) -> None:
    with pytest.raises(SpecError, match="both change the size"):
        vlmattn.wrap(model, "downsample(keep=0.5) + downsample(keep=0.25)")


def test_the_processor_makes_as_many_tokens_as_the_budget_says(model: Any, processor: Any) -> None:
    side = side_of(processor)
    image = picture(8 * side, 12 * side)
    assert grid_of(processor, image) == (8, 12)
    with vlmattn.wrap(model, "downsample(keep=0.5)", processor=processor) as session:
        with session.images([image]) as (smaller,):
            assert grid_of(processor, smaller) == resize_to_tokens(8, 12, 48)
        answer = session.answer(image, QUESTION, max_new_tokens=3)
        report = session.report()
    assert isinstance(answer, str) and report.visual_tokens == [48] and report.visual_per_layer == [[48] * 3]


def test_a_smaller_image_and_a_pruner_compose(model: Any, processor: Any) -> None:
    image = picture(8 * side_of(processor), 8 * side_of(processor))
    with vlmattn.wrap(model, "downsample(keep=0.5) + random(keep=0.5, before_layer=1)", processor=processor) as session:
        session.answer(image, QUESTION, max_new_tokens=1)
        cells = resize_to_tokens(8, 8, 32)
        whole = cells[0] * cells[1]
        assert session.report().visual_per_layer == [[whole, (whole + 1) // 2, (whole + 1) // 2]]


def test_the_answer_is_that_of_the_model_on_the_smaller_image(model: Any, processor: Any) -> None:
    from vlmattn.check import prepare

    side = side_of(processor)
    image = picture(8 * side, 8 * side)
    smaller = image.resize((5 * side, 6 * side), Image.Resampling.BICUBIC)
    inputs = prepare(model, processor, smaller, QUESTION)
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    said = processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    with vlmattn.wrap(model, "downsample(keep=0.5)", processor=processor) as session:
        assert session.answer(image, QUESTION, max_new_tokens=4, do_sample=False) == said


def test_inputs_made_without_it_are_refused_by_name(model: Any, processor: Any) -> None:
    from vlmattn.check import prepare

    inputs = prepare(model, processor, picture(64, 64), QUESTION)
    with vlmattn.wrap(model, "downsample(keep=0.5)", processor=processor) as session:
        for call in (lambda: model(**inputs), lambda: model.generate(**inputs, max_new_tokens=1)):
            with pytest.raises(CallError, match=r"downsample.*session\.answer.*session\.images"):
                call()
        session.set("downsample.keep", 1.0)
        model(**inputs)
    model(**inputs)


def test_what_the_processor_would_enlarge_again_is_refused(model: Any, processor: Any) -> None:
    side = side_of(processor)
    with (
        vlmattn.wrap(model, "downsample(keep=1)", processor=processor) as session,
        pytest.raises(BudgetError, match="smallest size"),
        session.images([picture(8 * side, 8 * side)]),
    ):
        pass


def test_it_needs_the_processor(model: Any) -> None:
    with vlmattn.wrap(model, "downsample(keep=0.5)") as session:
        with pytest.raises(CallError, match="processor=processor"), session.images([picture(64, 64)]):
            pass
        with pytest.raises(CallError, match="processor=processor"):
            session.answer(picture(64, 64), QUESTION)


def test_sessions_without_it_give_pictures_back_and_answer(model: Any, processor: Any) -> None:
    image = picture(64, 64)
    with vlmattn.wrap(model, "none") as session, session.images([image]) as (same,):
        assert same is image
    with vlmattn.wrap(model, "random(keep=0.5, before_layer=0)", processor=processor) as session:
        assert isinstance(session.answer(image, QUESTION, max_new_tokens=2), str)
    with pytest.raises(CallError, match="removed"), session.images([image]):
        pass


def test_its_cost_stands_beside_the_whole_image() -> None:
    names = ("prompt_tokens", "visual_tokens", "kv_bytes", "kv_bytes_full", "prefill_macs", "prefill_macs_full")
    whole = dict(zip(names, (20.0, 16.0, 100.0, 100.0, 60.0, 60.0), strict=True)) | {"questions": 2}
    less = dict(zip(names, (12.0, 8.0, 60.0, 60.0, 30.0, 30.0), strict=True)) | {"questions": 2}
    found = summary._beside(less, whole)
    assert found["visual_tokens"] == 16.0 and found["kv_bytes_full"] == 100.0 and found["kv_bytes"] == 60.0
    assert found["prefill_macs_ratio"] == 0.5
    assert summary._beside(whole, less) is whole and summary._beside(less, {**whole, "questions": 3}) is less


def test_a_processor_without_a_chat_template() -> None:
    from types import SimpleNamespace

    from vlmattn.check import prepare

    def refuse(*args: Any, **kwargs: Any) -> str:
        raise ValueError("no template")

    with pytest.raises(DataError, match="no chat template"):
        prepare(None, SimpleNamespace(apply_chat_template=refuse), picture(8, 8), "x")
