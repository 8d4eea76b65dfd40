"""Layers left out: what is chosen, that nothing else changes, and what that is measured by."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import vlmattn
from vlmattn import cost, layers, proof, spec
from vlmattn.errors import CallError, LayerError, SpecError, VlmattnWarning
from vlmattn.methods.skip.layerskip import LayerSkip, least_changing, visual_region
from vlmattn.patches import families
from vlmattn.patches.families import supported

pytestmark = [pytest.mark.usefixtures("no_grad"), pytest.mark.filterwarnings("ignore:.*is experimental")]
STEPS = 8


@pytest.fixture(autouse=True)
def _free_layers(request: pytest.FixtureRequest) -> None:
    """The layers that are left out here must stay where visual features are added again behind them."""
    name = request.node.callspec.params.get("family") if hasattr(request.node, "callspec") else None
    if any(family.model_type == name and family.deepstack for family in supported()):
        pytest.skip("its first layers must stay")


def generate(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> Any:
    more = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True} | options
    return model.generate(**batch, max_new_tokens=STEPS, **more)


def gap(a: Any, b: Any) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def without(model: Any, dropped: tuple[int, ...]) -> Any:
    """A copy of the model that never had these layers."""
    shorter = copy.deepcopy(model)
    text = shorter.model.language_model
    text.layers = nn.ModuleList([layer for i, layer in enumerate(text.layers) if i not in dropped])
    for index, layer in enumerate(text.layers):
        layer.self_attn.layer_idx = index
    text.config.num_hidden_layers = len(text.layers)
    if getattr(text.config, "layer_types", None):
        text.config.layer_types = text.config.layer_types[: len(text.layers)]
    return shorter


# What is chosen


def test_worked_example():
    """x0 = (1, 0), x1 = (.8, .6), x2 = (.75, .66), x3 = (0, 1): layer 1 goes first."""
    x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.75, 0.66], [0.0, 1.0]])
    distance = layers.angular_distance(x[:-1], x[1:])
    assert distance.tolist() == pytest.approx([0.2048, 0.0249, 0.2703], abs=5e-5)
    assert (1 - layers.block_influence(x[:-1], x[1:])).tolist() == pytest.approx([0.8, 0.9969, 0.6606], abs=5e-5)
    assert least_changing(distance.tolist(), 1, ()) == (1,)


def test_regions():
    assert visual_region(32) == (0, 4, 8, 12, 16, 20, 24, 28) and visual_region(2) == (0,)
    assert visual_region(28) == (0, 4, 8, 12, 16, 20, 24) and visual_region(40)[:3] == (0, 4, 8)
    assert LayerSkip(region="paper").protected(32) == (0, 4, 8, 12, 18, 22, 26, 30)
    assert LayerSkip(region="code").protected(32) == (1, 5, 9, 13, 19, 23, 27, 31)
    with pytest.raises(LayerError, match="a list for 32 layers, this model has 4"):
        LayerSkip(region="paper").protected(4)


def test_choice_leaves_the_region_and_the_ends():
    scores = (0.0, 0.5, 0.1, 0.1, 0.0, 0.2, 0.3, 0.0)  # region of 8 layers: 0 and 4
    assert LayerSkip(scores=scores).skipped(8) == (2,)  # of equal scores the lower layer
    assert LayerSkip(scores=scores, n_drop=3).skipped(8) == (2, 3, 5)
    assert LayerSkip(scores=scores, n_drop=2, adjacent=False).skipped(8) == (2, 5)
    assert LayerSkip(scores=scores, n_drop=2, region=(2, 3)).skipped(8) == (4, 5)
    with pytest.raises(LayerError, match=r"6 of 8 layers cannot be left out: only 5 can"):
        LayerSkip(scores=scores, n_drop=6).skipped(8)
    with pytest.raises(LayerError, match="none of which are neighbours"):
        LayerSkip(scores=scores, n_drop=4, adjacent=False).skipped(8)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("layers=[0]", "layer 0 must stay"),
        ("layers=[-1]", "expected decoder layers such as"),
        ("layers=3", "expected decoder layers such as"),
        ("region=half", "expected decoder layers such as"),
        ("n_drop=-1", "n_drop=-1: expected an int >= 0"),
        ("adjacent=false", "expected True or False"),
        ("scores=[1, 'a']", "expected a number for each decoder layer"),
        ("scores=[1e999]", "expected a number for each decoder layer"),
        ("layers=[1], n_drop=2", "do nothing beside layers"),
    ],
)
def test_fields_are_checked(text, said):
    with pytest.raises((LayerError, SpecError), match=said):
        spec.parse(f"layerskip({text})")


def test_what_does_not_fit_a_model_is_refused():
    model = tiny.llava()
    for text, said in [
        ("layerskip", r"run `vlmattn layers --model NAME`"),
        ("layerskip(layers=[4])", "4 decoder layers"),
        ("layerskip(scores=[1, 2, 3])", "3 scores do not fit a model of 4"),
        ("layerskip(scores=[1, 2, 3, 4], region=[9])", r"region \[9\] does not fit"),
        ("layerskip(layers=[1]) + fastv(before_layer=2)", "reads the attention of layer 1, which layerskip"),
        ("layerskip(layers=[1]) + knockout(window=(1, 2))", "acts only in layers that are left out"),
        ("layerskip(layers=[1]) + layerskip(layers=[1, 2])", "both leave out layer 1"),
    ]:
        with pytest.raises((LayerError, SpecError), match=said):
            vlmattn.wrap(model, text)
    assert vlmattn.wrap(model, "none").active  # nothing was left behind


def test_layers_that_read_the_image_again_must_stay(monkeypatch):
    """DeepStack adds visual features behind the first three layers."""
    find = families.find
    monkeypatch.setattr(families, "find", lambda model: dataclasses.replace(find(model), deepstack="again"))
    model = tiny.llava(layers=5)
    for layer in (1, 2):
        with pytest.raises(LayerError, match=f"adds visual features behind its first 3 layers, so that layer {layer}"):
            vlmattn.wrap(model, f"layerskip(layers=[{layer}])")
    with vlmattn.wrap(model, "layerskip(layers=[3])"):
        assert model.model.language_model.layers[3].forward(torch.ones(1)).item() == 1


def test_later_layers_than_deepstacks_may_go():
    model, batch = tiny.MODELS["qwen3_vl"](layers=5), tiny.prompts("qwen3_vl")
    with pytest.raises(LayerError, match="adds visual features"):
        vlmattn.wrap(model, "layerskip(layers=[2])")
    shorter = without(model, (3,))
    with vlmattn.wrap(model, "layerskip(layers=[3])"):
        assert gap(generate(model, batch).logits, generate(shorter, batch).logits) == 0.0


def test_it_says_that_it_is_experimental():
    model = tiny.llava()
    with pytest.warns(VlmattnWarning, match=r"layerskip\(layers=\(1,\)\) is experimental.*expect visible losses"):
        session = vlmattn.wrap(model, "layerskip(layers=[1])")
    session.remove()


# What the model computes


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dropped", [(1,), (3,), (1, 2)])
def test_it_equals_a_model_without_the_layers(family, attention, dropped):
    """Prefill, and greedy steps from the cache; the cache of a layer that is left out stays empty."""
    model, batch = tiny.MODELS[family](attention=attention), tiny.prompts(family)
    shorter = without(model, dropped)
    expected, logits = generate(shorter, batch), shorter(**batch).logits
    with vlmattn.wrap(model, f"layerskip(layers={list(dropped)})") as session:
        assert torch.equal(model(**batch).logits, logits)
        out, report = generate(model, batch), session.report()
    assert torch.equal(out.sequences, expected.sequences)
    assert gap(out.logits, expected.logits) == 0.0
    held = [layer.is_initialized for layer in out.past_key_values.layers]
    assert held == [i not in dropped for i in range(tiny.LAYERS)]
    assert report.skipped_layers == list(dropped)
    dims = cost.Dims.from_config(model.config.get_text_config())
    tokens = [[0 if i in dropped else n for i in range(tiny.LAYERS)] for n in report.prompt_tokens]
    assert report.prefill_macs == sum(cost.prefill_macs(dims, row) for row in tokens)
    assert report.kv_bytes == sum(cost.kv_bytes(dims, row, 4) for row in tokens)
    assert report.kv_bytes * tiny.LAYERS == report.kv_bytes_full * (tiny.LAYERS - len(dropped))
    (method,) = session.methods
    for visual, counts in zip(report.visual_tokens, report.visual_per_layer, strict=True):
        assert method.expected_tokens(visual, tiny.LAYERS) == counts
    assert f"layers left out          {', '.join(map(str, dropped))}" in str(report)


def test_measured_bytes_are_the_reports(family, model, batch):
    one = tiny.single(batch, 1)
    with vlmattn.wrap(model, "fastv(keep=0.5, before_layer=1) + layerskip(layers=[2])") as session:
        cache = model(**one, use_cache=True).past_key_values
        measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)
        assert measured == session.report().kv_bytes


def test_no_layer_and_undo_are_bit_identical(model, batch):
    plain, logits = generate(model, batch), model(**batch).logits
    before = proof.footprint(model)
    for text in ("layerskip(layers=[])", "layerskip(n_drop=0)"):
        with vlmattn.wrap(model, text):
            assert torch.equal(model(**batch).logits, logits)
            assert gap(generate(model, batch).logits, plain.logits) == 0.0
    modules = list(model.model.language_model.layers)
    with vlmattn.wrap(model, "layerskip(layers=[1, 2])") as session:
        assert not torch.equal(model(**batch).logits, logits)
        session.set("layerskip.layers", [3])
        assert not torch.equal(model(**batch).logits, logits)
    assert proof.footprint(model) == before
    assert all(a is b for a, b in zip(modules, model.model.language_model.layers, strict=True))
    assert [layer.self_attn.layer_idx for layer in modules] == list(range(tiny.LAYERS))
    assert torch.equal(model(**batch).logits, logits)
    assert gap(generate(model, batch).logits, plain.logits) == 0.0


def test_a_pruners_layer_is_an_original_number(model, batch):
    """`before_layer` counts the layers that are left out."""
    shorter = without(model, (1,))
    with vlmattn.wrap(shorter, "uniform(keep=0.5, before_layer=2)") as session:
        expected, kept = generate(shorter, batch), session.report().stages[0].kept
    with vlmattn.wrap(model, "uniform(keep=0.5, before_layer=3) + layerskip(layers=[1])") as session:
        out, report = generate(model, batch), session.report()
    assert gap(out.logits, expected.logits) == 0.0 and report.stages[0].kept == kept
    assert report.visual_per_layer[0] == [16, 0, 16, 8]
    with vlmattn.wrap(model, "fastv(keep=0.5, before_layer=3) + layerskip(layers=[1])"):
        from_layer_2 = generate(model, batch)
    with vlmattn.wrap(shorter, "fastv(keep=0.5, before_layer=2)"):
        assert gap(from_layer_2.logits, generate(shorter, batch).logits) == 0.0
    with vlmattn.wrap(model, "uniform(keep=0.5, before_layer=1) + layerskip(layers=[1])"):
        early = generate(model, batch)
    with vlmattn.wrap(shorter, "uniform(keep=0.5, before_layer=1)"):
        assert gap(early.logits, generate(shorter, batch).logits) == 0.0


@pytest.mark.parametrize(
    "others", ["vhr", "var(sinks=[1, 2, 3], tau=1.5, rho=0.2, first_layer=1)", "knockout(window=(0, 3))"]
)
def test_it_composes_with_edits(model, batch, others):
    """The edits act in the layers that run, and record says nothing of those that do not."""
    with vlmattn.wrap(model, f"layerskip(layers=[2]) + {others}") as session:
        session.record()
        quick = generate(model, batch)
        mass = session.report().visual_mass
        json.dumps(session.report().to_dict(), allow_nan=False)
        session.use_backend("reference")
        assert gap(generate(model, batch).logits, quick.logits) < 1e-4
    assert mass is not None and [m is None for m in mass] == [False, False, True, False]


def test_text_beams_lookup_and_a_second_turn(family, model, batch):
    shorter = without(model, (2,))
    text = tiny.prompts(family, images=(0, 0))
    one = tiny.single(batch, 1)
    one["input_ids"][:, -4:] = torch.tensor([[5, 6, 5, 6]])
    runs = []
    for subject, methods in ((model, "layerskip(layers=[2])"), (shorter, "none")):
        with vlmattn.wrap(subject, methods):
            runs.append([generate(subject, text).sequences])
            options = {"num_beams": 3, "num_return_sequences": 2}
            runs[-1] += [generate(subject, batch, **options).sequences]
            runs[-1] += [generate(subject, one, prompt_lookup_num_tokens=3).sequences]
            first = generate(subject, one)
            ids = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], 1)
            turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            runs[-1] += [generate(subject, turn, past_key_values=first.past_key_values).sequences]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_conversation_keeps_its_layers(model, batch):
    """A cache that was filled with other layers is refused instead of read."""
    one = tiny.single(batch, 1)
    with vlmattn.wrap(model, "layerskip(layers=[2])") as session:
        first = generate(model, one)
        ids = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": first.past_key_values}
        for other in ([3], []):
            session.set("layerskip.layers", other)
            with pytest.raises(CallError, match=r"without layers \[2\].*start a fresh cache"):
                generate(model, turn)


# How redundancy is measured


def test_scores_are_those_of_the_hidden_states(family, model, batch):
    prompts = [tiny.single(batch, row) for row in (0, 1)]
    found: dict[str, list[list[float]]] = {"angular_last": [], "bi": [], "bi_multimodal": []}
    for one in prompts:
        inputs: list[torch.Tensor] = []
        handles = [
            layer.register_forward_hook(lambda module, args, out, seen=inputs: seen.append(out[0]))
            for layer in model.model.language_model.layers
        ]
        embeds = model(**one, output_hidden_states=True).hidden_states[0][0]
        for handle in handles:
            handle.remove()
        visual = one["input_ids"][0] == tiny.IMAGE
        rows: dict[str, list[float]] = {name: [] for name in found}
        for before, after in itertools.pairwise([embeds, *inputs]):
            cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
            rows["angular_last"].append(math.acos(float(cosine[-1])) / math.pi)
            rows["bi"].append(1 - float(cosine.mean()))
            rows["bi_multimodal"].append(1 - float(cosine[visual].mean() + cosine[~visual].mean()) / 2)
        for name, values in rows.items():
            found[name].append(values)
    for name, values in found.items():
        mean = torch.tensor(values).mean(0).tolist()
        assert layers.layer_scores(model, prompts, name) == pytest.approx(mean, abs=1e-4)
    assert layers.layer_scores(model, prompts, "bi") != layers.layer_scores(model, prompts, "bi_multimodal")


def test_a_layer_that_does_nothing_goes_first(family, batch):
    model = tiny.MODELS[family](layers=6)
    idle = model.model.language_model.layers[2]
    idle.self_attn.o_proj.weight.zero_()
    idle.mlp.down_proj.weight.zero_()
    model(**batch)  # transformers hangs hooks of its own on a model then
    before = proof.footprint(model)
    for score in layers.SCORES:
        found = layers.redundant_layers(model, [tiny.single(batch, 1)], score=score)
        assert found.layers == (2,) and found.scores[2] == pytest.approx(0, abs=1e-6)
        assert found.spec == "layerskip(layers=(2,))" and found.protected == (0, 3)
    with vlmattn.wrap(model, found.spec):
        skipped = model(**batch).logits
    assert torch.equal(skipped, model(**batch).logits)
    assert proof.footprint(model) == before


def test_iterative_choice_measures_anew(family, batch):
    model = tiny.MODELS[family](layers=6)
    prompts = [tiny.single(batch, 1)]
    once = layers.redundant_layers(model, prompts, 2, region=[])
    found = layers.redundant_layers(model, prompts, 2, region=[], iterative=True)
    assert found.order[0] == once.order[0] and found.scores == once.scores
    with vlmattn.wrap(model, f"layerskip(layers=[{once.order[0]}])"):
        again = layers.layer_scores(model, prompts)
    rest = [layer for layer in range(1, 5) if layer != once.order[0]]
    assert found.order[1] == min(rest, key=lambda layer: again[layer])
    assert again[once.order[0]] == pytest.approx(0, abs=1e-6)
    apart = layers.redundant_layers(model, prompts, 2, region=[], adjacent=False, iterative=True)
    assert abs(apart.order[0] - apart.order[1]) > 1
    assert json.loads(json.dumps(apart.to_dict()))["layers"] == sorted(apart.order)


def test_what_cannot_be_measured_is_refused(model, batch):
    one = tiny.single(batch, 1)
    with pytest.raises(CallError, match="at least one prompt"):
        layers.layer_scores(model, [])
    with pytest.raises(CallError, match="one unpadded prompt with an image"):
        layers.layer_scores(model, [batch])
    with pytest.raises(CallError, match="one unpadded prompt with an image"):
        layers.layer_scores(model, [{"input_ids": torch.tensor([[1, 5, 6]])}])
    with pytest.raises(SpecError, match="score='l2': expected one of angular_last"):
        layers.layer_scores(model, [one], "l2")
    with vlmattn.wrap(model, "random(keep=0.5, before_layer=2)"), pytest.raises(CallError, match="without pruning"):
        layers.layer_scores(model, [one])
