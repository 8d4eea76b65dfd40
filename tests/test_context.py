"""The compressed context of an image, and the image in the middle layers only."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import tiny
import torch

import vlmattn
from vlmattn import cost, proof, spec
from vlmattn.errors import BudgetError, CallError, DataError, LayerError, SpecError
from vlmattn.methods.prune.context import Context
from vlmattn.methods.prune.middle import Middle
from vlmattn.patches.families import supported

pytestmark = pytest.mark.usefixtures("no_grad")
STEPS = 5
TEXT = [tiny.IMAGE, tiny.VIDEO, 92, 93]
PICTURE: Any = object()
QUESTION = torch.tensor([[5, 6, 7, 8]])
both = pytest.mark.parametrize("attention", ["sdpa", "eager"])


@pytest.fixture
def one(family) -> dict[str, torch.Tensor]:
    """A prompt with one image, on the M-RoPE family a wide one."""
    return tiny.single(tiny.prompts(family), 1)


def generate(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> Any:
    more = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "max_new_tokens": STEPS}
    return model.generate(**batch, suppress_tokens=TEXT, **(more | options))


def ask(context: Any, ids: torch.Tensor = QUESTION, **options: Any) -> Any:
    more = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "max_new_tokens": STEPS}
    return context.generate(ids, suppress_tokens=TEXT, **(more | options))


def gap(a: Any, b: Any) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def turns(model: Any, one: dict[str, torch.Tensor], ids: torch.Tensor = QUESTION, **options: Any) -> Any:
    """A plain second turn behind a cache that holds the prompt and nothing else."""
    cache = generate(model, one, max_new_tokens=1).past_key_values
    whole = torch.cat([one["input_ids"], ids], 1)
    batch = {"input_ids": whole, "attention_mask": torch.ones_like(whole), "past_key_values": cache}
    return generate(model, batch, **options)


# Compressed context


def test_worked_example():
    """s = [.02 .30 .01 .08 .25 .04], keep = 34 %: ceil(2.04) = 3 tokens, {1, 3, 4}."""
    scores = torch.tensor([[0.5, 0.02, 0.30, 0.01, 0.08, 0.25, 0.04, 0.9]])
    image = torch.tensor([[-1, 0, 0, 0, 0, 0, 0, -1]])
    method = Context(keep=0.34)
    assert method.cached(6) == 3
    assert (method.select(scores, image).mask[0].nonzero()[:, 0] - 1).tolist() == [1, 3, 4]
    assert not Context(keep=0.0).select(scores, image).mask.any()
    two = torch.tensor([[0, 0, 0, -1, 1, 1, 1, -1]])
    assert Context(keep=0.1).select(scores, two).mask[0].nonzero()[:, 0].tolist() == [0, 5]


def test_budgets_are_rounded_up_and_not_by_float_noise():
    assert [Context(keep=k).cached(30) for k in (0.05, 0.1, 0.11, 1.0, 0.0, 7, 99, 0)] == [2, 3, 4, 30, 0, 7, 30, 0]
    assert Context(keep=0.05).expected_tokens(576, 3) == [29, 29, 29] and Context().expected_tokens(0, 2) == [0, 0]


def test_layers_of_the_description():
    """A quarter to a half of the depth, the paper's 20 to 39 of 80."""
    assert [list(Context().layers(n)) for n in (32, 28, 80)] == [
        list(range(8, 16)),
        list(range(7, 14)),
        list(range(20, 40)),
    ]


@pytest.mark.parametrize("middle", ["(0.25, 0.5)", "(1, 3)"])
def test_importance_is_what_generated_tokens_look_at(family, one, middle):
    """Against the probabilities of an eager run over prompt and description, without a cache."""
    model = tiny.MODELS[family](attention="eager")
    model.generation_config.suppress_tokens = TEXT
    with vlmattn.wrap(model, f"context(keep=0.3, new_tokens=6, middle={middle})") as session:
        context = session.compress_inputs(one)
    written = generate(model, one, max_new_tokens=6, min_new_tokens=2)
    prompt = one["input_ids"].shape[1]
    assert context.description.tolist() == written.sequences[0, prompt:].tolist()
    whole = oracle.longer(one, written.sequences, flat=family == "llava")
    attentions = model(**whole, output_attentions=True, use_cache=False).attentions
    layers = [1] if middle == "(0.25, 0.5)" else [1, 2]
    seen = torch.stack([attentions[layer][0].mean(0)[prompt:-1] for layer in layers]).mean((0, 1))
    visual = one["input_ids"][0] == tiny.IMAGE
    scores = seen[:prompt][visual].tolist()
    count = -(-3 * len(scores) // 10)
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]
    assert context.kept == [sorted(best)]


@both
@pytest.mark.parametrize("keep", [1.0, 0.25, 0.0])
def test_answers_equal_masking(family, attention, one, keep):
    """What comes after the prompt sees its text and the kept tokens only; the prompt itself saw everything."""
    model = tiny.MODELS[family](attention=attention)
    with vlmattn.wrap(model, f"context(keep={keep}, new_tokens=6)") as session:
        context = session.compress_inputs(one)
        out = ask(context)
    prompt = one["input_ids"].shape[1]
    visual = one["input_ids"][0] == tiny.IMAGE
    gone = visual.nonzero()[:, 0].tolist()
    gone = [column for i, column in enumerate(gone) if i not in context.kept[0]]
    whole = oracle.longer(one, out.sequences, flat=family == "llava")
    length = out.sequences.shape[1]
    pairs = torch.zeros(1, length, length, dtype=torch.bool)
    pairs[:, prompt:, gone] = True
    expected = oracle.cut_forward(model, whole, dict.fromkeys(range(tiny.LAYERS), pairs))
    assert gap(out.logits, expected[:, -STEPS - 1 : -1].transpose(0, 1)) < 1e-4
    assert len(gone) == len(visual.nonzero()) - Context(keep=keep).cached(int(visual.sum()))


def test_all_tokens_equal_a_plain_second_turn(model, one):
    """The same prompt in the cache, the description removed; with beams and several answers, too."""
    plain = turns(model, one)
    with vlmattn.wrap(model, "context(keep=1.0, new_tokens=6)") as session:
        context = session.compress_inputs(one)
        out = ask(context)
        assert torch.equal(out.sequences, plain.sequences)
        assert gap(out.logits, plain.logits) < 1e-5 * plain.logits[0].abs().max().item()
        beams = context.generate(QUESTION, max_new_tokens=STEPS, do_sample=False, num_beams=3, num_return_sequences=2)
        torch.manual_seed(3)
        drawn = context.generate(QUESTION, max_new_tokens=STEPS, do_sample=True, num_return_sequences=3)
    cache = generate(model, one, max_new_tokens=1).past_key_values
    cache.batch_repeat_interleave(3)
    whole = torch.cat([one["input_ids"], QUESTION], 1)
    again = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    options = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": STEPS}
    expected = model.generate(**again, past_key_values=cache, **options)
    assert torch.equal(beams, expected[:, whole.shape[1] :])
    assert drawn.shape == (3, STEPS) and len(drawn.unique(dim=0)) > 1


def test_the_plan_of_a_context_has_the_columns_of_the_prompt_alone():
    """Of images with newline tokens, too."""
    model, one = tiny.ANYRES["llava_next"](), tiny.single(tiny.tiled_prompts("llava_next"), 1)
    with vlmattn.wrap(model, "context(keep=0.3, new_tokens=4)") as session:
        plan = session.compress_inputs(one)._cache.plan
    assert plan.newline.any() and plan.newline.shape == plan.real.shape == plan.visual.shape == plan.image.shape


def test_entries_bytes_and_report(family, model, one):
    prompt, visual = one["input_ids"].shape[1], int((one["input_ids"] == tiny.IMAGE).sum())
    dims = cost.Dims.from_config(model.config.get_text_config())
    for keep in (0.0, 0.05, 0.3, 3, 1.0):
        with vlmattn.wrap(model, f"context(keep={keep}, new_tokens=4)") as session:
            context = session.compress_inputs(one)
            report = session.report()
            (method,) = session.methods
            kept = method.cached(visual)
            assert context.entries == [prompt - visual + kept] * tiny.LAYERS
            assert report.cached_per_layer == [[kept] * tiny.LAYERS] == [method.expected_tokens(visual, tiny.LAYERS)]
            assert report.kv_bytes == cost.kv_bytes(dims, context.entries, 4)
            assert report.prefill_macs == report.prefill_macs_full
            held = context._cache.layers
            assert sum(layer.keys.nbytes + layer.values.nbytes for layer in held) == report.kv_bytes
            ask(context)
            assert session.report().cached_per_layer == report.cached_per_layer
            assert [layer.keys.shape[2] for layer in held] == context.entries


def test_kept_sets_are_nested(model, one):
    previous: set[int] = set()
    for keep in (0.0, 0.05, 0.2, 0.5, 0.9, 1.0):
        with vlmattn.wrap(model, f"context(keep={keep}, new_tokens=4)") as session:
            kept = set(session.compress_inputs(one).kept[0])
        assert previous <= kept
        previous = kept


def test_questions_do_not_see_each_other(model, one):
    other = torch.tensor([[40, 41]])
    with vlmattn.wrap(model, "context(keep=0.25, new_tokens=4)") as session:
        with session.compress_inputs(one) as context:
            first = ask(context)
            ask(context, other, max_new_tokens=9)
            assert torch.equal(ask(context).sequences, first.sequences)
        with pytest.raises(CallError, match="closed"):
            context.generate(QUESTION)


def test_two_contexts_and_a_text_prompt_side_by_side(family, model):
    """Images of different sizes: positions go on behind each one's own."""
    batch, text = tiny.prompts(family), {"input_ids": torch.tensor([[1, 5, 9, 12]])}
    plain = generate(model, text | {"attention_mask": torch.ones(1, 4, dtype=torch.long)})
    with vlmattn.wrap(model, "context(keep=0.25, new_tokens=4)") as session:
        alone = []
        for row in (0, 1):
            alone.append(ask(session.compress_inputs(tiny.single(batch, row))).sequences)
        contexts = [session.compress_inputs(tiny.single(batch, row)) for row in (0, 1)]
        assert torch.equal(ask(contexts[0]).sequences, alone[0])
        between = generate(model, text | {"attention_mask": torch.ones(1, 4, dtype=torch.long)})
        assert torch.equal(ask(contexts[1]).sequences, alone[1])
        assert torch.equal(ask(contexts[0]).sequences, alone[0])
    assert gap(between.logits, plain.logits) == 0.0


def test_families_say_where_positions_go_on():
    """M-RoPE models note in every prefill how far positions are ahead of columns."""
    for family in supported():
        assert bool(family.position_state) == (family.rope == "mrope"), family.name


def test_several_images_keep_a_share_each(family):
    model = tiny.MODELS[family]()
    batch = tiny.prompts(family, images=(2,))
    with vlmattn.wrap(model, "context(keep=0.2, new_tokens=4)") as session:
        context = session.compress_inputs(batch)
        sizes = [16, 16 if family == "llava" else 24]
        assert [len(kept) for kept in context.kept] == [-(-size // 5) for size in sizes]
        assert ask(context).sequences.shape[1] == batch["input_ids"].shape[1] + 4 + STEPS


def test_it_is_undone(model, one):
    logits = model(**one).logits
    plain = generate(model, one)
    before = proof.footprint(model)
    with vlmattn.wrap(model, "context(keep=0.25, new_tokens=4)") as session:
        context = session.compress_inputs(one)
        ask(context)
    assert proof.footprint(model) == before
    assert torch.equal(model(**one).logits, logits)
    assert gap(generate(model, one).logits, plain.logits) == 0.0
    with pytest.raises(CallError, match="was removed"):
        context.generate(QUESTION)


def test_what_cannot_be_done_is_refused_with_the_way_out(family, model, one):
    padded, blind = tiny.prompts(family), tiny.prompts(family, images=(0,))
    with vlmattn.wrap(model, "none") as session, pytest.raises(CallError, match=r"wrap the model with 'context\(keep"):
        session.compress_inputs(one)
    with vlmattn.wrap(model, "context(new_tokens=4)") as session:
        for call in (lambda: model(**one), lambda: generate(model, one)):
            with pytest.raises(CallError, match=r"plain forward or generate: call session\.compress\(image\)\.answer"):
                call()
        with pytest.raises(CallError, match="2 rows or padding"):
            session.compress_inputs(padded)
        with pytest.raises(CallError, match="needs a prompt with an image"):
            session.compress_inputs(blind)
        with pytest.raises(CallError, match="needs the processor"):
            session.compress(None)
        context = session.compress_inputs(one)
        with pytest.raises(CallError, match=r"put questions as tokens, context\.generate\(ids\)"):
            context.answer("What?")
        for ids in (torch.zeros(1, 0, dtype=torch.long), torch.tensor([5]), QUESTION.repeat(2, 1)):
            with pytest.raises(CallError, match="one row of at least one new token"):
                context.generate(ids)
        session.set("context.keep", 0.5)
        with pytest.raises(CallError, match="compress the image again after a change"):
            context.generate(QUESTION)
    for other in ("fastv(keep=0.5, before_layer=2)", "middle", "random(keep=0.5, before_layer=0)"):
        with pytest.raises(SpecError, match=r"chooses among all tokens of the prompt, and .* drops some"):
            vlmattn.wrap(model, f"context + {other}")


@pytest.mark.parametrize("bad", ["-0.1", "1.1", "True", "x", "-1", "None"])
def test_budgets_out_of_range(bad):
    with pytest.raises(BudgetError, match=r"context\.keep=.*expected a share in \[0, 1\]"):
        spec.parse(f"context(keep={bad})")


def test_other_fields_are_checked():
    for text, said in [
        ("middle=(0.5, 0.5)", "no layer is left to look at"),
        ("middle=3", "expected two bounds"),
        ("query=3", "context.query=3: expected a text"),
        ("new_tokens=1", "expected an int >= 2"),
    ]:
        with pytest.raises((SpecError, LayerError), match=said):
            spec.parse(f"context({text})")


@pytest.mark.parametrize(
    "others", ["vhr", "var(sinks=[1, 2, 3], tau=1.5, rho=0.2, first_layer=1)", "knockout(window=(2, 3))"]
)
def test_it_composes_with_edits(model, one, others):
    with vlmattn.wrap(model, f"context(keep=0.25, new_tokens=4) + {others}") as session:
        session.record()
        runs = []
        for backend in ("rows", "reference"):
            session.use_backend(backend)
            context = session.compress_inputs(one)
            runs.append((context.kept, ask(context).logits))
            assert session.stats()["visual_mass"].values.shape[0] == STEPS
    assert runs[0][0] == runs[1][0] and gap(runs[0][1], runs[1][1]) < 1e-4


@pytest.mark.filterwarnings("ignore:.*is experimental")
def test_it_composes_with_layers_left_out(model, one):
    with vlmattn.wrap(model, "context(keep=0.25, new_tokens=4, middle=(2, 4)) + layerskip(layers=[3])") as session:
        context = session.compress_inputs(one)
        assert context.entries[3] == 0 and len(set(context.entries)) == 2
        ask(context)
        assert session.report().cached_per_layer[0][3] == 0


# Conversations


class Letters:
    """A tokenizer whose tokens are letters."""

    bos_token = None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 40 for letter in text]}

    def decode(self, ids: torch.Tensor, **options: Any) -> str:
        return "".join(chr(int(i) + 40) for i in ids)


class Words:
    """A processor that makes one prompt of everything; `anew`: its template counts the turns first."""

    tokenizer = Letters()

    def __init__(self, one: dict[str, torch.Tensor], anew: bool = False) -> None:
        self.one, self.anew = one, anew

    def apply_chat_template(self, conversation: Any, **options: Any) -> str:
        said = [f"{turn['role'][0]}:{turn['content'][-1]['text']};" for turn in conversation]
        return f"{len(said) if self.anew else ''}{''.join(said)}a:"

    def __call__(self, images: Any, text: Any, **options: Any) -> dict[str, torch.Tensor]:
        assert text == ["u:Describe the image.;a:"] and images == [[PICTURE]]
        return dict(self.one)


def test_a_question_is_a_new_turn_behind_the_query(model, one):
    with vlmattn.wrap(model, "context(keep=0.25, new_tokens=4)", processor=Words(one)) as session:
        context = session.compress(PICTURE)
        expected = "a:OK.;u:What?;a:".removeprefix("a:")
        assert context.ids("What?").tolist() == [[ord(letter) - 40 for letter in expected]]
        answer = context.answer("What?", max_new_tokens=3, do_sample=False)
        tokens = context.generate(context.ids("What?"), max_new_tokens=3, do_sample=False)
        assert answer == "".join(chr(int(i) + 40) for i in tokens[0]).strip()
    with vlmattn.wrap(model, "context(new_tokens=4)", processor=Words(one, anew=True)) as session:
        context = session.compress_inputs(one)
        context._turns = [{"role": "user", "content": [{"text": "Describe the image."}]}]
        with pytest.raises(DataError, match="writes a conversation anew"):
            context.ids("What?")


# Middle layers only


@both
@pytest.mark.parametrize("window", [(0.25, 0.5), (1, 3), (0, 2)])
@pytest.mark.parametrize(("prefill", "decode"), [(False, True), (True, True), (True, False)])
def test_middle_layers_equal_masking(family, attention, window, prefill, decode):
    """Keys that text rows never read may as well be gone."""
    model, batch = tiny.MODELS[family](attention=attention), tiny.prompts(family)
    text = f"middle(window={window}, block_prefill_text={prefill}, block_decode={decode})"
    with vlmattn.wrap(model, text) as session:
        out = generate(model, batch)
        (method,) = session.methods
        outside = set(method.layers(tiny.LAYERS))
        counts = session.report().cached_per_layer
        sizes = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    prompt = batch["input_ids"].shape[1]
    whole = oracle.longer(batch, out.sequences, flat=family == "llava")
    visual = whole["input_ids"] == tiny.IMAGE
    after = torch.arange(visual.shape[1]) >= prompt
    rows = (visual.cumsum(1) > 0) & ~visual & ((~after & prefill) | (after & decode))
    expected = oracle.cut_forward(model, whole, dict.fromkeys(outside, rows[:, :, None] & visual[:, None, :]))
    assert gap(out.logits, expected[:, -STEPS - 1 : -1].transpose(0, 1)) < 1e-4
    for row, held in enumerate(counts):
        total = int(visual[row].sum())
        assert held == [0 if decode and i in outside else total for i in range(tiny.LAYERS)]
        assert held == method.expected_tokens(total, tiny.LAYERS)
    texts = max(int((row["real"] & ~row["visual"]).sum()) for row in _rows(batch))
    assert sizes == [STEPS - 1 + (texts if decode and i in outside else prompt) for i in range(tiny.LAYERS)]


def _rows(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [
        {"real": mask.bool(), "visual": ids == tiny.IMAGE}
        for mask, ids in zip(batch["attention_mask"], batch["input_ids"], strict=True)
    ]


def test_bytes_are_text_in_all_layers_and_the_image_in_the_middle(model, one):
    visual = int((one["input_ids"] == tiny.IMAGE).sum())
    text = one["input_ids"].shape[1] - visual
    dims = cost.Dims.from_config(model.config.get_text_config())
    with vlmattn.wrap(model, "middle") as session:
        cache = model(**one, use_cache=True).past_key_values
        report = session.report()
    measured = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert measured == report.kv_bytes == 2 * (text * tiny.LAYERS + visual) * dims.kv_heads * dims.head_dim * 4
    assert report.prefill_macs == report.prefill_macs_full


def test_the_whole_depth_and_undo_are_bit_identical(model, batch):
    plain = generate(model, batch)
    logits = model(**batch).logits
    for text in ("middle(window=(0.0, 1.0))", "middle(window=(0, 4), block_prefill_text=True)"):
        with vlmattn.wrap(model, text):
            assert torch.equal(model(**batch).logits, logits)
            assert gap(generate(model, batch).logits, plain.logits) == 0.0
    with vlmattn.wrap(model, "middle"):
        assert torch.equal(model(**batch).logits, logits)  # the prompt sees everything
        assert gap(generate(model, batch).logits, plain.logits) > 1e-3
    assert gap(generate(model, batch).logits, plain.logits) == 0.0
    assert Middle().disabled().is_noop and Middle().disabled().window == (0.25, 0.5)


def test_middle_layers_in_batches_beams_and_a_second_turn(model, batch):
    with vlmattn.wrap(model, "middle(block_prefill_text=True) + fastv(keep=0.5, before_layer=1)"):
        together = generate(model, batch)
        beams = model.generate(**batch, max_new_tokens=STEPS, do_sample=False, num_beams=3, num_return_sequences=2)
        for row in (0, 1):
            one = tiny.single(batch, row)
            alone = generate(model, one)
            assert gap([x[row] for x in together.logits], [x[0] for x in alone.logits]) < 1e-4
            own = model.generate(**one, max_new_tokens=STEPS, do_sample=False, num_beams=3, num_return_sequences=2)
            assert torch.equal(own[:, -STEPS:], beams[2 * row : 2 * row + 2, -STEPS:])
        ids = torch.cat([alone.sequences, QUESTION], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": alone.past_key_values}
        assert generate(model, turn).sequences.shape[1] == ids.shape[1] + STEPS


def test_fields_of_middle_are_checked():
    for text, said in [
        ("window=7", "expected two bounds"),
        ("block_decode=false", "expected True or False"),
        ("block_prefill_text=1", "expected True or False"),
    ]:
        with pytest.raises((SpecError, LayerError), match=said):
            spec.parse(f"middle({text})")
    with pytest.raises(LayerError, match="not a window in a model of 4"):
        vlmattn.wrap(tiny.llava(), "middle(window=(2, 9))")
    assert list(Middle(window=(2, 2)).layers(4)) == [0, 1, 2, 3]
