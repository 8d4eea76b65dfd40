"""The scripts in examples/ work."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import vlmattn
from vlmattn import scenes, spec
from vlmattn.methods.base import REGISTRY

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_quickstart_answers_with_and_without(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "quickstart.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert sum("label:" in line for line in lines) == 6
    assert any("fastv" in line for line in lines if "label:" not in line)


@pytest.fixture
def my_method() -> Iterator[None]:
    """Runs examples/my_method.py, which registers `longest`, and takes it out of the registry afterwards."""
    runpy.run_path(str(EXAMPLES / "my_method.py"), run_name="my_method")
    yield
    del REGISTRY["longest"]


def test_my_method_is_short() -> None:
    assert len((EXAMPLES / "my_method.py").read_text().splitlines()) < 25


@pytest.mark.usefixtures("my_method")
def test_my_method_prunes() -> None:
    """The tokens that stay are those with the longest rows at the entry of the text model, by an independent count."""
    model, processor = scenes.load("scenes-llava")
    examples = scenes.benchmark(images=1)
    row = examples.rows[0]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["text"]}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=examples.image(row["image"]), text=prompt, return_tensors="pt")
    with torch.no_grad(), vlmattn.wrap(model, "longest(keep=0.25)") as session:
        model(**inputs)
        report = session.report()
        features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0]
    expected = features.float().norm(dim=-1).argsort(descending=True)[:36].sort().values.tolist()
    assert report.stages[0].kept == [[expected]]


@pytest.mark.usefixtures("my_method")
def test_my_method_is_registered() -> None:
    assert spec.registry()["longest"].summary.startswith("Keep the visual tokens with the longest")
    assert "longest" in {method["name"] for method in vlmattn.methods_info()}
