"""The claims of `vlmattn check`: no-op identity, removal = masking, oracle generation, equal backends, undo.

Each is measured on one model and one prompt, against something that shares as little as possible with what it proves.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmattn.errors import BudgetError, CallError, VlmattnError
from vlmattn.methods.base import Editor, Method, Pruner, Selector
from vlmattn.methods.cache import Evictor
from vlmattn.oracle import Gap, compare, footprint, longer, masked
from vlmattn.patches import families
from vlmattn.session import Session, TextTower, wrap

FP32_TOLERANCE = 1e-4
"""Largest logit difference allowed in fp32, as a share of the largest logit."""
HALF_STEPS = 16
"""In half precision the RMS difference may be this many rounding steps of the RMS logit: 0.125 in bf16, 0.016 in fp16.
The largest difference is no measure there: gates of an edit open and shut at near ties."""
HALF_AGREEMENT = 0.9
"""In half precision this share of the positions must have the same best token."""
NEW_TOKENS = 8


@dataclass(frozen=True)
class CheckRow:
    """One claim.

    Attributes:
        name: short name of the claim.
        passed: True, False, or None where there is nothing to prove.
        value: what was measured, in the unit that `explanation` names; None if nothing was.
        tolerance: the largest value that passes; None if nothing was measured.
        explanation: what was compared, and everything a reader should know about the value.
        refused: whether the package itself refused the call; that is a contract result, not a failure.
    """

    name: str
    passed: bool | None
    value: float | None
    tolerance: float | None
    explanation: str
    refused: bool = False

    @property
    def verdict(self) -> str:
        """`pass`, `FAIL`, `refused` or `n/a`."""
        return "refused" if self.refused else "n/a" if self.passed is None else "pass" if self.passed else "FAIL"


def tolerance(dtype: torch.dtype) -> float:
    """The gap that passes: of `largest` in fp32 and fp64, of `rms` in half precision."""
    if dtype in (torch.float32, torch.float64):
        return FP32_TOLERANCE
    return HALF_STEPS * torch.finfo(dtype).eps


class Proof:
    """The claims, one method each, on one model and one unpadded prompt.

    Args:
        model: unwrapped.
        inputs: of one prompt.
        methods: to install.
        new_tokens: length of the compared generation.
        processor, text_tower: as `wrap` takes them.
    """

    def __init__(
        self,
        model: Any,
        inputs: dict[str, Any],
        methods: Sequence[Method],
        new_tokens: int,
        processor: Any = None,
        text_tower: TextTower | None = None,
    ) -> None:
        self._wrap = functools.partial(wrap, model, processor=processor, text_tower=text_tower)
        self.model, self.inputs, self.methods, self.new_tokens = model, inputs, tuple(methods), new_tokens
        self.family = families.find(model)
        text_model: Any = self.family.part(model, "text_model")
        self.layers: list[nn.Module] = list(getattr(text_model, self.family.layers))
        self.attention: str = text_model.config._attn_implementation
        ids = inputs["input_ids"][0].cpu()
        self.visual = torch.isin(ids, torch.tensor(self.family.placeholders(model.config)))
        self.tolerance = tolerance(model.dtype)
        self.half = self.tolerance != FP32_TOLERANCE
        self.plain, self.plain_generation = self.logits(), self.generate()
        # after the first calls: transformers hangs hooks of its own on a model then
        self.before = footprint(model)

    def rows(self) -> list[CheckRow]:
        """Every claim, in order; what the package refuses is a row that says so."""
        claims: list[tuple[str, Callable[[], CheckRow]]] = [
            ("no-op", self.no_op),
            ("removal = masking", self.removal),
            ("oracle generation", self.oracle),
            ("backends", self.backends),
            ("undo", self.undo),
        ]
        if any(isinstance(method, Evictor) for method in self.methods):
            claims.insert(3, ("eviction = masking", self.eviction))
        rows = []
        for name, claim in claims:
            try:
                rows.append(dataclasses.replace(claim(), name=name))
            except VlmattnError as error:
                rows.append(CheckRow(name, None, None, None, f"refused: {error}", refused=True))
        return rows

    def logits(self) -> Tensor:
        """`(n, vocabulary)` of one pass over the prompt without a cache."""
        return self.model(**self.inputs, use_cache=False).logits[0]

    def generate(self) -> tuple[Tensor, Tensor]:
        """Greedy ids `(1, n + new)` with the cache, and the raw logits `(new, vocabulary)` they were chosen by."""
        out = self.model.generate(
            **self.inputs,
            max_new_tokens=self.new_tokens,
            min_new_tokens=self.new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            # a model that is kept from ending may write an image token, which no recomputation could tell from an image
            suppress_tokens=[*self.family.placeholders(self.model.config), *self.family.wrappers(self.model.config)],
            output_logits=True,
            return_dict_in_generate=True,
        )
        return out.sequences, torch.cat(out.logits)

    # Claims

    def no_op(self) -> CheckRow:
        """With every method at the strength that changes nothing, all logits are bit-identical."""
        if not torch.equal(self.logits(), self.plain):
            return _row(
                None, None, None, "the model alone does not repeat its own logits: bit-identity cannot be judged"
            )
        plain = self.plain_generation
        cases = {"disabled": [method.disabled() for method in self.methods]}
        if any(isinstance(method, Pruner) for method in self.methods):
            # nothing to drop: scores are computed and ranked, all tokens stay
            cases["keeping every token"] = [self._keeping_all(method) for method in self.methods]
        worst, wrong = 0.0, []
        for name, methods in cases.items():
            with self._wrap(methods):
                forward, generated = self.logits(), self.generate()
            pairs = [(forward, self.plain), (generated[1], plain[1])]
            if not (torch.equal(generated[0], plain[0]) and all(torch.equal(a, b) for a, b in pairs)):
                wrong.append(name)
            worst = max([worst, *(_distance(a, b) for a, b in pairs)])
        said = f"prompt and {self.new_tokens} greedy tokens, torch.equal; cases: {', '.join(cases)}"
        return _row(not wrong, worst, 0.0, said + (f"; differs: {', '.join(wrong)}" if wrong else ""))

    def _keeping_all(self, method: Method) -> Method | None:
        """The method with a budget of all tokens; disabled where it has none, or would do more than drop nothing."""
        tokens, layers = int(self.visual.sum()), len(self.layers)
        if isinstance(method, Pruner) and not (method.fixed or method.merges) and method.positions == "original":
            with suppress(BudgetError):  # some take a share only
                full = dataclasses.replace(method, keep=tokens)
                if full.expected_tokens(tokens, layers) == [tokens] * layers:
                    return full
        return method.disabled()

    def removal(self) -> CheckRow:
        """Pruned logits equal an unpruned run in which the dropped keys are masked from their layer on."""
        pruners = [method for method in self.methods if isinstance(method, Selector) and not method.is_noop]
        if not pruners:
            return _row(None, None, None, "no method drops tokens")
        changing = [str(pruner) for pruner in pruners if pruner.merges or pruner.positions == "compact"]
        if changing:
            return _row(None, None, None, f"{', '.join(changing)} merges or renumbers tokens, which no mask can do")
        if self.attention not in ("sdpa", "eager"):
            return _row(None, None, None, f"{self.attention} takes no mask of this kind: load the model with sdpa")
        with self._wrap(pruners) as session:
            pruned = self.logits()
            report = session.report()
        dropped = {stage.before_layer: self._dropped(stage.positions[0]) for stage in report.stages}
        if not dropped:
            return _row(None, None, None, "every visual token stayed: nothing was removed")
        with masked(self.layers, dropped, additive=self.attention == "eager"):
            oracle = self.logits()
        kept = torch.tensor(report.positions[0], device=oracle.device)
        where = ", ".join(f"{len(columns)} masked from layer {layer}" for layer, columns in dropped.items())
        extra = "; pruning alone, without the other methods" if len(pruners) < len(self.methods) else ""
        return self._judge(compare(pruned, oracle[kept]), f"{len(kept)} kept positions, {where}{extra}")

    def oracle(self) -> CheckRow:
        """Cached generation equals one pass over prompt and answer without a cache."""
        if any(isinstance(method, Selector) and method.shrink_early_layers for method in self.methods):
            return _row(None, None, None, "the answer sees less than the prompt did, so one pass cannot show it")
        if any(isinstance(method, Evictor) and not method.is_noop for method in self.methods):
            return _row(None, None, None, "the answer sees less than the prompt did: see eviction = masking")
        with self._wrap(self.methods) as session:
            ids, logits = self.generate()
            decided = _decisions(session)
            with session.prompt(self.inputs["input_ids"].shape[1]):
                again = self.model(**longer(self.inputs, ids), use_cache=False).logits[0]
            same = decided == _decisions(session)
        steps = logits.shape[0]
        said = f"{steps} greedy tokens from the cache against one pass without it"
        if not same and self.half:
            return _row(
                None, None, None, f"{said}: the passes chose other tokens or heads at near ties of {self.model.dtype}"
            )
        row = self._judge(compare(logits, again[-steps - 1 : -1]), said)
        return (
            row
            if same
            else dataclasses.replace(row, passed=False, explanation=f"{said}; they chose other tokens or heads")
        )

    def eviction(self) -> CheckRow:
        """Answers from a cache that was cut equal one pass whose answer rows do not see what went."""
        evictors = [method for method in self.methods if isinstance(method, Evictor) and not method.is_noop]
        if not evictors:
            return _row(None, None, None, "no method evicts from the cache")
        moving = [str(method) for method in evictors if not method.static]
        if moving:
            return _row(
                None, None, None, f"{', '.join(moving)} decides anew while decoding, which one pass cannot show"
            )
        pruners = [method for method in self.methods if isinstance(method, Selector) and not method.is_noop]
        if any(pruner.merges or pruner.positions == "compact" for pruner in pruners):
            return _row(None, None, None, "tokens are merged or renumbered, which no mask can do")
        if self.attention not in ("sdpa", "eager"):
            return _row(None, None, None, f"{self.attention} takes no mask of this kind: load the model with sdpa")
        with self._wrap([*pruners, *evictors]) as session:
            ids, logits = self.generate()
            report = session.report()
        prompt, steps = self.inputs["input_ids"].shape[1], logits.shape[0]
        dropped = {stage.before_layer: self._dropped(stage.positions[0]) for stage in report.stages}
        gone = {cache.layer: self._dropped(cache.positions[0]) for cache in report.caches}
        if not gone:
            return _row(None, None, None, "every key stayed: nothing was evicted")
        with masked(self.layers, dropped, self.attention == "eager", gone, prompt):
            again = self.model(**longer(self.inputs, ids), use_cache=False).logits[0]
        counts = ", ".join(f"{len(columns)} from layer {layer}" for layer, columns in gone.items())
        extra = "; without the other methods" if len(pruners) + len(evictors) < len(self.methods) else ""
        said = f"{steps} greedy tokens from the cut cache against one pass; evicted: {counts}{extra}"
        return self._judge(compare(logits, again[-steps - 1 : -1]), said)

    def backends(self) -> CheckRow:
        """The fast attention backend equals the naive one where edits are installed."""
        editors = [method for method in self.methods if isinstance(method, Editor) and not method.is_noop]
        if not editors:
            return _row(None, None, None, "no method edits attention")
        idle = [method.disabled() if method in editors else method for method in self.methods]
        with self._wrap(idle):
            without = self.generate()[1]
        with self._wrap(self.methods) as session:
            fast, quick = self.generate()
            session.use_backend("reference")
            naive, slow = self.generate()
        same = int((fast == naive).long().cumprod(1).sum()) - self.inputs["input_ids"].shape[1]
        steps = min(same + 1, quick.shape[0])
        moved = compare(quick[:1], without[:1]).largest
        said = f"rows against reference over prompt and {steps} tokens; the edit moves the first logits by {moved:.1e}"
        if moved == 0.0:
            said += ": it found nothing to change in this prompt, so this row says little"
        return self._judge(compare(quick[:steps], slow[:steps]), said)

    def undo(self) -> CheckRow:
        """After `remove()` the model has its old logits, hooks, attributes, attention names and registries."""
        try:
            with self._wrap(self.methods) as session:
                session.record()
                self.logits()
        finally:
            after, logits = footprint(self.model), self.logits()
        changed = [name for name in self.before if self.before[name] != after[name]]
        worst = _distance(logits, self.plain)
        said = "logits bit-identical; " + ", ".join(self.before) + " as before"
        if changed:
            said += f"; left behind: {', '.join(changed)}"
        return _row(not changed and torch.equal(logits, self.plain), worst, 0.0, said)

    def _judge(self, gap: Gap, said: str) -> CheckRow:
        said = f"{said}; best token the same at {gap.agreement:.1%} of the positions; "
        if not self.half:
            said += "value: largest difference over largest logit"
            return _row(gap.largest <= self.tolerance, gap.largest, self.tolerance, said)
        said += (
            f"value: RMS difference over RMS logit, held to {HALF_STEPS} rounding steps of {self.model.dtype} and "
            f"{HALF_AGREEMENT:.0%} agreement only; largest difference {gap.largest:.1e} of the largest logit"
        )
        return _row(gap.rms <= self.tolerance and gap.agreement >= HALF_AGREEMENT, gap.rms, self.tolerance, said)

    def _dropped(self, kept: Sequence[int]) -> list[int]:
        """Prompt columns that are not among `kept`."""
        return sorted(set(range(len(self.visual))) - set(kept))


def _row(passed: bool | None, value: float | None, limit: float | None, said: str) -> CheckRow:
    return CheckRow("", passed, value, limit, said)


def _distance(a: Tensor, b: Tensor) -> float:
    return compare(a, b).largest if a.shape == b.shape else torch.inf


def _decisions(session: Session) -> tuple[list[list[list[list[int]]]], list[Any]]:
    """What the methods decided for the last prompt: kept tokens, and factors of heads where they were scaled."""
    gains: list[Any] = []
    with suppress(CallError, KeyError):  # no method scales heads
        gains = session.stats()["gain"].values.nan_to_num().tolist()
    return [stage.kept for stage in session.report().stages], gains
