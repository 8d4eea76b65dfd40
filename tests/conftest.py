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
    """Skip `gpu` tests where torch sees no CUDA device; torch is only imported if there are such tests. Of the families
    outside `tiny.CORE` the default suite runs the contract with a few methods, the rest is slow."""
    for item in items:
        if not _in_default_suite(getattr(item, "callspec", None)):
            item.add_marker(pytest.mark.slow)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))


FEW = (
    "random(keep=0.5, before_layer=2)",
    "fastv(keep=0.5, before_layer=1)",
    "pool(keep=0.5)",
    "noimage",
    "none",
)
"""The specs that the default suite tries on every family, `sdpa` and padded."""


def _in_default_suite(case: Any) -> bool:
    tiny, params = sys.modules.get("tiny"), {} if case is None else case.params
    family = params.get("family", params.get("name"))
    if tiny is None or family not in tiny.MODELS or family in tiny.CORE:
        return True
    usual = {"attention": "sdpa", "shape": "padded"}
    return params.get("text", params.get("spec")) in FEW and all(params.get(k, v) == v for k, v in usual.items())


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
