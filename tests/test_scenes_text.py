"""The exported processor and the training pipeline read the same ids and the same pixels."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from vlmattn.scenes.export import build_processor
from vlmattn.scenes.model import normalized_pixels
from vlmattn.scenes.packing import PREFIX, SLOT_GROUPS, pack, training_batch, training_tasks
from vlmattn.scenes.questions import EXISTENCE_TASKS, OTHER_TASKS, ask
from vlmattn.scenes.text import ASSISTANT_ID, EOS_ID, UNKNOWN_ID, VOCABULARY, VOCABULARY_SIZE, article, encode
from vlmattn.scenes.world import random_state, sample_scene


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("processor")
    build_processor().save_pretrained(folder)
    return AutoProcessor.from_pretrained(folder, local_files_only=True)


def questions() -> list:
    found = []
    for number in range(40):
        rng = random_state(906, number)
        scene = sample_scene(rng)
        found += [ask(rng, scene, task) for task in ("exist-yes", *EXISTENCE_TASKS, *OTHER_TASKS)]
    return [question for question in found if question is not None]


def test_vocabulary() -> None:
    assert len(VOCABULARY) == VOCABULARY_SIZE == len(set(VOCABULARY.values()))
    assert encode("Is there  an Orange star,\nred 47?") == encode("is there an orange star , red 4 7 ?")
    assert encode("zebra") == (UNKNOWN_ID,)
    assert (article("red ring"), article("orange ring")) == ("a red ring", "an orange ring")


def test_tokenizer_equals_the_training_encoder(processor) -> None:
    for question in questions():
        for text in (question.text, question.answer):
            assert processor.tokenizer(text)["input_ids"] == list(encode(text))
            assert processor.tokenizer.decode(encode(text)) == text.lower()


def test_chat_template_equals_the_training_layout(processor) -> None:
    picture = training_batch(3, 0, 1, 3).pixels[0]
    for question in questions()[:13]:
        content = [{"type": "image", "image": Image.fromarray(picture)}, {"type": "text", "text": question.text}]
        asked = [{"role": "user", "content": content}]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        prompt = processor.apply_chat_template(asked, add_generation_prompt=True, **options)
        expected = [*PREFIX, *encode(question.text), ASSISTANT_ID]
        assert prompt["input_ids"][0].tolist() == expected
        answered = [*asked, {"role": "assistant", "content": question.answer}]
        whole = processor.apply_chat_template(answered, **options)
        assert whole["input_ids"][0].tolist() == [*expected, *encode(question.answer), EOS_ID]


def test_processor_pixels_equal_the_training_pixels(processor) -> None:
    pictures = training_batch(3, 0, 4, 3).pixels
    mine = normalized_pixels(torch.from_numpy(pictures))
    theirs = processor.image_processor([Image.fromarray(x) for x in pictures], return_tensors="pt")["pixel_values"]
    assert theirs.shape == mine.shape
    assert (mine - theirs).abs().max() < 1e-6


def test_processor_loads_without_warnings_and_names_the_pil_class(tmp_path: Path) -> None:
    build_processor().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = AutoProcessor.from_pretrained(tmp_path, local_files_only=True)
    assert type(loaded.image_processor).__name__ == "CLIPImageProcessorPil"


def test_packing_places_every_question_once_and_weighs_answers_only() -> None:
    for number in range(60):
        rng = random_state(907, number)
        scene = sample_scene(rng)
        packed = pack(rng, scene, training_tasks(rng, scene))
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
        assert tasks.count("loc") == 3 and tasks.count("cell") == 5 and tasks.count("caption") == 1
        named = packed.cells[packed.cells >= 0]
        assert len(named) >= 7 and named.max() <= 9


def test_packing_refuses_what_does_not_fit() -> None:
    scene = sample_scene(random_state(908))
    with pytest.raises(ValueError, match="slots"):
        pack(random_state(908), scene, (["loc"] * (SLOT_GROUPS[0][0] + 1), [], []))
    with pytest.raises(ValueError, match="its slot 12"):
        pack(random_state(908), scene, (["caption"], [], []))


def test_a_training_sample_depends_on_its_number_alone() -> None:
    whole = training_batch(7, 10, 4, 3)
    part = training_batch(7, 12, 2, 3)
    for a, b in zip(whole, part, strict=True):
        assert np.array_equal(a[2:], b)
    assert not np.array_equal(training_batch(8, 10, 1, 3).pixels[0], whole.pixels[0])
