"""What is told about heads: T-VHD per generated token, and maps of layers and heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from typer.testing import CliRunner

import vlmattn
from vlmattn.errors import CallError, SpecError
from vlmattn.methods.attend.vhr import total_divergence
from vlmattn.viz import heads

pytestmark = pytest.mark.usefixtures("no_grad")


def test_total_divergence_sums_the_largest_heads_over_layers():
    vhd = torch.tensor([[[[1.0, 3.0, 2.0]], [[0.0, 0.5, 4.0]]], [[[1.0, 1.0, 1.0]], [[2.0, 0.0, 0.0]]]])
    assert total_divergence(vhd, 1).tolist() == [[7.0], [3.0]]
    assert total_divergence(vhd, 2).tolist() == [[9.5], [4.0]]
    for top in (0, 4, 1.0):
        with pytest.raises(SpecError, match="between 1 and the 3 heads"):
            total_divergence(vhd, top)


@pytest.mark.parametrize("spec", ["none", "vhr(depth=1)", "fastv(keep=0.5, before_layer=2) + pai(first_layer=1)"])
def test_divergence_of_every_token_is_that_of_two_separate_runs(model, family, batch, spec):
    """With nothing installed against hooks on runs of our own; otherwise the first token's against `stats()`."""
    outputs: dict[int, torch.Tensor] = {}
    with vlmattn.wrap(model, spec) as session:
        sequences = model.generate(**batch, max_new_tokens=4, do_sample=False)
        first = session.stats()["divergence"].values if "vhr" in spec else None
        found = session.token_divergence(batch, sequences)
        assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), sequences)
    assert found.axes == ("token", "layer", "sample", "head") and found.values.shape == (4, tiny.LAYERS, 2, 4)
    assert bool((found.values > 0).all())
    if first is not None:  # heads that the outlier rule rejects count 0 there
        kept = first[1] > 0
        assert torch.allclose(found.values[0, 1][kept], first[1][kept], atol=1e-4)
    if spec != "none":
        return
    layers = model.model.language_model.layers
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, a, i=i: outputs.__setitem__(i, a[0]))
        for i, layer in enumerate(layers)
    ]
    longer = tiny.answered(batch, sequences)
    wrappers = [] if family == "llava" else [92, 93]
    for row in (0, 1):
        one = {name: longer[name][row : row + 1] for name in ("input_ids", "attention_mask")}
        real = one["attention_mask"][0].bool()
        single = tiny.single(longer, row)
        model(**single)
        image = torch.stack([outputs[i][0, -5:-1] for i in range(tiny.LAYERS)])
        ids = one["input_ids"][0][real]
        kept = torch.tensor([token not in (tiny.IMAGE, *wrappers) for token in ids.tolist()])
        model(input_ids=ids[kept][None])
        text = torch.stack([outputs[i][0, -5:-1] for i in range(tiny.LAYERS)])
        expected = (image - text).view(tiny.LAYERS, 4, 4, -1).norm(dim=-1)
        assert torch.allclose(found.values[:, :, row], expected.transpose(0, 1), atol=1e-4)
    for hook in hooks:
        hook.remove()


def test_divergence_of_sequences_that_do_not_fit(model, family, batch):
    with vlmattn.wrap(model, "none") as session:
        sequences = model.generate(**batch, max_new_tokens=2, do_sample=False)
        for wrong in (sequences[:1], batch["input_ids"], sequences.flip(1)):
            with pytest.raises(CallError, match="do not continue"):
                session.token_divergence(batch, wrong)
        with pytest.raises(CallError, match="input_ids"):
            session.token_divergence({}, sequences)
        text = tiny.prompts(family, images=(0,))
        with pytest.raises(CallError, match="no image"):
            session.token_divergence(text, torch.cat([text["input_ids"], torch.tensor([[5]])], 1))
        with pytest.raises(vlmattn.VlmattnError, match=r"record\(\)"):
            session.stats()


def test_maps_have_a_panel_for_every_statistic(tmp_path: Path):
    maps = {name: np.random.default_rng(0).random((12, 8), np.float32) for name in ("visual_mass", "entropy", "other")}
    figure = heads.draw(maps, "title")
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["attention on the image", "entropy, nats", "other"]
    assert (panels[0].get_images()[0].get_array() == maps["visual_mass"]).all()
    assert panels[0].get_images()[0].get_clim() == (0.0, 1.0)
    assert panels[1].get_images()[0].get_clim()[1] == pytest.approx(float(maps["entropy"].max()))
    path = heads.save(figure, tmp_path / "deep" / "maps.png")
    assert Image.open(path).size[0] > 300
    with pytest.raises(ValueError, match="layers, heads"):
        heads.draw({"a": np.zeros((2, 3)), "b": np.zeros((3, 2))})
    with pytest.raises(ValueError, match="at least one"):
        heads.draw({})


def test_show_draws_heads(tmp_path: Path):
    from vlmattn.cli import app

    target = tmp_path / "heads.png"
    said = CliRunner().invoke(
        app, ["show", "scene:3", "--heads", str(target), "--methods", "pai", "--max-new-tokens", "4"]
    )
    assert said.exit_code == 0, said.output
    assert "visual_mass: mean" in said.output and "divergence: mean" in said.output
    assert Image.open(target).size[0] > 300
