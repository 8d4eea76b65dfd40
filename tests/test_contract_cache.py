"""The runtime contract of methods that evict from the cache, for every registered one on every family.

C1 no-op, C2 eviction equals masking from the answer on, C3 counts and bytes, C4 batch equals single, C5 beams, C6 undo,
C7 eager and SDPA agree, C8 text passes through, C9 a further turn, C10 composition and refusals.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tiny
import torch

import vlmattn
from vlmattn import oracle, proof, spec
from vlmattn.errors import CallError, SpecError
from vlmattn.methods.cache import Evictor

STEPS = 5
EVICTORS = [name for name, info in spec.registry().items() if issubclass(info.cls, Evictor) and not info.cls.through]
STATIC = [
    *EVICTORS,
    "avl(keep=0.3)",
    "evict3r(keep=0.5, floor=1, temperature=20.0)",
    "evict3r(keep=6, floor=2, rows=text, anchor=0.3)",
    "fastv(keep=0.6, before_layer=2) + avl(keep=0.4)",
    "random(keep=0.7, before_layer=0) + evict3r(keep=0.4, floor=1)",
]
MOVING = [
    "avl(keep=0.6, core=0.2, refresh=3)",
    "avl(keep=0.9, core=0.6, refresh=2)",
    "avl(text_policy=h2o, text_keep=0.5, text_floor=2)",
    "avl(keep=0.6, core=0.2, refresh=2, text_policy=h2o, text_keep=0.4, text_floor=3)",
]
SPECS = [*STATIC, *MOVING]

pytestmark = pytest.mark.usefixtures("no_grad")
both = pytest.mark.parametrize("attention", ["sdpa", "eager"])
specs = pytest.mark.parametrize("text", SPECS)

_MODELS: dict[tuple[str, str], Any] = {}


def model_of(family: str, attention: str = "sdpa") -> Any:
    key = (family, attention)
    if key not in _MODELS:
        _MODELS[key] = tiny.MODELS[family](attention=attention)
    return _MODELS[key]


def generate(model: Any, batch: dict[str, torch.Tensor], steps: int = STEPS, **options: Any) -> Any:
    options = {"do_sample": False} | options
    return model.generate(**batch, max_new_tokens=steps, return_dict_in_generate=True, output_logits=True, **options)


def gap(a: Any, b: Any) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def sizes(cache: Any) -> list[int]:
    return [layer.keys.shape[-2] for layer in cache.layers]


@both
@specs
def test_c1_keeping_everything_is_bit_identical(family, attention, text):
    """Without strength, and with budgets that hold every token: scores are computed, nothing goes."""
    model, batch = model_of(family, attention), tiny.prompts(family)
    plain = generate(model, batch)
    every = [
        dataclasses.replace(m, **({"keep": 99} | ({"core": 99} if getattr(m, "refresh", None) else {}) | text_kept(m)))
        if isinstance(m, Evictor) and hasattr(m, "keep")
        else m.disabled()
        for m in spec.parse(text)
    ]
    for methods in ([m.disabled() for m in spec.parse(text)], every):
        with vlmattn.wrap(model, methods):
            out = generate(model, batch)
        assert torch.equal(out.sequences, plain.sequences)
        assert all(torch.equal(a, b) for a, b in zip(out.logits, plain.logits, strict=True))


def text_kept(method: Any) -> dict[str, Any]:
    return {"text_keep": 1.0} if getattr(method, "text_policy", "none") == "h2o" else {}


@both
@pytest.mark.parametrize("text", STATIC)
def test_c2_eviction_equals_masking(family, attention, text):
    model = model_of(family, attention)
    inputs = tiny.single(tiny.prompts(family), 1)
    row = proof.Proof(model, inputs, spec.parse(text), STEPS).eviction()
    assert row.passed and "evicted:" in row.explanation, row


def test_c2_notices_what_is_masked(family):
    """The oracle can fail: with one key more in its mask it does."""
    model, inputs = model_of(family), tiny.single(tiny.prompts(family), 1)
    claim = proof.Proof(model, inputs, spec.parse("avl(keep=0.3)"), STEPS)
    dropped = claim._dropped
    claim._dropped = lambda kept: dropped(kept[:1] + kept[2:])  # type: ignore[method-assign]
    assert claim.eviction().passed is False


@both
@specs
@pytest.mark.parametrize("shape", ["single", "padded"])
def test_c3_counts_and_bytes(family, attention, text, shape):
    model, batch = model_of(family, attention), tiny.prompts(family)
    batch = tiny.single(batch, 1) if shape == "single" else batch
    with vlmattn.wrap(model, text) as session:
        cache = model(**batch, use_cache=True).past_key_values
        report = session.report()
    length = batch["input_ids"].shape[1]
    held = [  # per sample and layer
        [n - v + c for c in counts]
        for n, v, counts in zip(report.prompt_tokens, report.visual_tokens, report.cached_per_layer, strict=True)
    ]
    for entry in report.caches:
        for row, (images, columns) in enumerate(zip(entry.kept, entry.positions, strict=True)):
            held[row][entry.layer] = len(columns)
            assert sum(map(len, images)) == report.cached_per_layer[row][entry.layer]
            assert columns == sorted(columns) and all(image == sorted(image) for image in images)
    whole = [entry.layer for entry in report.caches]
    slots = [max(row[n] for row in held) if n in whole else length for n in range(tiny.LAYERS)]
    assert sizes(cache) == slots
    config = model.config.get_text_config()
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    assert report.kv_bytes == sum(map(sum, held)) * 2 * width * 4 < report.kv_bytes_full
    if shape == "single":
        assert report.kv_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@specs
def test_c3_the_cache_grows_as_said(family, text):
    """A slot for every token of the answer; where text goes, fewer."""
    model, batch = model_of(family), tiny.single(tiny.prompts(family), 0)
    with vlmattn.wrap(model, text) as session:
        out = generate(model, batch)
        after = sizes(out.past_key_values)
        first = sizes(model(**batch, use_cache=True).past_key_values)
        assert out.past_key_values.get_seq_length() == batch["input_ids"].shape[1] + STEPS - 1
    if "h2o" in text:
        assert all(b - a < STEPS - 1 for a, b in zip(first, after, strict=True))
    else:
        assert after == [n + STEPS - 1 for n in first]
    assert session.methods[-1].name in EVICTORS


@pytest.mark.parametrize("name", EVICTORS)
@pytest.mark.parametrize("keep", [0.5, 0.3, 5, 99])
def test_c3_expected_tokens_are_the_caches(family, name, keep):
    model, batch = model_of(family), tiny.prompts(family)
    budget = f"(keep={keep})" if "keep" in {field["name"] for field in spec.registry()[name].fields} else ""
    (method,) = spec.parse(name + budget)
    assert isinstance(method, Evictor)
    with vlmattn.wrap(model, [method]) as session:
        model(**batch)
        report = session.report()
    assert report.visual_per_layer == [[n] * tiny.LAYERS for n in report.visual_tokens]
    for visual, counts in zip(report.visual_tokens, report.cached_per_layer, strict=True):
        expected = method.expected_tokens(visual, tiny.LAYERS)
        assert sum(counts) <= sum(expected) if method.adaptive else counts == expected
    assert method.expected_tokens(0, tiny.LAYERS) == [0] * tiny.LAYERS


@both
@specs
def test_c4_a_batch_equals_its_rows(family, attention, text):
    model, batch = model_of(family, attention), tiny.prompts(family)
    with vlmattn.wrap(model, text) as session:
        together, report = generate(model, batch), session.report()
        for row in range(2):
            alone = generate(model, tiny.single(batch, row))
            own = session.report()
            assert [entry.kept[0] for entry in own.caches] == [entry.kept[row] for entry in report.caches]
            assert gap([a[row] for a in together.logits], [b[0] for b in alone.logits]) < 1e-4


@specs
def test_c5_beams_batch_equals_single(family, text):
    model, batch = model_of(family), tiny.prompts(family)
    options = {"num_beams": 3, "num_return_sequences": 2}
    with vlmattn.wrap(model, text):
        together = generate(model, batch, **options).sequences[:, -STEPS:]
        alone = [generate(model, tiny.single(batch, row), **options).sequences[:, -STEPS:] for row in (0, 1)]
    assert torch.equal(together, torch.cat(alone))


@specs
def test_c6_undo_is_bit_identical(family, text):
    model, batch = model_of(family), tiny.prompts(family)
    before, plain = oracle.footprint(model), generate(model, batch)
    with vlmattn.wrap(model, text):
        assert gap(generate(model, batch).logits[1:], plain.logits[1:]) > 0
    after = generate(model, batch)
    assert oracle.footprint(model) == before
    assert all(torch.equal(a, b) for a, b in zip(after.logits, plain.logits, strict=True))


@specs
def test_c7_eager_and_sdpa_agree(family, text):
    found = []
    for attention in ("sdpa", "eager"):
        model = model_of(family, attention)
        with vlmattn.wrap(model, text) as session:
            logits = generate(model, tiny.prompts(family)).logits
            found.append((logits, [entry.kept for entry in session.report().caches]))
    assert found[0][1] == found[1][1]
    assert gap(found[0][0], found[1][0]) < 1e-4


@both
@specs
def test_c8_text_only_prompts_pass_through(family, attention, text):
    model, batch = model_of(family, attention), tiny.prompts(family, images=(0, 0))
    tokens = generate(model, batch).sequences
    with vlmattn.wrap(model, text):
        assert torch.equal(generate(model, batch).sequences, tokens)


@specs
def test_c8_rows_without_an_image_are_left_alone(family, text):
    model, batch = model_of(family), tiny.prompts(family, images=(2, 1, 0))
    plain = generate(model, batch)
    with vlmattn.wrap(model, text) as session:
        out, report = generate(model, batch), session.report()
    assert gap([x[2] for x in out.logits], [x[2] for x in plain.logits]) < 1e-4
    assert all(entry.kept[2] == [] and len(entry.kept[0]) == 2 for entry in report.caches)
    assert all(len(entry.positions[2]) == report.prompt_tokens[2] for entry in report.caches)


@specs
def test_c9_a_further_turn_goes_on_from_what_is_left(family, text):
    """In one piece and token by token the conversation is the same for methods that decided once."""
    model, one = model_of(family), tiny.single(tiny.prompts(family), 0)
    with vlmattn.wrap(model, text):
        first = generate(model, one, 4)
        held = sizes(first.past_key_values)
        ids = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": first.past_key_values}
        second = generate(model, turn, 3)
        assert second.past_key_values.get_seq_length() == ids.shape[1] + 2
        if "h2o" not in text:
            assert sizes(second.past_key_values) == [n + 6 for n in held]
        if text in STATIC:
            again, said = generate(model, one, 4), torch.cat([first.sequences[:, -1:], torch.tensor([[7, 8, 9]])], 1)
            for step, token in enumerate(said[0]):
                place = torch.full((1, 1), one["input_ids"].shape[1] + 3 + step)
                if "image_grid_thw" in one:  # positions of several axes go on behind the largest
                    place = place + int(model.model.rope_deltas[0, 0])
                out = model(
                    input_ids=token.view(1, 1),
                    past_key_values=again.past_key_values,
                    position_ids=place,
                    use_cache=True,
                )
            assert gap([out.logits[:, -1]], [second.logits[0]]) < 1e-4


def test_c10_no_cache_is_refused(family):
    model, batch = model_of(family), tiny.prompts(family)
    for name in EVICTORS:
        with vlmattn.wrap(model, name), pytest.raises(CallError, match="use_cache"):
            model.generate(**batch, max_new_tokens=2, use_cache=False)


def test_c10_guessed_tokens_only_where_nothing_moves(family):
    model, one = model_of(family), tiny.single(tiny.prompts(family), 1)
    one["input_ids"][:, -4:] = torch.tensor([[5, 6, 5, 6]])
    for text in STATIC:
        with vlmattn.wrap(model, text):
            greedy = generate(model, one, 12).sequences
            lookup = generate(model, one, 12, prompt_lookup_num_tokens=3).sequences
        assert torch.equal(greedy, lookup[:, : greedy.shape[1]]), text
    for text in MOVING:
        with vlmattn.wrap(model, text), pytest.raises(CallError, match=r"prompt_lookup_num_tokens.*leave assisted"):
            generate(model, one, 4, prompt_lookup_num_tokens=3)


def test_c10_two_that_shorten_caches_are_refused(family):
    model = model_of(family)
    for text, message in (
        ("avl + evict3r", "both evict from the cache of layer 0"),
        ("fastv(keep=0.5, before_layer=2, shrink_early_layers=True) + avl", "leave shrink_early_layers off"),
    ):
        with pytest.raises(SpecError, match=message):
            vlmattn.wrap(model, text)


@both
@pytest.mark.parametrize("text", ["avl(keep=0.4)", "evict3r(keep=0.4, floor=1)", MOVING[0], MOVING[3]])
@pytest.mark.parametrize("edit", ["var(sinks=[1, 2, 3], tau=1.5, rho=0.2, min_visual=0.05, first_layer=1)", "vhr"])
def test_c10_edits_of_attention_compose(family, attention, text, edit):
    """Groups of keys are cut with the keys: rows of a batch do what they do alone, and backends agree."""
    model, batch = model_of(family, attention), tiny.prompts(family)
    with vlmattn.wrap(model, f"{text} + {edit}") as session:
        session.record()
        together = generate(model, batch)
        masses = session.stats()["visual_mass"].values
        for row in range(2):
            alone = generate(model, tiny.single(batch, row))
            assert gap([a[row] for a in together.logits], [b[0] for b in alone.logits]) < 2e-4
        session.use_backend("reference")
        assert gap(together.logits, generate(model, batch).logits) < 2e-4
    with vlmattn.wrap(model, text):
        assert gap(together.logits, generate(model, batch).logits) > 1e-4
    assert masses.shape[0] == STEPS and float(masses.max()) > 0


def test_a_cache_is_not_cropped_into_what_was_decided_about(family):
    model, batch = model_of(family), tiny.single(tiny.prompts(family), 0)
    with vlmattn.wrap(model, "avl"):
        cache = generate(model, batch).past_key_values
        before = sizes(cache)
        cache.crop(-3)
        assert sizes(cache) == [n - 3 for n in before]
        with pytest.raises(CallError, match="at most 1 can go"):
            cache.crop(-3)
