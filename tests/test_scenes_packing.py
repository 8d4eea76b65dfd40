"""The packed training forward computes what the stock transformers forward computes."""

from __future__ import annotations

import torch

from vlmattn.scenes.model import PackedForward, build_model, normalized_pixels
from vlmattn.scenes.packing import PREFIX, SLOT_GROUPS, training_batch
from vlmattn.scenes.text import EOS_ID


def test_packed_forward_equals_the_stock_forward() -> None:
    model = build_model(seed=3).eval()
    batch = training_batch(seed=5, first=0, count=2, anchors=3)
    pixels, ids = normalized_pixels(torch.from_numpy(batch.pixels)), torch.from_numpy(batch.ids)
    with torch.no_grad():
        packed, _ = PackedForward(model)(pixels, ids)
    worst, compared, start = 0.0, 0, 0
    for slots, length in SLOT_GROUPS:
        for at in range(start, start + slots * length, length):
            for row in range(len(ids)):
                words = ids[row, at : at + length].tolist()
                if EOS_ID not in words:
                    continue
                words = words[: words.index(EOS_ID) + 1]
                with torch.no_grad():
                    stock = model(
                        input_ids=torch.tensor([[*PREFIX, *words]]), pixel_values=pixels[row : row + 1]
                    ).logits
                worst = max(worst, (stock[0, len(PREFIX) :] - packed[row, at : at + len(words)]).abs().max().item())
                compared += 1
        start += slots * length
    assert compared > 20
    assert worst < 1e-5
