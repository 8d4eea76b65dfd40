"""Attention edits and head reinforcement: kernels against the naive reference, worked examples, both families."""

from __future__ import annotations

import itertools
from typing import Any

import oracle
import pytest
import tiny
import torch

import vlmattn
from vlmattn import spec
from vlmattn.edits import NOT_A_KEY, AttnEdit
from vlmattn.errors import LayerError, SpecError, UnsupportedModelError
from vlmattn.kernels import naive, rows
from vlmattn.kernels.rows import Request
from vlmattn.methods.attend.var import VAR, sink_strength
from vlmattn.methods.attend.vhr import VHR, divergence
from vlmattn.methods.base import Editor, Resizer, Selector
from vlmattn.methods.cache import Evictor
from vlmattn.methods.rehearsal import Rehearser
from vlmattn.methods.segments import Segmenter
from vlmattn.patches.families import supported

FAMILIES = sorted(tiny.MODELS)
SINKS = "sinks=[1, 2, 3], tau=1.5, rho=0.2, min_visual=0.05, first_layer=1"
VAR_TINY = f"var({SINKS})"
COMPOSED = [
    VAR_TINY,
    "vhr",
    f"{VAR_TINY} + vhr",
    f"fastv(keep=0.5, before_layer=1) + {VAR_TINY}",
    "random(keep=0.6, before_layer=0) + vhr",
    f"fastv(keep=0.5, before_layer=2) + {VAR_TINY} + vhr",
]


pytestmark = pytest.mark.usefixtures("no_grad")


def generate(model: Any, batch: dict[str, torch.Tensor], steps: int = 16, **options: Any) -> Any:
    return model.generate(
        **batch, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )


def gap(a: Any, b: Any) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


# Kernels

EDITS = {
    "take": AttnEdit(take=(0.0, 0.6, 0.0, 0.6), min_visual=0.2, min_share=0.5),
    "scale": AttnEdit(scale=(1.0, 1.0, 1.3, 0.7)),
    "logit": AttnEdit(logit_strength=(0.0, 0.0, 0.5, 0.5)),
    "coefficient": AttnEdit(coefficient=(1.0, 0.5, 1.5, 0.2)),
    "renormalised": AttnEdit(coefficient=(1.0, 0.5, 1.5, 0.2), renormalise=True),
    "hidden": AttnEdit(hide=(2, 3)),
    "hidden and more": AttnEdit(
        hide=(0, 2), logit_strength=(0, 0, 0.5, 0.5), coefficient=(1.0, 0.5, 1.5, 0.2), renormalise=True
    ),
    "several": AttnEdit(scale=(1.0, 1.0, 1.2, 1.0), take=(0.0, 0.4, 0.0, 0.4), min_visual=0.1),
}


def case(heads: int, kv_heads: int, queries: int, keys: int, masked: bool, seed: int = 0) -> dict[str, Any]:
    """A call of two samples with different image positions; the second is left-padded by 3."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, h, n, 16, generator=g) * 2 for h, n in ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    )
    tag = torch.zeros(2, keys, dtype=torch.uint8)
    tag[0, 2:12], tag[1, 5:17] = 2, 2
    tag[0, 0], tag[0, 4], tag[1, 3], tag[1, 9] = 1, 3, 1, 3
    mask = None
    if masked:
        tag[1, :3] = NOT_A_KEY
        causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        mask = causal[None, None] & (tag != NOT_A_KEY)[:, None, None, :]
    touched = torch.ones(2, queries, dtype=torch.bool)
    if queries > 1:
        touched[0, :12], touched[1, :17] = False, False
    return {"query": q, "key": k, "value": v, "mask": mask, "scaling": 0.25, "tag": tag, "rows": touched}


def attend(backend: Any, call: dict[str, Any], edit: AttnEdit | None, active: tuple[bool, bool] = (True, True)) -> Any:
    kv = call["query"].shape[1] // call["key"].shape[1]
    k, v = (call[n].repeat_interleave(kv, 1) for n in ("key", "value"))
    queries, keys = call["query"].shape[2], k.shape[2]
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) if call["mask"] is None else call["mask"]
    out = torch.nn.functional.scaled_dot_product_attention(call["query"], k, v, mask, scale=call["scaling"]).transpose(
        1, 2
    )
    request = Request(call["tag"], torch.tensor(active), call["rows"], edit, -1)
    result, statistics = backend.apply(*(call[n] for n in ("query", "key", "value", "mask", "scaling")), out, request)
    return out, result, statistics


@pytest.mark.parametrize("edit", sorted(EDITS))
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (7, 1)])
@pytest.mark.parametrize(("queries", "keys"), [(24, 24), (1, 31), (3, 31)])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_equals_reference(edit, heads, queries, keys, masked):
    call = case(*heads, queries, keys, masked)
    _, quick, quick_statistics = attend(rows, call, EDITS[edit])
    _, slow, slow_statistics = attend(naive, call, EDITS[edit])
    real = torch.ones(2, queries, dtype=torch.bool)
    if masked and queries == keys:
        real[1, :3] = False
    assert (quick - slow)[real].abs().max() < 1e-5
    assert (quick_statistics - slow_statistics).abs().max() < 1e-5


def test_untouched_rows_and_samples_are_bit_identical():
    call = case(4, 2, 24, 24, True)
    out, result, _ = attend(rows, call, EDITS["coefficient"])
    assert torch.equal(result[~call["rows"]], out[~call["rows"]])
    assert not torch.equal(result[call["rows"]], out[call["rows"]])
    out, result, _ = attend(rows, call, EDITS["coefficient"], active=(False, True))
    assert torch.equal(result[0], out[0]) and not torch.equal(result[1], out[1])
    shut = AttnEdit(take=(0.0, 0.6, 0.0, 0.6), min_visual=1.0)
    out, result, _ = attend(rows, call, shut)
    assert torch.equal(result, out)


def test_edited_rows_sum_to_one_and_keep_ratios():
    call = case(4, 2, 24, 24, False)
    request = Request(call["tag"], torch.tensor([True, True]), call["rows"], EDITS["take"], None)
    before = rows.probabilities(call["query"], call["key"], None, 0.25, torch.arange(17, 24), request)
    after, gate = rows.edit_rows(before, call["tag"], EDITS["take"])
    assert bool(gate.any()) and not bool(gate.all())
    assert (after.sum(-1) - 1).abs().max() < 1e-6 and bool((after >= 0).all())
    text = (call["tag"] == 0)[:, None, None, :].expand_as(after)
    assert torch.equal(after[text], before[text])
    for group, factor in ((3, 0.4), (1, 0.4)):
        sinks = (call["tag"] == group)[:, None, None, :].expand_as(after) & gate[..., None] & (before > 1e-6)
        assert torch.allclose(after[sinks], factor * before[sinks])
    visual = (call["tag"] == 2)[:, None, None, :].expand_as(after) & gate[..., None]
    grown = torch.where(visual & (before > 1e-6), after / before, torch.nan)
    spread = grown.nan_to_num(-torch.inf).amax(-1) - grown.nan_to_num(torch.inf).amin(-1)
    assert spread[gate].abs().max() < 1e-4


# VAR: worked examples of the card


@pytest.mark.parametrize(
    ("p", "rho", "row", "output"),
    [
        (0.4, 0.5, [0.24, 0.12, 0.22, 0.22, 0.20], 3.04),
        (0.6, 0.5, [0.16, 0.08, 0.28, 0.28, 0.20], 3.36),
        (0.6, 0.8, [0.40, 0.20, 0.10, 0.10, 0.20], 2.40),
    ],
)
def test_var_worked_row(p, rho, row, output):
    probabilities = torch.tensor([0.40, 0.20, 0.10, 0.10, 0.20])[None, None, None]
    tag = torch.tensor([[1, 3, 2, 2, 0]], dtype=torch.uint8)
    after, gate = rows.edit_rows(probabilities, tag, VAR(p=p, rho=rho).edit(2))
    assert after[0, 0, 0].tolist() == pytest.approx(row, abs=1e-6)
    values = torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0])
    assert float(after[0, 0, 0] @ values) == pytest.approx(output, abs=1e-6)
    assert bool(gate[0, 0, 0]) is (rho == 0.5)


def test_var_sink_strength():
    """The card prints 52.43 and 34.95; they include 1e-6 under the root."""
    hidden = torch.full((1, 1, 4096), 0.1)
    hidden[0, 0, 2533], hidden[0, 0, 1415] = -30.0, 20.0
    assert float(sink_strength(hidden, (1415, 2533))) == pytest.approx(52.43, abs=0.01)
    assert float(sink_strength(hidden, (1415,))) == pytest.approx(34.95, abs=0.01)


@pytest.mark.parametrize("bad", ["var(p=1.2)", "var(rho=-1)", "var(tau=0)", "var(sinks=[-1])", "vhr(alpha=-1)",
                                 "vhr(depth=1.5)", "vhr(outlier_rule=3)",
                                 "var(sinks=5)", "var(tau=x)", "var(sinks=[True])", "fastv(query=[1])"])  # fmt: skip
def test_bad_values(bad):
    with pytest.raises(SpecError):
        spec.parse(bad)


def test_layers_that_do_not_exist(model):
    nothing = "vhr(depth=0, first_layer=None)"
    for text in ("var(sinks=[1], first_layer=3)", "var(sinks=[1], last_layer=9)", "vhr(first_layer=7)", "vhr(depth=9)"):
        with pytest.raises(LayerError, match="4 decoder layers"):
            vlmattn.wrap(model, text)
    with pytest.raises(LayerError, match="no layer of 4 is left"):
        vlmattn.wrap(model, nothing)
    with vlmattn.wrap(model, "var(sinks=[64])"), pytest.raises(SpecError, match="64 hidden dimensions"):
        model(**tiny.prompts("llava" if "Llava" in type(model).__name__ else "qwen2_5_vl"))


def test_an_unknown_checkpoint_names_discover(model):
    with pytest.raises(SpecError, match="vlmattn discover"):
        vlmattn.wrap(model, "var")


def test_known_checkpoints_have_their_sinks(model, family):
    from vlmattn import presets

    config = model.config
    text = config.get_text_config()
    if family == "llava":
        config._name_or_path, text.hidden_size, text.num_hidden_layers = "llava-hf/llava-1.5-7b-hf", 4096, 32
        assert presets.sink_dims(config) == (1415, 2533)
    text.hidden_size = 77
    with pytest.raises(SpecError):
        presets.sink_dims(config)


# VHR: worked example of the card


def test_vhr_worked_layer():
    image = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.5, 0.5]]])
    text = torch.tensor([[[0.0, 0.0], [0.0, 1.0], [0.0, 9.0], [0.5, 0.4]]])
    assert divergence(image, text, outlier_rule=False)[0].tolist() == pytest.approx([1, 1, 9.487, 0.1], abs=1e-3)
    assert divergence(image, text)[0].tolist() == pytest.approx([1, 1, 0, 0.1], abs=1e-6)
    assert VHR().gain(image, text)[0].tolist() == [[2.0, 2.0, 1.0, 1.0]]
    assert VHR(outlier_rule=False).gain(image, text)[0].tolist() == [[1.0, 1.0, 2.0, 1.0]]


def test_vhr_layers():
    assert VHR().layers(32) == [1, *range(18, 32)]
    assert VHR(first_layer=None, depth=2).layers(4) == [2, 3]
    assert VHR().layers(28) == [1, *range(16, 28)]


def test_vhr_without_a_difference_is_the_identity():
    same = torch.randn(2, 4, 8)
    assert VHR().gain(same, same)[0].tolist() == [[1.0] * 4] * 2


# On models


NOTHING = [
    "var(p=0.0)",
    "var(sinks=[])",
    f"var({SINKS}, p=0.0)",
    "vhr(alpha=1.0)",
    "var(sinks=[1], tau=100.0)",
    f"var({SINKS.replace('rho=0.2', 'rho=1.0')})",
]


@pytest.mark.parametrize("text", NOTHING)
def test_nothing_to_do_is_bit_identical(model, batch, text):
    logits, out = model(**batch).logits, generate(model, batch, 4).sequences
    with vlmattn.wrap(model, text):
        assert torch.equal(model(**batch).logits, logits)
        assert torch.equal(generate(model, batch, 4).sequences, out)


@pytest.mark.parametrize("text", COMPOSED)
def test_backends_agree_over_prefill_and_16_steps(model, batch, text):
    plain = generate(model, batch).logits
    with vlmattn.wrap(model, text) as session:
        quick = generate(model, batch)
        session.use_backend("reference")
        slow = generate(model, batch)
    assert torch.equal(quick.sequences, slow.sequences)
    assert gap(quick.logits, slow.logits) < 1e-5
    assert gap(quick.logits, plain) > 1e-3


PARTS = {
    "var": VAR_TINY,
    "fastv": "fastv(keep=0.6, before_layer=2)",
    "random": "random(keep=0.7, before_layer=0)",
    "noimage": "noimage(before_layer=3)",
    "layerskip": "layerskip(layers=[1])",
    "pai": "pai(first_layer=1, last_layer=2)",
    "vaf": "vaf(first_layer=0, last_layer=0)",
    "hgai": "hgai(first_layer=2, last_layer=3)",
    "adhh": "adhh(heads=[(1, 0), (2, 3)], tau=0.01)",
    "paint": "paint(first_layer=0)",
    "schedule": "schedule(keep=0.75)",
}


def _reads(pruner: Selector, layer: int) -> bool:
    """Whether a pruner ranks by what happens in a layer."""
    if pruner.attention is None and "layer_keys" not in pruner.needs:
        return False
    upcoming = pruner.attention is not None and pruner.attention.layer == "upcoming"
    return layer + (not upcoming) in pruner.stages(tiny.LAYERS)


EVERYWHERE = [
    name
    for name, info in spec.registry().items()
    if not info.cls.through and info.kind != "decode" and not issubclass(info.cls, Resizer)
]
"""Those of kind `decode` have pairs of their own in test_decode_contract.py."""


def _edits(pair: tuple[str, ...]) -> bool:
    """Whether there is more than pruners in it."""
    return any(not issubclass(spec.registry()[name].cls, Selector) for name in pair)


PAIRED = list({frozenset(pair): pair for pair in itertools.combinations(EVERYWHERE, 2)}.values())
CASES = [
    pytest.param(
        family, pair, marks=pytest.mark.slow if place or not _edits(pair) else (), id="+".join((family, *pair))
    )
    for place, family in enumerate(FAMILIES)
    for pair in PAIRED
]


@pytest.mark.parametrize(("family", "pair"), CASES)
def test_all_pairs_agree_with_the_reference_backend(family, model, batch, pair):
    """In both orders of the spec: the order of composition is fixed. What collides, or lacks something, says so."""
    parts = [PARTS.get(name, f"{name}(before_layer=1)" if name == "uniform" else name) for name in pair]
    pruners = [m for m in spec.parse(parts) if isinstance(m, Selector) and not m.is_noop]
    editors = [m for m in spec.parse(parts) if isinstance(m, Editor)]
    layers = [layer for pruner in pruners for layer in pruner.stages(tiny.LAYERS)]
    edited = [layer for editor in editors for layer in editor.layers(tiny.LAYERS)]
    lacking = any("text_tower" in pruner.requires for pruner in pruners)
    again = any(known.model_type == family and known.deepstack for known in supported())
    blind = "layerskip" in pair and (again or any(_reads(pruner, 1) for pruner in pruners))
    whole = any(isinstance(editor, Rehearser | Segmenter) for editor in editors)
    late = whole and (any(layers) or any(isinstance(method, Evictor) for method in spec.parse(parts)))
    evicting = sum(isinstance(method, Evictor) for method in spec.parse(parts))
    clash = any(len(table) > len(set(table)) for table in (layers, edited)) or evicting > 1
    idle = "layerskip" in pair and any(set(editor.layers(tiny.LAYERS)) == {1} for editor in editors)
    if lacking or blind or late or clash or idle:
        said = (
            r"needs .*: use |both (prune before|edit attention in|evict from the cache of) layer|reads the|must stay"
            r"|: prune before layer 0|takes keys from|acts only in layers"
        )
        with pytest.raises((UnsupportedModelError, SpecError, LayerError), match=said):
            vlmattn.wrap(model, parts)
        return
    runs = []
    for backend, order in (("rows", parts), ("reference", parts), ("rows", parts[::-1])):
        with vlmattn.wrap(model, " + ".join(order)) as session:
            session.use_backend(backend)
            runs.append(generate(model, batch, 8).logits)
    assert gap(runs[0], runs[1]) < 1e-5 * max(1.0, max(logits.abs().max().item() for logits in runs[0]))
    assert gap(runs[0], runs[2]) == 0.0


@pytest.mark.parametrize("text", COMPOSED)
def test_eager_and_sdpa_agree(family, batch, text):
    runs = []
    for attention in ("sdpa", "eager"):
        with vlmattn.wrap(tiny.MODELS[family](attention=attention), text) as session:
            runs.append(generate(session.model, batch, 8).logits)
    assert gap(*runs) < 1e-4


@pytest.mark.parametrize("text", COMPOSED)
def test_a_batch_equals_its_rows_and_beams(model, batch, text):
    with vlmattn.wrap(model, text):
        together = generate(model, batch)
        beams = model.generate(**batch, max_new_tokens=6, do_sample=False, num_beams=3, num_return_sequences=2)
        new = beams[:, batch["input_ids"].shape[1] :]
        for row in (0, 1):
            one = tiny.single(batch, row)
            alone = generate(model, one)
            assert gap([x[row] for x in together.logits], [x[0] for x in alone.logits]) < 1e-4
            own = model.generate(**one, max_new_tokens=6, do_sample=False, num_beams=3, num_return_sequences=2)
            assert torch.equal(own[:, one["input_ids"].shape[1] :], new[2 * row : 2 * row + 2])


def test_rows_before_and_of_the_image_are_untouched(model, batch):
    one = tiny.single(batch, 1)
    states = model(**one, output_hidden_states=True).hidden_states
    with vlmattn.wrap(model, VAR_TINY):
        changed = model(**one, output_hidden_states=True).hidden_states
    visual = (one["input_ids"][0] == tiny.IMAGE).nonzero()[:, 0]
    last = int(visual[-1]) + 1
    for layer in range(1, len(states)):
        assert torch.equal(states[layer][:, :last], changed[layer][:, :last])
    assert torch.equal(states[1], changed[1])
    assert not torch.equal(states[2][:, last:], changed[2][:, last:])


def test_vhr_reads_a_standalone_text_run(model, family, batch):
    """With one reinforced layer, the first, its divergence must equal one computed from two separate runs."""
    seen: list[torch.Tensor] = []

    def look(module: Any, args: Any) -> None:
        seen.append(args[0])

    handle = model.model.language_model.layers[1].self_attn.o_proj.register_forward_pre_hook(look)
    expected = []
    for row in (0, 1):
        one = tiny.single(batch, row)
        ids = one["input_ids"][0]
        wrappers = [] if family == "llava" else [92, 93]
        keep = torch.tensor([i for i, t in enumerate(ids.tolist()) if t not in (tiny.IMAGE, *wrappers)])
        model(**one)
        model(input_ids=ids[keep][None], attention_mask=torch.ones(1, len(keep)).long())
        image, text = (x[:, -1].view(1, 4, -1) for x in seen[-2:])
        expected.append(divergence(image, text))
    handle.remove()
    with vlmattn.wrap(model, "vhr(depth=0)") as session:
        out = generate(model, batch, 3)
        vhd = session.stats()["divergence"].values[1]
    assert (vhd - torch.cat(expected)).abs().max() < 1e-4
    assert out.past_key_values.layers[0].keys.shape[0] == 2


def test_vhr_leaves_rows_without_an_image_alone(model, family):
    """Both streams of such a row say the same; rounding must not choose heads."""
    batch = tiny.prompts(family, images=(1, 0))
    plain = model(**batch).logits
    with vlmattn.wrap(model, "vhr") as session:
        changed = model(**batch).logits
        gain = session.stats()["gain"].values[1]
    assert (changed[1] - plain[1]).abs().max() < 1e-4
    assert (changed[0] - plain[0]).abs().max() > 1e-2
    assert gain[1].tolist() == [1.0] * 4


def test_vhr_reads_guesses_as_text(model, batch):
    """Prompt lookup guesses image wrappers; the text-only stream must still end with the prompt."""
    one = tiny.single(batch, 1)
    tail = torch.tensor([[50, 51, 92, 93, 20, 21, 22, 50, 51]])
    one["input_ids"] = torch.cat([one["input_ids"], tail], 1)
    one["attention_mask"] = torch.ones_like(one["input_ids"])
    if "mm_token_type_ids" in one:
        one["mm_token_type_ids"] = (one["input_ids"] == tiny.IMAGE).long()
    with vlmattn.wrap(model, "vhr") as session:
        greedy = model.generate(**one, max_new_tokens=10, do_sample=False)
        gain = session.stats()["gain"].values
        lookup = model.generate(**one, max_new_tokens=10, do_sample=False, prompt_lookup_num_tokens=2)
        assert torch.equal(session.stats()["gain"].values.nan_to_num(), gain.nan_to_num())
    assert torch.equal(greedy, lookup)


def test_vhr_scales_the_chosen_heads(model, batch):
    """alpha on the chosen heads equals scaling the columns of the projection, per sample."""
    one = tiny.single(batch, 0)
    with vlmattn.wrap(model, "vhr(depth=1, first_layer=None, alpha=3.0)") as session:
        logits = model(**one).logits
        gain = session.stats()["gain"].values[3][0]
    assert sorted(gain.tolist()) == [1.0, 1.0, 3.0, 3.0]
    projection = model.model.language_model.layers[3].self_attn.o_proj
    projection.weight.data *= gain.repeat_interleave(projection.in_features // 4)
    assert (model(**one).logits - logits).abs().max() < 1e-4


def test_vhr_heads_are_fixed_for_the_generation(model, batch):
    with vlmattn.wrap(model, "vhr") as session:
        generate(model, batch, 2)
        first = session.stats()["gain"].values
        generate(model, batch, 12)
        assert torch.equal(session.stats()["gain"].values.nan_to_num(), first.nan_to_num())


def test_text_only_prompts_pass_through(model, family):
    batch = tiny.prompts(family, images=(0, 0))
    logits = model(**batch).logits
    with vlmattn.wrap(model, f"{VAR_TINY} + vhr"):
        assert torch.equal(model(**batch).logits, logits)


def test_prompt_lookup_equals_greedy(model, batch):
    one = tiny.single(batch, 1)
    one["input_ids"][:, -4:] = torch.tensor([[5, 6, 5, 6]])
    with vlmattn.wrap(model, f"fastv(before_layer=2) + {VAR_TINY} + vhr"):
        greedy = model.generate(**one, max_new_tokens=12, do_sample=False)
        lookup = model.generate(**one, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy, lookup)


@pytest.mark.parametrize("text", COMPOSED)
def test_one_pass_over_prompt_and_answer_equals_generation(model, batch, text):
    """The oracle of `session.prompt`: no cache, everything recomputed, the selection of the prompt."""
    with vlmattn.wrap(model, text) as session:
        out = generate(model, batch, 6, suppress_tokens=[tiny.IMAGE, tiny.VIDEO])
        start = batch["input_ids"].shape[1]
        longer = dict(batch)
        longer["input_ids"] = out.sequences
        longer["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones(2, 6).long()], 1)
        if "mm_token_type_ids" in batch:
            longer["mm_token_type_ids"] = (out.sequences == tiny.IMAGE).long()
        elif "position_ids" not in longer:
            longer["position_ids"] = (longer["attention_mask"].cumsum(1) - 1).clamp_min(0)
        with session.prompt(start):
            logits = model(**longer, use_cache=False).logits
    assert gap(out.logits, [logits[:, step - 7] for step in range(6)]) < 1e-4


def test_forward_without_cache(model, batch):
    with vlmattn.wrap(model, f"{VAR_TINY} + vhr"):
        assert torch.allclose(model(**batch, use_cache=False).logits, model(**batch).logits, atol=1e-5)


def test_conflicts_are_refused_by_name(model):
    for text, message in [
        (f"{VAR_TINY} + var(sinks=[5], first_layer=2)", r"var.*var.*both edit attention in layer 2"),
        ("vhr + vhr(alpha=3.0)", r"vhr and vhr\(alpha=3.0\) both scale heads in layer 1"),
    ]:
        with pytest.raises(SpecError, match=message):
            vlmattn.wrap(model, text)


# Statistics


def test_statistics_equal_the_oracles_probabilities(model, batch):
    prompts = oracle.read_prompts(model, batch, tiny.IMAGE)
    with vlmattn.wrap(model, "none") as session:
        session.record()
        generate(model, batch, 5)
        stats = session.stats()
    mass, entropy, peak = (stats[name] for name in ("visual_mass", "entropy", "max"))
    assert mass.axes == ("step", "layer", "sample", "head")
    assert mass.values.shape == (5, tiny.LAYERS, 2, 4)
    for row, prompt in enumerate(prompts):
        seen: dict[int, torch.Tensor] = {}
        for layer in range(1, tiny.LAYERS):

            def look(p: torch.Tensor, present: list[int], layer: int = layer, into: Any = seen) -> list[int]:
                into[layer - 1] = p[:, -1]
                return present

            oracle.generate(model, prompt, {layer: look}, 1)
        for layer, p in seen.items():
            assert torch.allclose(mass.values[0, layer, row], p[:, prompt.visual].sum(-1), atol=1e-5)
            assert torch.allclose(entropy.values[0, layer, row], -torch.xlogy(p, p).sum(-1), atol=1e-4)
            assert torch.allclose(peak.values[0, layer, row], p.amax(-1), atol=1e-5)
    assert mass.mean("head", "sample").axes == ("step", "layer")


def test_recording_changes_no_bit(model, batch):
    logits = generate(model, batch, 4).logits
    with vlmattn.wrap(model, "none") as session:
        session.record()
        assert gap(generate(model, batch, 4).logits, logits) == 0.0


def test_recording_composes_with_pruning_and_edits(model, batch):
    text = f"fastv(keep=0.5, before_layer=2) + {VAR_TINY}"
    with vlmattn.wrap(model, text) as session:
        logits = generate(model, batch, 4).logits
        session.record()
        assert gap(generate(model, batch, 4).logits, logits) == 0.0
        stats = session.stats()
        assert stats["sink_mass"].values[:, 1].max() > 0
        assert bool((stats["visual_mass"].values <= 1 + 1e-5).all())
        assert session.report().visual_mass is not None


def test_statistics_need_recording(model, batch):
    with vlmattn.wrap(model, "none") as session:
        generate(model, batch, 2)
        with pytest.raises(vlmattn.VlmattnError, match=r"record\(\)"):
            session.stats()
