"""What every test gets: no network, one thread, fixed seeds; tests marked `gpu` are skipped, visibly, without CUDA."""

from __future__ import annotations

import os
import random
import sys

# Read by huggingface_hub, OpenMP and the tokenizers at import, so set before any test module is collected.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Iterator
from typing import Any

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where torch sees no CUDA device; torch is only imported if there are such tests."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    """Seed every generator before each test, without importing what the test does not use."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
        torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `family` runs once per tiny model, unless it names the families itself."""
    named = any("family" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "family" in metafunc.fixturenames and not named:
        import tiny

        metafunc.parametrize("family", sorted(tiny.MODELS))


@pytest.fixture
def model(family: str) -> Any:
    """A fresh tiny model of the family."""
    import tiny

    return tiny.MODELS[family]()


@pytest.fixture
def batch(family: str) -> dict[str, Any]:
    """A padded batch of prompts with images for the family's tiny model."""
    import tiny

    return tiny.prompts(family)


@pytest.fixture
def no_grad() -> Iterator[None]:
    """No gradients in the whole test."""
    import torch

    with torch.no_grad():
        yield
