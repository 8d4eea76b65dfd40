"""`vlmattn check`: passes where the package is right, and every planted defect turns its own row red."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from typer.testing import CliRunner, Result

import vlmattn
from vlmattn import cli, proof
from vlmattn.check import CheckResult, check, check_inputs
from vlmattn.errors import CallError, DataError, SpecError
from vlmattn.kernels import dispatch, rows
from vlmattn.methods.attend.var import VAR
from vlmattn.methods.prune.fastv import FastV
from vlmattn.patches import passes
from vlmattn.patches.attention import Registration
from vlmattn.patches.engine import Engine

VAR_TINY = "var(sinks=[1, 2, 3], tau=1.5, rho=0.2, min_visual=0.05, first_layer=1)"
ALL = f"random(keep=0.7, before_layer=0) + fastv(keep=0.5, before_layer=2) + {VAR_TINY} + vhr"
CLAIMS = ["no-op", "removal = masking", "oracle generation", "backends", "undo"]


@pytest.fixture
def inputs(family) -> dict[str, torch.Tensor]:
    return tiny.single(tiny.prompts(family), 1)


def processor(inputs: dict[str, torch.Tensor], template: bool = True) -> Any:
    """A processor that makes `inputs` of everything."""

    class Fake:
        tokenizer = SimpleNamespace(bos_token="<s>")

        def apply_chat_template(self, turns: Any, **kwargs: Any) -> str:
            if not template:
                raise ValueError("no chat_template")
            return "<s>" + turns[0]["content"][1]["text"]

        def __call__(self, **kwargs: Any) -> dict[str, Any]:
            assert kwargs["text"] == ["<s>what?"] and kwargs["add_special_tokens"] is False
            return dict(inputs)

    return Fake()


def verdicts(result: CheckResult) -> dict[str, str]:
    return {row.name: row.verdict for row in result.rows}


@pytest.mark.parametrize(
    ("spec", "absent"),
    [
        ("none", {"removal = masking", "backends"}),
        ("fastv(keep=0.5, before_layer=2)", {"backends"}),
        ("noimage", {"backends"}),
        ("pyramiddrop(ratios=[0.7, 0.5, 0.3])", {"backends"}),
        ("feather(keep=0.4)", {"backends"}),
        ("schedule(keep=0.5)", {"backends"}),
        ("dart(keep=0.5)", {"backends"}),
        ("vflowopt(recycle=False)", {"backends"}),
        ("pool(keep=0.5)", {"removal = masking", "backends"}),
        ("fastv(keep=0.5, before_layer=2, shrink_early_layers=True)", {"oracle generation", "backends"}),
        (VAR_TINY, {"removal = masking"}),
        (ALL, set()),
    ],
)
def test_everything_is_proved(model, inputs, family, spec, absent):
    result = check(model, processor(inputs), None, "what?", spec)  # type: ignore[arg-type]
    assert verdicts(result) == {name: "n/a" if name in absent else "pass" for name in CLAIMS}
    assert result.passed and not result.refused
    assert result.prompt_tokens == inputs["input_ids"].shape[1]
    assert result.visual_tokens == int((inputs["input_ids"] == tiny.IMAGE).sum())
    row = result.support_row()
    assert row.count("\n") == 0 and row.startswith("| ") and type(model).__name__ in row and "`" + result.spec in row
    assert json.loads(json.dumps(result.to_dict()))["support_row"] == row


@pytest.mark.parametrize(
    ("spec", "absent"),
    [
        ("avl(keep=0.4)", {"removal = masking", "oracle generation", "backends"}),
        ("evict3r(keep=0.4, floor=1)", {"removal = masking", "oracle generation", "backends"}),
        ("fastv(keep=0.6, before_layer=2) + avl(keep=0.4) + " + VAR_TINY, {"oracle generation"}),
        ("avl(core=0.2, refresh=2)", {"removal = masking", "oracle generation", "eviction = masking", "backends"}),
        ("avl(keep=1.0)", {"removal = masking", "eviction = masking", "backends"}),
    ],
)
def test_eviction_is_proved(model, inputs, spec, absent):
    result = check_inputs(model, inputs, spec)
    claims = [*CLAIMS[:3], "eviction = masking", *CLAIMS[3:]]
    assert verdicts(result) == {name: "n/a" if name in absent else "pass" for name in claims}
    assert result.passed and "eviction = masking" in result.support_row()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_says_that_its_bounds_are_looser(model, inputs, dtype):
    model, inputs = model.to(dtype), inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}
    result = check_inputs(model, inputs, "fastv(keep=0.5, before_layer=2)")
    assert result.passed
    removal = result.rows[1]
    assert removal.tolerance == 16 * torch.finfo(dtype).eps and "rounding steps" in removal.explanation
    assert "not 1e-04" in result.support_row()


def test_eager_models_are_proved_too(inputs, family):
    result = check_inputs(tiny.MODELS[family](attention="eager"), inputs, ALL)
    assert result.attention == "eager" and set(verdicts(result).values()) == {"pass"}


# Planted defects: one row each


def red(model: Any, inputs: dict[str, torch.Tensor], spec: str = ALL) -> set[str]:
    """Names of the rows that failed."""
    result = check_inputs(model, inputs, spec)
    assert not result.passed
    return {row.name for row in result.rows if row.passed is False}


def test_a_strength_that_is_not_zero_is_found(model, inputs, monkeypatch):
    monkeypatch.setattr(FastV, "disabled", lambda self: self)
    assert red(model, inputs) == {"no-op"}


def test_a_mask_that_shows_the_future_is_found(model, inputs, monkeypatch):
    def everything(mask: Any, stage: Any) -> torch.Tensor:
        return torch.ones(1, 1, stage.size, stage.size, dtype=torch.bool)

    monkeypatch.setattr(passes, "prefill_mask", everything)
    assert "removal = masking" in red(model, inputs, "fastv(keep=0.5, before_layer=2)")


def test_a_rotation_by_the_wrong_positions_is_found(model, inputs, monkeypatch):
    real = passes.Pass._swap

    def crowded(self: Any, kwargs: dict[str, Any], stage: Any, hidden: torch.Tensor) -> None:
        real(self, kwargs, stage, hidden)
        if self.prefill and stage.layer:
            cos, sin = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = cos.roll(1, -2), sin.roll(1, -2)

    monkeypatch.setattr(passes.Pass, "_swap", crowded)
    assert "removal = masking" in red(model, inputs, "fastv(keep=0.5, before_layer=2)")


def test_an_edit_that_is_forgotten_after_the_prompt_is_found(model, inputs, monkeypatch):
    real = passes.Pass._request
    monkeypatch.setattr(passes.Pass, "_request", lambda self, *args: real(self, *args) if self.prefill else None)
    assert red(model, inputs, VAR_TINY) == {"oracle generation"}


def test_a_wrong_backend_is_found(model, inputs, monkeypatch):
    def loud(*args: Any) -> Any:
        out, statistics = rows.apply(*args)
        return out * 1.01, statistics

    monkeypatch.setitem(dispatch.BACKENDS, "rows", loud)
    assert red(model, inputs, VAR_TINY) == {"backends"}


def test_an_attention_name_that_stays_is_found(model, inputs, monkeypatch):
    real, kept = Registration.remove, []
    monkeypatch.setattr(Registration, "remove", lambda self: kept.append(self))
    try:
        assert red(model, inputs) == {"undo"}
    finally:
        for registration in kept:
            real(registration)


def test_an_attribute_that_stays_is_found(model, inputs, monkeypatch):
    monkeypatch.setattr(
        Engine, "_replace", staticmethod(lambda stack, owner, name, value: setattr(owner, "left_" + name, value))
    )
    result = check_inputs(model, inputs, "fastv(keep=0.5, before_layer=2)")
    assert result.rows[-1].passed is False and "attributes" in result.rows[-1].explanation


# Refusals and mistakes


def test_a_refusal_is_shown_as_such(model, inputs):
    result = check_inputs(model, inputs, "var")
    assert result.passed and result.refused
    assert verdicts(result)["no-op"] == "pass" and verdicts(result)["oracle generation"] == "refused"
    assert "vlmattn discover" in result.rows[2].explanation
    with vlmattn.wrap(model, "none"):
        assert all(row.refused for row in check_inputs(model, inputs, "vhr").rows if row.name != "backends"
                   and row.name != "removal = masking")  # fmt: skip


def test_a_model_that_does_not_repeat_itself_is_not_judged(model, inputs, monkeypatch):
    real = proof.Proof.logits
    monkeypatch.setattr(proof.Proof, "logits", lambda self: real(self) + torch.rand(()))
    row = check_inputs(model, inputs, "fastv(before_layer=2)").rows[0]
    assert row.verdict == "n/a" and "does not repeat" in row.explanation


def test_what_check_cannot_take(model, inputs, family):
    with pytest.raises(CallError, match="one unpadded prompt"):
        check_inputs(model, tiny.prompts(family), "fastv")
    with pytest.raises(SpecError):
        check_inputs(model, inputs, "fastvv")
    with pytest.raises(DataError, match="no chat template"):
        check(model, processor(inputs, template=False), None, "what?", "fastv")  # type: ignore[arg-type]


def test_an_edit_with_nothing_to_do_says_so(model, inputs):
    row = check_inputs(model, inputs, "var(sinks=[1], tau=100.0)").rows[3]
    assert row.passed and "says little" in row.explanation


# The command


def command(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(cli.app, ["check", *arguments])


def test_the_command_proves_the_embedded_model():
    result = command()
    assert result.exit_code == 0, result.output
    for name in CLAIMS:
        assert name in result.stdout
    assert result.stdout.splitlines()[-1].startswith("| LLaVA-1.5 | LlavaForConditionalGeneration | float32 | sdpa |")


def test_the_command_exits_1_on_a_failure_and_2_on_a_refusal(monkeypatch):
    monkeypatch.setattr(FastV, "disabled", lambda self: self)
    result = command("--json", "--methods", "fastv(keep=0.5)")
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert data["passed"] is False and [row["name"] for row in data["rows"]] == CLAIMS
    monkeypatch.undo()
    refused = command("--methods", "fastv(keep=0.5) + fastv(keep=0.25)")
    assert refused.exit_code == 2 and "both prune before layer" in refused.stdout
    assert command("--methods", "fastvv").exit_code == 2


def test_disabled_edits_are_not_called_edits(model, inputs):
    assert VAR(p=0.0).is_noop
    assert check_inputs(model, inputs, "var(p=0.0)").rows[3].verdict == "n/a"
