"""The exported processor and the training pipeline read the same ids and the same pixels."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from vlmattn.scenes.export import save_processor
from vlmattn.scenes.library import load_processor
from vlmattn.scenes.model import normalized_pixels
from vlmattn.scenes.packing import pack, training_batch, training_tasks
from vlmattn.scenes.questions import EXISTENCE_TASKS, OTHER_TASKS, PAIR_TASKS, ask
from vlmattn.scenes.text import ASSISTANT_ID, EOS_ID, UNKNOWN_ID, WORDS, article, encode
from vlmattn.scenes.versions import LLAVA, VERSION_2, VERSIONS, Version
from vlmattn.scenes.world import random_state, sample_scene

WORDS_SHA256 = "57a0bf74d58a0e8f0c5e738dc891a48e4604010cd3b2de6c305f7967e234e507"
"""Of all words in order; checkpoints are trained on their places."""


@pytest.fixture(scope="module", params=VERSIONS.values(), ids=VERSIONS)
def version(request) -> Version:
    return request.param


@pytest.fixture(scope="module")
def processor(version: Version, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("processor")
    save_processor(version, folder)
    return load_processor(folder)


def questions(version: Version) -> list:
    tasks = ["exist-yes", *EXISTENCE_TASKS, *OTHER_TASKS, *PAIR_TASKS]
    found = []
    for number in range(40):
        rng = random_state(906, number)
        scene = sample_scene(rng, version.world)
        found += [ask(rng, scene, task) for task in tasks]
    return [question for question in found if question is not None]


def test_vocabulary() -> None:
    assert hashlib.sha256(" ".join(WORDS).encode()).hexdigest() == WORDS_SHA256
    assert len(WORDS) == len(set(WORDS)) == 144
    assert encode("Is there  an Orange star,\nred 47?") == encode("is there an orange star , red 4 7 ?")
    assert encode("zebra") == (UNKNOWN_ID,)
    assert (article("red ring"), article("orange ring")) == ("a red ring", "an orange ring")


def test_tokenizer_equals_the_training_encoder(version: Version, processor) -> None:
    assert len(processor.tokenizer) == len(WORDS)
    for question in questions(version):
        for text in (question.text, question.answer):
            assert processor.tokenizer(text)["input_ids"] == list(encode(text))
            assert processor.tokenizer.decode(encode(text)) == text.lower()


def test_chat_template_equals_the_training_layout(version: Version, processor) -> None:
    picture = training_batch(version, 3, 0, 1).pixels[0]
    for question in questions(version)[:17]:
        content = [{"type": "image", "image": Image.fromarray(picture)}, {"type": "text", "text": question.text}]
        asked = [{"role": "user", "content": content}]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        prompt = processor.apply_chat_template(asked, add_generation_prompt=True, **options)
        expected = [*version.prefix(), *encode(question.text), ASSISTANT_ID]
        assert prompt["input_ids"][0].tolist() == expected
        answered = [*asked, {"role": "assistant", "content": question.answer}]
        whole = processor.apply_chat_template(answered, **options)
        assert whole["input_ids"][0].tolist() == [*expected, *encode(question.answer), EOS_ID]


def test_processor_pixels_equal_the_training_pixels(version: Version, processor) -> None:
    if version.family != LLAVA:
        pytest.skip("patches in another order: test_scenes_qwen.py")
    pictures = training_batch(version, 3, 0, 4).pixels
    mine = normalized_pixels(torch.from_numpy(pictures))
    theirs = processor.image_processor([Image.fromarray(x) for x in pictures], return_tensors="pt")["pixel_values"]
    assert theirs.shape == mine.shape
    assert (mine - theirs).abs().max() < 1e-6


def test_processor_loads_without_warnings_and_names_the_pil_class(tmp_path: Path) -> None:
    save_processor(VERSION_2, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = AutoProcessor.from_pretrained(tmp_path, local_files_only=True)
    assert type(loaded.image_processor).__name__ == "CLIPImageProcessorPil"


def test_packing_places_every_question_once_and_weighs_answers_only(version: Version) -> None:
    lessons = version.lessons
    for number in range(60):
        rng = random_state(907, number)
        scene = sample_scene(rng, version.world)
        packed = pack(rng, scene, training_tasks(rng, scene, lessons), lessons)
        tokens = packed.ids.tolist()
        starts = []
        for _, first, end in packed.slots:
            assert tokens[first - 1] == ASSISTANT_ID and tokens[end] == EOS_ID
            assert (packed.weights[first : end + 1] > 0).all()
            starts.append(first)
        answers = sum(end + 1 - first for _, first, end in packed.slots)
        assert (packed.weights > 0).sum() == answers
        assert len(set(starts)) == len(starts) and tokens.count(EOS_ID) == len(starts)
        tasks = [slot.task for slot in packed.slots]
        for task in ("loc", "cell", "next"):
            assert tasks.count(task) == lessons.short.count(task)
        assert tasks.count("caption") == 1
        named = packed.cells[packed.cells >= 0]
        assert len(named) >= 7 and named.max() <= version.world.cells


def test_the_longest_caption_fits() -> None:
    scenes = (sample_scene(random_state(913, n), VERSION_2.world, 1.0, (6, 6)) for n in range(20))
    scene = max(scenes, key=lambda scene: len(scene.objects))
    assert len(scene.objects) == 12
    pack(random_state(0), scene, ([], [], ["caption"]), VERSION_2.lessons)


def test_packing_refuses_what_does_not_fit() -> None:
    scene, lessons = sample_scene(random_state(908)), VERSION_2.lessons
    with pytest.raises(ValueError, match="slots"):
        pack(random_state(908), scene, (["loc"] * (lessons.slot_groups[0][0] + 1), [], []), lessons)
    with pytest.raises(ValueError, match="its slot 13"):
        pack(random_state(908), scene, (["caption"], [], []), lessons)


def test_a_training_sample_depends_on_its_number_alone(version: Version) -> None:
    whole = training_batch(version, 7, 10, 4)
    part = training_batch(version, 7, 12, 2)
    for a, b in zip(whole, part, strict=True):
        assert np.array_equal(a[2:], b)
    assert not np.array_equal(training_batch(version, 8, 10, 1).pixels[0], whole.pixels[0])
