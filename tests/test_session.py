"""Wrapping and undoing: the model after `remove()` is bit for bit the model before `wrap()`."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import tiny
import torch
from transformers import AttentionInterface, AttentionMaskInterface

import vlmattn
from vlmattn import spec
from vlmattn.errors import (
    AlreadyWrappedError,
    BudgetError,
    CallError,
    LayerError,
    SpecError,
    UnknownMethodError,
    UnsupportedModelError,
)
from vlmattn.methods.attend.var import VAR
from vlmattn.methods.prune.fastv import FastV
from vlmattn.methods.prune.random import Random
from vlmattn.patches import engine as engine_module
from vlmattn.patches.attention import Registration

EVERYTHING = (
    "random(keep=0.7, before_layer=0) + fastv(keep=0.5, before_layer=2) "
    "+ var(sinks=[1, 2, 3], tau=1.5, first_layer=1) + vhr"
)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs",
         "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called", "_state_dict_hooks")  # fmt: skip


def snapshot(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Everything a session could leave behind."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        outputs = model(**batch).logits, model.generate(**batch, max_new_tokens=4, do_sample=False)
    return {
        "classes": {name: type(module) for name, module in modules.items()},
        "hooks": {name: {h: dict(getattr(module, h)) for h in HOOKS} for name, module in modules.items()},
        "dict": {name: sorted(module.__dict__) for name, module in modules.items()},
        "callables": {
            name: {k: v for k, v in module.__dict__.items() if inspect.isroutine(v)} for name, module in modules.items()
        },
        "buffers": sorted(name for name, _ in model.named_buffers()),
        "config": [
            (config.to_dict(), config._attn_implementation_internal)
            for config in (model.config, model.config.vision_config, model.model.language_model.config)
        ],
        "attention": sorted(AttentionInterface._global_mapping),
        "masks": sorted(AttentionMaskInterface._global_mapping),
        "generation": model.generation_config.to_dict(),
        "outputs": outputs,
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [key for key in a if not same(a[key], b[key])]


@pytest.mark.parametrize("text", [EVERYTHING, "uniform(keep=4, before_layer=1)", "fastv(keep=1.0)", "none"])
@pytest.mark.parametrize("exit", ["remove", "context", "exception"])
def test_undo_is_bit_identical(model, family, text, exit):
    batch = tiny.prompts(family)
    before = snapshot(model, batch)
    if exit == "remove":
        session = vlmattn.wrap(model, text)
        session.record()
        session.use_backend("reference")
        model.generate(**batch, max_new_tokens=3)
        session.remove()
        session.remove()
    elif exit == "context":
        with vlmattn.wrap(model, text):
            model.generate(**batch, max_new_tokens=3)
    else:
        with pytest.raises(ZeroDivisionError), vlmattn.wrap(model, text):
            model.generate(**batch, max_new_tokens=3)
            raise ZeroDivisionError
    assert differences(before, snapshot(model, batch)) == []


def test_wrapping_is_seen_by_the_snapshot(model, family):
    batch = tiny.prompts(family)
    before = snapshot(model, batch)
    with vlmattn.wrap(model, EVERYTHING):
        changed = differences(before, snapshot(model, batch))
    assert {"hooks", "dict", "config", "attention", "masks", "outputs"} <= set(changed)


@pytest.mark.parametrize("what", ["hooks", "head hooks", "attention name", "instance attributes"])
def test_the_undo_test_fails_when_the_undo_is_broken(model, family, what, monkeypatch):
    batch = tiny.prompts(family)
    before = snapshot(model, batch)
    repairs = []
    if what == "attention name":
        real = Registration.remove
        monkeypatch.setattr(Registration, "remove", lambda self: repairs.append(lambda: real(self)))
    elif what == "instance attributes":
        keep = staticmethod(lambda stack, owner, name, value: setattr(owner, name, value))
        monkeypatch.setattr(engine_module.Engine, "_replace", keep)
    session = vlmattn.wrap(model, "vhr" if what == "head hooks" else "none")
    if what == "hooks":
        session._engine._stack.pop_all()
    elif what == "head hooks":
        session._engine._setup.pop_all()
    session.remove()
    assert differences(before, snapshot(model, batch)) != []
    for repair in repairs:
        repair()


def test_a_failed_wrap_leaves_nothing(model, family, monkeypatch):
    batch = tiny.prompts(family)
    before = snapshot(model, batch)
    monkeypatch.setattr(engine_module.Engine, "_configure", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vlmattn.wrap(model, EVERYTHING)
    monkeypatch.undo()
    assert differences(before, snapshot(model, batch)) == []
    vlmattn.wrap(model, EVERYTHING).remove()


def test_wrapping_twice_names_the_first_session(model):
    with (
        vlmattn.wrap(model, "fastv(keep=0.25)"),
        pytest.raises(AlreadyWrappedError, match=r"fastv\(keep=0.25\).*remove\(\)"),
    ):
        vlmattn.wrap(model, "random")
    vlmattn.wrap(model, "random").remove()


def test_set_changes_the_next_prompt(model, family):
    batch = tiny.prompts(family)
    with torch.no_grad(), vlmattn.wrap(model, "fastv(keep=0.5, before_layer=2)") as session:
        plain = model(**batch).logits.shape
        session.set("fastv.keep", 2)
        assert session.spec == "fastv(keep=2, before_layer=2)"
        assert model(**batch).logits.shape != plain
        assert [len(image) for row in session.report().stages[0].kept for image in row] == [2, 2]
        session.set("fastv.before_layer", 1)
        model(**batch)
        assert session.report().stages[0].before_layer == 1
        session.set("fastv.keep", 1.0)
        model(**batch)
        assert session.report().stages == []


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        ("fastv.keep", 1.5, BudgetError),
        ("fastv.before_layer", 99, LayerError),
        ("fastv.kep", 0.5, UnknownMethodError),
        ("random.keep", 0.5, UnknownMethodError),
        ("keep", 0.5, SpecError),
    ],
)
def test_a_bad_set_changes_nothing(model, family, path, value, error):
    batch = tiny.prompts(family)
    with torch.no_grad(), vlmattn.wrap(model, "fastv(keep=0.5, before_layer=2)") as session:
        expected = model(**batch).logits
        with pytest.raises(error):
            session.set(path, value)
        assert session.spec == "fastv(before_layer=2)"
        assert torch.equal(model(**batch).logits, expected)


def test_set_keeps_what_the_method_needs(model, family):
    """The tap on the vision tower must survive the exchange of the methods."""
    batch = tiny.prompts(family)
    before = snapshot(model, batch)
    with torch.no_grad(), vlmattn.wrap(model, "random(keep=0.5, before_layer=0)") as session:
        for seed in (1, 2):
            session.set("random.seed", seed)
            model(**batch)
        kept = session.report().stages[0].kept
    with torch.no_grad(), vlmattn.wrap(model, "random(keep=0.5, before_layer=0, seed=2)") as session:
        model(**batch)
        assert session.report().stages[0].kept == kept
    assert differences(before, snapshot(model, batch)) == []


def test_two_methods_of_one_name_need_a_number(model):
    with vlmattn.wrap(model, [Random(0.5, 0), "random(keep=0.5, before_layer=2)"]) as session:
        with pytest.raises(SpecError, match=r"random\[0\]\.seed"):
            session.set("random.seed", 1)
        session.set("random[1].seed", 3)
        assert session.spec == "random(before_layer=0) + random(before_layer=2, seed=3)"


def test_text_objects_and_lists_are_the_same(model, family):
    batch = tiny.prompts(family)
    seen = []
    objects = [Random(0.7, 0), FastV(0.5, 2), VAR(sinks=(1, 2, 3), tau=1.5, first_layer=1), "vhr"]
    for form in (EVERYTHING, objects, list(spec.parse(EVERYTHING))):
        with torch.no_grad(), vlmattn.wrap(model, form) as session:
            seen.append((session.spec, model(**batch).logits))
    assert all(text == seen[0][0] and torch.equal(logits, seen[0][1]) for text, logits in seen)


def test_bad_requests_name_the_way_out(model):
    for text, error, message in [
        ("fastvv(keep=0.5)", UnknownMethodError, "did you mean 'fastv'"),
        ("fastv(kep=0.5)", UnknownMethodError, "did you mean 'keep'"),
        ("fastv(keep=1.4)", BudgetError, r"1.4 is outside \(0, 1\]"),
        ("fastv(keep=0)", BudgetError, "at least 1"),
        ("fastv(before_layer=0)", LayerError, "first possible is 1"),
        ("fastv(before_layer=4)", LayerError, "4 decoder layers.*between 1 and 3"),
        ("random(before_layer=-1)", LayerError, "first possible is 0"),
        ("random(before_layer=2) + fastv(before_layer=2)", SpecError, "both prune before layer 2"),
        ("fastv(keep=", SpecError, "cannot read"),
        ("fastv(0.5)", SpecError, "by name"),
    ]:
        with pytest.raises(error, match=message):
            vlmattn.wrap(model, text)
    vlmattn.wrap(model, "none").remove()


def test_unsupported_models_are_told_what_is_supported(model):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32, vocab_size=20
    )
    with pytest.raises(UnsupportedModelError, match=r"'llama' is not supported.*llava.*qwen2_5_vl"):
        vlmattn.wrap(LlamaForCausalLM(config), "fastv")
    with pytest.raises(UnsupportedModelError, match="wrap the whole model"):
        vlmattn.wrap(model.model, "fastv")
    with pytest.raises(UnsupportedModelError, match="str"):
        vlmattn.wrap("llava-hf/llava-1.5-7b-hf", "fastv")  # type: ignore[arg-type]


def test_a_removed_session_says_so(model):
    session = vlmattn.wrap(model, "fastv")
    session.remove()
    with pytest.raises(CallError, match="was removed"):
        session.set("fastv.keep", 0.2)
    assert "removed" in repr(session)


def test_geometry_needs_the_processor(model):
    with vlmattn.wrap(model, "fastv") as session, pytest.raises(CallError, match="processor=processor"):
        session.geometry([], {})


def test_the_report_reads_well(model, family):
    batch = tiny.prompts(family)
    with torch.no_grad(), vlmattn.wrap(model, EVERYTHING) as session:
        model(**batch)
        report = session.report()
    text = str(report)
    assert "fastv" in text and "sample 1" in text and "layers 0-1" in text
    data = report.to_dict()
    assert data["average_visual_tokens"] == pytest.approx(report.average_visual_tokens)
    assert data["speedup"] > 1
    assert report.kv_bytes < report.kv_bytes_full
