"""Ask a session that answers from compressed contexts: every image is read once, whatever number of questions it has.

The time of reading an image and describing it counts into the prefill of the first question about it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vlmattn.eval.answer import Answers, Asker, FirstLogits
from vlmattn.eval.models import Loaded

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmattn import CompressedContext, Report, Session, VisionStore

CONTEXTS = 8
"""So many images are held ready; questions about one image usually stand together."""


def asker_of(loaded: Loaded, session: Session, max_new_tokens: int, store: VisionStore | None = None) -> Asker:
    """What answers under a session; arguments as of `Asker`."""
    return (ContextAsker if session.compresses else Asker)(loaded, session, max_new_tokens, store)


class ContextAsker(Asker):
    """As `Asker`, question by question, each behind the compressed context of its image."""

    def __init__(self, loaded: Loaded, session: Session, max_new_tokens: int, store: VisionStore | None = None) -> None:
        super().__init__(loaded, session, max_new_tokens, store)
        self._contexts: dict[str, CompressedContext] = {}

    def __call__(self, images: Sequence[Image], prompts: Sequence[str]) -> Answers:
        """Answer prompts[i] about images[i]; `times` are sums."""
        told = [super(ContextAsker, self).__call__([image], [prompt]) for image, prompt in zip(images, prompts)]
        first = told[0]
        times = {name: sum(answer.times[name] for answer in told) for name in first.times}
        times["new_tokens"] = sum(answer.times["new_tokens"] - 1 for answer in told) + 1
        return dataclasses.replace(
            first,
            texts=[text for answer in told for text in answer.texts],
            truncated=[cut for answer in told for cut in answer.truncated],
            margins=[margin for answer in told for margin in answer.margins],  # type: ignore[arg-type]
            seen=[seen for answer in told for seen in answer.seen],
            costs=[cost for answer in told for cost in answer.costs],
            times=times,
            report=joined([answer.report for answer in told]),
        )

    def _generate(self, images: Sequence[Image], prompts: Sequence[str], inputs: Any, clock: FirstLogits) -> Tensor:
        context = self._context(images[0])
        ids = context.ids(prompts[0])
        with self._timed(clock) as options:
            return context.generate(ids, **options)

    def _context(self, image: Image) -> CompressedContext:
        key = hashlib.sha256(f"{image.size}{image.mode}".encode() + image.tobytes()).hexdigest()
        if key not in self._contexts:
            while len(self._contexts) >= CONTEXTS:
                self._contexts.pop(next(iter(self._contexts))).close()
            self._contexts[key] = self.session.compress(image)
        return self._contexts[key]


def joined(reports: Sequence[Report]) -> Report:
    """The report of several samples, from one each: lists one after the other, sums added."""
    lists = ("prompt_tokens", "visual_tokens", "visual_per_layer", "cached_per_layer", "positions")
    sums = ("kv_bytes", "kv_bytes_full", "prefill_macs", "prefill_macs_full")
    made: dict[str, Any] = {name: [entry for report in reports for entry in getattr(report, name)] for name in lists}
    made |= {name: sum(getattr(report, name) for report in reports) for name in sums}
    made["caches"] = [_joined(caches) for caches in zip(*(report.caches for report in reports), strict=False)]
    return dataclasses.replace(reports[0], **made)


def _joined(caches: Sequence[Any]) -> Any:
    """One layer's cache over several samples."""
    rows = {name: [row for cache in caches for row in getattr(cache, name)] for name in ("kept", "positions")}
    return dataclasses.replace(caches[0], **rows)
