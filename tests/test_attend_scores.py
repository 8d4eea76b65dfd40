"""Edits of the row that decides the next token (pai, paint, hgai, adhh) and of all text rows (vaf)."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

import vlmattn
from vlmattn import presets, spec
from vlmattn.edits import LOCAL, PREFIX, SUMMARY, TEXT, VISUAL, AttnEdit, per_group
from vlmattn.errors import LayerError, SpecError
from vlmattn.kernels import naive, rows
from vlmattn.kernels.rows import Request
from vlmattn.methods.attend.adhh import ADHH
from vlmattn.methods.attend.hgai import HGAI
from vlmattn.methods.attend.pai import PAI
from vlmattn.methods.attend.paint import PAINT, local, outliers
from vlmattn.methods.attend.vaf import VAF
from vlmattn.methods.base import LayerView

pytestmark = pytest.mark.usefixtures("no_grad")

BACKENDS = {"rows": rows, "reference": naive}
backends = pytest.mark.parametrize("backend", sorted(BACKENDS))
BASE = [0.2242, 0.6095, 0.0303, 0.1360]
SCORES = [1.0, 2.0, -1.0, 0.5]


def row(backend: str, scores: Any, tags: list[int], edit: AttnEdit | None) -> torch.Tensor:
    """`(H, S)` probabilities of one row with these scores `(H, S)`: with unit keys and values they are the output."""
    scores = torch.tensor(scores).reshape(-1, len(tags))
    heads, keys = scores.shape
    unit = torch.eye(keys).expand(1, heads, keys, keys)
    tag = torch.tensor([tags], dtype=torch.uint8)
    request = Request(tag, torch.tensor([True]), torch.ones(1, 1, dtype=torch.bool), edit, None)
    out = scores.softmax(-1)[None, None]
    return BACKENDS[backend].apply(scores[None, :, None], unit, unit, None, 1.0, out, request)[0][0, 0]


# Worked examples of the cards


@backends
@pytest.mark.parametrize(
    ("tags", "edit", "expected"),
    [
        ([TEXT, VISUAL, VISUAL, TEXT], None, BASE),
        ([TEXT, VISUAL, VISUAL, TEXT], PAI(alpha=0.5).edit(2), [0.1085, 0.8015, 0.0242, 0.0658]),
        ([PREFIX, VISUAL, VISUAL, TEXT], VAF(beta=1.15, gamma=0.95).edit(9), [0.1780, 0.6867, 0.0218, 0.1135]),
        ([TEXT, LOCAL, SUMMARY, TEXT], PAINT(alpha=0.7, beta=0.4).edit(2), [0.0779, 0.8591, 0.0157, 0.0473]),
    ],
)
def test_worked_rows(backend, tags, edit, expected):
    assert row(backend, SCORES, tags, edit)[0].tolist() == pytest.approx(expected, abs=5e-5)


@backends
def test_worked_rows_of_two_heads(backend):
    tags = [TEXT, VISUAL, VISUAL, TEXT]
    found = row(backend, [SCORES, [0.0, -2.0, 1.0, 0.0]], tags, HGAI(alpha=0.5).edit(5))
    assert found[0].tolist() == pytest.approx([0.1085, 0.8015, 0.0242, 0.0658], abs=5e-5)
    assert found[1].tolist() == pytest.approx([0.1460, 0.0537, 0.6543, 0.1460], abs=5e-5)


@backends
@pytest.mark.parametrize(
    ("tau", "expected"),
    [(0.4, [0.10, 0.30, 0.0, 0.0]), (0.61, [0.10, 0.30, 0.35, 0.25]), (0.0, [0.10, 0.30, 0.0, 0.0])],
)
def test_worked_row_of_a_head_that_is_cut_off(backend, tau, expected):
    probabilities = torch.tensor([[0.10, 0.30, 0.35, 0.25]] * 2)
    tags = [PREFIX, VISUAL, TEXT, TEXT]
    found = row(backend, probabilities.log().tolist(), tags, ADHH(heads=((3, 1), (4, 0)), tau=tau).edit(3))
    assert found[1].tolist() == pytest.approx(expected, abs=1e-6)
    assert found[0].tolist() == pytest.approx([0.10, 0.30, 0.35, 0.25], abs=1e-6)


@backends
def test_a_head_without_any_group_is_silent(backend):
    found = row(backend, [SCORES, SCORES], [TEXT, VISUAL, VISUAL, TEXT], AttnEdit(coefficient=(0.0,) * 7, heads=(1,)))
    assert found[1].tolist() == [0.0] * 4 and found[0].tolist() == pytest.approx(BASE, abs=5e-5)


def test_the_fence_of_summary_tokens():
    weight = torch.tensor([[0.01, 0.02, 0.02, 0.03, 0.03, 0.04, 0.05, 0.40, 9.0, 0.0]])
    image = torch.tensor([[0] * 8 + [-1, -1]])
    assert outliers(weight, image).tolist() == [[False] * 7 + [True, False, False]]
    quartiles = weight[0, :8].quantile(torch.tensor([0.25, 0.75]))
    assert quartiles.tolist() == pytest.approx([0.02, 0.0425])
    two = torch.cat([weight[:, :8], weight[:, :8].flip(1)], 1)
    assert outliers(two, torch.tensor([[0] * 8 + [1] * 8])).nonzero()[:, 1].tolist() == [7, 8]


def test_local_tokens_are_the_best_quarter_of_every_image():
    weight = torch.tensor([[3.0, 1.0, 3.0, 3.0, 2.0, 0.0, 1.0, 5.0, 4.0, 9.0]])
    image = torch.tensor([[0] * 5 + [1] * 4 + [-1]])
    assert local(weight, image, 0.5).nonzero()[:, 1].tolist() == [0, 2, 7, 8]  # int(2.5) and 2; of equals the first
    assert local(weight, image, 0.25).nonzero()[:, 1].tolist() == [0, 7]
    assert not local(weight, image, 0.0).any()


# Algebra


@backends
def test_image_mass_never_falls_under_pai_and_hgai_bonuses_are_shared(backend):
    scores, tags = torch.randn(4, 9) * 2, [TEXT, *[VISUAL] * 5, *[TEXT] * 3]
    before = row(backend, scores.tolist(), tags, None)[:, 1:6].sum(-1)
    for alpha in (0.1, 0.6, 1.0):
        assert bool((row(backend, scores.tolist(), tags, PAI(alpha=alpha).edit(2))[:, 1:6].sum(-1) >= before).all())
    found = row(backend, scores.tolist(), tags, HGAI(alpha=0.5).edit(5))
    bonus = found.log() - scores - (found.log() - scores)[:, :1]
    assert torch.allclose(bonus[:, 1:6], 0.5 * scores[:, 1:6].abs().mean(0).expand(4, 5), atol=1e-5)
    assert bonus[:, 6:].abs().max() < 1e-5


@backends
def test_vaf_sharpens_rather_than_raises(backend):
    """A negative score among zeros loses; positive ones never do; and it is one softmax scale for each group."""
    loses = (
        row(backend, [0.0, -3.0, 0.0], [TEXT, VISUAL, TEXT], None)[0, 1],
        row(backend, [0.0, -3.0, 0.0], [TEXT, VISUAL, TEXT], VAF().edit(9))[0, 1],
    )
    assert [float(x) for x in loses] == pytest.approx([0.0243, 0.0156], abs=5e-5)
    scores, tags = torch.randn(4, 9), [PREFIX, PREFIX, *[VISUAL] * 4, *[TEXT] * 3]
    scores[:, 2:6].abs_()
    before, after = (row(backend, scores.tolist(), tags, edit) for edit in (None, VAF(gamma=1.0).edit(9)))
    assert bool((after[:, 2:6].sum(-1) >= before[:, 2:6].sum(-1)).all())
    parts = (0.95 * scores[:, :2], 1.15 * scores[:, 2:6], scores[:, 6:])
    mass = torch.stack([part.logsumexp(-1) for part in parts], -1).softmax(-1)
    merged = torch.cat([part.softmax(-1) * mass[:, n : n + 1] for n, part in enumerate(parts)], -1)
    assert torch.allclose(row(backend, scores.tolist(), tags, VAF().edit(9)), merged, atol=1e-6)


def test_paint_tags_local_and_summary_tokens_apart():
    """Twelve tokens, two of them text slots in between, one pruned: a token that is both is a summary token."""
    first, last = torch.arange(12.0)[None, :, None], torch.ones(1, 12, 2)
    last[0, 10] = 50.0
    visual = torch.tensor([[False, *[True] * 11, False]])
    token = torch.tensor([[-1, *range(11), -1]])  # the last of the twelve was pruned
    view = LayerView(
        torch.zeros(1, 13, 4), visual, torch.ones_like(visual), vision={"first": first, "last": last},
        grid=torch.zeros(1, 12, dtype=torch.long), token=token,
    )  # fmt: skip
    tags = PAINT().tags(view)
    assert tags.tag.tolist() == [[TEXT, *[VISUAL] * 9, LOCAL, SUMMARY, TEXT]] and tags.active.tolist() == [True]


@backends
def test_what_equals_pai_bit_for_bit(backend):
    scores, tags = torch.randn(1, 9) * 2, [TEXT, *[VISUAL] * 5, *[TEXT] * 3]
    pai = row(backend, scores.tolist(), tags, PAI(alpha=0.7).edit(2))
    assert torch.equal(row(backend, scores.tolist(), tags, HGAI(alpha=0.7).edit(5)), pai)
    parts = [
        LOCAL if tag == VISUAL and number % 2 else SUMMARY if tag == VISUAL else tag for number, tag in enumerate(tags)
    ]
    assert torch.equal(row(backend, scores.tolist(), parts, PAINT(alpha=0.7, beta=0.7).edit(2)), pai)
    same = scores.expand(3, 9).tolist()
    assert torch.allclose(row(backend, same, tags, HGAI(alpha=0.7).edit(5)), pai.expand(3, 9))


@backends
def test_the_limit_of_heads_follows_their_visual_mass(backend):
    """Alpha times H m_h / sum m_h, clipped."""
    scores, tags = torch.randn(4, 8) * 2, [TEXT, LOCAL, LOCAL, SUMMARY, VISUAL, TEXT, TEXT, TEXT]
    mass = scores.softmax(-1)[:, 1:5].sum(-1)
    strength = (0.5 * 4 * mass / mass.sum()).clamp(0, 0.75)
    expected = scores.clone()
    expected[:, 1:3] += strength[:, None] * scores[:, 1:3].abs()
    found = row(backend, scores.tolist(), tags, PAINT(alpha=0.5, beta=0.0, head_limit=1.5).edit(2))
    assert torch.allclose(found, expected.softmax(-1), atol=1e-6)


EDITS = {
    "pai": PAI().edit(2),
    "vaf": VAF().edit(9),
    "hgai": HGAI().edit(5),
    "paint": PAINT(alpha=0.7, beta=0.4).edit(2),
    "limited": PAINT(alpha=0.7, beta=0.4, head_limit=1.5).edit(2),
    "adhh": ADHH(heads=((0, 1), (0, 2)), tau=0.0).edit(0),
    "several": AttnEdit(
        scale=per_group(1.0, {PREFIX: 0.9, LOCAL: 1.2}),
        logit_strength=per_group(0.0, {VISUAL: 0.3}),
        across_heads=True,
        coefficient=per_group(1.0, {TEXT: 0.5, SUMMARY: 2.0}),
        min_mass=per_group(0.0, {VISUAL: 0.1}),
        renormalise=True,
        heads=(0, 3),
    ),
}


@pytest.mark.parametrize("name", sorted(EDITS))
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize(("queries", "keys"), [(24, 24), (1, 31), (3, 31)])
def test_rows_equals_reference(name, heads, queries, keys):
    """Also that rows, heads and samples that are not edited keep every bit, and that edited rows sum to 1."""
    edit = EDITS[name]
    q, k = torch.randn(2, heads[0], queries, 16) * 2, torch.randn(2, heads[1], keys, 16) * 2
    value = torch.randn(2, heads[1], keys, 16)
    value[..., 0] = 1.0
    tag = torch.randint(0, 7, (2, keys)).to(torch.uint8)
    touched = torch.rand(2, queries) < 0.5
    touched[0, -1] = True
    group = heads[0] // heads[1]
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(group, 1), value.repeat_interleave(group, 1), mask, scale=0.25
    ).transpose(1, 2)
    request = Request(tag, torch.tensor([True, False]), touched, edit, -1)
    quick, measured = rows.apply(q, k, value, None, 0.25, out, request)
    slow, expected = naive.apply(q, k, value, None, 0.25, out, request)
    assert (quick - slow).abs().max() < 1e-5 and (measured - expected).abs().max() < 1e-5
    assert torch.equal(quick[1], out[1]) and torch.equal(quick[0][~touched[0]], out[0][~touched[0]])
    untouched = [head for head in range(heads[0]) if edit.heads is not None and head not in edit.heads]
    assert torch.equal(quick[:, :, untouched], out[:, :, untouched])
    assert not torch.equal(quick[0], out[0])
    sums = quick[0, -1, :, 0]
    assert bool((sums < 1 + 1e-5).all()) if name == "adhh" else torch.allclose(sums, torch.ones_like(sums), atol=1e-5)


# Layers, presets, values


@pytest.mark.parametrize(
    ("method", "depth", "expected"),
    [
        (PAI(), 32, range(2, 32)),
        (PAINT(), 32, range(2, 32)),
        (VAF(), 32, range(9, 15)),
        (VAF(), 28, range(8, 14)),
        (HGAI(), 32, range(5, 18)),
        (HGAI(), 28, range(4, 16)),
        (VAF(), 1, range(0, 1)),
        (HGAI(), 1, range(0, 1)),
        (HGAI(first_layer=0, last_layer=2), 4, range(0, 3)),
        (ADHH(heads=((3, 1), (1, 0), (3, 2))), 4, [1, 3]),
    ],
)
def test_layers(method, depth, expected):
    assert list(method.layers(depth)) == list(expected)


@pytest.mark.parametrize("text", ["pai(alpha=-1)", "pai(alpha=x)", "pai(official_quirk=1)", "vaf(beta=0)",
                                  "hgai(alpha=True)",
                                  "vaf(gamma=-0.1)", "paint(local_ratio=2)", "paint(beta=-1)", "paint(head_limit=-1)",
                                  "adhh(tau=-0.1)", "adhh(heads=3)", "adhh(heads=[1, 2])", "adhh(heads=[(1, 2, 3)])",
                                  "adhh(heads=[(1, -2)])", "adhh(heads=[(1, 2.0)])"])  # fmt: skip
def test_bad_values(text):
    with pytest.raises(SpecError, match="expected"):
        spec.parse(text)


@pytest.mark.parametrize("text", ["pai(first_layer=-1)", "vaf(last_layer=1.5)", "hgai(first_layer=True)"])
def test_bad_layers(text):
    with pytest.raises(LayerError, match="is not a layer"):
        spec.parse(text)


def test_what_does_not_fit_the_model(model):
    for text in (
        "pai(first_layer=4)",
        "vaf(first_layer=3, last_layer=2)",
        "hgai(last_layer=9)",
        "adhh(heads=[(4, 0)])",
    ):
        with pytest.raises(LayerError, match="4 decoder layers"):
            vlmattn.wrap(model, text)
    with pytest.raises(SpecError, match="no head 4, this model has 4 query heads"):
        vlmattn.wrap(model, "adhh(heads=[(1, 0), (2, 4)])")
    with pytest.raises(SpecError, match=r"known for adhh.*adhh\(heads="):
        vlmattn.wrap(model, "adhh")


def test_head_lists_belong_to_one_checkpoint():
    config = tiny.llava().config
    text = config.get_text_config()
    config._name_or_path, text.hidden_size, text.num_hidden_layers = "llava-hf/llava-1.5-7b-hf", 4096, 32
    known = presets.head_list(config, "adhh")
    assert len(known) == 20 and known[:3] == ((16, 29), (26, 9), (13, 31))
    assert max(head for _, head in known) < 32 and ADHH(heads=known).layers(32)[0] == 13
    for entry in presets.read(presets.Path(presets.__file__).with_name("heads.json"), presets.HEAD_FIELDS):
        assert "official code" in entry["source"]
    with pytest.raises(SpecError, match="no heads"):
        presets.head_list(config, "other")
    text.num_hidden_layers = 40
    with pytest.raises(SpecError, match="no heads"):
        presets.head_list(config, "adhh")


# On models

METHODS = {
    "pai": "pai(first_layer=1)",
    "vaf": "vaf(first_layer=1, last_layer=2, beta=1.5, gamma=0.7)",
    "hgai": "hgai(first_layer=1, last_layer=2)",
    "adhh": "adhh(heads=[(1, 0), (1, 2), (2, 3)], tau=0.01)",
    "paint": "paint(first_layer=1, alpha=0.7, beta=0.4, head_limit=1.5)",
}
NOTHING = [
    "pai(alpha=0)",
    "vaf(beta=1, gamma=1.0)",
    "hgai(alpha=0.0)",
    "adhh(tau=1.1)",
    "adhh(heads=[])",
    "paint(alpha=0, beta=0)",
]
methods = pytest.mark.parametrize("text", list(METHODS.values()), ids=list(METHODS))


def generate(model: Any, batch: dict[str, torch.Tensor], steps: int = 16, **options: Any) -> Any:
    return model.generate(
        **batch, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )


def gap(a: Any, b: Any) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def test_nothing_to_do_is_bit_identical(model, batch):
    logits, out = model(**batch).logits, generate(model, batch, 3).sequences
    for text in (*NOTHING, *(method.disabled() for name in METHODS.values() for method in spec.parse(name))):
        with vlmattn.wrap(model, text):
            assert torch.equal(model(**batch).logits, logits)
            assert torch.equal(generate(model, batch, 3).sequences, out)


@methods
def test_backends_rows_and_beams_agree(model, batch, text):
    """Prefill and 16 steps: `rows` against `reference`, a batch against its rows, and what an edit moves at all."""
    plain = generate(model, batch).logits
    with vlmattn.wrap(model, text) as session:
        quick = generate(model, batch)
        beams = model.generate(**batch, max_new_tokens=4, do_sample=False, num_beams=2)[:, -4:]
        for number in (0, 1):
            one = tiny.single(batch, number)
            alone = generate(model, one)
            assert gap([x[number] for x in quick.logits], [x[0] for x in alone.logits]) < 1e-4
            own = model.generate(**one, max_new_tokens=4, do_sample=False, num_beams=2)[:, -4:]
            assert torch.equal(own[0], beams[number])
        session.use_backend("reference")
        slow = generate(model, batch)
    assert torch.equal(quick.sequences, slow.sequences)
    assert gap(quick.logits, slow.logits) < 1e-5
    assert gap(quick.logits, plain) > 1e-3
    assert gap(generate(model, batch, 2).logits, plain[:2]) == 0.0  # removed: bit for bit the model it was


@methods
def test_only_the_wanted_rows_change(model, batch, text):
    """In the first edited layer: the last row, or for vaf all behind the image."""
    one = tiny.single(batch, 1)
    before = model(**one, output_hidden_states=True).hidden_states
    with vlmattn.wrap(model, text):
        after = model(**one, output_hidden_states=True).hidden_states
    last = int((one["input_ids"][0] == tiny.IMAGE).nonzero()[-1])
    same = last + 1 if text.startswith("vaf") else one["input_ids"].shape[1] - 1
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[2][:, :same], after[2][:, :same])
    assert not torch.equal(before[2][:, same:], after[2][:, same:])


@methods
def test_one_pass_over_prompt_and_answer_equals_generation(model, batch, text):
    with vlmattn.wrap(model, text) as session:
        out = generate(model, batch, 5, suppress_tokens=[tiny.IMAGE, tiny.VIDEO])
        longer = tiny.answered(batch, out.sequences)
        with session.prompt(batch["input_ids"].shape[1]):
            logits = model(**longer, use_cache=False).logits
    assert gap(out.logits, [logits[:, step - 6] for step in range(5)]) < 1e-4


@methods
def test_samples_without_an_image_are_left_alone(model, family, text):
    batch = tiny.prompts(family, images=(1, 0))
    plain = model(**batch).logits
    with vlmattn.wrap(model, text):
        changed = model(**batch).logits
    assert torch.equal(changed[1], plain[1]) and not torch.equal(changed[0, -1], plain[0, -1])


def test_the_quirk_of_pai_and_paint_spares_the_first_token(model, batch):
    plain = generate(model, batch, 3).logits
    for text in ("pai(first_layer=1, official_quirk=True)", "paint(first_layer=1, alpha=0.9, official_quirk=True)"):
        with vlmattn.wrap(model, text):
            quirk = generate(model, batch, 3).logits
        assert torch.equal(plain[0], quirk[0]) and gap(plain[1:], quirk[1:]) > 1e-3


def test_several_images(model, family):
    """Vaf damps what stands before the first and edits the rows behind the last; text between them is left alone."""
    batch = tiny.prompts(family, images=(2,))
    before = model(**batch, output_hidden_states=True).hidden_states[2]
    last = int((batch["input_ids"][0] == tiny.IMAGE).nonzero()[-1])
    with vlmattn.wrap(model, METHODS["vaf"]):
        after = model(**batch, output_hidden_states=True).hidden_states[2]
    assert torch.equal(before[:, : last + 1], after[:, : last + 1])
    for text in METHODS.values():
        with vlmattn.wrap(model, text) as session:
            quick = model(**batch).logits
            session.use_backend("reference")
            assert gap([quick], [model(**batch).logits]) < 1e-5


@pytest.mark.parametrize("pruner", ["random(keep=0.6, before_layer=0)", "fastv(keep=0.5, before_layer=2)"])
def test_paint_chooses_on_the_whole_image(model, batch, pruner):
    """Which tokens are local or summary does not depend on what was pruned."""
    from vlmattn.patches import cache as caches

    kept = {}
    for text in (METHODS["paint"], f"{pruner} + {METHODS['paint']}"):
        with vlmattn.wrap(model, text) as session:
            plan = caches.plan_of(model(**batch, use_cache=True).past_key_values)
            tags = plan.tags[3].tag
            columns = [list(range(batch["input_ids"].shape[1]))] * 2 if "+" not in text else session.report().positions
            kept[text] = [
                {column: int(tag) for column, tag in zip(row, tags[number][-len(row) :].tolist(), strict=True)}
                for number, row in enumerate(columns)
            ]
    whole, part = kept.values()
    assert all(LOCAL in row.values() for row in whole)
    for number in (0, 1):
        assert all(whole[number][column] == tag for column, tag in part[number].items())


def test_two_editors_share_a_model_but_not_a_layer(model, batch):
    with pytest.raises(SpecError, match=r"pai.* and hgai.* both edit attention in layer 1"):
        vlmattn.wrap(model, "pai(first_layer=1) + hgai(first_layer=1, last_layer=1)")
    with vlmattn.wrap(model, "vaf(first_layer=0, last_layer=1) + hgai(first_layer=2, last_layer=3) + vhr") as session:
        quick = generate(model, batch, 6)
        session.use_backend("reference")
        assert gap(quick.logits, generate(model, batch, 6).logits) < 1e-4


@pytest.mark.parametrize("family", sorted(tiny.ANYRES))
@pytest.mark.parametrize(
    "spec", [METHODS["paint"], METHODS["vaf"], "hired(keep=0.5) + ilvad(tau=1.1, tokens=4)", "pine"]
)
def test_images_of_several_grids(family, spec):
    """Newline tokens are visual, but never local or summary tokens; each grid of an image has its own of these."""
    model, batch = tiny.ANYRES[family](), tiny.tiled_prompts(family, images=(2,) if spec == "pine" else (1, 1))
    plain = generate(model, batch, 6).logits
    with vlmattn.wrap(model, spec) as session:
        quick = generate(model, batch, 6)
        plan = session._engine.last
        for number in (0, 1) if spec != "pine" else ():
            alone = generate(model, tiny.single(batch, number), 6)
            assert gap([x[number] for x in quick.logits], [x[0] for x in alone.logits]) < 1e-4
        session.use_backend("reference")
        assert gap(quick.logits, generate(model, batch, 6).logits) < 1e-4
    assert gap(quick.logits, plain) > 1e-3
    if spec != METHODS["paint"]:
        return
    tags, newline = plan.tags[1].tag, plan.newline > 0
    assert bool(newline.any()) and bool((tags[newline] == VISUAL).all())
    for number, spans in enumerate(plan.spans):
        rest = tags[number][plan.visual[number]]
        for part in rest.split([raster.length for span in spans for raster in span.rasters]):
            chosen = int((part == LOCAL).sum() + (part == SUMMARY).sum())
            assert len(part) // 4 <= chosen and int((part == LOCAL).sum()) <= len(part) // 4
