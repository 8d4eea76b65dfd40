"""A-VL: visual and textual keys leave the cache by rules of their own, and only a core of the visual ones is computed.

Idea: image tokens are attended to during the whole answer, but few of them in each layer and always much the same; text
fades. So each layer keeps the visual keys that the last prompt token attends to most, computes only the best of those,
and looks at all it kept every few tokens to choose anew. Zhang et al., "A-VL: Adaptive Attention for Large
Vision-Language Models", arXiv 2409.14846.

Of the V visual tokens of the prompt each layer keeps the best int(V * keep) after the prefill; the others leave its
keys and values for good. With `refresh=K` the best int(V * core) of them are the core: every K-th token of the answer
sees all that was kept and chooses the core again by its own attention, the tokens between see the core alone.
`refresh=None`, the code's default of -1, computes all that was kept. With `text_policy=h2o` the text behind the image,
answer included, keeps the newest and the heaviest tokens (H2O, arXiv 2306.14048): of a budget of max(round(text_keep *
n), text_floor) of the n such tokens so far int(heavy * budget) are those that received most attention in sum.

The paper's filter inside the prefill is FastV: `fastv(keep=0.5, before_layer=3) + avl`; a layer then keeps no more than
arrived. V counts the tokens of the image either way.

Deviations from the released code: tokens outside the core are not only masked; where the core is less than half of what
the layer holds only its keys and values are read. Text is evicted by the mean over heads, not by each head, since a
layer holds one set of positions (the released rule leaves different tokens in every head), and by default not at all.
The budget holds per image unless `budget_scope="sample"`; text before the last image stays; at least one visual token
stays; separators of images are text. The core is never more than what stays, where the code refuses. A further turn of
several tokens at once sees all that was kept and chooses the core again, as a K-th token does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vlmattn import budget
from vlmattn.edits import Eviction, Keep
from vlmattn.errors import SpecError
from vlmattn.methods.base import SCOPES, param, register
from vlmattn.methods.cache import Evictor
from vlmattn.methods.views import CacheView, Watch


@register("avl", title="A-VL: Adaptive Attention for Large Vision-Language Models", paper="2409.14846")
@dataclass(frozen=True)
class AVL(Evictor):
    """Keep in each layer's cache the visual keys that the last token attends to most, and compute a core of them."""

    keep: float | int = param(0.5, "share (or number) of the visual tokens whose keys stay in each layer's cache")
    core: float | int = param(0.4, "share (or number) of the visual tokens that are computed; needs refresh")
    refresh: int | None = param(None, "every so many tokens all that stayed is computed and the core chosen anew")
    budget_scope: str = param("image", "'image': budgets hold for every image; 'sample': for all images of a prompt")
    text_policy: str = param("none", "whether text behind the image is evicted: 'none', or 'h2o': newest and heaviest")
    text_keep: float = param(0.5, "share of the text behind the image that stays; needs text_policy=h2o")
    text_floor: int = param(20, "number of such tokens that stay in any case; needs text_policy=h2o")
    heavy: float = param(
        0.7, "share of the text budget for the heaviest, the rest is the newest; needs text_policy=h2o"
    )

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            BudgetError, SpecError: a parameter is out of range, or does nothing beside another.
        """
        budget.check(self.keep, "avl.keep")
        budget.check(self.core, "avl.core")
        self._one_of("budget_scope", SCOPES)
        self._one_of("text_policy", ("none", "h2o"))
        if self.refresh is not None:
            self._count("refresh", 1)
        self._number("text_keep", "a number in [0, 1]", lambda x: 0 <= x <= 1)
        self._number("heavy", "a number in [0, 1]", lambda x: 0 <= x <= 1)
        self._count("text_floor", 1)
        self._idle("refresh", self.refresh is None, ("core",))
        self._idle("text_policy", self.text_policy == "none", ("text_keep", "text_floor", "heavy"))

    def _idle(self, switch: str, off: bool, names: Sequence[str]) -> None:
        """Refuse parameters that were set but do nothing."""
        defaults = {field.name: field.default for field in fields(self)}
        for name in names:
            if off and getattr(self, name) != defaults[name]:
                given, said = getattr(self, name), getattr(self, switch)
                raise SpecError(f"avl.{name}={given!r} does nothing with {switch}={said!r}: set {switch} as well")

    @property
    def is_noop(self) -> bool:
        """True if all visual keys stay and are computed, and all text stays."""
        computes = self.refresh in (None, 1) or (isinstance(self.core, float) and self.core == 1.0)
        stays = self.text_policy == "none" or self.text_keep == 1
        return isinstance(self.keep, float) and self.keep == 1.0 and computes and stays

    def disabled(self) -> AVL:
        """The same method with everything kept and computed."""
        return AVL(keep=1.0, budget_scope=self.budget_scope)

    @property
    def watched(self) -> Mapping[str, Watch]:
        """The last row, and for the text the sum over all rows behind the image."""
        text = {"text": Watch("after", total=True)} if self.text_policy == "h2o" else {}
        return {"last": Watch("last")} | text

    @property
    def static(self) -> bool:
        """Without core and text policy."""
        return self.refresh is None and self.text_policy == "none"

    def decides(self, step: int, new: int) -> bool:
        """After the prefill, when the core is chosen anew, and after every token where text goes."""
        return step == 0 or self.text_policy == "h2o" or self._refreshes(step, new)

    def hides(self, step: int, new: int) -> bool:
        """Between those steps."""
        return not self._refreshes(step, new)

    def _refreshes(self, step: int, new: int) -> bool:
        return self.refresh is not None and (new > 1 or step % self.refresh == 0)

    def evict(self, layers: Sequence[CacheView]) -> list[Eviction]:
        """Each layer by its own attention."""
        return [self._decide(view) for view in layers]

    def _decide(self, view: CacheView) -> Eviction:
        keep, core, state = torch.ones_like(view.real), view.state.get("core"), {}
        if view.step == 0:
            keep = ~view.visual | self._best(view, view.visual, self.keep)
        if self.refresh is not None and (view.step == 0 or self._refreshes(view.step, view.new)):
            core = self._best(view, view.visual & keep, self.core)
        if core is not None:
            state["core"] = core
        if self.text_policy == "h2o":
            state["received"] = view.state.get("received", 0) + view.scores["text"]
            keep = keep & self.text(view, state["received"])
        return Eviction(keep, None if core is None else view.visual & ~core, state)

    def _best(self, view: CacheView, among: Tensor, share: float | int) -> Tensor:
        """`(B, S)` bool, the best of some visual slots by the last row: in each image as many as `share` says."""
        sizes = [[span.length for span in row] for row in view.spans]
        if self.budget_scope == "sample":
            sizes = [[sum(row)] for row in sizes]
        width = max(map(len, sizes))
        counts = [[self._quota(n, share) for n in row] + [0] * (width - len(row)) for row in sizes]
        group = view.image if self.budget_scope == "image" else view.image.clamp_max(0)
        return Keep.top(view.scores["last"], group.where(among, -1), torch.tensor(counts, device=group.device)).mask

    @staticmethod
    def _quota(total: int, share: float | int) -> int:
        """`int(total * share)`, at least 1."""
        if total == 0:
            return 0
        return min(max(int(total * share + 1e-9) if isinstance(share, float) else share, 1), total)

    def text(self, view: CacheView, received: Tensor) -> Tensor:
        """`(B, S)` bool, False at text behind the last image that goes by H2O's rule.

        Args:
            view: of the layer.
            received: `(B, S)` fp32 attention received so far, in sum over rows.
        """
        device = view.real.device
        ends = [[max((span.start + span.columns for span in row), default=0)] for row in view.spans]
        images = torch.tensor([[bool(row)] for row in view.spans], device=device)
        end = torch.tensor(ends, device=device)
        region = view.real & (view.column >= end) & images
        said = view.column[:, -1:] + 1 - end
        limit = (said.double() * self.text_keep).round().long().clamp_min(self.text_floor)
        heaviest = (limit * self.heavy + 1e-9).long()
        newest = region & (region.flip(1).cumsum(1).flip(1) <= limit - heaviest)
        older = region & ~newest
        heavy = Keep.top(received, torch.where(older, 0, -1), heaviest).mask
        return ~region | newest | heavy

    def cached(self, visual: int, grid: tuple[int, int, int] | None = None) -> int:
        """`int(V * keep)`, at least 1."""
        return self._quota(visual, self.keep)
