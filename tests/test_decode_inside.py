"""Calibrations that look inside the model (AvisC, DAMRO, SID, DoLa, DeCo), against recomputation without cache."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import contrast
import oracle
import pytest
import tiny
import torch
from contrast import gap, generate
from torch import Tensor

import vlmattn
from vlmattn import spec
from vlmattn.errors import CallError, LayerError, SpecError, UnsupportedModelError

pytestmark = pytest.mark.usefixtures("no_grad")

STEPS = 5
BRANCHES = [
    "avisc(alpha=1.0)",
    "avisc(lam=0.0, share=0.9, mask=drop)",
    "damro(k=4, positions=original)",
    "damro(k=3, order=raster, positions=original)",
    "sid(keep=0.3, before_layer=2)",
    "sid(keep=5, before_layer=1, frozen=True)",
]
LENSES = ["dola(layers=[0, 1, 2, 3])", "deco(first_layer=0, last_layer=3, alpha=2.0)"]
REST = [
    "fastv(keep=0.5, before_layer=3)",
    "var(sinks=[1, 2, 3], tau=1.5, rho=0.2, min_visual=0.05, first_layer=1)",
    "vhr",
]


def states(model: Any, prompt: oracle.Prompt, answer: list[int], keep: Any = None) -> tuple[Tensor, list[Tensor]]:
    """Logits `(n, W)` of one pass over prompt and answer, and the probabilities `(H, n, n)` of every layer.

    `keep` `(layer, count)`: from that layer on visual keys are hidden but for the `count` that a row, in the layer
    before, looks at least; rows of the prompt hide what its last row hides.
    """
    text = model.model.language_model
    embeds = torch.cat([prompt.embeds, text.embed_tokens(torch.tensor(answer, dtype=torch.long))])
    behind = prompt.positions.amax() + 1 + torch.arange(len(answer))
    positions = torch.cat([prompt.positions, behind.expand(len(prompt.positions), -1)], 1)
    cos, sin = oracle._tables(text, embeds, positions)
    length, total = len(prompt.visual), len(embeds)
    hidden, found, mask = embeds, [], torch.ones(total, total, dtype=torch.bool).tril()
    for index, layer in enumerate(text.layers):
        if keep is not None and index == keep[0]:
            mask = mask.clone()
            columns = prompt.visual.nonzero()[:, 0]
            for row in range(total):
                paid = found[-1].mean(0)[max(row, length - 1), columns]
                ranked = sorted(range(len(columns)), key=lambda i: (float(paid[i]), i))
                mask[row, columns[ranked[keep[1] :]]] = False
        x = layer.input_layernorm(hidden)
        attention = layer.self_attn
        q, k, v = (
            project(x).view(total, -1, attention.head_dim).transpose(0, 1)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = q * cos + oracle._rotate(q) * sin, k * cos + oracle._rotate(k) * sin
        groups = q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        logits = (q @ k.transpose(-1, -2) * attention.head_dim**-0.5).masked_fill(~mask, -torch.inf)
        found.append(logits.softmax(-1))
        hidden = hidden + attention.o_proj((found[-1] @ v).transpose(0, 1).reshape(total, -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(text.norm(hidden)), found


def without(prompt: oracle.Prompt, dropped: Tensor) -> oracle.Prompt:
    """The prompt without some columns, positions as they were."""
    return oracle.Prompt(prompt.embeds[~dropped], prompt.positions[:, ~dropped], prompt.visual[~dropped])


def second(model: Any, method: Any, prompt: oracle.Prompt, one: dict[str, Any]) -> tuple[oracle.Prompt, Any]:
    """The prompt of the second branch, and what `states` hides in it."""
    visual = prompt.visual
    columns = visual.nonzero()[:, 0]
    if method.name == "sid":
        count = method.keep if isinstance(method.keep, int) else math.floor(len(columns) * method.keep + 0.5)
        return prompt, (method.before_layer, count)
    dropped = visual.clone()
    if method.name == "avisc":
        paid = torch.stack([p.mean(0)[-1, columns] for p in states(model, prompt, [])[1]])
        part, order = (paid.sum(1) / paid.sum()).sort(descending=True)
        chosen = order[: int((part.cumsum(0) < method.share).sum()) + 1]
        weight = paid[chosen].mean(0)
        dropped[columns] = weight < weight.mean() + method.lam * weight.std()
        assert 0 < int(dropped.sum()) < len(columns)
        if method.mask == "zeros":
            return dataclasses.replace(prompt, embeds=prompt.embeds * ~dropped[:, None]), None
        return without(prompt, dropped), None
    best = patches(model, one).argsort(descending=True, stable=True)[: method.k]
    dropped[columns[best]] = False
    embeds = prompt.embeds.clone()
    if method.order == "score":
        embeds[columns[best.sort().values]] = prompt.embeds[columns[best]]
    return without(dataclasses.replace(prompt, embeds=embeds), dropped), None


def patches(model: Any, one: dict[str, Any]) -> Tensor:
    """How the vision tower ranks patches: its CLS row as one head, or what patches receive."""
    from vlmattn.methods.decode.damro import Outliers

    seen: list[Tensor] = []
    original = Outliers.select

    def look(self: Any, view: Any) -> Any:
        seen.append(view.vision["row"][0])
        return original(self, view)

    Outliers.select = look
    try:
        with vlmattn.wrap(model, "damro(positions=original)"):
            model(**one)
    finally:
        Outliers.select = original
    return seen[0]


def combined(method: Any, logits: Tensor, other: Tensor) -> Tensor:
    new = (1 + method.alpha) * logits - method.alpha * other
    return new.where(logits.softmax(-1) >= method.beta * logits.softmax(-1).max(), -torch.inf)


@pytest.mark.parametrize("family", sorted(tiny.CORE))
@pytest.mark.parametrize("text", BRANCHES)
def test_branches_equal_recomputation(family, model, batch, text):
    (method,) = spec.parse(text)
    prompts = oracle.read_prompts(model, batch, tiny.IMAGE)
    plain = generate(model, batch, STEPS)
    with vlmattn.wrap(model, text) as session:
        out = generate(model, batch, STEPS)
        report = session.report()
    assert max(gap(a.nan_to_num(neginf=0), b) for a, b in zip(out.logits, plain.logits, strict=True)) > 0.1
    for row, prompt in enumerate(prompts):
        other, hides = second(model, method, prompt, tiny.single(batch, row))
        answer = out.sequences[row, -STEPS:].tolist()
        own, theirs = states(model, prompt, answer)[0], None
        if method.name == "sid" and method.frozen:  # rows of the answer hide what the prompt's last row hides
            paid = states(model, prompt, [])[1][hides[0] - 1].mean(0)[-1, prompt.visual]
            gone = prompt.visual.nonzero()[:, 0][paid.argsort(stable=True)[hides[1] :]].tolist()
            stays = [c for c in range(len(prompt.visual)) if c not in gone]
            run = oracle.generate(model, prompt, {hides[0]: stays}, STEPS, answer)
            theirs = torch.stack(run.logits)
        else:
            theirs = states(model, other, answer, hides)[0][-STEPS - 1 : -1]
        for step in range(STEPS):
            want = combined(method, own[len(prompt.visual) - 1 + step], theirs[step])
            assert gap(out.logits[step][row], want) < 1e-4
        assert report.second_tokens[row] == len(other.visual)


def test_hidden_tokens_are_chosen_anew_by_every_token(family, model, batch):
    with vlmattn.wrap(model, "sid(keep=0.3, before_layer=2, beta=0)") as session:
        anew = generate(model, batch, 12)
        session.set("sid.frozen", True)
        frozen = generate(model, batch, 12)
    assert gap(anew.logits[0], frozen.logits[0]) < 1e-4
    assert max(gap(a, b) for a, b in zip(anew.logits[1:3], frozen.logits[1:3], strict=True)) > 1e-3
    sizes = [[layer.keys.shape[2] for layer in out.past_key_values.layers] for out in (anew, frozen)]
    assert sizes[0] == sizes[1]  # the first branch keeps everything, and both stand in one cache


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("text", ["sid(keep=0.3, before_layer=2)", "avisc"])
def test_attention_implementations_agree(family, batch, attention, text):
    with vlmattn.wrap(tiny.MODELS[family](), text):
        ...
    results = []
    for name in ("sdpa", attention):
        with vlmattn.wrap(model := tiny.MODELS[family](attention=name), text):
            results.append(generate(model, batch, 3).logits)
    assert max(gap(a, b) for a, b in zip(*results, strict=True)) < 1e-4


@pytest.mark.parametrize("text", ["sid(keep=1.0, beta=0)", "sid(keep=1.0, beta=0, frozen=True)",
                                  "avisc(lam=-1e9, beta=0)", "damro(k=99, order=raster, positions=original, beta=0)",
                                  "damro(k=99, order=raster, positions=original, beta=0, alpha=3.0)"])  # fmt: skip
def test_what_leaves_the_branch_as_the_prompt_changes_nothing(family, model, batch, text):
    plain = generate(model, batch, STEPS)
    with vlmattn.wrap(model, text):
        out = generate(model, batch, STEPS)
    assert torch.equal(out.sequences, plain.sequences)
    assert max(gap(a, b) for a, b in zip(out.logits, plain.logits, strict=True)) < 1e-3


@pytest.mark.parametrize("text", LENSES)
def test_lenses_equal_the_hidden_states(family, model, batch, text):
    (method,) = spec.parse(text)
    with vlmattn.wrap(model, text):
        out = generate(model, batch, STEPS)
    text_model = model.model.language_model
    for row in range(2):
        one = tiny.single(batch, row)
        for step in range(STEPS):
            answer = out.sequences[row, -STEPS:].tolist()[:step]
            model.model.rope_deltas = None
            seen = model(**contrast.extended(one, answer), use_cache=False, output_hidden_states=True)
            last = seen.logits[0, -1]
            early = [model.lm_head(text_model.norm(state[0, -1])) for state in seen.hidden_states[:-1]]
            p = last.softmax(-1)
            if method.name == "dola":

                def apart(q: Tensor, p: Tensor = p) -> float:
                    m = (p + q) / 2
                    return float((p * (p / m).log()).sum() / 2 + (q * (q / m).log()).nan_to_num().sum() / 2)

                best = max(range(4), key=lambda j: apart(early[j].softmax(-1)))
                want = (p.log() - early[best].log_softmax(-1)).where(p >= 0.1 * p.max(), -torch.inf)
            else:
                ranked = p.argsort(descending=True)[:20]
                candidates = ranked[: int((p[ranked].cumsum(0) < 0.9).sum()) + 1]
                sure = [float(logits.softmax(-1)[candidates].max()) for logits in early]
                best = sure.index(max(sure))
                want = torch.full_like(p, -torch.inf)
                want[candidates] = (last + method.alpha * sure[best] * early[best])[candidates]
            assert gap(out.logits[step][row], want) < 1e-3


@pytest.mark.parametrize("text", [*BRANCHES, *LENSES, *(f"{rest} + {text}" for rest in REST for text in
                                                        (BRANCHES[0], BRANCHES[4], LENSES[1]))])  # fmt: skip
def test_a_batch_equals_its_rows(family, model, batch, text):
    with vlmattn.wrap(model, text):
        together = generate(model, batch, STEPS)
        for row in range(2):
            alone = generate(model, tiny.single(batch, row), STEPS)
            assert max(gap(a[row], b[0]) for a, b in zip(together.logits, alone.logits, strict=True)) < 1e-4


@pytest.mark.parametrize("text", [BRANCHES[0], BRANCHES[2], BRANCHES[4], *LENSES,
                                  "fastv(keep=0.5, before_layer=1) + sid(keep=0.3, before_layer=3)"])  # fmt: skip
def test_beams_and_lookup(family, model, batch, text):
    one = tiny.single(batch, 1)
    one["input_ids"][:, -4:] = torch.tensor([[5, 6, 5, 6]])
    length = one["input_ids"].shape[1]
    with vlmattn.wrap(model, text) as session:
        beams = generate(model, one, STEPS, num_beams=2, num_return_sequences=2, output_scores=True)
        for row, score in zip(beams.sequences, beams.sequences_scores.tolist(), strict=True):
            with session.prompt(length):
                logits = model(**contrast.extended(one, row[length:].tolist()), use_cache=False).logits[0]
            chances = logits[-STEPS - 1 : -1].log_softmax(-1).gather(1, row[length:, None])
            assert chances.sum().item() / STEPS == pytest.approx(score, abs=1e-4)
        greedy = generate(model, one, 10)
        lookup = generate(model, one, 10, prompt_lookup_num_tokens=3)
        assert torch.equal(greedy.sequences, lookup.sequences[:, : greedy.sequences.shape[1]])


def test_strength_zero_and_undo_are_bit_identical(family, model, batch):
    plain = generate(model, batch, 3)
    for text in (*BRANCHES, "deco"):
        (method,) = spec.parse(text)
        with vlmattn.wrap(model, method.disabled()):
            assert torch.equal(generate(model, batch, 3).sequences, plain.sequences)
        with vlmattn.wrap(model, text):
            generate(model, batch, 2)
        after = generate(model, batch, 3)
        assert all(torch.equal(a, b) for a, b in zip(after.logits, plain.logits, strict=True))
    assert spec.parse("dola")[0].disabled() is None


@pytest.mark.parametrize("family", sorted(tiny.CORE))
def test_renumbered_outliers_stand_without_a_gap(model, batch, monkeypatch):
    """LLaVA's default: k image tokens, then the text goes on; a second prompt of its own in every way."""
    if type(model).__name__ != "LlavaForConditionalGeneration":
        with pytest.raises(UnsupportedModelError, match=r"damro with positions='original'"):
            vlmattn.wrap(model, "damro")
        return
    one = tiny.single(batch, 1)
    (prompt,) = oracle.read_prompts(model, one, tiny.IMAGE)
    (method,) = spec.parse("damro(k=4, alpha=1.0)")
    with vlmattn.wrap(model, [method]) as session:
        out = generate(model, one, STEPS)
        report = session.report()
    other, _ = second(model, method, prompt, one)
    other = dataclasses.replace(other, positions=torch.arange(len(other.visual))[None])
    answer = out.sequences[0, -STEPS:].tolist()
    own, theirs = (states(model, p, answer)[0][-STEPS - 1 : -1] for p in (prompt, other))
    for step in range(STEPS):
        assert gap(out.logits[step][0], combined(method, own[step], theirs[step])) < 1e-4
    assert report.second_tokens == [report.prompt_tokens[0] - 16 + 4]


def test_refusals(model, batch):
    with pytest.raises(SpecError, match=r"uniform.* and the second branch of avisc both prune before layer 0"):
        vlmattn.wrap(model, "uniform(before_layer=0) + avisc")
    with pytest.raises(SpecError, match="both prune before layer 1"):
        vlmattn.wrap(model, "fastv(before_layer=1) + sid(before_layer=1, frozen=True)")
    with pytest.raises(LayerError):
        vlmattn.wrap(model, "sid(before_layer=4)")
    features = model.model.get_image_features(
        **{name: value for name, value in batch.items() if name in ("pixel_values", "image_grid_thw")}
    )
    inputs = {name: value for name, value in batch.items() if name != "pixel_values"}
    if "mm_encoder_outputs" in model.forward.__code__.co_varnames:
        with vlmattn.wrap(model, "vcd"), pytest.raises(CallError, match="pass pixel_values"):
            model(**inputs, mm_encoder_outputs={"image": features})


@pytest.mark.parametrize("bad", ["avisc(share=2)", "avisc(lam=x)", "avisc(mask=ones)", "damro(k=0)",
                                 "damro(order=best)", "damro(positions=none)", "sid(keep=0)", "sid(frozen=1)",
                                 "sid(before_layer=0)", "sid(before_layer=[1])", "dola(layers=middle)",
                                 "dola(layers=[])", "dola(layers=[-1])", "dola(beta=2)", "deco(alpha=-1)",
                                 "deco(top_p=0)", "deco(top_k=0)", "deco(first_layer=-1)"])  # fmt: skip
def test_bad_values(bad):
    with pytest.raises(vlmattn.VlmattnError):
        spec.parse(bad)
