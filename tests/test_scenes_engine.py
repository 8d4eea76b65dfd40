"""The contract of pruning on the trained models, for every registered pruner at the paper's layers.

No-op and undo, removal equals masking, counts and bytes, a batch equals its samples, refusals."""

from __future__ import annotations

from typing import Any, NamedTuple

import oracle
import pytest
import tiny
import torch
from torch import Tensor

import vlmattn
from vlmattn import scenes, spec
from vlmattn.errors import UnsupportedModelError
from vlmattn.methods.base import Pruner, Selector
from vlmattn.patches import families
from vlmattn.scenes.library import DERIVED

NAMES = [name for name in scenes.names() if name not in DERIVED]
TASKS = ("loc", "cell", "digits", "exist-random")
STEPS = 5
METHODS = {name: info.cls for name, info in spec.registry().items() if issubclass(info.cls, Selector)}
SPECS = [
    *(
        f"{name}(keep=0.25)" if issubclass(cls, Pruner) else name
        for name, cls in METHODS.items()
        if name != "oraclebox"
    ),
    "oraclebox(box=(0.0, 0.3, 0.5, 1.0))",
    "fastv(keep=0.25, before_layer=2)",
    "uniform(keep=16, before_layer=3)",
    "cdpruner(keep=0.25, relevance=embeddings)",
    "random(keep=0.5) + fastv(keep=0.5)",
    "fastv(keep=0.5) + vhr",
]


class Asked(NamedTuple):
    """A packaged model, and four questions of different length about pictures of the sizes that it knows."""

    model: Any
    batch: dict[str, Tensor]

    def visual(self) -> Tensor:
        return self.batch["input_ids"] == self.model.config.image_token_id

    def generate(self, batch: dict[str, Tensor], **options: Any) -> Any:
        out = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True}
        return self.model.generate(**batch, **out, output_logits=True, **options)


@pytest.fixture(scope="module", params=NAMES)
def asked(request: pytest.FixtureRequest) -> Asked:
    model, processor = scenes.load(request.param)
    data = scenes.benchmark("val", TASKS, images=6, world=scenes.version(request.param).world.name)
    rows = [next(row for row in data.rows if row["task"].startswith(task)) for task in TASKS]
    chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["text"]}]}] for row in rows]
    text = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    images = [data.image(row["image"]) for row in rows]
    return Asked(model, dict(processor(images=images, text=text, padding=True, return_tensors="pt")))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def served(asked: Asked, text: str) -> None:
    """Leave out a method that the model is refused; `test_refusals` has those."""
    if not _fits(asked, text):
        pytest.skip(f"{asked.model.config.model_type} has not what {text} requires")


def _fits(asked: Asked, text: str) -> bool:
    has = families.find(asked.model).capabilities
    return all(method.requires <= has for method in spec.parse(text) if isinstance(method, Selector))


def pruners(text: str) -> list[Selector]:
    return [method for method in spec.parse(text) if isinstance(method, Selector)]


def gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


every = pytest.mark.parametrize("text", SPECS)


@every
def test_keeping_everything_changes_nothing_and_removing_the_session_undoes_it(asked: Asked, text: str) -> None:
    served(asked, text)
    plain = asked.model(**asked.batch).logits
    with vlmattn.wrap(asked.model, [method.disabled() for method in pruners(text)]):
        assert torch.equal(asked.model(**asked.batch).logits, plain)
    with vlmattn.wrap(asked.model, text):
        changed = asked.model(**asked.batch).logits
    assert changed.shape != plain.shape or not torch.equal(changed, plain)
    assert torch.equal(asked.model(**asked.batch).logits, plain)


@every
def test_removal_equals_masking(asked: Asked, text: str) -> None:
    served(asked, text)
    if any(method.merges for method in pruners(text)) or "vhr" in text:
        pytest.skip("it changes more than which tokens there are")
    with vlmattn.wrap(asked.model, text) as session:
        pruned = asked.model(**asked.batch).logits
        report = session.report()
    stages = {stage.before_layer: _columns(asked, stage) for stage in report.stages}
    masked = oracle.masked_forward(asked.model, asked.batch, stages)
    for row, columns in enumerate(report.positions):
        assert gap(pruned[row, -len(columns) :], masked[row, columns]) < 1e-4


def _columns(asked: Asked, stage: Any) -> list[list[int]]:
    """The prompt columns that a stage leaves."""
    rows = []
    for visual, real, [image] in zip(asked.visual(), asked.batch["attention_mask"].bool(), stage.kept, strict=True):
        start = int(visual.long().argmax())
        rows.append(sorted([*(real & ~visual).nonzero()[:, 0].tolist(), *(start + place for place in image)]))
    return rows


@every
def test_counts_and_bytes(asked: Asked, text: str) -> None:
    served(asked, text)
    alone = tiny.single(asked.batch, 1)
    layers = asked.model.config.text_config.num_hidden_layers
    with vlmattn.wrap(asked.model, text) as session:
        cache = asked.model(**alone, use_cache=True).past_key_values
        report = session.report()
    methods, [counts], [tokens] = pruners(text), report.visual_per_layer, report.visual_tokens
    if len(methods) == 1 and not methods[0].adaptive:
        [grid] = families.find(asked.model).input_grids(asked.model.config, alone)
        assert counts == methods[0].expected_tokens(tokens, layers, grid)
    assert counts == sorted(counts, reverse=True)
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == report.kv_bytes


@every
def test_a_batch_equals_its_samples(asked: Asked, text: str) -> None:
    served(asked, text)
    with vlmattn.wrap(asked.model, text) as session:
        together, report = asked.generate(asked.batch), session.report()
        for row in range(len(TASKS)):
            alone = asked.generate(tiny.single(asked.batch, row))
            own = session.report()
            assert [stage.kept[0] for stage in own.stages] == [stage.kept[row] for stage in report.stages]
            assert max(gap(a[row], b[0]) for a, b in zip(together.logits, alone.logits, strict=True)) < 1e-3


@every
def test_refusals(asked: Asked, text: str) -> None:
    """By name, with the methods that fit instead."""
    if _fits(asked, text):
        pytest.skip("it is served")
    with pytest.raises(UnsupportedModelError, match=r"needs .* has none: use .*fastv.*uniform"):
        vlmattn.wrap(asked.model, text)
