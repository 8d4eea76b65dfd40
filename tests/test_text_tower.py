"""A CLIP text tower beside a model's vision tower: the questions it embeds, and the methods that need it."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

import vlmattn
from vlmattn.errors import CallError, UnsupportedModelError
from vlmattn.patches.text_tower import TextTower

pytestmark = pytest.mark.usefixtures("no_grad")


class Letters:
    """A tokenizer of one token a letter."""

    bos_token_id, eos_token_id = 97, 98

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) % 90 for letter in text]}

    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(33 + int(token)) for token in ids)


def clip(model: Any, seed: int = 0) -> Any:
    """A CLIP model around the vision tower of `model`."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

    torch.manual_seed(seed)
    text = CLIPTextConfig(
        vocab_size=99,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=97,
        eos_token_id=98,
    )
    vision = model.config.vision_config
    both = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)).eval()
    both.vision_model = model.model.vision_tower
    both.visual_projection.weight.data *= 20
    return both


def test_questions_and_patches_are_those_of_the_clip_model():
    model = tiny.llava()
    both = clip(model)
    tower = TextTower(both, Letters())
    tower.check(model.model.vision_tower)
    paired = tower.pair(["abcd", "a" * 25])
    ids = torch.tensor([[97, *(ord(letter) % 90 for letter in "abcd"), 98]])
    torch.testing.assert_close(paired.text[:1, 0], both.get_text_features(input_ids=ids).pooler_output)
    assert paired.segments.tolist() == [[True, False, False], [True, True, True]]
    rest = torch.tensor([[97, *[ord("a") % 90] * 5, 98]])
    torch.testing.assert_close(paired.text[1:, 2], both.get_text_features(input_ids=rest).pooler_output)
    padded = torch.cat([ids, torch.full((1, 6), 98)], 1)
    states = both.text_model(input_ids=padded, attention_mask=(torch.arange(12) < 6)[None].long()).last_hidden_state
    torch.testing.assert_close(paired.last[:1], both.text_projection(states[:, -1]))
    pixels = tiny.prompts("llava")["pixel_values"]
    hidden = model.model.vision_tower(pixels).last_hidden_state
    torch.testing.assert_close(paired.patches(hidden, True)[:, 0], both.get_image_features(pixels).pooler_output)
    assert torch.equal(paired.patches(hidden, False), both.visual_projection(hidden))


def test_towers_that_do_not_fit():
    model = tiny.llava()
    with pytest.raises(UnsupportedModelError, match="has no text_model, text_projection"):
        TextTower(model.model.vision_tower, Letters())
    with pytest.raises(UnsupportedModelError, match="of another vision tower"):
        TextTower(clip(model), Letters()).check(tiny.qwen2_5_vl().model.visual)


class Processor:
    """Just a tokenizer."""

    tokenizer = Letters()


SPECS = [
    "cdpruner(keep=0.5)",
    "cdpruner(keep=6, theta=0.8, positions=compact)",
    "recoverable(min_tokens=5)",
    "recoverable(min_tokens=5, merging=False)",
    "recoverable(min_tokens=5, faithful_bugs=True, order=code, positions=compact)",
]


def generate(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> Any:
    options = {"max_new_tokens": 4, "do_sample": False} | options
    return model.generate(**batch, **options, return_dict_in_generate=True, output_logits=True)


@pytest.mark.parametrize("text", SPECS)
def test_a_model_with_its_text_tower(text):
    """A batch is its rows, beams and a text stream see the same question, and leaving undoes everything."""
    model, batch = tiny.llava(), tiny.prompts("llava")
    before = model(**batch).logits
    given = {"processor": Processor(), "text_tower": TextTower(clip(model), Letters())}
    with vlmattn.wrap(model, text, **given) as session:
        together, report = generate(model, batch), session.report()
        beams = generate(model, batch, num_beams=3)
        kept = [stage.kept for stage in report.stages]
        assert [stage.kept for stage in session.report().stages] == [
            [row for row in rows for _ in range(3)] for rows in kept
        ]
        for row in range(2):
            alone = generate(model, tiny.single(batch, row))
            assert [stage.kept[0] for stage in session.report().stages] == [rows[row] for rows in kept]
            for a, b in zip(together.logits, alone.logits, strict=True):
                torch.testing.assert_close(a[row], b[0], atol=1e-4, rtol=1e-4)
    with vlmattn.wrap(model, f"{text} + vhr", **given) as session:
        generate(model, batch)
        assert [stage.kept for stage in session.report().stages] == kept
    assert len(beams.sequences) == 2 and report.visual_per_layer[0][0] < 16
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("text", SPECS[::2])
def test_the_question_matters_and_can_be_said(text):
    model, batch = tiny.llava(), tiny.prompts("llava")
    tower = TextTower(clip(model), Letters())
    with vlmattn.wrap(model, text, text_tower=tower) as session:
        with pytest.raises(CallError, match="compares patches with the question"):
            model(**batch)
        kept = []
        for asked in (["abc", "defgh"], ["abc", "mnopq"], "abc"):
            with session.question(asked):
                model(**batch)
            kept.append([row for stage in session.report().stages for row in stage.kept])
        assert kept[0][0] == kept[1][0] == kept[2][0] and not kept[0] == kept[1] == kept[2]
        with (
            session.question(["a", "b", "c"]),
            pytest.raises(CallError, match="3 questions were given for a batch of 2"),
        ):
            model(**batch)
    with vlmattn.wrap(model, text, Processor(), text_tower=tower) as session:
        model(**batch)
        read = [row for stage in session.report().stages for row in stage.kept]
        visual = batch["input_ids"] == tiny.IMAGE
        rows = [row[int(flags.nonzero().max()) + 1 :] for row, flags in zip(batch["input_ids"], visual, strict=True)]
        with session.question([Letters().decode(row, True) for row in rows]):
            model(**batch)
        assert [row for stage in session.report().stages for row in stage.kept] == read


def test_without_a_text_tower_it_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"needs the text tower of .* has none: use .*divprune"):
        vlmattn.wrap(tiny.llava(), "recoverable")
    with pytest.raises(UnsupportedModelError, match="of another vision tower"):
        vlmattn.wrap(tiny.qwen2_5_vl(), "cdpruner", text_tower=TextTower(clip(tiny.llava()), Letters()))
    with vlmattn.wrap(tiny.llava(), "none") as session, pytest.raises(CallError, match="give a text"):
        session.question([1]).__enter__()
