"""Options of `generate` under which methods would silently go wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vlmattn.errors import CallError
from vlmattn.methods.cache import Evictor

REFUSED_OPTIONS: dict[str, Callable[[Any], bool]] = {
    "use_cache": lambda value: value is False,
    "prefill_chunk_size": lambda value: value is not None,
}
WAY_OUT = {
    "use_cache": "every step would choose other tokens; leave use_cache on",
    "prefill_chunk_size": "the prompt must arrive in one piece; leave it unset",
}
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens")


def check_options(options: Mapping[str, Any], config: Any, evictors: Iterable[Evictor]) -> None:
    """Refuse what does not go with the installed methods.

    Args:
        options: what `generate` was called with, by name.
        config: the generation config that holds for what was not said.
        evictors: the installed methods that evict from the cache.

    Raises:
        CallError: without a cache, with a prompt in pieces, or with guessed tokens where a step changes the cache for
            good, or the steps after it.
    """
    for name, refused in REFUSED_OPTIONS.items():
        value = options.get(name, getattr(config, name, None))
        if refused(value):
            raise CallError(f"generate({name}={value!r}) does not go with the installed methods: {WAY_OUT[name]}")
    moving = next((method for method in evictors if not method.static), None)
    for name in ASSISTED:
        if moving is not None and options.get(name, getattr(config, name, None)) is not None:
            raise CallError(
                f"generate({name}=...) takes guessed tokens back, but {moving} decides anew while decoding: leave "
                "assisted decoding off"
            )
