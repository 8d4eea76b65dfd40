"""`check`: proofs on the user's own checkpoint, so that "supported" is not a word but a line of numbers.

It needs a model, an image and a question; nothing is trained and nothing is kept. The claims and how each of them is
measured are in `proof.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from vlmattn import chat
from vlmattn import spec as specs
from vlmattn.errors import CallError
from vlmattn.patches import families
from vlmattn.proof import FP32_TOLERANCE, HALF_STEPS, NEW_TOKENS, CheckRow, Proof

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmattn.patches.text_tower import TextTower

SUPPORT_HEAD = (
    "| family | class | dtype | attention | transformers | methods | results |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


@dataclass(frozen=True)
class CheckResult:
    """All claims about one model, one prompt and one spec.

    Attributes:
        model: name or path of the checkpoint, as its config has it.
        family, model_class, dtype, device, attention: of the model as it was given; `attention` is its implementation.
        torch, transformers: versions.
        spec: canonical text of the methods.
        prompt_tokens, visual_tokens: of the prompt.
        rows: the claims.
    """

    model: str
    family: str
    model_class: str
    dtype: str
    device: str
    attention: str
    torch: str
    transformers: str
    spec: str
    prompt_tokens: int
    visual_tokens: int
    rows: tuple[CheckRow, ...]

    @property
    def passed(self) -> bool:
        """True if no claim failed."""
        return all(row.passed is not False for row in self.rows)

    @property
    def refused(self) -> bool:
        """True if the package refused something that was to be proved."""
        return any(row.refused for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, with `passed` and the support row."""
        return dataclasses.asdict(self) | {"passed": self.passed, "support_row": self.support_row()}

    def support_row(self) -> str:
        """One line of a markdown table whose head is `SUPPORT_HEAD`."""
        results = ", ".join(
            f"{row.name}: {row.verdict}" + (f" ({row.value:.2g})" if row.passed is not None and row.value else "")
            for row in self.rows
        )
        if self.dtype not in ("float32", "float64"):
            results += f" [{self.dtype}: within {HALF_STEPS} rounding steps, not {FP32_TOLERANCE:.0e}]"
        facts = (
            self.family,
            self.model_class,
            self.dtype,
            self.attention,
            self.transformers,
            f"`{self.spec}`",
            results,
        )
        return "| " + " | ".join(facts) + " |"


def check(
    model: nn.Module,
    processor: Any,
    image: Image,
    question: str,
    spec: specs.Spec,
    *,
    name: str = "",
    new_tokens: int = NEW_TOKENS,
    text_tower: TextTower | None = None,
) -> CheckResult:
    """Prove on one image and one question that `spec` does to `model` what it says, and nothing else.

    Args:
        model: a supported model in eval mode; it is wrapped and unwrapped several times and ends as it was.
        processor: its processor, with a chat template.
        image, question: the prompt.
        spec: the methods.
        name: of the model, for the result; the default is what its config says.
        new_tokens: greedy tokens that are compared with a recomputation.
        text_tower: for methods that compare patches with the question.

    Raises:
        SpecError: the spec cannot be read.
        UnsupportedModelError: no family describes the model.
        DataError: the processor has no chat template.
    """
    inputs = prepare(model, processor, image, question)
    return check_inputs(
        model, inputs, spec, name=name, new_tokens=new_tokens, processor=processor, text_tower=text_tower
    )


def prepare(model: Any, processor: Any, image: Image, question: str) -> Mapping[str, Any]:
    """Model inputs of one prompt, on the model's device and in its dtype.

    Raises:
        DataError: the processor has no chat template.
    """
    return chat.encode(model, processor, [image], [chat.turn("user", question, 1)])


@torch.no_grad()
def check_inputs(
    model: Any,
    inputs: Mapping[str, Any],
    spec: specs.Spec,
    *,
    name: str = "",
    new_tokens: int = NEW_TOKENS,
    processor: Any = None,
    text_tower: TextTower | None = None,
) -> CheckResult:
    """As `check`, on finished model inputs of one unpadded prompt; raises CallError if they are more than that."""
    methods = specs.parse(spec)
    family = families.find(model)
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    if ids.shape[0] != 1 or (mask is not None and not bool(mask.bool().all())):
        raise CallError(f"check proves one unpadded prompt at a time, these inputs have {ids.shape[0]} rows or padding")
    proof = Proof(model, dict(inputs), methods, new_tokens, processor, text_tower)
    rows = proof.rows()
    return CheckResult(
        model=name or str(getattr(model.config, "_name_or_path", "") or "unnamed"),
        family=family.name,
        model_class=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(ids.device),
        attention=proof.attention,
        torch=torch.__version__,
        transformers=transformers.__version__,
        spec=specs.text(methods),
        prompt_tokens=ids.shape[1],
        visual_tokens=int(proof.visual.sum()),
        rows=tuple(rows),
    )
