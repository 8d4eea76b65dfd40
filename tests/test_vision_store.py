"""Vision features shared between sessions: the same bits, no tower call, and every way in which sharing must stop."""

from __future__ import annotations

import copy
import dataclasses
import gc
import threading
import types
from typing import Any

import pytest
import tiny
import torch
from test_session import differences, snapshot
from transformers.modeling_outputs import BaseModelOutputWithPooling

import vlmattn
from vlmattn.errors import CallError
from vlmattn.methods.base import Keep, Look, Selector, View
from vlmattn.patches import vision
from vlmattn.patches.families import find

FAMILIES = sorted(tiny.MODELS)
VAR_TINY = "var(sinks=[1, 2, 3], tau=1.5, rho=0.2, min_visual=0.05, first_layer=1)"
SPECS = [
    "none",
    "fastv(keep=0.5, before_layer=2)",
    "random(keep=0.5, before_layer=0)",
    "uniform(keep=5, before_layer=1)",
    "noimage",
    VAR_TINY,
    "vhr",
    "random(keep=0.7, before_layer=0) + vhr",
]


pytestmark = pytest.mark.usefixtures("no_grad")


class Calls:
    """Counts the forward calls of the vision tower."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        find(model).part(model, "vision_tower").register_forward_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1

    def new(self) -> int:
        """Calls since the last look."""
        found, self.count = self.count, 0
        return found


def answer(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """Logits of a pass, and tokens and logits of a generation."""
    options = {"max_new_tokens": 4, "do_sample": False} | options
    out = model.generate(**batch, **options, return_dict_in_generate=True, output_logits=True)
    return [model(**batch).logits, out.sequences, *out.logits]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", ["padded", "single", "several images"])
@pytest.mark.parametrize("text", SPECS)
def test_sharing_changes_no_bit(family, attention, shape, text):
    model = tiny.MODELS[family](attention=attention)
    batch = tiny.prompts(family, images=(2, 1)) if shape == "several images" else tiny.prompts(family)
    batch = tiny.single(batch, 1) if shape == "single" else batch
    with vlmattn.wrap(model, text) as session:
        expected, kept = answer(model, batch), [stage.kept for stage in session.report().stages]
    calls, store = Calls(model), vlmattn.VisionStore()
    for _ in range(2):  # computed, then taken from the store
        with vlmattn.wrap(model, text) as session:
            session.share_vision(store)
            assert same(answer(model, batch), expected)
            assert [stage.kept for stage in session.report().stages] == kept
    assert calls.new() == store.misses > 0
    assert store.hits == store.misses or store.hits == 3 * store.misses  # generate() may say the same as forward()


def test_a_sweep_runs_the_tower_once(model, family, batch):
    expected = {}
    for text in SPECS:
        with vlmattn.wrap(model, text):
            expected[text] = model.generate(**batch, max_new_tokens=4, do_sample=False)
    calls, store = Calls(model), vlmattn.VisionStore()
    for text in SPECS:
        with vlmattn.wrap(model, text) as session, torch.inference_mode():
            session.share_vision(store)
            assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), expected[text])
    assert calls.new() == 1 and (store.misses, store.hits, len(store)) == (1, len(SPECS) - 1, 1)


def test_features_survive_set_and_record(model, batch):
    calls, store = Calls(model), vlmattn.VisionStore()
    with vlmattn.wrap(model, "random(keep=0.5, before_layer=0)") as session:
        session.share_vision(store)
        model(**batch)
        for change in (
            lambda: session.set("random.seed", 5),
            lambda: session.set("random.keep", 1.0),
            session.record,
            lambda: session.use_backend("reference"),
        ):
            change()
            model(**batch)
        assert calls.new() == 1 and store.hits == 4
        session.share_vision(None)
        model(**batch)
        assert calls.new() == 1 and store.hits == 4


@pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 2}, {"num_return_sequences": 2}])
def test_beams_and_several_answers(model, batch, options):
    """Generation repeats the features of a prompt on the output it got: what is stored must not notice."""
    options = {"max_new_tokens": 4, "do_sample": "num_beams" not in options, **options}
    store = vlmattn.VisionStore()

    def run() -> list[torch.Tensor]:
        torch.manual_seed(0)
        return [model.generate(**batch, **options), model(**batch).logits]

    for text in ("none", "random(keep=0.5, before_layer=0)"):
        with vlmattn.wrap(model, text) as session:
            expected = run()
            session.share_vision(store)
            assert same(run(), expected) and same(run(), expected)
    assert store.hits > store.misses


def test_other_calls_miss(model, family, batch):
    calls, store = Calls(model), vlmattn.VisionStore()
    changed = batch["pixel_values"].clone()
    changed.view(-1)[-1] += 1e-3
    with vlmattn.wrap(model, "none") as session:
        session.share_vision(store)
        first = model(**batch).logits
        assert not torch.equal(model(**(batch | {"pixel_values": changed})).logits, first)
        model(**tiny.single(batch, 0))
        model.get_image_features(*feature_arguments(batch), output_hidden_states=True)
        assert (store.hits, store.misses, calls.new()) == (0, 4, 4)
        if family != "llava":  # the same bytes as another grid
            other = batch["image_grid_thw"].clone()
            other[1] = torch.tensor([1, 12, 8])
            model.get_image_features(batch["pixel_values"], other)
        else:
            model.get_image_features(batch["pixel_values"], vision_feature_layer=-1)
            model.get_image_features(batch["pixel_values"], vision_feature_select_strategy="full")
        assert store.hits == 0 and calls.new() > 0
        assert torch.equal(model(**batch).logits, first) and calls.new() == 0


def feature_arguments(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [batch[name] for name in ("pixel_values", "image_grid_thw") if name in batch]


def test_videos_are_shared_too():
    model = tiny.qwen2_5_vl()
    ids = torch.tensor([[1, 92, *[tiny.VIDEO] * 32, 93, 5, 6, 92, *[tiny.IMAGE] * 16, 93, 7, 8, 9]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == tiny.IMAGE).long() + 2 * (ids == tiny.VIDEO).long(),
        "pixel_values": torch.randn(64, 1176),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "pixel_values_videos": torch.randn(128, 1176),
        "video_grid_thw": torch.tensor([[2, 8, 8]]),
    }
    with vlmattn.wrap(model, "random(keep=0.5)") as session:
        expected = answer(model, batch)
        calls, store = Calls(model), vlmattn.VisionStore()
        session.share_vision(store)
        assert same(answer(model, batch), expected)
        calls.new()
        assert same(answer(model, batch), expected) and calls.new() == 0 and len(store) >= 2


# What is stored is nobody else's


def test_neither_the_first_nor_a_later_output_reaches_the_store(model, batch):
    store = vlmattn.VisionStore()
    with vlmattn.wrap(model, "none") as session:
        expected = [image.clone() for image in model.get_image_features(*feature_arguments(batch)).pooler_output]
        session.share_vision(store)
        for _ in range(3):
            output = model.get_image_features(*feature_arguments(batch))
            assert same(list(output.pooler_output), expected)
            for image in output.pooler_output:
                image.zero_()
            output.pooler_output = None
    assert store.hits == 2


@pytest.mark.parametrize("first", ["inference", "no_grad"])
def test_entries_serve_inside_and_outside_inference_mode(model, batch, first):
    modes = {"inference": torch.inference_mode, "no_grad": torch.no_grad}
    store = vlmattn.VisionStore()
    for parameter in model.model.parameters():  # a frozen tower: features without gradients, under autograd
        parameter.requires_grad_(False)
    with vlmattn.wrap(model, "none") as session:
        session.share_vision(store)
        for mode in (first, *modes):
            with modes[mode]():
                output = model.get_image_features(*feature_arguments(batch)).pooler_output[0]
                assert output.is_inference() == (mode == "inference")
                output += 1
        with torch.enable_grad():
            weight = torch.ones_like(output, requires_grad=True)
            (model.get_image_features(*feature_arguments(batch)).pooler_output[0] * weight).sum().backward()
    assert weight.grad is not None and (store.misses, store.hits) == (1, 3)


def test_gradients_run_the_tower(model, batch):
    calls, store = Calls(model), vlmattn.VisionStore()
    with vlmattn.wrap(model, "none") as session:
        session.share_vision(store)
        model(**batch)
        calls.new()
        with torch.enable_grad():
            model(**batch).logits.sum().backward()
            assert calls.new() == 1
            assert any(p.grad is not None for p in find(model).part(model, "vision_tower").parameters())
            model.requires_grad_(False)
            pixels = batch["pixel_values"].clone().requires_grad_()
            model(**(batch | {"pixel_values": pixels})).logits.sum().backward()
            assert pixels.grad is not None and calls.new() == 1
            model(**batch)
            assert calls.new() == 0
        model.train()
        model(**batch)
        assert calls.new() == 1
    assert (store.misses, store.hits) == (1, 1)


def test_training_is_refused_as_ever(model, batch):
    with vlmattn.wrap(model, "fastv(keep=0.5)") as session:
        session.share_vision(vlmattn.VisionStore())
        model.train()
        with pytest.raises(CallError, match="eval"):
            model(**batch)


def test_states_of_the_towers_layers_come_when_asked_for(model, batch):
    arguments = feature_arguments(batch)
    plain = model.get_image_features(*arguments, output_hidden_states=True, output_attentions=True)
    with vlmattn.wrap(model, "none") as session:
        session.share_vision(vlmattn.VisionStore())
        for _ in range(2):
            short = model.get_image_features(*arguments)
            assert short.get("hidden_states") is None and short.get("attentions") is None
            assert torch.equal(short.last_hidden_state, plain.last_hidden_state)
            full = model.get_image_features(*arguments, output_hidden_states=True, output_attentions=True)
            assert same(list(full.hidden_states), list(plain.hidden_states))
            assert full.keys() == plain.keys()


# Room, model, weights


def test_the_room_is_respected(model, family):
    first, second = (tiny.prompts(family, seed=seed) for seed in (1, 2))
    calls, store = Calls(model), vlmattn.VisionStore()
    with vlmattn.wrap(model, "none") as session:
        session.share_vision(store)
        expected = [model(**batch).logits for batch in (first, second)]
        size = store.stored_bytes // 2
        assert len(store) == 2 and store.left_out == 0
        calls.new()
        small = vlmattn.VisionStore(max_bytes=2 * size - 1)
        session.share_vision(small)
        for _ in range(3):
            assert same([model(**batch).logits for batch in (first, second)], expected)
    assert small.stored_bytes == size <= small.max_bytes and len(small) == 1
    assert (small.hits, small.misses, small.left_out, calls.new()) == (2, 4, 3, 4)
    assert store.stored_bytes == 2 * size
    store.clear()
    assert (len(store), store.stored_bytes, store.misses) == (0, 0, 2)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, None])
def test_a_store_needs_room(bad):
    with pytest.raises(CallError, match="at least 1"):
        vlmattn.VisionStore(max_bytes=bad)


def test_another_model_is_refused(model, family, batch):
    other = tiny.MODELS[family](seed=1)
    model.config._name_or_path = "mine/first"
    store = vlmattn.VisionStore()
    with vlmattn.wrap(model, "none") as a, vlmattn.wrap(other, "none") as b:
        a.share_vision(store)
        expected = model(**batch).logits
        with pytest.raises(CallError, match=r"'mine/first'.*cannot serve a \w+ForConditionalGeneration.*clear\(\)"):
            b.share_vision(store)
        assert not torch.equal(other(**batch).logits, expected) and store.hits == 0
        store.clear()
        b.share_vision(store)
        with pytest.raises(CallError, match="cannot serve"):  # the first session still shares what is no longer its own
            model(**batch)
        a.share_vision(None)
        assert torch.equal(model(**batch).logits, expected)
    with vlmattn.wrap(model, "none") as a, pytest.raises(CallError, match=r"vlmattn.VisionStore, or None"):
        a.share_vision({})  # type: ignore[arg-type]
    with pytest.raises(CallError, match="was removed"):
        a.share_vision(store)


def test_a_collected_model_takes_its_features_along(family, batch):
    model, store = tiny.MODELS[family](), vlmattn.VisionStore()
    with vlmattn.wrap(model, "none") as session:
        session.share_vision(store)
        model(**batch)
    assert len(store) == 1
    del model, session
    gc.collect()
    assert len(store) == 0 and store.stored_bytes == 0
    second = tiny.MODELS[family](seed=1)
    with vlmattn.wrap(second, "none") as session:
        expected = second(**batch).logits
        session.share_vision(store)
        assert torch.equal(second(**batch).logits, expected)


@pytest.mark.parametrize("part", ["vision_tower", "projector"])
@pytest.mark.parametrize("how", ["in place", "replaced", "dtype", "attention", "data"])
def test_changed_weights_are_noticed(model, batch, part, how):
    store = vlmattn.VisionStore()
    module = find(model).part(model, part)
    with vlmattn.wrap(model, "none") as session:
        session.share_vision(store)
        model(**batch)
        weight = next(module.parameters())
        if how == "in place":
            weight.add_(0.5)
        elif how == "replaced":
            weight.data = weight.data + 0.5
        elif how == "dtype":
            model.to(torch.float64)
            batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        elif how == "attention":
            model.config.vision_config._attn_implementation = "eager"
        else:  # the one that cannot be seen: the user says so
            weight.data.add_(0.5)
            store.clear()
        got = model(**batch).logits
        assert store.hits == 0 and len(store) == 1
        session.share_vision(None)
        assert torch.equal(model(**batch).logits, got)


class Adapter(torch.nn.Module):
    """A low-rank addition as adapter libraries make them: switches and scales are plain attributes."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, torch.nn.Linear(base.in_features, 2)
        self.up = torch.nn.Linear(2, base.out_features)
        self.scaling, self.disabled, self.shift = {"default": 1.0}, False, torch.zeros(())
        self.register_buffer("gain", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.disabled:
            return self.base(x)
        return self.base(x) + self.up(self.down(x)) * self.scaling["default"] * self.gain + self.shift


def middle_linear(module: Any) -> tuple[Any, str]:
    """The module that holds the middle one of all linear layers in `module`, and the layer's name there."""
    paths = [name for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)]
    path = paths[(len(paths) - 1) // 2]  # a tower's last layers may not be read
    parent, _, name = path.rpartition(".")
    return module.get_submodule(parent), name


def replace_module(model: Any, part: str) -> None:
    """Put another module of equal kind in the place of the part."""
    path = getattr(find(model), part)
    other = copy.deepcopy(model.get_submodule(path))
    for weight in other.parameters():
        weight.mul_(1.5)
    model.set_submodule(path, other)


def wrap_layer(model: Any, part: str) -> None:
    parent, name = middle_linear(find(model).part(model, part))
    setattr(parent, name, Adapter(getattr(parent, name)).eval())


def adapter(model: Any, part: str) -> Adapter:
    return next(module for module in find(model).part(model, part).modules() if isinstance(module, Adapter))


def patch_forward(model: Any, part: str) -> None:
    layer, before = adapter(model, part), adapter(model, part).forward
    layer.forward = lambda x: before(x) + 1  # type: ignore[method-assign]


def cast_and_back(model: Any, part: str) -> None:
    find(model).part(model, part).bfloat16().float()


def other_class(model: Any, part: str) -> None:
    layer = adapter(model, part)
    layer.__class__ = type("Twice", (Adapter,), {"forward": lambda self, x: 2 * Adapter.forward(self, x)})


def data_twice(model: Any, part: str) -> None:
    """Two replacements: the second may come to lie where the first memory was."""
    weight = adapter(model, part).down.weight
    for _ in range(2):
        weight.data = weight.data * 1.5


def parameter_on_old_memory(model: Any, part: str) -> None:
    layer = adapter(model, part).down
    layer.weight = torch.nn.Parameter(layer.weight.data)  # begins to count its versions anew
    while layer.weight._version < 1:
        layer.weight.add_(0.5)


CHANGES: dict[str, Any] = {
    "module replaced": replace_module,
    "layer wrapped": wrap_layer,
    "forward patched": patch_forward,
    "class replaced": other_class,
    "scale in a dict": lambda model, part: adapter(model, part).scaling.update(default=0.5),
    "switch": lambda model, part: setattr(adapter(model, part), "disabled", True),
    "buffer in place": lambda model, part: adapter(model, part).gain.mul_(2),
    "buffer in place, inference": lambda model, part: torch.inference_mode()(adapter(model, part).gain.mul_)(2),
    "buffer replaced": lambda model, part: setattr(adapter(model, part), "gain", torch.tensor(3.0)),
    "tensor attribute": lambda model, part: adapter(model, part).shift.add_(1),
    "hook": lambda model, part: adapter(model, part).register_forward_hook(lambda _, args, output: output + 1),
    "hook before": lambda model, part: adapter(model, part).register_forward_pre_hook(lambda _, args: (args[0] + 1,)),
    "cast and back": cast_and_back,
    "data twice": data_twice,
    "parameter on old memory": parameter_on_old_memory,
}


@pytest.mark.parametrize("part", ["vision_tower", "projector"])
@pytest.mark.parametrize("how", CHANGES)
def test_changed_modules_are_noticed(model, batch, part, how):
    store = vlmattn.VisionStore()
    if how != "layer wrapped":
        wrap_layer(model, part)
    with vlmattn.wrap(model, "none") as session:
        session.share_vision(store)
        for _ in range(2):
            before = model(**batch).logits
        assert store.hits == 1
        CHANGES[how](model, part)
        got = model(**batch).logits
        assert store.hits == 1 and len(store) == 1
        assert torch.equal(model(**batch).logits, got) and store.hits == 2
        session.share_vision(None)
        assert torch.equal(model(**batch).logits, got) and not torch.equal(got, before)


@pytest.mark.parametrize(
    ("name", "value"),
    [("vision_feature_layer", -1), ("vision_feature_select_strategy", "full")],
)
def test_a_changed_configuration_is_noticed(name, value):
    model, batch = tiny.MODELS["llava"](), tiny.prompts("llava")
    arguments, store = feature_arguments(batch), vlmattn.VisionStore()
    with vlmattn.wrap(model, "none") as session:
        session.share_vision(store)
        before = list(model.get_image_features(*arguments).pooler_output)
        setattr(model.config, name, value)
        got = list(model.get_image_features(*arguments).pooler_output)
        assert (store.hits, len(store)) == (0, 1)
        session.share_vision(None)
        assert same(list(model.get_image_features(*arguments).pooler_output), got)
        assert got[0].shape != before[0].shape or not same(got, before)


def test_the_language_model_is_no_matter(model, batch):
    store = vlmattn.VisionStore()
    text_model = find(model).part(model, "text_model")
    with vlmattn.wrap(model, "none") as session:
        session.share_vision(store)
        model(**batch)
        next(text_model.layers.parameters()).add_(0.5)
        text_model.config.rms_norm_eps = 0.1
        text_model.layers[0].register_forward_hook(lambda *_: None)
        model(**batch)
    assert (store.hits, store.misses) == (1, 1)


def test_an_adapter_in_training_runs_the_tower(model, batch):
    wrap_layer(model, "projector")
    store = vlmattn.VisionStore()
    with vlmattn.wrap(model, "none") as session:
        session.share_vision(store)
        adapter(model, "projector").train()
        model(**batch)
    assert (store.hits, store.misses) == (0, 0)


# Composition


@dataclasses.dataclass(frozen=True)
class Insider(Selector):
    """A method that must see inside the tower."""

    before_layer: int = 0
    on: bool = True

    @property
    def looks(self) -> dict[str, Look]:
        return {"seen": Look("received")}

    @property
    def is_noop(self) -> bool:
        return not self.on

    def select(self, view: View) -> Keep:
        return Keep(view.image == 0)


Insider.name = "insider"


def test_methods_that_look_inside_the_tower_run_it(model, batch):
    calls, store = Calls(model), vlmattn.VisionStore()
    with vlmattn.wrap(model, ["none", Insider(), VAR_TINY]) as session:
        expected = model(**batch).logits
        calls.new()
        session.share_vision(store)
        for _ in range(2):
            assert torch.equal(model(**batch).logits, expected)
        assert calls.new() == 2 and (store.hits, store.misses) == (0, 0)
        session.set("insider.on", False)
        for _ in range(2):
            model(**batch)
        assert calls.new() == 1 and (store.hits, store.misses) == (1, 1)


def test_a_session_that_looks_inside_leaves_the_entries_alone(model, batch):
    calls, store = Calls(model), vlmattn.VisionStore()
    for text, tower, hits in (("fastv(keep=5)", 1, 0), ("visionzip(keep=5)", 1, 0), ("fastv(keep=6)", 0, 1)):
        with vlmattn.wrap(model, text) as session:
            session.share_vision(store)
            model(**batch)
        assert (calls.new(), store.hits) == (tower, hits), text


def test_undo_with_a_store(model, family, batch):
    before = snapshot(model, batch)
    store = vlmattn.VisionStore()
    for text in ("none", "random(keep=0.5, before_layer=0) + vhr"):
        session = vlmattn.wrap(model, text)
        inside = snapshot(model, batch)
        session.share_vision(store)
        during = snapshot(model, batch)
        assert during["callables"] != inside["callables"]
        session.share_vision(None)
        after = snapshot(model, batch)
        assert same(list(after["outputs"]), list(inside["outputs"])) and after["dict"] == inside["dict"]
        session.share_vision(store)
        session.remove()
        assert differences(before, snapshot(model, batch)) == []
    assert store.hits > 0


def test_threads_share_a_store(model, family):
    inputs = [feature_arguments(tiny.prompts(family, seed=seed)) for seed in range(3)]
    with vlmattn.wrap(model, "none") as session:
        expected = [list(model.get_image_features(*one).pooler_output) for one in inputs]
        store = vlmattn.VisionStore()
        session.share_vision(store)
        wrong: list[int] = []

        def run() -> None:
            with torch.no_grad():
                for step in range(30):
                    which = step % 3
                    output = list(model.get_image_features(*inputs[which]).pooler_output)
                    if not same(output, expected[which]):
                        wrong.append(step)
                    output[0].zero_()

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == [] and len(store) == 3 and store.hits + store.misses == 120
    assert store.stored_bytes == sum(vision._nbytes(entry.output) for entry in store._entries.values())


def test_a_compiled_model_shares(family):
    torch._dynamo.reset()
    model, batch = tiny.MODELS[family](), tiny.prompts(family)
    plain = model(**batch).logits
    compiled = torch.compile(model, backend="eager")
    calls, store = Calls(model), vlmattn.VisionStore()
    with vlmattn.wrap(model, "none") as session:
        session.share_vision(store)
        for _ in range(3):
            assert torch.allclose(compiled(**batch).logits, plain, atol=1e-5)
    assert calls.new() == store.misses == 1 and store.hits == 2
    torch._dynamo.reset()


def test_time_is_counted_once_a_hit(model, batch, monkeypatch):
    clock = iter([10.0, 10.25, 20.0, 20.5])
    monkeypatch.setattr(vision, "_now", lambda device: next(clock))
    store = vlmattn.VisionStore()
    with vlmattn.wrap(model, "none") as session:
        session.share_vision(store)
        for _ in range(3):
            model(**batch)
    assert store.saved_ms == pytest.approx(500.0)
    assert "1 entries" in repr(store) and "2 hits, 1 misses" in repr(store)


# Outputs of every kind


def boxed(output: Any) -> tuple[Any, Any, vlmattn.VisionStore, list[int]]:
    """A shared feature method that returns `output`, its module, the store, and a list that grows by every call."""
    module, store, calls = torch.nn.Linear(2, 2).requires_grad_(False).eval(), vlmattn.VisionStore(), []

    def get_features(pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        calls.append(1)
        return output

    return vision.shared(get_features, store, module, module), module, store, calls


TENSOR = torch.arange(6.0).view(2, 3)


@pytest.mark.parametrize(
    "output",
    [
        TENSOR,
        TENSOR.bfloat16(),
        (TENSOR, None, 3),
        [TENSOR, [TENSOR.long()]],
        {"a": TENSOR, "b": (TENSOR,)},
        BaseModelOutputWithPooling(last_hidden_state=TENSOR, pooler_output=[TENSOR, TENSOR]),
        BaseModelOutputWithPooling(pooler_output=(TENSOR,)),
    ],
)
def test_outputs_keep_their_kind(output):
    features, _, store, calls = boxed(output)
    for _ in range(2):
        got = features(torch.zeros(1))
        assert type(got) is type(output) and str(got) == str(output)
    assert len(calls) == 1 and store.hits == 1
    assert (got is output) is False


def test_what_cannot_be_copied_or_compared_is_computed():
    features, _, store, calls = boxed(types.SimpleNamespace(pooler_output=TENSOR))
    for _ in range(2):
        assert features(torch.zeros(1)).pooler_output is TENSOR
    assert len(calls) == 2 and len(store) == 0
    features, _, store, calls = boxed(TENSOR)
    for _ in range(2):
        assert features(torch.zeros(1), helper=object()) is TENSOR
    assert len(calls) == 2 and (store.hits, store.misses) == (0, 0)


def test_keys_tell_every_difference():
    zero = torch.zeros(2, 3)
    calls = [
        {"x": zero},
        {"x": zero.view(3, 2)},
        {"x": zero.bfloat16()},
        {"x": zero.int()},
        {"x": -zero},
        {"y": zero},
        {"x": [zero]},
        {"x": zero, "n": 1},
        {"x": zero, "n": 1.0},
        {"x": zero, "n": True},
        {"x": zero, "n": None},
        {"x": zero, "n": "1"},
        {"x": zero, "n": [1, 2]},
        {"x": zero, "n": [[1], 2]},
        {"x": zero, "kwargs": {"n": 1}},
        {"x": torch.zeros(0)},
        {"x": torch.tensor(0.0)},
        {"x": torch.zeros(2, dtype=torch.bool)},
    ]
    keys = [vision.call_key("f", call) for call in calls]
    assert len(set(keys)) == len(keys)
    assert vision.call_key("f", {"x": zero.t().contiguous().t()}) == keys[0]
    assert vision.call_key("g", {"x": zero}) != keys[0]
    assert vision.call_key("f", {"n": (1, 2), "x": zero}) == vision.call_key("f", {"x": zero, "n": [1, 2]})
