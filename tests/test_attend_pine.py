"""PINE: segments side by side. Shifts, positions, the fast kernel against the paper's procedure, and invariance."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import tiny
import torch

import vlmattn
from vlmattn.errors import CallError, SpecError
from vlmattn.kernels import segments
from vlmattn.kernels.segments import Segments
from vlmattn.methods.attend.pine import PINE, spans

pytestmark = pytest.mark.usefixtures("no_grad")


def generate(model: Any, batch: dict[str, torch.Tensor], steps: int = 16, **options: Any) -> Any:
    return model.generate(
        **batch, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )


def gap(a: Any, b: Any) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


# The algorithm


def test_worked_shifts():
    extent = torch.tensor([[2, 2, 2]])
    assert PINE().shifts(torch.tensor([0.1, 0.5, 0.4])[None, None, None], extent).flatten().tolist() == [4, 0, 2]
    assert PINE().shifts(torch.tensor([0.3, 0.3, 0.3])[None, None, None], extent).flatten().tolist() == [0, 2, 4]
    own = torch.tensor([[0.2, torch.inf, 0.7], [-torch.inf, 0.1, 0.9]])[None, None]
    assert PINE().shifts(own, torch.tensor([[3, 5, 2]]))[0, 0].tolist() == [[7, 0, 5], [7, 2, 0]]


def test_positions_of_prefix_segments_and_suffix():
    """Two padding slots, a prefix of 2, segments of 3 and 2 with a word between, a suffix of 2."""
    segment = torch.tensor([[-1, -1, -1, -1, 0, 0, 0, -1, 1, 1, -1, -1]])
    real = torch.tensor([[False] * 2 + [True] * 10])
    given = torch.tensor([[[0, 0, *range(10)]]])
    found, extent = PINE().positions(given, segment, real)
    assert extent.tolist() == [[3, 2]]
    assert found[0, 0, 2:].tolist() == [0, 1, 5, 6, 7, 2, 6, 7, 8, 9]
    importance = torch.tensor([[[[0.2, 0.8], [torch.inf, 0.1]]]])
    moved = found[0, 0] - PINE().shifts(importance, extent)[0, 0].gather(1, segment.clamp_min(0).expand(2, -1))
    for row in moved:  # every frame tiles [P, E)
        assert sorted(row[(segment >= 0)[0]].tolist()) == [3, 4, 5, 6, 7]


def test_extent_of_three_axes():
    """An image of 2 x 3 tokens between its wrappers takes 1 + 3 + 1 positions."""
    image = torch.tensor([[4, 5, 5, 5, 5, 5, 5, 8], [4, 5, 5, 5, 6, 6, 6, 8], [4, 5, 6, 7, 5, 6, 7, 8]])[:, None]
    assert [x.tolist() for x in spans(image, torch.zeros(1, 8, dtype=torch.long))] == [[[4]], [[5]]]


def case(lengths: tuple[int, ...], order: tuple[int, ...], heads: int = 4, kv_heads: int = 2, seed: int = 0) -> Any:
    """Queries, keys, values and segments of a prefix of 3, `lengths` in that order, and a suffix of 4; and which
    columns are where in the original order."""
    g = torch.Generator().manual_seed(seed)
    total = 3 + sum(lengths) + 4
    parts = [*torch.arange(3, 3 + sum(lengths)).split(lengths)]
    columns = torch.cat([torch.arange(3), *[parts[number] for number in order], torch.arange(total - 4, total)])
    q, k, v = (torch.randn(1, h, total, 8, generator=g).double()[:, :, columns] for h in (heads, kv_heads, kv_heads))
    segment = torch.full((1, total), -1)
    start = 3
    for number, part in enumerate(order):
        segment[0, start : start + lengths[part]] = number
        start += lengths[part]
    real = torch.ones(1, total, dtype=torch.bool)
    positions, extent = PINE().positions(torch.arange(total)[None, None], segment, real)
    frequency = 100.0 ** (-torch.arange(4) / 4)
    angle = positions[0][..., None] * frequency
    tables = angle.cos().repeat(1, 1, 2), angle.sin().repeat(1, 1, 2)
    return (q, k, v, 8**-0.5, Segments(segment, real, extent, *tables, frequency, PINE().shifts)), columns


@pytest.mark.parametrize("lengths", [(4, 4), (2, 5, 3), (1, 6, 2, 2)])
@pytest.mark.parametrize("queries", [None, 1, 3])
def test_the_kernel_equals_the_papers_procedure(lengths, queries):
    (q, k, v, scaling, where), _ = case(lengths, tuple(range(len(lengths))))
    q = q if queries is None else q[:, :, -queries:]
    quick, slow = segments.attend(q, k, v, scaling, where), segments.naive(q, k, v, scaling, where)
    assert (quick[0] - slow[0]).abs().max() < 1e-5 and (quick[1] - slow[1]).abs().max() < 1e-5
    assert (quick[1].sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("serve", [segments.attend, segments.naive])
def test_a_layer_does_not_see_the_order(serve):
    lengths, outputs = (2, 5, 3), []
    for order in itertools.permutations(range(3)):
        call, columns = case(lengths, order)
        outputs.append(serve(*call)[0][:, columns.argsort()])
    for other in outputs[1:]:
        assert (other - outputs[0]).abs().max() < 1e-5


def test_one_segment_is_plain_attention():
    (q, k, v, scaling, where), _ = case((5,), (0,))
    length = q.shape[2]
    rotated = [segments.rotate(x.float(), where.cos, where.sin) for x in (q, k)]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    plain = torch.nn.functional.scaled_dot_product_attention(
        rotated[0], rotated[1].repeat_interleave(2, 1), v.float().repeat_interleave(2, 1), mask, scale=scaling
    )
    assert (segments.attend(q, k, v, scaling, where)[0].transpose(1, 2) - plain).abs().max() < 1e-5


def test_who_sees_whom():
    """Own segment causally, the others fully, the prefix always, what follows never."""
    (q, k, v, scaling, where), _ = case((3, 3), (0, 1))

    def changed(column: int) -> list[int]:
        other = k.clone(), v.clone()
        for x in other:
            x[:, :, column] += 5.0
        before, after = segments.attend(q, k, v, scaling, where)[0], segments.attend(q, *other, scaling, where)[0]
        return ((before - after).abs().amax((0, 2, 3)) > 1e-9).nonzero()[:, 0].tolist()

    assert changed(4) == [4, 5, *range(6, 9), *range(9, 13)]
    assert changed(1) == list(range(1, 13))
    assert changed(10) == [10, 11, 12]


# On models


def two(family: str, swap: bool, between: int = 2) -> dict[str, torch.Tensor]:
    """A prompt with two images (of different sizes where the family can), in one order or the other."""
    batch = tiny.prompts(family, images=(2,))
    if not swap:
        return batch
    ids = batch["input_ids"][0].tolist()
    first = next(i for i, token in enumerate(ids) if token in (92, tiny.IMAGE))
    wraps = 0 if family == "llava" else 2
    sizes = [16, 16] if family == "llava" else [16 + wraps, 24 + wraps]
    one, gap_, other = (ids[first : first + sizes[0]], ids[first + sizes[0] : first + sizes[0] + between],
                        ids[first + sizes[0] + between : first + sum(sizes) + between])  # fmt: skip
    ids = [*ids[:first], *other, *gap_, *one, *ids[first + sum(sizes) + between :]]
    turned = batch | {"input_ids": torch.tensor([ids])}
    if "image_grid_thw" in batch:
        counts = batch["image_grid_thw"].prod(-1).tolist()
        turned["pixel_values"] = torch.cat(batch["pixel_values"].split(counts)[::-1])
        turned["image_grid_thw"] = batch["image_grid_thw"].flip(0)
        turned["mm_token_type_ids"] = (turned["input_ids"] == tiny.IMAGE).long()
    else:
        turned["pixel_values"] = batch["pixel_values"].flip(0)
    return turned


@pytest.mark.parametrize("spec", ["pine", "pine + vhr"])
def test_the_order_of_images_does_not_matter(model, family, spec):
    plain = [model(**two(family, swap)).logits[:, -1] for swap in (False, True)]
    assert gap(*[[x] for x in plain]) > 1e-2
    with vlmattn.wrap(model, spec):
        runs = [generate(model, two(family, swap)) for swap in (False, True)]
    assert torch.equal(runs[0].sequences[:, -16:], runs[1].sequences[:, -16:])
    assert gap(runs[0].logits, runs[1].logits) < 2e-4
    assert gap([runs[0].logits[0]], [plain[0]]) > 1e-3
    assert torch.equal(model(**two(family, False)).logits[:, -1], plain[0])  # removed: bit for bit the model it was


def test_backends_batches_and_beams_agree(model, family):
    batch = tiny.prompts(family, images=(2, 1))
    with vlmattn.wrap(model, "random(keep=0.6, before_layer=0) + pine") as session:
        session.record()
        quick = generate(model, batch)
        mass = session.stats()["visual_mass"].values
        session.use_backend("reference")
        assert gap(quick.logits, generate(model, batch).logits) < 1e-4
        session.use_backend("rows")
        beams = model.generate(**batch, max_new_tokens=4, do_sample=False, num_beams=2)[:, -4:]
        one = tiny.prompts(family, images=(2,))
        real = batch["attention_mask"][0].bool()
        assert torch.equal(batch["input_ids"][0, real], one["input_ids"][0])
        one["pixel_values"] = batch["pixel_values"][: len(one["pixel_values"])]
        alone = generate(model, one)
        assert gap([x[0] for x in quick.logits], [x[0] for x in alone.logits]) < 2e-4
        own = model.generate(**one, max_new_tokens=4, do_sample=False, num_beams=2)[:, -4:]
        assert torch.equal(own[0], beams[0])
    assert bool(((mass > 0) & (mass < 1)).all())


def test_steps_equal_one_pass_and_guesses_change_nothing(model, family):
    batch = two(family, False)
    batch["input_ids"][:, -4:] = torch.tensor([[5, 6, 5, 6]])
    with vlmattn.wrap(model, "pine") as session:
        out = generate(model, batch, 6, suppress_tokens=[tiny.IMAGE, tiny.VIDEO, 92, 93])
        lookup = generate(model, batch, 6, suppress_tokens=[tiny.IMAGE, tiny.VIDEO, 92, 93], prompt_lookup_num_tokens=2)
        with session.prompt(batch["input_ids"].shape[1]):
            logits = model(**tiny.answered(batch, out.sequences), use_cache=False).logits
    assert torch.equal(out.sequences, lookup.sequences)
    assert gap(out.logits, [logits[:, step - 7] for step in range(6)]) < 1e-4


def test_one_image_is_left_alone_bit_for_bit(model, batch):
    plain = generate(model, batch, 4)
    with vlmattn.wrap(model, "pine"):
        assert gap(generate(model, batch, 4).logits, plain.logits) == 0.0
    assert gap(generate(model, batch, 4).logits, plain.logits) == 0.0


def test_a_conversation_cannot_go_on_without_it(model, family):
    batch = two(family, False)
    with vlmattn.wrap(model, "pine"):
        cache = model(**batch, use_cache=True).past_key_values
    turn = {"input_ids": torch.tensor([[5, 6]]), "past_key_values": cache}
    with vlmattn.wrap(model, "none"), pytest.raises(CallError, match="keys without positions"):
        model(**turn)


def test_segments_can_be_given(model, family):
    """Text segments: their order does not matter either."""
    batch = tiny.prompts(family, images=(1,))
    ids = batch["input_ids"][0]
    start = len(ids) - 9
    turned = batch | {"input_ids": ids[[*range(start), *range(start + 3, start + 5), *range(start, start + 3),
                                        *range(start + 5, len(ids))]][None]}  # fmt: skip
    with vlmattn.wrap(model, "pine") as session:
        with session.segments([[(start, start + 3), (start + 3, start + 5)]]):
            first = generate(model, batch, 6)
        with session.segments([[(start, start + 2), (start + 2, start + 5)]]):
            second = generate(model, turned, 6)
        assert gap(first.logits, second.logits) < 2e-4
        assert gap(first.logits, generate(model, batch, 6).logits) > 1e-4
        for wrong in (
            [[(0, 2), (1, 4)]],
            [[(0, 2), (3, 99)]],
            [[(2, 2), (3, 5)]],
            [[(0, 1), (1, 2)], [(0, 1), (1, 2)]],
        ):
            with session.segments(wrong), pytest.raises(CallError, match="segment"):
                model(**batch)
        with pytest.raises(CallError, match="pairs of columns"), session.segments([5]):
            pass


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("pine + fastv(before_layer=2)", r"takes tokens from some of them: prune before layer 0"),
        ("random(before_layer=0, positions=compact) + pine", "renumbers them"),
        ("avl + pine", "avl.* takes keys from some of them"),
        ("pine + pai", "pine and pai both edit attention in layer 2"),
    ],
)
def test_what_does_not_go_together(spec, said):
    with pytest.raises(SpecError, match=said):
        vlmattn.wrap(tiny.llava(), spec)
