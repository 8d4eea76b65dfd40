"""Calibrated decoding with a second branch, against two plain forward passes a step; and everything `generate` can."""

from __future__ import annotations

import math
from typing import Any

import contrast
import pytest
import tiny
import torch
from contrast import gap, generate
from transformers.generation.streamers import BaseStreamer

import vlmattn
from vlmattn import spec
from vlmattn.errors import CallError, SpecError
from vlmattn.methods.decode.vcd import VCD
from vlmattn.patches.families import supported
from vlmattn.patches.vision import content_key

pytestmark = pytest.mark.usefixtures("no_grad")

STEPS = 6
WORDS = [5, 6, 7, 8]
SPECS = [
    "vcd(noise_step=700)",
    "vcd(alpha=0.5, beta=0.02, noise_step=999, seed=3)",
    f"icd(disturbance={WORDS})",
    f"icd(disturbance={WORDS}, where=after, alpha=0.4)",
    "m3id(lam=0.2)",
    "textbranch(gamma=1.8)",
]
EACH = ["vcd(noise_step=700)", f"icd(disturbance={WORDS})", "m3id(lam=0.2)"]
OTHERS = [
    "fastv(keep=0.5, before_layer=2)",
    "fastv(keep=0.3, before_layer=1, shrink_early_layers=True)",
    "uniform(keep=0.5, before_layer=0) + fastv(keep=0.5, before_layer=2)",
    "visionzip(keep=0.5)",
    "var(sinks=[1, 2, 3], tau=1.5, rho=0.2, min_visual=0.05, first_layer=1)",
    "vhr",
    "uniform(keep=0.4, before_layer=0) + vhr",
]


def other_prompt(method: Any, one: dict[str, Any], family: str) -> dict[str, Any]:
    """What a method's second branch is shown, as inputs of the plain model."""
    if method.name == "vcd":
        pixels = one["pixel_values"]
        generator = torch.Generator().manual_seed(
            content_key(pixels[0] if family == "llava" else pixels) * 1_000_003 + method.seed
        )
        beta = torch.sigmoid(torch.linspace(-6, 6, 1000)) * (0.005 - 1e-5) + 1e-5
        kept = torch.prod(1 - beta[: method.noise_step + 1].double())
        noise = torch.randn(pixels.shape[1:] if family == "llava" else pixels.shape, generator=generator)
        return one | {"pixel_values": (math.sqrt(kept) * pixels + math.sqrt(1 - kept) * noise).float()}
    if method.name == "icd":
        return contrast.inserted(one, list(method.disturbance), method.where)
    return contrast.text_only(one)


def combined(method: Any) -> Any:
    """The card's formula, on its own."""

    def combine(logits: torch.Tensor, other: torch.Tensor, number: int) -> torch.Tensor:
        if method.name == "m3id":
            fade = math.exp(-method.lam * number)
            weight = min((1 - fade) / fade, method.max_weight)
            lc, lu = logits.log_softmax(-1), other.log_softmax(-1)
            new = lc + weight * (lc - lu)
        elif method.name == "textbranch":
            lc, lu = logits.log_softmax(-1), other.log_softmax(-1)
            new = method.gamma * lc - (method.gamma - 1) * lu
        else:
            new = (1 + method.alpha) * logits - method.alpha * other
        return new.where(logits.softmax(-1) >= method.beta * logits.softmax(-1).max(), -torch.inf)

    return combine


@pytest.mark.parametrize("text", SPECS)
def test_greedy_equals_two_forwards_a_step(family, model, batch, text):
    (method,) = spec.parse(text)
    plain = generate(model, batch)
    with vlmattn.wrap(model, text):
        out = generate(model, batch)
    assert not torch.equal(out.sequences, plain.sequences)
    for row in range(2):
        one = tiny.single(batch, row)
        tokens, logits = contrast.two_forwards(model, one, other_prompt(method, one, family), combined(method), STEPS)
        assert out.sequences[row, -STEPS:].tolist() == tokens
        assert max(gap(step[row], want) for step, want in zip(out.logits, logits, strict=True)) < 1e-4


@pytest.mark.parametrize("rest", OTHERS)
@pytest.mark.parametrize("text", EACH)
def test_with_other_methods_both_branches_run_the_changed_model(family, model, batch, text, rest):
    (method,) = spec.parse(text)
    with vlmattn.wrap(model, f"{rest} + {text}"):
        out = generate(model, batch)
    for row in range(2):
        one = tiny.single(batch, row)
        tokens, logits = contrast.two_forwards(
            model, one, other_prompt(method, one, family), combined(method), STEPS, rest
        )
        if "shrink_early_layers" in rest:  # the answer sees less than the prompt did: one pass cannot show it
            tokens, logits, steps = tokens[:1], logits[:1], 1
        else:
            steps = STEPS
        assert out.sequences[row, -STEPS:].tolist()[:steps] == tokens
        assert max(gap(step[row], want) for step, want in zip(out.logits, logits, strict=False)) < 1e-4


@pytest.mark.parametrize("text", [*SPECS, *(f"{rest} + {text}" for rest in OTHERS for text in EACH)])
def test_a_batch_equals_its_rows(family, model, batch, text):
    with vlmattn.wrap(model, text):
        together = generate(model, batch)
        for row in range(2):
            alone = generate(model, tiny.single(batch, row))
            assert torch.equal(together.sequences[row, -STEPS:], alone.sequences[0, -STEPS:])
            assert max(gap(a[row], b[0]) for a, b in zip(together.logits, alone.logits, strict=True)) < 1e-4


@pytest.mark.parametrize("text", ["vcd", "icd(disturbance=[5])", "m3id", "textbranch(gamma=3.0)"])
def test_strength_zero_and_undo_are_bit_identical(family, model, batch, text):
    forward, generated = model(**batch).logits, generate(model, batch)
    (method,) = spec.parse(text)
    with vlmattn.wrap(model, method.disabled()):
        assert torch.equal(model(**batch).logits, forward)
        assert torch.equal(generate(model, batch).sequences, generated.sequences)
    before = {name: (module.__dict__.copy(), list(module._forward_hooks)) for name, module in model.named_modules()}
    session = vlmattn.wrap(model, text)
    generate(model, batch)
    session.remove()
    after = generate(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(after.logits, generated.logits, strict=True))
    for name, module in model.named_modules():
        attributes, hooks = before[name]
        assert module.__dict__.keys() == attributes.keys() and list(module._forward_hooks) == hooks


@pytest.mark.parametrize("text", ["vcd(beta=1.0)", "icd(disturbance=[5], beta=1.0)", "m3id(beta=1.0)",
                                  "textbranch(beta=1.0)"])  # fmt: skip
def test_beta_of_one_is_greedy(family, model, batch, text):
    with vlmattn.wrap(model, text):
        assert torch.equal(generate(model, batch).sequences, same := generate(model, batch).sequences)
    assert torch.equal(generate(model, batch).sequences, same)


def test_equal_branches_change_nothing(family, model, batch, monkeypatch):
    """The same pixels again: (1 + a) l - a l."""
    plain = generate(model, batch)
    monkeypatch.setattr(VCD, "noised", lambda self, pixels: pixels.values.clone())
    with vlmattn.wrap(model, "vcd(beta=0)"):
        out = generate(model, batch)
    assert max(gap(a, b) for a, b in zip(out.logits, plain.logits, strict=True)) < 1e-4


@pytest.mark.parametrize("text", EACH)
def test_the_branches_differ_at_every_step(family, model, batch, text, monkeypatch):
    """A shared cache would make them equal from the second token on."""
    (method,) = spec.parse(text)
    apart, numbers, combine = [], [], type(method).combine

    def look(self: Any, step: Any) -> torch.Tensor:
        apart.append((step.logits - step.other).abs().amax(-1).flatten())
        numbers.append(step.number.tolist())
        return combine(self, step)

    monkeypatch.setattr(type(method), "combine", look)
    with vlmattn.wrap(model, text) as session:
        out = generate(model, batch)
        report = session.report()
    assert numbers == [[n] for n in range(1, STEPS + 1)]
    assert torch.stack(apart).min() > 1e-2
    cache = out.past_key_values
    first, second = cache.plan.real.split(2)
    assert first.sum(1).tolist() == report.prompt_tokens and second.sum(1).tolist() == report.second_tokens
    for row in range(2):
        other = other_prompt(method, tiny.single(batch, row), family)
        assert report.second_tokens[row] == other["input_ids"].shape[1]
    assert {layer.keys.shape[0] for layer in cache.layers} == {4}
    assert report.kv_bytes > report.kv_bytes_full and "second branch" in str(report)
    width = batch["input_ids"].shape[1]
    assert cache.get_seq_length() == width + STEPS - 1


@pytest.mark.parametrize("text", [*EACH, f"fastv(keep=0.5, before_layer=2) + icd(disturbance={WORDS})",
                                  "random(keep=0.5, before_layer=0) + vcd"])  # fmt: skip
def test_one_pass_over_prompt_and_answer_gives_the_same_logits(family, model, batch, text):
    """Also for beams and sampling: both follow the calibrated logits, with caches that follow the beams."""
    one = tiny.single(batch, 1)
    length = one["input_ids"].shape[1]
    banned = [tiny.IMAGE, tiny.VIDEO, *contrast.WRAPPERS]
    with vlmattn.wrap(model, text) as session:

        def scored(answer: torch.Tensor) -> torch.Tensor:
            with session.prompt(length):
                logits = model(**contrast.extended(one, answer.tolist()), use_cache=False).logits[0]
            return logits[-STEPS - 1 : -1]

        greedy = generate(model, one)
        again = scored(greedy.sequences[0, length:])
        assert max(gap(a[0], b) for a, b in zip(greedy.logits, again, strict=True)) < 1e-4

        beams = generate(model, one, num_beams=3, num_return_sequences=3, output_scores=True)
        for row, score in zip(beams.sequences, beams.sequences_scores.tolist(), strict=True):
            chances = scored(row[length:]).log_softmax(-1)
            own = chances.gather(1, row[length:, None]).sum().item() / STEPS
            assert own == pytest.approx(score, abs=1e-4)

        torch.manual_seed(5)
        sampled = generate(model, one, do_sample=True, top_k=0, temperature=0.7)
        torch.manual_seed(5)
        logits = scored(sampled.sequences[0, length:])
        logits[:, banned] = -torch.inf
        drawn = [int(torch.multinomial((row / 0.7).softmax(-1), 1)) for row in logits]
        assert drawn == sampled.sequences[0, length:].tolist()


@pytest.mark.parametrize("text", [*EACH, f"fastv(keep=0.5, before_layer=2) + icd(disturbance={WORDS})"])
def test_beams_of_a_batch_equal_those_of_its_rows(family, model, batch, text):
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2}
    with vlmattn.wrap(model, text):
        together = generate(model, batch, **options).sequences[:, -STEPS:]
        alone = [generate(model, tiny.single(batch, row), **options).sequences[:, -STEPS:] for row in range(2)]
        several = generate(model, batch, do_sample=True, num_return_sequences=2).sequences
    assert torch.equal(together, torch.cat(alone))
    assert several.shape[0] == 4


class Collected(BaseStreamer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        pass


@pytest.mark.parametrize("text", EACH)
def test_lookup_streamers_and_a_second_turn(family, model, batch, text):
    one = tiny.single(batch, 0)
    one["input_ids"][:, -4:] = torch.tensor([[5, 6, 5, 6]])
    with vlmattn.wrap(model, text):
        streamer = Collected()
        greedy = generate(model, one, 12, streamer=streamer)
        assert streamer.tokens == greedy.sequences[0].tolist()
        lookup = generate(model, one, 12, prompt_lookup_num_tokens=3)
        assert torch.equal(greedy.sequences, lookup.sequences[:, : greedy.sequences.shape[1]])
        ids = torch.cat([greedy.sequences, torch.tensor([[7, 8, 9]])], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": greedy.past_key_values}
        again = generate(model, turn, 3)
        longer = contrast.extended(one, ids[0, one["input_ids"].shape[1] :].tolist())
        fresh = generate(model, longer, 3)
    assert torch.equal(again.sequences, fresh.sequences)
    assert max(gap(a, b) for a, b in zip(again.logits, fresh.logits, strict=True)) < 1e-4


@pytest.mark.parametrize("text", [EACH[0], EACH[2], "vhr + vcd"])
def test_statistics_are_those_of_the_callers_rows(family, model, batch, text):
    """Recording changes nothing, and the first step is that of a session without contrast."""
    with vlmattn.wrap(model, text) as session:
        out = generate(model, batch)
        session.record()
        again = generate(model, batch)
        stats = session.stats()
    assert all(torch.equal(a, b) for a, b in zip(out.logits, again.logits, strict=True))
    with vlmattn.wrap(model, "vhr" if "vhr" in text else None) as session:
        session.record()
        generate(model, batch)
        plain = session.stats()
    assert stats["visual_mass"].values.shape == plain["visual_mass"].values.shape
    assert torch.allclose(stats["visual_mass"].values[0], plain["visual_mass"].values[0], atol=1e-6)
    if "vhr" in text:
        assert torch.equal(stats["gain"].values.nan_to_num(), plain["gain"].values.nan_to_num())


def test_hidden_states_are_those_of_the_callers_rows(model, batch):
    with vlmattn.wrap(model, "vcd"):
        out = generate(model, batch, 3, output_hidden_states=True)
    assert {state.shape[0] for step in out.hidden_states for state in step} == {2}


def test_rows_without_an_image_are_left_alone(family, model):
    """Beside rows with one, and in a prompt without any."""
    none = tiny.prompts(family, images=(0, 0))
    mixed = tiny.prompts(family, images=(1, 0))
    text = {name: mixed[name][1:] for name in ("input_ids", "attention_mask")}
    for method in ("vcd(alpha=3.0)", "m3id(lam=1.0)", "icd(disturbance=[5, 6])"):
        expected, plain = generate(model, none), generate(model, text)
        with vlmattn.wrap(model, method):
            assert torch.equal(generate(model, none).sequences, expected.sequences)
            together = generate(model, mixed)
        assert torch.equal(together.sequences[1], plain.sequences[0])


def test_the_vision_tower_runs_again_only_for_other_pixels(family, model, batch):
    calls: list[int] = []
    tower = model.model.vision_tower if family == "llava" else model.model.visual
    handle = tower.register_forward_pre_hook(lambda *_: calls.append(1))
    for text, times in (("vcd", 2), ("icd(disturbance=[5])", 1), ("m3id", 1), ("none", 1)):
        calls.clear()
        with vlmattn.wrap(model, text):
            generate(model, batch)
        assert len(calls) == times
    handle.remove()


def test_noise_depends_on_pixels_and_seed_only(family, model, batch):
    """Not on the batch (see above), nor on the generator that sampling uses."""
    with vlmattn.wrap(model, "vcd") as session:
        torch.manual_seed(1)
        first = generate(model, batch).logits
        torch.manual_seed(2)
        again = generate(model, batch).logits
        session.set("vcd.seed", 1)
        other = generate(model, batch).logits
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert gap(first[0].nan_to_num(neginf=0.0), other[0].nan_to_num(neginf=0.0)) > 1e-3


def test_agla_shows_the_second_branch_what_is_looked_at(family, model, batch, monkeypatch):
    """Against two forwards with the masked pixels, which are black where the attention is low."""
    text = "agla(beta=0.01, keep=0.4)"
    (method,) = spec.parse(text)
    shown: list[tuple[torch.Tensor, torch.Tensor]] = []
    masked = type(method).masked

    def look(self: Any, pixels: Any) -> torch.Tensor:
        shown.append((pixels.values, masked(self, pixels)))
        return shown[-1][1]

    def combine(logits: torch.Tensor, other: torch.Tensor, number: int) -> torch.Tensor:
        plausible = logits.softmax(-1) >= method.beta * logits.softmax(-1).max()
        return (logits + method.alpha * other).where(plausible, -torch.inf)

    monkeypatch.setattr(type(method), "masked", look)
    with vlmattn.wrap(model, text) as session:
        out = generate(model, batch)
        assert len(shown) == 2
        session.set("agla.official_quirk", True)
        quirk = generate(model, batch)
    for row, (before, after) in enumerate(shown[:2]):
        dark = (before != after).float().mean()
        assert 0.5 < float(dark) < 0.6
        assert len(after[before != after].unique()) == 3  # black, by channel
        one = tiny.single(batch, row)
        other = one | {"pixel_values": after[None] if family == "llava" else after}
        tokens, logits = contrast.two_forwards(model, one, other, combine, STEPS)
        assert out.sequences[row, -STEPS:].tolist() == tokens
        assert max(gap(step[row], want) for step, want in zip(out.logits, logits, strict=True)) < 1e-3
    assert gap(quirk.logits[0], out.logits[0]) == 0.0
    assert not torch.equal(quirk.sequences, out.sequences)


def test_pixels_are_blacked_out_where_they_are_not_visible():
    """Of a family that sends patches, against the image that they were cut from."""
    config = tiny.qwen2_5_vl().config
    image = torch.randn(1, 2, 3, 56, 84)  # 2 frames of a patch, 4 x 6 patches, 2 x 3 tokens

    def cut(image: torch.Tensor) -> torch.Tensor:
        split = image.view(1, 2, 3, 2, 2, 14, 3, 2, 14)  # as the family's image processor does
        return split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(24, -1)

    seen = torch.rand(56, 84) > 0.5
    black = torch.tensor([-1.0, -2.0, -3.0])
    expected = torch.where(seen, image, black[:, None, None])
    (family,) = (family for family in supported() if family.model_type == "qwen2_5_vl")
    found = family.blacken(config, cut(image), (1, 2, 3), lambda height, width: seen.view(height, width), black)
    assert torch.equal(found, cut(expected))


def test_a_store_of_features_serves_both_kinds_of_pixels(family, model, batch):
    store = vlmattn.VisionStore()
    with vlmattn.wrap(model, "vcd") as session:
        plain = generate(model, batch)
        session.share_vision(store)
        shared = [generate(model, batch) for _ in range(2)]
    assert store.misses == 2 and store.hits == 2
    for out in shared:
        assert all(torch.equal(a, b) for a, b in zip(out.logits, plain.logits, strict=True))


def test_retuning_follows_from_the_next_prompt_on(family, model, batch):
    """A conversation under way goes on without contrast, with as many rows as the caller has."""
    plain = generate(model, batch)
    ids = torch.nn.functional.pad(plain.sequences[:, : batch["input_ids"].shape[1] + 1], (0, 1), value=7)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 2), value=1)

    def go_on(cache: Any) -> torch.Tensor:
        return generate(model, {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}, 2).logits[0]

    expected = go_on(generate(model, batch, 1).past_key_values)
    with vlmattn.wrap(model, "vcd") as session:
        once = generate(model, batch)
        cache = generate(model, batch, 1).past_key_values
        session.set("vcd.alpha", 0.0)
        assert gap(go_on(cache), expected) < 1e-4
        assert torch.equal(generate(model, batch).sequences, plain.sequences)
        cache = generate(model, batch, 1).past_key_values
        session.set("vcd.alpha", 1.0)
        assert gap(go_on(cache), expected) < 1e-4
        assert torch.equal(generate(model, batch).sequences, once.sequences)


def test_refusals(model, batch):
    with pytest.raises(SpecError, match="both change the logits"):
        vlmattn.wrap(model, "vcd + m3id")
    with vlmattn.wrap(model, "icd"), pytest.raises(CallError, match="processor=processor"):
        model(**batch)
    with vlmattn.wrap(model, "vcd"):
        with pytest.raises(CallError, match="below its head"):
            model.model(**batch)
        with pytest.raises(CallError, match="logits_to_keep"):
            model(**batch, logits_to_keep=torch.tensor([1]))
    assert model(**batch).logits.shape[0] == 2


@pytest.mark.parametrize("bad", ["vcd(alpha=-1)", "vcd(beta=1.5)", "vcd(noise_step=1000)", "vcd(seed=-1)",
                                 "icd(disturbance='')", "icd(disturbance=[])", "icd(disturbance=[-1])",
                                 "icd(where=inside)", "m3id(lam=-1)", "m3id(max_weight=0)", "textbranch(gamma=0.9)",
                                 "textbranch(beta=True)", "vcd(alpha=x)"])  # fmt: skip
def test_bad_values(bad):
    with pytest.raises(SpecError):
        spec.parse(bad)
