"""ILVAD: the evidence, the factors, and two answers against an oracle with a cache and a softmax of its own."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import tiny
import torch

import vlmattn
from vlmattn import spec
from vlmattn.edits import TEXT, VISUAL, VISUAL_GROUPS, AttnEdit, Boost
from vlmattn.errors import CallError, SpecError
from vlmattn.kernels import naive, rows
from vlmattn.kernels.rows import Request
from vlmattn.methods.attend.ilvad import ILVAD, discrepancy, scaled

pytestmark = pytest.mark.usefixtures("no_grad")

TINY = "ilvad(tau=1.1, tokens=5)"
STEPS = 8


def generate(model: Any, batch: dict[str, torch.Tensor], steps: int = STEPS, **options: Any) -> Any:
    return model.generate(
        **batch, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )


def gap(a: Any, b: Any) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


# The algorithm


def test_switching_on_counts_and_a_sink_does_not():
    """Patterns over four layers: always on 0, off-on-off-on 2, on-off-on-on 1, never 0."""
    on = torch.tensor([[1.0, 0, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0]])
    attention = on[:, None] + 1e-3
    present = torch.ones(1, 4, dtype=torch.bool)
    assert discrepancy(attention, present, 0.5).tolist() == [[0, 2, 1, 0]]
    padded = torch.cat([attention, torch.full((4, 1, 1), 9.0)], -1)
    there = torch.tensor([[True] * 4 + [False]])
    assert discrepancy(padded, there, 0.5).tolist() == [[0, 2, 1, 0, 0]]
    # means over layers 1.001, .501, .751, .001; of all .5635: the code leaves out what is below
    assert discrepancy(attention, present, 0.5, quirk=True).tolist() == [[0, 0, 1, 0]]


def test_scaling_clips_at_three_standard_deviations():
    x = torch.tensor([[0.0] * 30 + [10.0], [2.0] * 31])
    there = torch.ones(2, 31, dtype=torch.bool)
    there[0, 0] = False
    found, differ = scaled(x, there, quirk=False)
    assert differ.tolist() == [[True], [False]]
    assert found[0].tolist() == [0.0] * 30 + [1.0] and found[1].tolist() == [0.0] * 31
    reach = x[0, 1:].mean() + 3 * x[0, 1:].std()
    assert scaled(x, there, quirk=True)[0][0, -1].item() == pytest.approx(reach.item() / 10)
    assert reach < 10


def test_evidence_is_the_exponent_of_what_switched_on():
    seen = torch.zeros(3, 2, 2, 3)
    seen[:, 0, :, 0], seen[:2, 1, 0, 1], seen[2, 1, 0, 2] = 1.0, 1.0, 9.0
    valid = torch.tensor([[True, True], [True, False], [False, False]])
    found = ILVAD(alpha=3.0, tau=1.5).evidence(seen, valid, torch.ones(2, 3, dtype=torch.bool))
    assert found.tolist() == [[0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]  # the third step is after the end
    none = ILVAD().evidence(seen, torch.zeros(3, 2, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool))
    assert not none.any()


@pytest.mark.parametrize("backend", [rows, naive], ids=["rows", "reference"])
def test_boosts_act_in_the_heads_that_look_most(backend):
    """Two of four heads each; tags text, three visual, two text."""
    p = torch.tensor([[0.1, 0.6, 0.1, 0.1, 0.05, 0.05], [0.4, 0.1, 0.1, 0.2, 0.1, 0.1],
                      [0.2, 0.1, 0.5, 0.1, 0.05, 0.05], [0.1, 0.05, 0.1, 0.15, 0.3, 0.3]])  # fmt: skip
    tag = torch.tensor([[TEXT, VISUAL, VISUAL, VISUAL, TEXT, TEXT]], dtype=torch.uint8)
    log = torch.tensor([[0.0, 1.0, 0.5, 0.0, 0.0, 0.0]])
    text = torch.tensor([[0.0, 0, 0, 0, 1, 1]])
    boosts = (
        Boost(log.exp(), log, VISUAL_GROUPS),
        Boost(torch.tensor([[1.0, 1, 1, 1, 0.5, 1]]), text),
    )
    unit = torch.eye(6).expand(1, 4, 6, 6)
    request = Request(tag, torch.tensor([True]), torch.ones(1, 1, dtype=torch.bool), AttnEdit(boosts=boosts), None)
    found = backend.apply(p.log()[None, :, None], unit, unit, None, 1.0, p[None, None], request)[0][0, 0]
    expected = p.clone()
    expected[[0, 2]] *= log.exp()  # .65/.8 and .35/.7, against .15/.4 and .1/.3
    expected[[1, 3], 4] *= 0.5
    assert torch.allclose(found, expected / expected.sum(-1, keepdim=True), atol=1e-6)


def test_of_equal_heads_the_lower_ones_are_taken():
    value = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])[None, :, None]
    for share, chosen in ((0.5, [1, 3]), (0.6, [0, 1, 3]), (0.1, [1])):
        assert rows.top_heads(value, share)[0, :, 0].nonzero()[:, 0].tolist() == chosen
        assert torch.equal(naive._best(value, share), rows.top_heads(value, share))


@pytest.mark.parametrize(
    "text", ["ilvad(alpha=-1)", "ilvad(tau=0)", "ilvad(tokens=1)", "ilvad(beta=0)", "ilvad(text=1)"]
)
def test_bad_values(text):
    with pytest.raises(SpecError, match="expected"):
        spec.parse(text)


# Against an oracle


def answer(model: Any, prompt: oracle.Prompt, steps: int, log: Any, method: ILVAD) -> Any:
    """One unpadded row, step by step: tokens, logits, and per step and layer the attention seen. `log` `(V,)` or None:
    unedited."""
    text, layers = model.model.language_model, model.model.language_model.layers
    edited = set(method.layers(len(layers))) if log is not None else set()
    visual, embeds, positions = prompt.visual.clone(), prompt.embeds, prompt.positions
    behind = ~visual & (visual.flip(0).cumsum(0) == 0).flip(0)
    image = torch.zeros(len(visual))
    if log is not None:
        image[visual] = log
    score = torch.full((len(visual),), math.nan)
    cache: list[Any] = [None] * len(layers)
    tokens, logits, seen = [], [], []
    for step in range(steps):
        cos, sin = oracle._tables(text, embeds, positions)
        hidden, n, total, views = embeds, len(embeds), torch.zeros(len(embeds)), []
        for index, layer in enumerate(layers):
            a = layer.self_attn
            x = layer.input_layernorm(hidden)
            q, k, v = (oracle.heads(a, name, x).transpose(0, 1) for name in "qkv")
            q, k = q * cos + oracle._rotate(q) * sin, k * cos + oracle._rotate(k) * sin
            if cache[index] is not None:
                k, v = torch.cat([cache[index][0], k], 1), torch.cat([cache[index][1], v], 1)
            cache[index] = k, v
            groups = q.shape[0] // k.shape[0]
            s = (q @ k.repeat_interleave(groups, 0).mT) * a.head_dim**-0.5
            s = s.masked_fill(torch.ones(n, k.shape[1], dtype=torch.bool).triu(k.shape[1] - n + 1), -torch.inf)
            p = s.softmax(-1)
            half = p.shape[0] // 2
            best = p[:, -1, visual].sum(-1).topk(half).indices
            views.append(p[best, -1][:, visual].mean(0))
            if index in edited:
                given = (p * image).sum(-1)
                ratio = given / p[..., visual].sum(-1)
                for row in range(n):
                    total[row] += given[ratio[:, row].topk(half).indices, row].mean()
                last, heads = p[:, -1].clone(), ratio[:, -1].topk(half).indices
                new = last.clone()
                new[heads] *= image.exp()
                there = ~score.isnan()
                if step and method.text:
                    w = score[there]
                    w = w.clamp(w.mean() - 3 * w.std(), w.mean() + 3 * w.std())
                    factor = torch.ones(len(score))
                    if w.max() > w.min():
                        factor[there] = (w - w.min()) / (w.max() - w.min()) + method.beta
                    new[last[:, behind].sum(-1).topk(half).indices] *= factor
                p[:, -1] = new / new.sum(-1, keepdim=True)
            out = (p @ v.repeat_interleave(groups, 0)).transpose(0, 1).reshape(n, -1)
            hidden = hidden + a.o_proj(out)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            hidden = oracle.behind(prompt, index, hidden, range(k.shape[1] - n, k.shape[1]))
        score[-n:] = torch.where(behind[-n:], total, math.nan)
        logits.append(model.lm_head(text.norm(hidden[-1])))
        tokens.append(int(logits[-1].argmax()))
        if step:
            seen.append(torch.stack(views))
        embeds = text.embed_tokens(torch.tensor([tokens[-1]]))
        positions = (prompt.positions.max() + 1 + step).expand(len(positions), 1)
        visual, behind = torch.cat([visual, torch.tensor([False])]), torch.cat([behind, torch.tensor([True])])
        image, score = torch.cat([image, torch.zeros(1)]), torch.cat([score, torch.tensor([math.nan])])
    return tokens, logits, torch.stack(seen)


@pytest.mark.parametrize("text", [TINY, "ilvad(tau=1.1, tokens=3, text=False, first_layer=1)"])
def test_two_answers_equal_the_oracle(model, batch, text):
    (method,) = spec.parse(text)
    prompts = oracle.read_prompts(model, batch, tiny.IMAGE)
    with vlmattn.wrap(model, text):
        out = generate(model, batch)
    moved = 0.0
    for row, prompt in enumerate(prompts):
        first = answer(model, prompt, method.tokens, None, method)
        attention = first[2].mean(0)  # (L, V)
        on = (attention > method.tau * attention.mean(1, keepdim=True)).float()
        switched = (on[1:] - on[:-1]).clamp_min(0).sum(0)
        clipped = switched.clamp(switched.mean() - 3 * switched.std(), switched.mean() + 3 * switched.std())
        log = method.alpha * (clipped - clipped.min()) / (clipped.max() - clipped.min())
        tokens, logits, _ = answer(model, prompt, STEPS, log, method)
        assert out.sequences[row, -STEPS:].tolist() == tokens
        assert gap([x[row] for x in out.logits], logits) < 1e-3
        moved = max(moved, gap(logits[: method.tokens], first[1]))
    assert moved > 0.1


@pytest.mark.parametrize("text", [TINY, f"random(keep=0.6, before_layer=0) + {TINY} + vhr"])
def test_backends_rows_and_beams_agree(model, batch, text):
    with vlmattn.wrap(model, text) as session:
        quick = generate(model, batch, 16)
        beams = model.generate(**batch, max_new_tokens=4, do_sample=False, num_beams=2)[:, -4:]
        for number in (0, 1):
            one = tiny.single(batch, number)
            alone = generate(model, one, 16)
            assert gap([x[number] for x in quick.logits], [x[0] for x in alone.logits]) < 2e-4
            own = model.generate(**one, max_new_tokens=4, do_sample=False, num_beams=2)[:, -4:]
            assert torch.equal(own[0], beams[number])
        session.use_backend("reference")
        slow = generate(model, batch, 16)
    assert torch.equal(quick.sequences, slow.sequences)
    assert gap(quick.logits, slow.logits) < 1e-4


def test_nothing_to_do_is_bit_identical(model, batch):
    plain = generate(model, batch, 4)
    with vlmattn.wrap(model, "ilvad(alpha=0)"):
        assert gap(generate(model, batch, 4).logits, plain.logits) == 0.0
    ends = plain.sequences[:, batch["input_ids"].shape[1]].tolist()
    with vlmattn.wrap(model, TINY):  # an answer of one token has nothing to look at
        out = generate(model, batch, 4, eos_token_id=ends)
        assert gap(out.logits, plain.logits[:1]) == 0.0
        generate(model, batch, 2)
        text = {"input_ids": torch.tensor([[1, 5, 6]])}
        with_it = generate(model, text, 3).logits
    assert gap(with_it, generate(model, text, 3).logits) == 0.0
    assert gap(generate(model, batch, 4).logits, plain.logits) == 0.0


def test_what_is_refused(model, batch):
    one = tiny.single(batch, 0)
    with vlmattn.wrap(model, TINY):
        with pytest.raises(CallError, match=r"ilvad.* call model.generate\(\)"):
            model(**one)
        with pytest.raises(CallError, match="prompt_lookup_num_tokens=2"):
            model.generate(**one, max_new_tokens=3, prompt_lookup_num_tokens=2)
    for text, said in [
        (f"{TINY} + fastv(before_layer=2)", "prune before layer 0"),
        ("ilvad(last_layer=1) + ilvad(first_layer=2, alpha=2.0)", "both answer twice"),
        (f"{TINY} + evict3r", "evict3r.* takes keys from some of them"),
        (f"{TINY} + pai", "both edit attention in layer 2"),
    ]:
        with pytest.raises(SpecError, match=said):
            vlmattn.wrap(model, text)
