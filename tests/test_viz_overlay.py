"""Pictures: the right pixels are bright, for one and for several images."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vlmattn.spans import Geometry
from vlmattn.viz import overlay

# 2 x 3 tokens of 10 x 10 pixels; a column of 5 pixels on the right belongs to no token.
GEOMETRY = Geometry(grid=(1, 2, 3), size=(35, 20), origin=(0.0, 0.0), cell=(10.0, 10.0))


def picture(size: tuple[int, int] = (35, 20)) -> Image.Image:
    return Image.new("RGB", size, (200, 40, 90))


def test_mask_says_kept_dropped_and_unseen() -> None:
    mask = overlay.token_mask(GEOMETRY, [1, 5])
    assert mask.shape == (20, 35)
    expected = np.full((20, 35), overlay.DROPPED)
    expected[:, 30:] = overlay.UNSEEN
    expected[:10, 10:20] = overlay.KEPT
    expected[10:, 20:30] = overlay.KEPT
    assert (mask == expected).all()


def test_kept_pixels_keep_their_colour_and_dropped_ones_are_dim_and_grey() -> None:
    shaded = np.asarray(overlay.shade(picture(), GEOMETRY, [1], side=350))
    assert shaded.shape == (200, 350, 3)
    assert tuple(shaded[50, 150]) == (200, 40, 90)
    dropped = shaded[150, 50]
    assert dropped.max() == dropped.min() < 80
    assert (shaded[100:, :300].max(axis=-1) < 80).all()
    assert tuple(shaded[50, 100]) == overlay._EDGE


def test_everything_kept_is_the_image_itself() -> None:
    full = Geometry(grid=(1, 2, 2), size=(20, 20), origin=(0.0, 0.0), cell=(10.0, 10.0))
    shaded = overlay.shade(picture((20, 20)), full, range(4), side=40)
    assert (np.asarray(shaded) == np.asarray(picture((40, 40)))).all()


def test_a_token_outside_the_grid_is_an_error() -> None:
    with pytest.raises(ValueError, match="do not fit the grid"):
        overlay.token_mask(GEOMETRY, [6])


def report() -> SimpleNamespace:
    kept = [[[0]], [[1, 2], [3]]]
    stages = [
        SimpleNamespace(method="uniform", before_layer=0, kept=kept),
        SimpleNamespace(method="fastv", before_layer=2, kept=[[[0]], [[1], []]]),
    ]
    return SimpleNamespace(stages=stages)


def test_panels_belong_to_the_sample_and_image_asked_for() -> None:
    titles = [title for title, _ in overlay.panels(picture(), GEOMETRY, report(), sample=1, number=1)]
    assert titles == [
        "what the model is given\n6 visual tokens",
        "uniform\nbefore the first layer: 1 of 6 kept",
        "fastv\nbefore layer 2: 0 of 6 kept",
    ]


def test_several_images_are_rows_of_one_picture(tmp_path: Path) -> None:
    wide = Geometry(grid=(1, 2, 4), size=(40, 20), origin=(0.0, 0.0), cell=(10.0, 10.0))
    drawn = overlay.draw([picture(), picture((40, 20))], [GEOMETRY, wide], report(), sample=1, side=120)
    one = overlay.draw([picture()], [GEOMETRY], report(), sample=1, side=120)
    assert drawn.height > 1.8 * one.height and drawn.width >= one.width
    path = overlay.save(drawn, tmp_path / "deep" / "kept.png")
    assert Image.open(path).size == drawn.size
    with pytest.raises(ValueError, match="one geometry per image"):
        overlay.draw([picture()], [GEOMETRY, wide], report())


def test_stages_need_no_report() -> None:
    pruned = [(stage.method, stage.before_layer, stage.kept[1][1]) for stage in report().stages]
    drawn = overlay.stage_panels(picture(), GEOMETRY, pruned, side=70)
    same = overlay.panels(picture(), GEOMETRY, report(), sample=1, number=1, side=70)
    assert [title for title, _ in drawn] == [title for title, _ in same]
    for (_, first), (_, second) in zip(drawn, same, strict=True):
        assert (np.asarray(first) == np.asarray(second)).all()
    assert len(overlay.stage_panels(picture(), GEOMETRY, [])) == 1


def test_fit_gives_the_longest_side() -> None:
    assert overlay.fit(picture((40, 20)).convert("L"), 100).size == (100, 50)
    assert overlay.fit(picture((400, 100)), 100).size == (100, 25)
