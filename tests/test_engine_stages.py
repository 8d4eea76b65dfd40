"""What pruners may ask of the engine beyond dropping tokens once: stages, merging, compact positions, early layers that
shrink."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import oracle
import pytest
import tiny
import torch

import vlmattn
from vlmattn.edits import Keep
from vlmattn.errors import LayerError, SpecError, UnsupportedModelError
from vlmattn.methods.base import Attention, Pruner, Selector, View, param

pytestmark = pytest.mark.usefixtures("no_grad")
STEPS = 5


def generate(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> Any:
    return model.generate(
        **batch,
        max_new_tokens=STEPS,
        do_sample=False,
        suppress_tokens=[tiny.IMAGE, tiny.VIDEO, 92, 93],
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def kept_columns(batch: dict[str, torch.Tensor], stage: Any) -> list[int]:
    """The prompt columns of a single, unpadded row that a stage leaves."""
    visual = batch["input_ids"][0] == tiny.IMAGE
    start = int(visual.long().argmax())
    return sorted([*(~visual).nonzero()[:, 0].tolist(), *(start + i for i in stage.kept[0][0])])


# Compact positions


@pytest.mark.parametrize(
    "text",
    [
        "random(keep=0.5, before_layer=0, positions=compact)",
        "fastv(keep=0.5, before_layer=2, positions=compact)",
        "pyramiddrop(keep=0.6, positions=compact)",
        "random(keep=0.7, before_layer=0, positions=compact) + fastv(keep=0.5, before_layer=2, positions=compact)",
    ],
)
def test_compact_positions_count_without_gaps(text):
    """Prompt and answer, at every stage and of padded rows too, against an oracle that renumbers what is present."""
    model, batch = tiny.llava(), tiny.prompts("llava")
    prompts = oracle.read_prompts(model, batch, tiny.IMAGE)
    with vlmattn.wrap(model, text) as session:
        out, report = model.generate(**batch, max_new_tokens=STEPS, do_sample=False), session.report()
        beams = model.generate(**batch, max_new_tokens=STEPS, do_sample=False, num_beams=2)
        alone = [
            model.generate(**tiny.single(batch, row), max_new_tokens=STEPS, do_sample=False, num_beams=2)
            for row in (0, 1)
        ]
    for row, prompt in enumerate(prompts):
        start, flags = prompt.visual.tolist().index(True), prompt.visual.tolist()
        stages = {
            stage.before_layer: [c for c, v in enumerate(flags) if not v or c - start in stage.kept[row][0]]
            for stage in report.stages
        }
        assert out[row, -STEPS:].tolist() == oracle.generate(model, prompt, stages, STEPS, compact=True).tokens
        assert torch.equal(beams[row, -STEPS:], alone[row][0, -STEPS:])


def test_compact_positions_change_what_is_said():
    model, batch = tiny.llava(), tiny.prompts("llava")
    logits = []
    for positions in ("original", "compact"):
        with vlmattn.wrap(model, f"random(keep=0.5, before_layer=0, positions={positions})"):
            logits.append(model(**batch).logits[:, -1])
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_three_axes_cannot_be_counted():
    model = tiny.qwen2_5_vl()
    with pytest.raises(UnsupportedModelError, match=r"one-dimensional positions.*positions='original'"):
        vlmattn.wrap(model, "fastv(keep=0.5, positions=compact)")


# Early layers that shrink

SHRINK = [
    "fastv(keep=0.5, before_layer=2, shrink_early_layers=True)",
    "fastv(keep=0.6, before_layer=1) + random(keep=0.5, before_layer=3, shrink_early_layers=True)",
    "random(keep=0.5, before_layer=1, shrink_early_layers=True) + fastv(keep=0.5, before_layer=3)",
    "random(keep=0.7, before_layer=0) + fastv(keep=0.5, before_layer=2, shrink_early_layers=True)",
]


@pytest.mark.parametrize("text", SHRINK)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_shrunken_layers_answer_as_if_the_dropped_were_masked(family, text, attention):
    """The prompt reads itself as without the option; the answer, in the layers below too, sees only what is left."""
    model, one = tiny.MODELS[family](attention=attention), tiny.single(tiny.prompts(family), 1)
    with vlmattn.wrap(model, text) as session:
        out, report = generate(model, one), session.report()
    length = one["input_ids"].shape[1]
    total = out.sequences.shape[1] - 1
    longer = one | {"input_ids": out.sequences[:, :-1], "attention_mask": torch.ones(1, total).long()}
    if "mm_token_type_ids" in one:
        longer["mm_token_type_ids"] = (longer["input_ids"] == tiny.IMAGE).long()
    stages = {stage.before_layer: kept_columns(one, stage) for stage in report.stages}
    last = max(stage.before_layer for stage in report.stages if "shrink" in stage.method)
    expected = _masked(model, longer, length, stages, last)[0, length - 1 :]
    for step, logits in enumerate(out.logits):
        assert (logits[0] - expected[step]).abs().max() < 1e-4


def _masked(model: Any, batch: dict[str, Any], length: int, stages: dict[int, list[int]], last: int) -> torch.Tensor:
    """Logits of an unpruned pass in which, layer by layer, dropped columns are hidden: from everyone behind their
    stage, and before `last` what is dropped there from the rows behind the prompt."""
    total = batch["input_ids"].shape[1]

    def hide(index: int) -> torch.Tensor:
        mask = torch.ones(total, total, dtype=torch.bool).tril()
        ruling = [layer for layer in stages if layer <= index]
        gone = torch.ones(total, dtype=torch.bool)
        for columns, rows in ((ruling, slice(None)), ([last] if index < last else [], slice(length, None))):
            if columns:
                gone[:] = False
                gone[[c for c in range(length) if c not in stages[max(columns)]]] = True
                mask[rows, gone] = False
        mask = (mask | torch.eye(total, dtype=torch.bool))[None, None]
        if model.model.language_model.config._attn_implementation == "eager":
            return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        return mask

    def swap(mask: torch.Tensor, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"attention_mask": mask}

    handles = [
        layer.register_forward_pre_hook(functools.partial(swap, hide(index)), with_kwargs=True)
        for index, layer in enumerate(model.model.language_model.layers)
    ]
    try:
        return model(**batch, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("text", SHRINK)
def test_shrunken_layers_hold_what_the_report_says(family, model, text):
    batch = tiny.single(tiny.prompts(family), 1)
    with vlmattn.wrap(model, text.replace(", shrink_early_layers=True", "")) as session:
        before = model(**batch, use_cache=True).logits
        full = session.report()
    with vlmattn.wrap(model, text) as session:
        out = model(**batch, use_cache=True)
        report = session.report()
    held = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
    assert report.kv_bytes == sum(x.keys.nbytes + x.values.nbytes for x in out.past_key_values.layers)
    assert report.kv_bytes < full.kv_bytes and report.prefill_macs == full.prefill_macs
    assert report.visual_per_layer == full.visual_per_layer
    assert torch.equal(out.logits, before)
    assert held == sorted(held, reverse=True) and held[0] < batch["input_ids"].shape[1]
    assert out.past_key_values.get_seq_length() == batch["input_ids"].shape[1]


@pytest.mark.parametrize("text", SHRINK[::3])
def test_shrunken_caches_in_every_mode(family, model, batch, text):
    """Padded batches, beams, guesses and a second turn do what single greedy rows do."""
    with vlmattn.wrap(model, text):
        together = generate(model, batch)
        beams = generate(model, batch, num_beams=3)
        for row in range(2):
            one = tiny.single(batch, row)
            alone = generate(model, one)
            assert max((a[row] - b[0]).abs().max() for a, b in zip(together.logits, alone.logits, strict=True)) < 1e-4
            best = generate(model, one, num_beams=3)
            assert torch.equal(beams.sequences[row, -STEPS:], best.sequences[0, -STEPS:])
        one["input_ids"][:, -4:] = torch.tensor([[5, 6, 5, 6]])
        greedy = generate(model, one)
        guessed = generate(model, one, prompt_lookup_num_tokens=3).sequences
        assert torch.equal(greedy.sequences, guessed[:, : greedy.sequences.shape[1]])
        ids = torch.cat([greedy.sequences, torch.tensor([[7, 8, 9]])], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        cache = greedy.past_key_values
        lengths = [layer.keys.shape[-2] for layer in cache.layers]
        model.generate(**turn, past_key_values=cache, max_new_tokens=2, do_sample=False)
        assert [layer.keys.shape[-2] - n for layer, n in zip(cache.layers, lengths, strict=True)] == [5] * tiny.LAYERS


def test_edits_go_on_in_shrunken_layers(model, batch):
    """Groups of keys follow the keys: the fast and the naive backend agree on every step."""
    spec = "var(sinks=[1, 2, 3], tau=1.5, rho=0.2, min_visual=0.05, first_layer=0) + " + SHRINK[0]
    with vlmattn.wrap(model, spec) as session:
        fast = generate(model, batch)
        session.use_backend("reference")
        slow = generate(model, batch)
    assert max((a - b).abs().max() for a, b in zip(fast.logits, slow.logits, strict=True)) < 1e-4


# Merging


@dataclass(frozen=True)
class Halves(Pruner):
    """Every second token, as the mean of itself and its neighbour."""

    before_layer: int | tuple[int, ...] | None = param(0, "layer")
    merges = True

    @property
    def needs(self) -> frozenset[str]:
        """Rows."""
        return frozenset({"layer_input"})

    def select(self, view: View) -> Keep:
        """Even tokens."""
        assert view.hidden is not None
        even = view.index % 2 == 0
        return Keep(even & (view.image >= 0), (view.hidden + view.hidden.roll(-1, 1)) / 2)

    def left(self, visual: int, grid: Any = None, stage: int = 0) -> int:
        """Half."""
        return visual // 2


Halves.name = "halves"


@pytest.mark.parametrize("layer", [0, 2])
def test_merged_rows_sit_on_kept_slots(family, model, batch, layer):
    """Against a run in which the same rows are rewritten by hand and the others masked."""
    model.to(torch.float64)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    with vlmattn.wrap(model, Halves(before_layer=layer)) as session:
        logits, report = model(**wide).logits, session.report()
    visual = batch["input_ids"] == tiny.IMAGE

    def rewrite(module: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0].clone()
        for row in range(2):
            rows = hidden[row, visual[row]]
            hidden[row, visual[row]] = (rows + rows.roll(-1, 0)) / 2
        return (hidden, *args[1:]), kwargs

    columns = [
        sorted([*(real.bool() & ~image).nonzero()[:, 0].tolist(), *image.nonzero()[::2, 0].tolist()])
        for real, image in zip(batch["attention_mask"], visual, strict=True)
    ]
    handle = model.model.language_model.layers[layer].register_forward_pre_hook(rewrite, with_kwargs=True)
    expected = oracle.masked_forward(model, wide, {layer: columns})
    handle.remove()
    assert report.positions == columns
    for row, mine in enumerate(columns):
        assert (logits[row, -len(mine) :] - expected[row, mine]).abs().max() < 1e-8


def test_rows_alone_may_be_rewritten(model, batch):
    """A mask that keeps everything, with new values."""

    @dataclass(frozen=True)
    class Zero(Halves):
        def select(self, view: View) -> Keep:
            assert view.hidden is not None
            return Keep(torch.ones_like(view.image, dtype=torch.bool), torch.zeros_like(view.hidden), torch.zeros_like)

    Zero.name = "zero"
    other = batch | {"pixel_values": batch["pixel_values"].flip(-1)}
    with vlmattn.wrap(model, Zero()):
        assert torch.equal(model(**batch).logits[:, -1], model(**other).logits[:, -1])


# Decisions that are none, and layers that are none


def test_wrong_answers_of_a_method_are_told(model, batch):
    @dataclass(frozen=True)
    class Odd(Selector):
        before_layer: int = 1
        wrong: str = "rows"

        def disabled(self) -> None:
            """Nothing."""

        @property
        def attention(self) -> Attention:
            return Attention("own")

        def query_rows(self, view: Any) -> torch.Tensor:
            return view.real[:, 1:] if self.wrong == "query" else view.real

        def select(self, view: View) -> Keep:
            return Keep(view.image >= 0, torch.zeros(1, 1, 1) if self.wrong == "rows" else None)

    Odd.name = "odd"
    with vlmattn.wrap(model, Odd()), pytest.raises(SpecError, match="rows of a Keep"):
        model(**batch)
    with vlmattn.wrap(model, Odd(wrong="query")), pytest.raises(SpecError, match="query_rows"):
        model(**batch)


@pytest.mark.parametrize("layers", [(1, 1), (2, 1), (), (0, 2), "2", (1, 2, 3, 4), 2, (1.0, 2)])
def test_layers_of_stages_are_checked(layers):
    from vlmattn.methods.prune.sparsevlm import SparseVLM

    with pytest.raises(LayerError, match=r"sparsevlm\.before_layer"):
        SparseVLM(before_layer=layers)
    assert SparseVLM(before_layer=[1, 2, 3]).before_layer == (1, 2, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["pyramiddrop(keep=0.6)", "feather(keep=0.5)", "sparsevlm(keep=0.4, recycle=True)"])
def test_stages_with_beams_and_with_several_images(family, text):
    model, batch = tiny.MODELS[family](), tiny.prompts(family)
    with vlmattn.wrap(model, text) as session:
        generate(model, batch, num_beams=2)
        wide = session.report()
        generate(model, batch)
        narrow = session.report()
        generate(model, tiny.prompts(family, images=(2, 1, 0)))
        several = session.report()
    for a, b in zip(wide.stages, narrow.stages, strict=True):
        assert a.kept == [row for row in b.kept for _ in range(2)]
    for stage in several.stages:
        assert [len(row) for row in stage.kept] == [2, 1, 0] and all(len(kept) for row in stage.kept for kept in row)
    assert several.visual_per_layer[2] == [0] * tiny.LAYERS
