"""The runtime contract of pruning, oracles O1 to O10, for every registered pruner on every family.

O1 no-op, O2 removal equals masking, O3 selection, O4 counts, O5 cache lengths, O6 generation without cache, O7 batch
equals single, O8 undo, O9 eager and SDPA agree, O10 text passes through.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import oracle
import pytest
import tiny
import torch

import vlmattn
from vlmattn import budget, spec
from vlmattn.errors import CallError, LayerError, UnsupportedModelError
from vlmattn.methods.base import Keep, Pruner, Selector, View
from vlmattn.patches.families import supported

STEPS = 6
FACTS = {family.model_type: family for family in supported()}
PRUNERS = [name for name, info in spec.registry().items() if issubclass(info.cls, Selector)]
FAMILIES = sorted(tiny.MODELS)
ATTENTION = ["sdpa", "eager"]
BATCH = ["single", "padded"]


KEEPS = {"schedule": 0.75}
"""Shares that pruners are tried with where it is not 0.5: the default floor and ceiling give four layers no such
average."""


def cases() -> list[str]:
    """Every pruner at the paper's layers, those with one stage also before their first possible layer and layer 2."""
    found = []
    for name in PRUNERS:
        cls = spec.registry()[name].cls
        assert issubclass(cls, Selector)
        budget = [f"keep={KEEPS.get(name, 0.5)}"] if issubclass(cls, Pruner) else []
        one = len(cls.paper_layers) == 1
        layers: list[int | None] = [None] if not one or cls.entry_only else [*sorted({cls.min_layer, 2})]
        for layer in layers:
            fields = [*budget, *([] if layer is None else [f"before_layer={layer}"])]
            found.append(f"{name}({', '.join(fields)})")
    return found


SPECS = [
    *cases(),
    "fastv(keep=0.3, before_layer=2, query=all_text)",
    "fastv(keep=5, before_layer=1, query=all)",
    "uniform(keep=0.5, before_layer=0, mode='2d', exact_budget=True)",
    "random(keep=0.7, before_layer=0) + fastv(keep=0.5, before_layer=2)",
    "fastv(keep=0.6, before_layer=1) + random(keep=0.5, before_layer=3)",
    "fastv(keep=0.5, before_layer=1) + noimage(before_layer=3)",
    "noimage + fastv(keep=0.5, before_layer=2)",
    "oraclebox(box=(0.0, 0.3, 0.5, 1.0))",
    "sparsevlm(keep=0.3, recycle=True)",
    "cdpruner(keep=0.5, relevance=embeddings)",
    "fastv(keep=0.5, before_layer=2, positions=compact)",
    "random(keep=0.5, before_layer=0, positions=compact) + fastv(keep=0.5, before_layer=2)",
    "fastv(keep=0.6, before_layer=1, positions=compact) + random(keep=0.5, before_layer=3)",
]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


FEW = ["fastv(keep=0.5, before_layer=2)", "random(keep=0.5, before_layer=0)", "uniform(keep=0.5, before_layer=2)"]
"""What families with several grids an image are tried with; the rest is slow."""


_MODELS: dict[tuple[str, str], Any] = {}


def model_of(family: str, attention: str) -> Any:
    key = (family, attention)
    if key not in _MODELS:
        _MODELS[key] = (tiny.MODELS | tiny.ANYRES)[family](attention=attention)
    return _MODELS[key]


def batch_of(family: str, shape: str) -> dict[str, torch.Tensor]:
    batch = tiny.prompts(family)
    return tiny.single(batch, 1) if shape == "single" else batch


def full_keep(text: str) -> list[Any]:
    """The same methods told to keep everything; those that cannot, left out."""
    return [
        dataclasses.replace(method, keep=1.0) if isinstance(method, Pruner) else method.disabled()
        for method in spec.parse(text)
    ]


def expected_counts(text: str, visual: int) -> list[int]:
    """Visual tokens per layer that the budgets promise; of compositions from the vocabulary's rounding alone."""
    methods = spec.parse(text)
    if len(methods) == 1:
        return methods[0].expected_tokens(visual, tiny.LAYERS)
    counts, left = [], visual
    schedule = {method.resolve_layer(tiny.LAYERS): getattr(method, "keep", None) for method in methods}
    for layer in range(tiny.LAYERS):
        if layer in schedule and left:
            left = 0 if schedule[layer] is None else budget.count(left, schedule[layer])
        counts.append(left)
    return counts


def generate(model: Any, batch: dict[str, torch.Tensor], steps: int = STEPS, **options: Any) -> Any:
    return model.generate(
        **batch, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


both = pytest.mark.parametrize("attention", ATTENTION)
shapes = pytest.mark.parametrize("shape", BATCH)
families = pytest.mark.parametrize("family", FAMILIES)
specs = pytest.mark.parametrize("text", SPECS)


def has_all(family: str, text: str) -> bool:
    """Whether the family has what the methods require."""
    return all(m.requires <= FACTS[family].capabilities for m in spec.parse(text) if isinstance(m, Selector))


def is_removal(text: str) -> bool:
    """Whether tokens are dropped and nothing else changes."""
    return not any(m.merges or m.positions == "compact" for m in spec.parse(text) if isinstance(m, Selector))


PAIRS = [(family, text) for family in [*FAMILIES, *tiny.ANYRES] for text in SPECS]


def cases_of(pairs: list[tuple[str, str]]) -> pytest.MarkDecorator:
    """Parametrise by pairs of family and spec; most of those of the families with several grids are slow."""
    marks = [(pytest.mark.slow,) if family in tiny.ANYRES and text not in FEW else () for family, text in pairs]
    return pytest.mark.parametrize(
        ("family", "text"), [pytest.param(*pair, marks=mark) for pair, mark in zip(pairs, marks, strict=True)]
    )


def keeps_text(family: str, text: str) -> bool:
    """Whether all that is no visual token stays; newline tokens may not, see test_anyres.py."""
    return family not in tiny.ANYRES or all(
        method.newlines == "all" for method in spec.parse(text) if isinstance(method, Selector)
    )


served = cases_of([pair for pair in PAIRS if has_all(*pair)])
counted = cases_of([pair for pair in PAIRS if has_all(*pair) and keeps_text(*pair)])
removals = cases_of([pair for pair in PAIRS if has_all(*pair) and keeps_text(*pair) and is_removal(pair[1])])


def columns_of(family: str, batch: dict[str, torch.Tensor], stage: Any) -> list[list[int]]:
    """The prompt columns that a stage of a report leaves, a row with at most one image each."""
    rows = []
    visual, real = tiny.visual(family, batch), batch["attention_mask"].bool()
    for row, images in enumerate(stage.kept):
        own = visual[row].nonzero()[:, 0].tolist()
        text = (real[row] & ~visual[row]).nonzero()[:, 0].tolist()
        rows.append(sorted([*text, *(own[i] for image in images for i in image)]))
    return rows


@both
@shapes
@served
def test_o1_keeping_everything_is_bit_identical(family, attention, shape, text):
    model, batch = model_of(family, attention), batch_of(family, shape)
    logits, tokens = model(**batch).logits, generate(model, batch).sequences
    with vlmattn.wrap(model, full_keep(text)):
        assert torch.equal(model(**batch).logits, logits)
        assert torch.equal(generate(model, batch).sequences, tokens)
    assert torch.equal(model(**batch).logits, logits)


@both
@shapes
@removals
def test_o2_removal_equals_masking(family, attention, shape, text):
    model, batch = model_of(family, attention), batch_of(family, shape)
    with vlmattn.wrap(model, text) as session:
        pruned = model(**batch).logits
        report = session.report()
    stages = {stage.before_layer: columns_of(family, batch, stage) for stage in report.stages}
    masked = oracle.masked_forward(model, batch, stages)
    for row, columns in enumerate(report.positions):
        assert gap(pruned[row, -len(columns) :], masked[row, columns]) < 1e-4


@both
@counted
def test_o4_counts_and_order(family, attention, text):
    model, batch = model_of(family, attention), batch_of(family, "padded")
    with vlmattn.wrap(model, text) as session:
        model(**batch)
        report = session.report()
    visual = tiny.visual(family, batch)
    assert report.visual_tokens == visual.sum(1).tolist()
    for row, counts in enumerate(report.visual_per_layer):
        by_grid = family in tiny.ANYRES and text.startswith(("pool", "oraclebox"))  # several grids, each by itself
        if not by_grid and not any(method.adaptive for method in spec.parse(text)):
            assert counts == expected_counts(text, int(visual[row].sum()))
        assert counts == sorted(counts, reverse=True) and min(counts) >= (0 if "noimage" in text else 1)
        text_columns = (batch["attention_mask"][row].bool() & ~visual[row]).nonzero()[:, 0].tolist()
        assert set(text_columns) <= set(report.positions[row])
        assert report.positions[row] == sorted(set(report.positions[row]))


@both
@shapes
@counted
def test_o5_cache_lengths(family, attention, shape, text):
    model, batch = model_of(family, attention), batch_of(family, shape)
    with vlmattn.wrap(model, text) as session:
        cache = model(**batch, use_cache=True).past_key_values
        report = session.report()
        after = generate(model, batch).past_key_values
    rows = range(len(report.visual_tokens))
    slots = [
        max(report.prompt_tokens[r] - report.visual_tokens[r] + report.visual_per_layer[r][layer] for r in rows)
        if report.visual_per_layer[0][layer] < report.visual_tokens[0]
        else batch["input_ids"].shape[1]
        for layer in range(tiny.LAYERS)
    ]
    assert [layer.keys.shape[-2] for layer in cache.layers] == slots
    assert [layer.keys.shape[-2] for layer in after.layers] == [n + STEPS - 1 for n in slots]
    if shape == "single":
        measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert measured == report.kv_bytes


@both
@shapes
@removals
def test_o6_generation_equals_recomputation_without_cache(family, attention, shape, text):
    model, batch = model_of(family, attention), batch_of(family, shape)
    prompts = oracle.read_prompts(model, batch, tiny.IMAGE)
    with vlmattn.wrap(model, text) as session:
        out = generate(model, batch)
        report = session.report()
    visual = tiny.visual(family, batch)
    for row, prompt in enumerate(prompts):
        flags = visual[row, batch["attention_mask"][row].bool()]
        own, stages = flags.nonzero()[:, 0].tolist(), {}
        for stage in report.stages:
            kept = {own[i] for i in stage.kept[row][0]}
            stages[stage.before_layer] = [c for c, v in enumerate(flags.tolist()) if not v or c in kept]
        expected = oracle.generate(model, prompt, stages, STEPS)
        assert out.sequences[row, -STEPS:].tolist() == expected.tokens
        assert max(gap(step[row], want) for step, want in zip(out.logits, expected.logits, strict=True)) < 1e-4


@both
@served
def test_o7_a_batch_equals_its_rows(family, attention, text):
    model, batch = model_of(family, attention), batch_of(family, "padded")
    with vlmattn.wrap(model, text) as session:
        together, report = generate(model, batch), session.report()
        for row in range(2):
            alone = generate(model, tiny.single(batch, row))
            own = session.report()
            assert [stage.kept[0] for stage in own.stages] == [stage.kept[row] for stage in report.stages]
            assert max(gap(a[row], b[0]) for a, b in zip(together.logits, alone.logits, strict=True)) < 1e-4


@served
def test_o9_eager_and_sdpa_keep_the_same_tokens(family, text):
    kept = []
    for attention in ATTENTION:
        model = model_of(family, attention)
        with vlmattn.wrap(model, text) as session:
            model(**batch_of(family, "padded"))
            kept.append([stage.kept for stage in session.report().stages])
    assert kept[0] == kept[1]


@both
@served
def test_o10_text_only_prompts_pass_through(family, attention, text):
    model, batch = model_of(family, attention), tiny.prompts(family, images=(0, 0))
    logits, tokens = model(**batch).logits, generate(model, batch).sequences
    with vlmattn.wrap(model, text) as session:
        assert torch.equal(model(**batch).logits, logits)
        assert torch.equal(generate(model, batch).sequences, tokens)
        with pytest.raises(vlmattn.VlmattnError, match="no prompt with an image"):
            session.report()


@both
@shapes
@served
def test_o6_generation_equals_one_pass_over_prompt_and_answer(family, attention, shape, text):
    """Also where tokens are merged or renumbered: the cache holds what a pass without one computes."""
    model, batch = model_of(family, attention), batch_of(family, shape)
    with vlmattn.wrap(model, text) as session:
        out = generate(model, batch, suppress_tokens=[tiny.IMAGE, tiny.VIDEO, 92, 93])  # no image behind the prompt
        longer = batch | {"input_ids": out.sequences}
        for name in ("attention_mask", "mm_token_type_ids"):
            if name in batch:
                fill = batch[name].new_full((len(out.sequences), STEPS), int(name == "attention_mask"))
                longer[name] = torch.cat([batch[name], fill], 1)
        if FACTS[family].rope == "1d":  # as generate counts them; the size of rotated keys is one for each position
            longer["position_ids"] = (longer["attention_mask"].cumsum(1) - 1).clamp_min(0)
        with session.prompt(batch["input_ids"].shape[1]):
            again = model(**longer, use_cache=False).logits
    for step, logits in enumerate(out.logits):
        assert gap(logits, again[:, step - STEPS - 1]) < 1e-4


@cases_of([pair for pair in PAIRS if not has_all(*pair)])
def test_what_a_model_lacks_is_refused_by_name(family, text):
    """With the methods that fit instead."""
    with pytest.raises(UnsupportedModelError, match=r"needs .* has none: use .*fastv.*uniform"):
        vlmattn.wrap(model_of(family, "sdpa"), text)


@families
@both
def test_o3_fastv_ranks_by_the_last_row(family, attention):
    """Against the probabilities of the oracle's own softmax; ties to the lower index."""
    model, batch = model_of(family, attention), batch_of(family, "padded")
    prompts = oracle.read_prompts(model, batch, tiny.IMAGE)
    for layer in (1, 2, 3):
        with vlmattn.wrap(model, f"fastv(keep=0.4, before_layer={layer})") as session:
            model(**batch)
            kept = session.report().stages[0].kept
        for row, prompt in enumerate(prompts):
            probabilities: list[torch.Tensor] = []

            def look(p: torch.Tensor, present: list[int], seen: list[torch.Tensor] = probabilities) -> list[int]:
                seen.append(p)
                return present

            oracle.generate(model, prompt, {layer: look}, 1)
            score = probabilities[0][:, -1].mean(0)
            assert score.sum().item() == pytest.approx(1.0, abs=1e-5)
            score = score[prompt.visual].tolist()
            best = sorted(range(len(score)), key=lambda i: (-score[i], i))[: budget.count(len(score), 0.4)]
            assert kept[row][0] == sorted(best)


@families
def test_fastv_budgets_are_nested(family):
    """Prefix property: what a smaller budget keeps, a larger one keeps too."""
    model, batch, previous = model_of(family, "sdpa"), batch_of(family, "padded"), None
    for keep in (0.2, 0.4, 0.6, 0.8):
        with vlmattn.wrap(model, f"fastv(keep={keep}, before_layer=2)") as session:
            model(**batch)
            kept = [set(row[0]) for row in session.report().stages[0].kept]
        if previous is not None:
            assert all(small <= large for small, large in zip(previous, kept, strict=True))
        previous = kept


EXPECTED = [
    *cases(),
    *(name for name in PRUNERS if name not in KEEPS),
    *("var(sinks=[1])", "vhr", "fastv(keep=1.0)", "fastv(keep=7)", "fastv(keep=99, before_layer=1)"),
    *("uniform(keep=0.3, mode='2d')", "uniform(keep=7, mode='2d', before_layer=1)"),
    "uniform(keep=0.3, mode='2d', exact_budget=True)",
]


@families
@pytest.mark.parametrize("text", EXPECTED)
def test_expected_tokens_are_the_reports(family, text):
    """What a method says without a model is what happens, on square and (M-RoPE family) on wide grids."""
    model, batch = model_of(family, "sdpa"), batch_of(family, "padded")
    (method,) = spec.parse(text)
    if isinstance(method, Selector) and (method.adaptive or not has_all(family, text)):
        pytest.skip("the number depends on the image" if method.adaptive else "refused")
    with vlmattn.wrap(model, text) as session:
        model(**batch)
        report = session.report()
    grids = [None, None if family == "llava" else (1, 4, 6)]
    for visual, counts, grid in zip(report.visual_tokens, report.visual_per_layer, grids, strict=True):
        assert method.expected_tokens(visual, tiny.LAYERS, grid) == counts
        assert method.expected_tokens(visual, tiny.LAYERS) == counts  # 4 x 6 is the squarest grid of 24
    assert method.expected_tokens(0, tiny.LAYERS) == [0] * tiny.LAYERS


def test_expected_tokens_depend_on_the_grid():
    """A sub-grid of a narrow image holds other numbers than one of a square."""
    (method,) = spec.parse("uniform(keep=5, mode='2d')")
    assert method.expected_tokens(16, 2) == [4, 4]
    assert method.expected_tokens(16, 2, (1, 1, 16)) == [5, 5]
    with pytest.raises(CallError, match="needs the whole grid"):
        method.expected_tokens(16, 2, (1, 4, 5))
    with pytest.raises(LayerError, match="2 decoder layers"):
        spec.parse("random(before_layer=2)")[0].expected_tokens(16, 2)


# No visual token left


@families
@both
@shapes
def test_without_an_image_only_text_is_left(family, attention, shape):
    """The logits of the text are those of a full run in which nobody sees the image."""
    model, batch = model_of(family, attention), batch_of(family, shape)
    visual = batch["input_ids"] == tiny.IMAGE
    with vlmattn.wrap(model, "noimage") as session:
        logits = model(**batch).logits
        report = session.report()
    text = [(real.bool() & ~image).nonzero()[:, 0].tolist() for real, image in zip(batch["attention_mask"], visual)]
    masked = oracle.masked_forward(model, batch, {0: text})
    for row, columns in enumerate(text):
        assert gap(logits[row, -len(columns) :], masked[row, columns]) < 1e-4
    assert report.positions == text
    assert report.visual_per_layer == [[0] * tiny.LAYERS] * len(text) and report.average_visual_tokens == 0
    assert [stage.kept for stage in report.stages] == [[[[]]] * len(text)]
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert report.kv_bytes == sum(map(len, text)) * tiny.LAYERS * 2 * config.num_key_value_heads * head * 4
    assert report.to_dict()["speedup"] > 1 and "0 in layers 0-3" in str(report)


@families
def test_without_an_image_pixels_do_not_matter(family):
    model, batch = model_of(family, "sdpa"), batch_of(family, "padded")
    other = batch | {"pixel_values": batch["pixel_values"].flip(-1)}
    assert gap(model(**batch).logits, model(**other).logits) > 1e-3
    with vlmattn.wrap(model, "noimage"):
        a, b = generate(model, batch), generate(model, other)
    assert torch.equal(a.sequences, b.sequences)
    assert all(torch.equal(first, second) for first, second in zip(a.logits, b.logits, strict=True))


@families
@pytest.mark.parametrize("text", ["noimage", "noimage(before_layer=2)"])
def test_without_an_image_beams_lookup_and_a_second_turn(family, text):
    model, batch = model_of(family, "sdpa"), batch_of(family, "padded")
    with vlmattn.wrap(model, text):
        beams = model.generate(**batch, max_new_tokens=STEPS, num_beams=3, num_return_sequences=2, do_sample=False)
        for row in range(2):
            one = tiny.single(batch, row)
            alone = model.generate(**one, max_new_tokens=STEPS, num_beams=3, num_return_sequences=2, do_sample=False)
            assert torch.equal(beams[2 * row : 2 * row + 2, -STEPS:], alone[:, -STEPS:])
        one["input_ids"][:, -4:] = torch.tensor([[5, 6, 5, 6]])
        greedy = generate(model, one, 12)
        lookup = generate(model, one, 12, prompt_lookup_num_tokens=3)
        assert torch.equal(greedy.sequences, lookup.sequences[:, : greedy.sequences.shape[1]])
        ids = torch.cat([greedy.sequences, torch.tensor([[7, 8, 9]])], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": greedy.past_key_values}
        again = model.generate(**turn, max_new_tokens=2, do_sample=False)
        longer = one | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in one:
            longer["mm_token_type_ids"] = (ids == tiny.IMAGE).long()
        assert torch.equal(again, model.generate(**longer, max_new_tokens=2, do_sample=False))


@dataclasses.dataclass(frozen=True)
class Blind(Selector):
    """Drops the image of every second sample."""

    before_layer: int = 0

    def disabled(self) -> None:
        """Nothing."""

    def select(self, view: View) -> Keep:
        """All tokens of even rows."""
        return Keep((torch.arange(len(view.image)) % 2 == 0)[:, None].expand_as(view.image))


Blind.name = "blind"
EDITS = ["var(sinks=[1, 2, 3], tau=1.5, rho=0.2, min_visual=0.05, first_layer=1)", "vhr"]
LATER = ["fastv(keep=0.5, before_layer=3)", "random(keep=3, before_layer=3)", "uniform(keep=3, before_layer=3)"]


@families
@both
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("after", ["none", *LATER, "noimage(before_layer=3)", *EDITS])
def test_some_samples_without_an_image(family, attention, layer, after):
    """Rows with and without visual tokens side by side do what they do alone."""
    model, batch = model_of(family, attention), batch_of(family, "padded")
    rest = spec.parse(after)
    with vlmattn.wrap(model, [Blind(layer), *rest]) as session:
        session.record()
        together, report = generate(model, batch), session.report()
    assert report.visual_per_layer[1] == [24 if family != "llava" else 16] * layer + [0] * (tiny.LAYERS - layer)
    assert report.visual_per_layer[0][2] == 16
    for row, first in enumerate((None, f"noimage(before_layer={layer})")):
        with vlmattn.wrap(model, [first, *rest]):
            alone = generate(model, tiny.single(batch, row))
        assert max(gap(a[row], b[0]) for a, b in zip(together.logits, alone.logits, strict=True)) < 1e-4


@families
def test_edits_without_an_image(family):
    """At the entry nothing is left to redistribute to, and no head can react to an image; later something is."""
    model, batch = model_of(family, "sdpa"), batch_of(family, "padded")
    with vlmattn.wrap(model, "noimage"):
        plain = generate(model, batch)
    for edit in EDITS:
        with vlmattn.wrap(model, f"noimage + {edit}") as session:
            session.record()
            edited = generate(model, batch)
            stats = session.stats()
        assert torch.equal(plain.sequences, edited.sequences)
        assert max(gap(a, b) for a, b in zip(plain.logits, edited.logits, strict=True)) < 1e-4
        assert float(stats["visual_mass"].values.abs().max()) == 0.0
        assert "gain" not in stats or float(stats["gain"].values.nan_to_num(1.0).min()) == 1.0
    with vlmattn.wrap(model, f"noimage(before_layer=2) + {EDITS[1]}") as session:
        generate(model, batch)
        assert float(session.stats()["gain"].values.nan_to_num(1.0).max()) == 2.0


def test_a_prompt_must_not_be_left_empty():
    model, batch = model_of("llava", "sdpa"), tiny.prompts("llava", images=(1,))
    batch = {"input_ids": torch.full((1, 16), tiny.IMAGE), "pixel_values": batch["pixel_values"]}
    assert math.isfinite(float(model(**batch).logits.sum()))
    with vlmattn.wrap(model, "noimage"), pytest.raises(CallError, match="left empty: add text"):
        model(**batch)
