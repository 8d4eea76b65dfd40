"""What a benchmark is to the runner: a list of items, a way to open their images, and a pure scoring function."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Item:
    """One question about one image.

    Attributes:
        id: unique in the benchmark, for instance "random/17".
        image: name of the image, the cluster of the bootstrap.
        question: what is asked, before a prompt template is put around it.
        label: the gold answer.
        group: category or task the metrics are split by.
    """

    id: str
    image: str
    question: str
    label: str
    group: str


ScoreFunction = Callable[[Sequence[Item], Iterable[tuple[str, str]], Collection[str]], dict[str, Any]]


@dataclass(frozen=True)
class Benchmark:
    """Items with everything needed to ask and to score them.

    Attributes:
        name: "pope" or "scenes".
        items: what is asked, in a fixed order.
        open_image: name of an image -> PIL image; raises OSError or ValueError for a broken one.
        score: (items, (id, raw text) pairs, ids that failed) -> metrics as a JSON-able dictionary.
        intervals: same arguments plus n_resamples and seed -> {metric: (low, high)}.
        sha256: hash of the data.
        source: where the data came from, in words.
        prompt: name of the prompt template.
        profile: name of the parser profile.
        files: file name -> SHA-256, empty for rendered data.
    """

    name: str
    items: tuple[Item, ...]
    open_image: Callable[[str], Image]
    score: ScoreFunction
    intervals: Callable[..., dict[str, tuple[float, float] | None]]
    sha256: str
    source: str
    prompt: str = "bare"
    profile: str = "official"
    files: dict[str, str] = field(default_factory=dict)

    def take(self, limit: int | None) -> tuple[Item, ...]:
        """The first `limit` items of every group, in benchmark order; all of them for None."""
        if limit is None:
            return self.items
        seen: dict[str, int] = {}
        chosen = []
        for item in self.items:
            seen[item.group] = seen.get(item.group, 0) + 1
            if seen[item.group] <= limit:
                chosen.append(item)
        return tuple(chosen)
