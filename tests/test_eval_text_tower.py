"""A text tower from the command line: loaded beside a model, checked, part of a run's identity."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from test_text_tower import clip

import vlmattn
from vlmattn.check import check_inputs
from vlmattn.errors import DataError, UnsupportedModelError
from vlmattn.eval import models, runner


def saved(folder: Path, model: Any) -> Path:
    """A CLIP model around the vision tower of `model`, with a tokenizer of words, as a checkpoint."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    clip(model).save_pretrained(folder)
    words = {word: number for number, word in enumerate(("<s>", "</s>", "what", "is", "this", "<unk>"))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def loaded_of(model: Any) -> models.Loaded:
    tokenizer = SimpleNamespace(decode=lambda ids, **options: "what is this")
    return models.Loaded("toy", model, SimpleNamespace(tokenizer=tokenizer), False, "f00d", "float32", "cpu")


def test_methods_that_read_the_question_run_with_it(tmp_path: Path) -> None:
    model, batch = tiny.llava(), tiny.prompts("llava")
    bare = loaded_of(model)
    with pytest.raises(UnsupportedModelError, match=r"text tower.*use .*divprune"):
        models.wrapped(bare, "cdpruner(keep=4)")
    found = models._with_text_tower(bare, str(saved(tmp_path / "clip", model)))
    assert found.text_fingerprint and found.text_tower is not None
    for text in ("cdpruner(keep=4)", "recoverable"):
        with models.wrapped(found, text) as session:
            model(**batch)
            assert session.report().visual_per_layer[0][-1] < 16
    assert runner.refusals(found, ["cdpruner", "recoverable"]) == {}


def test_a_proof_with_a_text_tower(tmp_path: Path) -> None:
    model = tiny.llava()
    found = models._with_text_tower(loaded_of(model), str(saved(tmp_path / "clip", model)))
    inputs = tiny.single(tiny.prompts("llava"), 0)
    result = check_inputs(model, inputs, "cdpruner(keep=4)", processor=found.processor, text_tower=found.text_tower)
    assert result.passed and not result.refused
    assert check_inputs(model, inputs, "cdpruner(keep=4)").refused


def test_towers_that_cannot_be_taken(tmp_path: Path) -> None:
    model = tiny.llava()
    folder = saved(tmp_path / "clip", model)
    with pytest.raises(UnsupportedModelError, match="of another vision tower"):
        models._with_text_tower(loaded_of(tiny.qwen2_5_vl()), str(folder))
    with pytest.raises(DataError, match=r"cannot load the text tower .*nowhere"):
        models._with_text_tower(loaded_of(model), str(tmp_path / "nowhere"))
    vlmattn.wrap(model, "none").remove()  # nothing is left behind


def test_it_is_a_part_of_the_identity_only_where_there_is_one() -> None:
    model = tiny.llava()
    bench: Any = SimpleNamespace(pictures={}, name="pope", sha256="a", prompt="bare")
    bare = loaded_of(model)
    assert "text_tower" not in runner.identity(bare, bench, "none", runner.Settings())
    with_tower = dataclasses.replace(bare, text_fingerprint="beef")
    assert json.loads(json.dumps(runner.identity(with_tower, bench, "none", runner.Settings())))["text_tower"] == "beef"
