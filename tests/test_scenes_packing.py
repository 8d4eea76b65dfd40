"""The packed training forward computes what the stock transformers forward computes."""

from __future__ import annotations

import torch

from vlmattn.scenes.model import PackedForward, build_model, normalized_pixels
from vlmattn.scenes.packing import training_batch
from vlmattn.scenes.text import EOS_ID
from vlmattn.scenes.versions import VERSION_2


def test_packed_forward_of_a_llava_equals_the_stock_forward() -> None:
    version = VERSION_2
    model = build_model(version, seed=3).eval()
    batch = training_batch(version, seed=5, first=0, count=2)
    pixels, ids = normalized_pixels(torch.from_numpy(batch.pixels)), torch.from_numpy(batch.ids)
    with torch.no_grad():
        packed, _ = PackedForward(model, version)(pixels, ids)
    worst, compared, start = 0.0, 0, 0
    for slots, length in version.lessons.slot_groups:
        for at in range(start, start + slots * length, length):
            for row in range(len(ids)):
                words = ids[row, at : at + length].tolist()
                if EOS_ID not in words:
                    continue
                words = words[: words.index(EOS_ID) + 1]
                with torch.no_grad():
                    stock = model(
                        input_ids=torch.tensor([[*version.prefix(), *words]]), pixel_values=pixels[row : row + 1]
                    ).logits
                away = stock[0, len(version.prefix()) :] - packed[row, at : at + len(words)]
                worst = max(worst, away.abs().max().item())
                compared += 1
        start += slots * length
    assert compared > 20
    assert worst < 1e-5
