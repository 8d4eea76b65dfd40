"""Generation modes, caches, masks and every trap of transformers that the engine handles or refuses."""

from __future__ import annotations

import copy
import gc
import json
import threading
import warnings
import weakref
from typing import Any

import oracle
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

import vlmattn
from vlmattn.errors import AlreadyWrappedError, CallError, UnsupportedModelError, VlmattnWarning

FAMILIES = sorted(tiny.MODELS)
PRUNE = ["fastv(keep=0.5, before_layer=2)", "random(keep=0.5, before_layer=0)", "uniform(keep=5, before_layer=1)"]
BOTH_ENDS = "random(keep=0.7, before_layer=0) + fastv(keep=0.5, before_layer=2)"

specs = pytest.mark.parametrize("text", [*PRUNE, BOTH_ENDS])


pytestmark = pytest.mark.usefixtures("no_grad")


def tokens(model: Any, batch: dict[str, torch.Tensor], steps: int = 8, **options: Any) -> torch.Tensor:
    options = {"do_sample": False} | options
    out = model.generate(**batch, max_new_tokens=steps, **options)
    return out[:, batch["input_ids"].shape[1] :]


# Generation modes


@specs
def test_beams_batch_equals_single(model, family, batch, text):
    with vlmattn.wrap(model, text):
        together = tokens(model, batch, num_beams=3, num_return_sequences=2)
        alone = [tokens(model, tiny.single(batch, row), num_beams=3, num_return_sequences=2) for row in (0, 1)]
    assert torch.equal(together, torch.cat(alone))
    assert together.shape == (4, 8)


@specs
def test_beams_of_one_prompt_share_the_selection(model, batch, text):
    with vlmattn.wrap(model, text) as session:
        tokens(model, batch, num_beams=3, steps=3)
        wide = session.report()
        tokens(model, batch, steps=3)
        narrow = session.report()
    for a, b in zip(wide.stages, narrow.stages, strict=True):
        assert a.kept == [row for row in b.kept for _ in range(3)]


@specs
def test_return_sequences_and_sampling_run_the_users_generate(model, batch, text):
    with vlmattn.wrap(model, text):
        torch.manual_seed(0)
        first = tokens(model, batch, do_sample=True, temperature=3.0, num_return_sequences=2)
        torch.manual_seed(0)
        again = tokens(model, batch, do_sample=True, temperature=3.0, num_return_sequences=2)
    assert first.shape == (4, 8) and torch.equal(first, again)
    assert not torch.equal(first[0], first[1])


@specs
def test_prompt_lookup_equals_greedy(model, family, batch, text):
    one = tiny.single(batch, 1)
    one["input_ids"][:, -4:] = torch.tensor([[5, 6, 5, 6]])
    with vlmattn.wrap(model, text):
        greedy = tokens(model, one, steps=12)
        lookup = tokens(model, one, steps=12, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy, lookup[:, : greedy.shape[1]])


@specs
def test_second_turn_uses_the_first_turns_selection(model, family, batch, text):
    one = tiny.single(batch, 0)
    prompt = oracle.read_prompts(model, one, tiny.IMAGE)[0]
    with vlmattn.wrap(model, text) as session:
        first = model.generate(**one, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        report = session.report()
        turn = torch.tensor([[7, 8, 9]])
        ids = torch.cat([first.sequences, turn], 1)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        second = model.generate(
            **inputs,
            past_key_values=first.past_key_values,
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    start = prompt.visual.tolist().index(True)
    stages = {
        stage.before_layer: [c for c, v in enumerate(prompt.visual.tolist()) if not v or c - start in stage.kept[0][0]]
        for stage in report.stages
    }
    said = [*first.sequences[0, -4:].tolist(), 7, 8, 9]
    expected = oracle.generate(model, prompt, stages, 11, follow=said)
    assert second.sequences[0, -4:].tolist() == expected.tokens[-4:]
    for got, want in zip(second.logits, expected.logits[-4:], strict=True):
        assert (got[0] - want).abs().max() < 1e-4


@specs
def test_several_images_in_one_prompt(model, family, text):
    batch = tiny.prompts(family, images=(2, 1, 0))
    with vlmattn.wrap(model, text) as session:
        together, report = tokens(model, batch), session.report()
    assert [len(row) for row in report.stages[0].kept] == [2, 1, 0]
    assert all(len(kept) > 0 for row in report.stages[0].kept for kept in row)
    assert together.shape == (3, 8)
    with vlmattn.wrap(model, text):
        row2 = {
            k: v[2:, batch["attention_mask"][2].bool()]
            for k, v in batch.items()
            if k in ("input_ids", "attention_mask")
        }
        assert torch.equal(tokens(model, row2), together[2:])


def test_two_adjacent_images_are_two_budgets():
    model, batch = tiny.llava(), tiny.prompts("llava", images=(2,))
    ids = batch["input_ids"][0].tolist()
    visual = [t for t in ids if t == tiny.IMAGE]
    rest = [t for t in ids if t != tiny.IMAGE]
    batch["input_ids"] = torch.tensor([rest[:1] + visual + rest[1:]])
    with vlmattn.wrap(model, "uniform(keep=3, before_layer=1)") as session:
        model(**batch)
        assert [len(kept) for kept in session.report().stages[0].kept[0]] == [3, 3]
    with vlmattn.wrap(model, "fastv(keep=6, before_layer=1, budget_scope=sample)") as session:
        model(**batch)
        assert sum(len(kept) for kept in session.report().stages[0].kept[0]) == 6


def test_generations_may_interleave(model, family):
    """The plan lives on the cache: two generations stepped in turn equal one after the other."""
    a, b = (tiny.single(tiny.prompts(family, seed=s), 0) for s in (1, 2))

    def steps(batch: dict[str, torch.Tensor]) -> Any:
        cache = DynamicCache(config=model.config.get_text_config())
        out, ids, position = model(**batch, past_key_values=cache, use_cache=True), [], None
        start = batch["input_ids"].shape[1]
        for step in range(4):
            token = out.logits[:, -1:].argmax(-1)
            ids.append(int(token))
            yield ids
            position = torch.tensor([[start + step]])
            out = model(input_ids=token, past_key_values=cache, position_ids=position, use_cache=True)

    with vlmattn.wrap(model, BOTH_ENDS):
        apart = [list(steps(x))[-1] for x in (a, b)]
        together = [list(pair) for pair in zip(steps(a), steps(b), strict=True)][-1]
    assert together == apart


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_unequal_rows_without_padding(attention):
    """Rows of equal length with 16 and 24 visual tokens: the model's own mask may be None, ours must not."""
    model, batch = tiny.qwen2_5_vl(attention=attention), tiny.prompts("qwen2_5_vl")
    ids = batch["input_ids"]
    filler = torch.randint(3, 80, (1, 6))
    batch["input_ids"] = torch.cat([torch.cat([ids[:1, 6:], filler], 1), ids[1:]])
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    batch["mm_token_type_ids"] = (batch["input_ids"] == tiny.IMAGE).long()
    for text in [*PRUNE[:2], BOTH_ENDS]:
        with vlmattn.wrap(model, text) as session:
            together = tokens(model, batch)
            assert len(set(map(len, session.report().positions))) == 2
            assert torch.equal(together, torch.cat([tokens(model, tiny.single(batch, row)) for row in (0, 1)]))


def test_rows_of_a_cache_carry_their_plan(family, model, batch):
    """Selecting, repeating and copying caches, as continuous batching and prompt reuse do."""
    step = torch.tensor([[7], [8]])

    def forward(cache: Any, rows: list[int]) -> torch.Tensor:
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 1).long()], 1)[rows]
        place = torch.tensor([[50], [60]])[rows]
        return model(
            input_ids=step[rows],
            attention_mask=mask,
            position_ids=place if family == "llava" else place.expand(3, -1, -1),
            past_key_values=cache,
            use_cache=True,
        ).logits

    with vlmattn.wrap(model, BOTH_ENDS):
        cache = model(**batch, use_cache=True).past_key_values
        copies = [copy.deepcopy(cache) for _ in range(4)]
        expected = forward(copies[0], [0, 1])
        copies[1].batch_select_indices(torch.tensor([1]))
        assert torch.allclose(forward(copies[1], [1]), expected[1:], atol=1e-5)
        copies[2].batch_repeat_interleave(2)
        assert torch.allclose(forward(copies[2], [0, 0, 1, 1]), expected.repeat_interleave(2, 0), atol=1e-5)
        copies[3].reorder_cache(torch.tensor([1, 0]))
        assert torch.allclose(forward(copies[3], [1, 0]), expected.flip(0), atol=1e-5)
        assert torch.allclose(forward(cache, [0, 1]), expected, atol=1e-5)


def test_pruned_layers_get_no_position_ids(model, batch):
    """Gapped position ids would make flash attention at batch 1 believe in packed sequences."""
    seen: dict[int, Any] = {}
    with vlmattn.wrap(model, "uniform(keep=4, before_layer=2)"):
        for index, layer in enumerate(model.model.language_model.layers):

            def look(module: Any, args: Any, kwargs: Any, index: int = index) -> None:
                seen[index] = kwargs["position_ids"]

            layer.register_forward_pre_hook(look, with_kwargs=True)
        model(**tiny.single(batch, 0))
    assert seen[2] is None and seen[3] is None


def test_without_an_attention_mask(model, family, batch):
    one = tiny.single(batch, 1)
    with vlmattn.wrap(model, BOTH_ENDS):
        expected = tokens(model, one)
        del one["attention_mask"]
        assert torch.equal(tokens(model, one), expected)


def test_a_reused_cache_forgets_the_old_prompt(model, family):
    first, second = (tiny.single(tiny.prompts(family, seed=s), 0) for s in (1, 2))
    with vlmattn.wrap(model, BOTH_ENDS):
        expected = tokens(model, second)
        cache = DynamicCache(config=model.config.get_text_config())
        tokens(model, first, past_key_values=cache)
        cache.reset()
        if cache.get_seq_length():  # older releases zero the keys and keep the length: the model or we refuse
            with pytest.raises((CallError, ValueError)):
                tokens(model, second, past_key_values=cache)
        else:
            assert torch.equal(tokens(model, second, past_key_values=cache), expected)


def test_forward_without_cache_equals_with_cache(model, batch):
    with vlmattn.wrap(model, BOTH_ENDS):
        with_cache = model(**batch, use_cache=True).logits
        without = model(**batch, use_cache=False)
    assert torch.allclose(with_cache, without.logits, atol=1e-5)
    assert without.past_key_values is None


def test_a_manual_loop_without_position_ids_continues_at_the_prompts_end():
    """Plain rotary models derive missing positions from the cache; after entry pruning that must be the logical
    length."""
    model = tiny.llava()
    one = tiny.single(tiny.prompts("llava"), 0)
    with vlmattn.wrap(model, "random(keep=0.5, before_layer=0)"):
        expected = tokens(model, one, steps=4)[0].tolist()
        out, got = model(**one, use_cache=True), []
        for _ in range(4):
            got.append(int(out.logits[0, -1].argmax()))
            out = model(input_ids=torch.tensor([[got[-1]]]), past_key_values=out.past_key_values, use_cache=True)
    assert got == expected


def test_arguments_by_position(model, family, batch):
    """Some wrappers call the inner model with `input_ids` by position."""
    with vlmattn.wrap(model, BOTH_ENDS):
        rest = {k: v for k, v in batch.items() if k != "input_ids"}
        assert torch.equal(model(batch["input_ids"], **rest).logits, model(**batch).logits)
        inner = model.model(batch["input_ids"], **rest).last_hidden_state
        assert torch.equal(model.lm_head(inner), model(**batch).logits)


def test_hidden_states_are_ragged_and_attentions_absent(model, batch):
    with vlmattn.wrap(model, "uniform(keep=4, before_layer=2)") as session:
        states = model(**batch, output_hidden_states=True).hidden_states
        last = max(map(len, session.report().positions))
    assert [state.shape[1] for state in states[:2]] == [batch["input_ids"].shape[1]] * 2
    assert states[-1].shape[1] == last


# Costs: no attention matrix, few hooks


class Shapes(TorchDispatchMode):
    """Records the shapes of all tensors that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.seen.append((str(func), tuple(tensor.shape)))
        return out


def squares(seen: list[tuple[str, tuple[int, ...]]], n: int) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, shape) for name, shape in seen if sum(size >= n for size in shape) >= 2]


@specs
def test_no_attention_matrix_is_allocated(family, text):
    """Nothing of ours has two dimensions >= N, and nothing at all is heads x N x N. N is larger than every model
    width."""
    model = tiny.MODELS[family](layers=4)
    batch = tiny.prompts(family)
    filler = torch.randint(3, 80, (2, 240))
    batch["input_ids"] = torch.cat([batch["input_ids"], filler], 1)
    batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(filler)], 1)
    if "mm_token_type_ids" in batch:
        batch["mm_token_type_ids"] = (batch["input_ids"] == tiny.IMAGE).long()
    n = batch["input_ids"].shape[1]
    with Shapes() as plain:
        model(**batch)
    for case in (text, "fastv(keep=0.5, before_layer=1, query=all)"):
        with vlmattn.wrap(model, case), Shapes() as wrapped:
            model(**batch)
        theirs = {shape for _, shape in squares(plain.seen, n)}
        ours = [entry for entry in squares(wrapped.seen, n) if entry[1] not in theirs]
        assert ours == []
        assert [s for _, s in wrapped.seen if len(s) >= 3 and s[-1] >= n and s[-2] >= n and s[-3] > 1] == []


def test_the_matrix_detector_detects(family):
    """The companion of the test above: eager attention is caught."""
    model, batch = tiny.MODELS[family](attention="eager"), tiny.prompts(family)
    n = batch["input_ids"].shape[1]
    with Shapes() as shapes:
        model(**batch)
    assert [s for _, s in shapes.seen if len(s) >= 3 and s[-1] >= n and s[-2] >= n and s[-3] > 1]


# Compile


def test_a_compiled_model_does_not_ignore_a_session(family):
    torch._dynamo.reset()
    model, batch = tiny.MODELS[family](), tiny.prompts(family)
    plain = model(**batch).logits
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(**batch).logits, plain, atol=1e-5)
    with vlmattn.wrap(model, "uniform(keep=4, before_layer=2)"):
        expected = model(**batch).logits
        assert torch.allclose(compiled(**batch).logits, expected, atol=1e-5)
    assert torch.allclose(compiled(**batch).logits, plain, atol=1e-5)
    torch._dynamo.reset()


def test_every_configuration_has_a_fresh_attention_name(model):
    config = model.model.language_model.config
    with vlmattn.wrap(model, "fastv(keep=0.5)") as session:
        first = config._attn_implementation
        session.set("fastv.keep", 0.25)
        second = config._attn_implementation
    with vlmattn.wrap(model, "fastv(keep=0.5)"):
        third = config._attn_implementation
    assert len({first, second, third, config._attn_implementation}) == 4


# Isolation


def test_the_vision_tower_and_the_top_config_keep_their_attention(model):
    with vlmattn.wrap(model, "fastv(keep=0.5)"):
        assert model.config._attn_implementation == "sdpa"
        assert model.config.vision_config._attn_implementation == "sdpa"
        assert model.model.language_model.config._attn_implementation.startswith("vlmattn_")


def test_a_model_that_shares_the_config_is_untouched(family):
    model = tiny.MODELS[family]()
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    twin.model.language_model.config = model.model.language_model.config
    for layer in twin.model.language_model.layers:
        layer.self_attn.config = model.model.language_model.config
    batch = tiny.prompts(family)
    plain = twin(**batch).logits
    first = vlmattn.wrap(model, "fastv(keep=0.5)")
    assert torch.equal(twin(**batch).logits, plain)
    pruned = model(**batch).logits
    second = vlmattn.wrap(twin, "uniform(keep=3, before_layer=1)")
    assert torch.equal(model(**batch).logits, pruned)
    first.remove()
    assert torch.equal(model(**batch).logits, plain)
    assert twin(**batch).logits.shape != plain.shape
    second.remove()
    assert torch.equal(twin(**batch).logits, plain)
    assert model.model.language_model.config._attn_implementation == "sdpa"


def test_two_threads_share_a_session(model, family):
    """Forward passes of four threads at once. (The M-RoPE family keeps `rope_deltas` on the model, so its threads must
    bring their positions, wrapped or not.)"""
    inputs: list[dict[str, Any]] = [tiny.single(tiny.prompts(family, seed=s), 0) for s in range(4)]
    for one in inputs:
        if family != "llava":
            one["position_ids"] = oracle.read_prompts(model, one, tiny.IMAGE)[0].positions[:, None]
    with vlmattn.wrap(model, BOTH_ENDS):
        expected = [model(**one).logits for one in inputs]
        results: dict[int, list[torch.Tensor]] = {i: [] for i in range(4)}

        def run(i: int) -> None:
            with torch.no_grad():
                results[i] += [model(**inputs[i]).logits for _ in range(5)]

        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(len(results[i]) == 5 and torch.equal(logits, expected[i]) for i in range(4) for logits in results[i])


def test_registries_have_their_first_size_after_100_wraps(model):
    before = (dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping))
    for _ in range(100):
        vlmattn.wrap(model, "fastv(keep=0.5)").remove()
    assert (dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)) == before


def test_copies_are_refused(model):
    with vlmattn.wrap(model, "fastv(keep=0.5)"):
        with pytest.raises(CallError, match="cannot be copied"):
            copy.deepcopy(model)
        with pytest.raises(CallError, match="cannot be copied"):
            copy.deepcopy(model.model.language_model.layers[1])
    assert copy.deepcopy(model) is not model


def test_save_pretrained_writes_no_trace(model, batch, tmp_path):
    logits = model(**batch).logits
    with vlmattn.wrap(model, BOTH_ENDS):
        model.save_pretrained(tmp_path)
    assert "vlmattn" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.allclose(again(**batch).logits, logits, atol=1e-6)


def test_moving_the_model_while_wrapped(model, batch):
    with vlmattn.wrap(model, BOTH_ENDS):
        model.to(torch.float64)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        a = model(**wide).logits
        model.to(torch.float32)
        b = model(**batch).logits
    assert a.dtype == torch.float64
    assert torch.allclose(a.float(), b, atol=1e-3)


def test_half_precision_runs(model, batch):
    model.to(torch.bfloat16)
    low = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
    with vlmattn.wrap(model, BOTH_ENDS) as session:
        assert tokens(model, low).shape == (2, 8)
        values = tiny.LAYERS * 2 * model.model.language_model.layers[0].self_attn.k_proj.out_features
        assert session.report().kv_bytes_full == sum(session.report().prompt_tokens) * values * 2


def test_mixed_dtypes_run(model, family, batch):
    """A bfloat16 decoder behind a float32 tower, as some checkpoints are loaded."""
    model.model.language_model.to(torch.bfloat16)
    model.lm_head.to(torch.bfloat16)
    plain = tokens(model, batch)
    with vlmattn.wrap(model, "fastv(keep=1.0)"):
        assert torch.equal(tokens(model, batch), plain)
    with vlmattn.wrap(model, BOTH_ENDS) as session:
        assert tokens(model, batch).shape == plain.shape
        values = tiny.LAYERS * 2 * model.model.language_model.layers[0].self_attn.k_proj.out_features
        assert session.report().kv_bytes_full == sum(session.report().prompt_tokens) * values * 2


def test_fastv_in_bfloat16_keeps_nearly_the_same_tokens(model, batch):
    """Exact equality needs float32; half precision is compared by overlap."""
    kept = []
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        with vlmattn.wrap(model, "fastv(keep=0.5, before_layer=1)") as session:
            model(**cast)
            kept.append([set(image) for row in session.report().stages[0].kept for image in row])
    overlap = sum(len(a & b) for a, b in zip(*kept, strict=True)) / sum(map(len, kept[0]))
    assert overlap >= 0.75


# Refusals


def refused(match: str) -> Any:
    return pytest.raises(CallError, match=match)


@pytest.mark.parametrize("text", PRUNE)
def test_calls_that_cannot_work_are_refused(model, batch, text):
    plain = model(**batch).logits
    with vlmattn.wrap(model, text):
        with refused("use_cache"):
            model.generate(**batch, max_new_tokens=2, use_cache=False)
        with refused("prefill_chunk_size"):
            model.generate(**batch, max_new_tokens=2, prefill_chunk_size=4)
        with refused("DynamicCache"):
            model.generate(**batch, max_new_tokens=2, cache_implementation="static")
        with refused("labels"):
            model(**batch, labels=batch["input_ids"])
        with refused("eval"):
            model.train()
            model(**batch)
        model.eval()
        right = batch | {"attention_mask": batch["attention_mask"].flip(1)}
        with refused("right-padded"):
            model(**right)
        prepared = batch | {"attention_mask": torch.ones(2, 1, 35, 35, dtype=torch.bool)}
        with refused("plain"):
            model.model.language_model.eval()
            model(**prepared, position_ids=torch.zeros(3, 2, batch["input_ids"].shape[1], dtype=torch.long)[-1:][0])
        embeds = model.get_input_embeddings()(batch["input_ids"])
        with refused("input_ids"):
            rest = {k: v for k, v in batch.items() if k not in ("input_ids", "mm_token_type_ids")}
            extra = {} if "image_grid_thw" not in batch else {"position_ids": torch.zeros(3, *embeds.shape[:2]).long()}
            model(inputs_embeds=embeds, **rest, **extra)
        assert model(**batch).logits.shape != plain.shape
    assert torch.equal(model(**batch).logits, plain)


def test_an_image_in_a_later_turn_is_refused(family, model):
    one = tiny.single(tiny.prompts(family), 0)
    with vlmattn.wrap(model, "uniform(keep=4, before_layer=1)"):
        cache = model(**one, use_cache=True).past_key_values
        extra = {} if family == "llava" else {"position_ids": torch.zeros(3, 1, one["input_ids"].shape[1]).long()}
        mask = torch.ones(1, 2 * one["input_ids"].shape[1]).long()
        with refused("already holds a conversation"):
            model(**(one | {"attention_mask": mask}), past_key_values=cache, use_cache=True, **extra)


def test_options_in_a_positional_generation_config_are_refused(model, batch):
    from transformers import GenerationConfig

    ids = batch.pop("input_ids")
    with vlmattn.wrap(model, "fastv(keep=0.5)"):
        for option in ({"use_cache": False}, {"prefill_chunk_size": 4}):
            with refused(next(iter(option))):
                model.generate(ids, GenerationConfig(max_new_tokens=2, **option), **batch)


def test_another_attention_implementation_while_wrapped_is_refused(model, batch):
    plain = model(**batch).logits
    session = vlmattn.wrap(model, "fastv(keep=0.5)")
    model.set_attn_implementation("eager")
    with refused("'eager' while the session was installed"):
        model(**batch)
    session.remove()
    assert model.model.language_model.config._attn_implementation == "eager"
    assert torch.allclose(model(**batch).logits[:, -1], plain[:, -1], atol=1e-4)


def test_a_tensor_of_logits_to_keep_is_refused(model, batch):
    with vlmattn.wrap(model, "fastv(keep=0.5)"):
        with refused("logits_to_keep"):
            model(**batch, logits_to_keep=torch.tensor([3]))
        assert model(**batch, logits_to_keep=2).logits.shape[1] == 2


def test_the_prompt_must_hold_the_images(model, family, batch):
    one = tiny.single(batch, 0)
    with vlmattn.wrap(model, "fastv(keep=0.5)") as session:
        for bad in (0, -3, 1.5, True):
            with refused("at least 1"), session.prompt(bad):
                model(**one)
        with refused("the prompt must hold all images"), session.prompt(5):
            model(**one)


def test_a_prompt_of_embeddings_is_told_once(model, batch):
    one = tiny.single(batch, 0)
    embeds = model.get_input_embeddings()(one["input_ids"].clamp_max(80))
    with vlmattn.wrap(model, "fastv(keep=0.5)"):
        with pytest.warns(VlmattnWarning, match="inputs_embeds"):
            model(inputs_embeds=embeds, attention_mask=one["attention_mask"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(inputs_embeds=embeds, attention_mask=one["attention_mask"])


def test_a_failed_call_does_not_reach_a_direct_call_of_the_text_model(model, batch):
    text = torch.randint(3, 80, (1, 12))
    expected = model.model.language_model(input_ids=text).last_hidden_state
    broken = batch | {"pixel_values": batch["pixel_values"][:1]}
    with vlmattn.wrap(model, "random(keep=0.5, before_layer=0)"):
        with pytest.raises((ValueError, RuntimeError, IndexError, StopIteration)):
            model(**broken)
        assert torch.equal(model.model.language_model(input_ids=text).last_hidden_state, expected)


def test_wrapped_models_can_be_collected(family):
    model = tiny.MODELS[family]()
    session = vlmattn.wrap(model, BOTH_ENDS)
    alive = weakref.ref(model)
    del session
    gc.collect()
    with pytest.raises(AlreadyWrappedError):
        vlmattn.wrap(model, "none")
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("text", [*PRUNE, BOTH_ENDS, "vhr", "vhr + random(keep=0.5, before_layer=0)"])
def test_an_emptied_cache_has_no_plan(model, family, batch, text):
    """A text-only prompt, or a session that does nothing, on a cache that once held a pruned prompt."""
    words = {"input_ids": torch.randint(3, 80, (2, 9)), "attention_mask": torch.ones(2, 9).long()}
    words["attention_mask"][0, :3] = 0
    expected, plain = tokens(model, words), tokens(model, batch)
    cache = DynamicCache(config=model.config.get_text_config())
    with vlmattn.wrap(model, text):
        tokens(model, batch, past_key_values=cache)
        cache.reset()
        if cache.get_seq_length():
            pytest.skip("this transformers release does not empty a dynamic cache")
        assert torch.equal(tokens(model, words, past_key_values=cache), expected)
        cache.reset()
        tokens(model, batch, past_key_values=cache)
        cache.reset()
    with vlmattn.wrap(model, "none"):
        assert torch.equal(tokens(model, batch, past_key_values=cache), plain)


def test_a_cache_is_not_cropped_to_a_length(model, batch):
    with vlmattn.wrap(model, BOTH_ENDS):
        cache = model(**batch, use_cache=True).past_key_values
        with refused("crop"):
            cache.crop(20)


def test_videos_and_images_in_one_prompt():
    """Video tokens are visual tokens; every video and image has a budget of its own."""
    model = tiny.qwen2_5_vl()
    ids = torch.tensor([[1, 92, *[tiny.VIDEO] * 32, 93, 5, 6, 92, *[tiny.IMAGE] * 16, 93, 7, 8, 9]])
    kinds = (ids == tiny.IMAGE).long() + 2 * (ids == tiny.VIDEO).long()
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": kinds,
        "pixel_values": torch.randn(64, 1176),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "pixel_values_videos": torch.randn(128, 1176),
        "video_grid_thw": torch.tensor([[2, 8, 8]]),
    }
    plain = model(**batch).logits
    for text, counts in ((PRUNE[0], [16, 8]), (PRUNE[1], [16, 8]), ("uniform(keep=8, mode='2d')", [8, 6])):
        with vlmattn.wrap(model, text) as session:
            once = tokens(model, batch)
            report = session.report()
            assert [len(kept) for kept in report.stages[0].kept[0]] == counts
            assert torch.equal(tokens(model, batch), once)
    assert torch.equal(model(**batch).logits, plain)


def test_scores_are_fp32_whatever_the_model():
    from vlmattn.kernels.reference import attention_received

    generator = torch.Generator().manual_seed(0)
    query, key = (400 * torch.randn(1, 2, 6, 64, generator=generator) for _ in range(2))
    rows = torch.zeros(1, 6, dtype=torch.bool)
    rows[0, -1] = True
    half = attention_received(query.half(), key.half(), None, 1e-5, rows)
    assert half.sum().item() == pytest.approx(1.0, abs=1e-4)
    assert torch.allclose(half, attention_received(query.half().float(), key.half().float(), None, 1e-5, rows))


def test_no_op_methods_refuse_nothing(model, batch):
    with vlmattn.wrap(model, "fastv(keep=1.0)"):
        out = model.generate(**batch, max_new_tokens=3, do_sample=False, use_cache=False)
    assert out.shape[1] == batch["input_ids"].shape[1] + 3


def test_a_call_that_fails_leaves_no_state(model, batch):
    """After an error in the middle of a pass the next call is as if nothing had happened."""
    with vlmattn.wrap(model, BOTH_ENDS):
        good = tokens(model, batch)
        broken = batch | {"pixel_values": batch["pixel_values"][:1]}
        with pytest.raises((ValueError, RuntimeError, IndexError, StopIteration)):
            model(**broken)
        text_only = {k: batch[k][:, -4:] for k in ("input_ids", "attention_mask")}
        text_only["input_ids"] = text_only["input_ids"].clamp(3, 80)
        assert model(**text_only).logits.shape[1] == 4
        assert torch.equal(tokens(model, batch), good)


def test_flex_attention_is_refused():
    model = tiny.llava()
    model.model.language_model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="flex_attention"):
        vlmattn.wrap(model, "fastv(keep=0.5)")
    assert model.model.language_model.config._attn_implementation == "flex_attention"


def test_sliding_windows_are_refused():
    model = tiny.qwen2_5_vl()
    config = model.model.language_model.config
    config.sliding_window, config.layer_types = (
        8,
        ["full_attention", "full_attention", "sliding_attention", "full_attention"],
    )
    model.model.language_model.has_sliding_layers = True
    with vlmattn.wrap(model, "fastv(keep=0.5)"), refused("Sliding"):
        model.generate(**tiny.prompts("qwen2_5_vl"), max_new_tokens=2)


def test_no_warnings_from_a_wrapped_generation(model, batch):
    tokens(model, batch, steps=1)
    with vlmattn.wrap(model, BOTH_ENDS), warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens(model, batch)
