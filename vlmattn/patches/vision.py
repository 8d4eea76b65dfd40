"""What is captured at the vision tower: a key of the content of every image, and features that sessions may share."""

from __future__ import annotations

import functools
import hashlib
import inspect
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from vlmattn.errors import CallError

INSIDE = "vision_"
"""Needs that begin with this are about what happens inside the tower: then it must run for every prompt."""


def content_key(tensor: Tensor, start: int = 0) -> int:
    """CRC-32 of a tensor's bytes, continued from `start`; floats count as bfloat16, so that the model's dtype is no
    matter."""
    if tensor.is_floating_point():
        tensor = tensor.bfloat16()
    return zlib.crc32(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes(), start)


def tapped(
    original: Callable[..., Any],
    split: Callable[[Mapping[str, Any]], Sequence[Tensor]],
    put: Callable[[list[int]], None],
) -> Callable[..., Any]:
    """`original` with a look at its pixels: `put` receives one content key per image before it runs."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def features(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        put([content_key(pixels) for pixels in split(arguments)])
        return original(*args, **kwargs)

    return features


class VisionStore:
    """Vision features that sessions on one model share, so that a sweep runs the tower once per batch of images.

    `session.share_vision(store)` makes the model's feature methods (`get_image_features`, `get_video_features`) look
    here first. A call whose arguments all equal those of an earlier one, pixels and grids to the last bit, in the same
    order and number, gets a copy of what that one returned, without running tower and projector; outputs are
    bit-identical. What a call holds is one entry: the same image in another batch is another entry.

    Sharing is left out, and the tower runs, where a method needs to see what happens inside the tower, where gradients
    of tower, projector or pixels are recorded, and where an argument or output is of a kind that cannot be compared or
    copied. Hooks of your own on the tower do not run for a shared call. Hidden states and attentions of the tower's
    layers are neither kept nor returned unless the call asks for them (`output_hidden_states`, `output_attentions`).

    Entries belong to one model and to its weights as they are. Replaced or in-place changed weights of tower and
    projector are noticed and the entries dropped; a change through `parameter.data` is not: call `clear()` after it.
    One store may serve several threads.

    Args:
        max_bytes: how much the entries may hold, on the device of the features. When it is reached, further outputs are
            not stored; nothing is thrown out, since a sweep asks for its images in the same order again and again.

    Attributes:
        max_bytes: as given.
        hits: calls served from the store.
        misses: calls that ran the tower, stored or not; calls that are left out count as neither.
        left_out: misses whose output found no room.
        stored_bytes: what the entries hold.
        saved_ms: milliseconds that the calls served from the store took when they were computed, summed over hits.

    Raises:
        CallError: `max_bytes` is not a positive int.
    """

    def __init__(self, max_bytes: int = 2**31) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
            raise CallError(f"VisionStore(max_bytes={max_bytes!r}): give a number of bytes, at least 1")
        self.max_bytes = max_bytes
        self.hits = self.misses = self.left_out = self.stored_bytes = 0
        self.saved_ms = 0.0
        self._entries: dict[bytes, _Entry] = {}
        self._weights: tuple[Any, ...] | None = None
        self._model: weakref.ref[nn.Module] | None = None
        self._lock = threading.RLock()  # reentrant: a model may be collected, and its entries dropped, under the lock

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return (
            f"<vlmattn.VisionStore {len(self)} entries, {self.stored_bytes:,} of {self.max_bytes:,} B, "
            f"{self.hits} hits, {self.misses} misses>"
        )

    def clear(self) -> None:
        """Forget all entries and the model they belong to; the counters of calls go on."""
        with self._lock:
            self._drop()
            self._model = None

    def bind(self, model: nn.Module) -> None:
        """Make `model` the one whose features are stored.

        Raises:
            CallError: the store belongs to another model.
        """
        with self._lock:
            owner = None if self._model is None else self._model()
            if owner is None:
                self._drop()
                self._model = weakref.ref(model, self._forget)
            elif owner is not model:
                raise CallError(
                    f"this VisionStore holds features of {_name(owner)} and cannot serve {_name(model)}: make a store "
                    "for every model, or call clear() on this one first"
                )

    def find(self, key: bytes, weights: tuple[Any, ...]) -> Any:
        """A copy of the output stored under `key`, in the caller's inference mode; None if there is none.

        Args:
            key: of the call.
            weights: what identifies tower and projector now; entries made by others are dropped.
        """
        with self._lock:
            if weights != self._weights:
                self._drop()
                self._weights = weights
            entry = self._entries.get(key)
            if entry is None:
                self.misses += 1
                return None
            self.hits += 1
            self.saved_ms += entry.milliseconds
        return copied(entry.output)

    def put(self, key: bytes, weights: tuple[Any, ...], output: Any, milliseconds: float) -> None:
        """Store a copy of `output`, which took so long to compute, if there is room."""
        size = _nbytes(output)
        with self._lock:
            if weights != self._weights or key in self._entries:
                return
            if self.stored_bytes + size > self.max_bytes:
                self.left_out += 1
                return
            self._entries[key] = _Entry(copied(output), milliseconds)
            self.stored_bytes += size

    def _drop(self) -> None:
        self._entries.clear()
        self.stored_bytes, self._weights = 0, None

    def _forget(self, model: weakref.ref[nn.Module]) -> None:
        """The model is gone, and with it the use of its features."""
        with self._lock:
            if model is self._model:
                self.clear()


@dataclass(frozen=True)
class _Entry:
    """One stored output, and the milliseconds it took."""

    output: Any
    milliseconds: float


class _OddValueError(Exception):
    """A value that cannot be hashed by its content, or copied."""


def shared(
    original: Callable[..., Any], store: VisionStore, model: nn.Module, parts: Sequence[nn.Module]
) -> Callable[..., Any]:
    """`original`, a feature method, behind a store.

    Args:
        original: the method, bound.
        store: where its outputs are kept.
        model: the wrapped model, to which the store must belong.
        parts: the modules that the method runs.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    @torch.compiler.disable  # a compiled model calls it as it is: there is nothing in it to trace
    def features(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        weights = [weight for part in parts for weight in part.parameters()]
        if any(part.training for part in parts) or _records_gradients(weights, bound.arguments):
            return original(*args, **kwargs)
        store.bind(model)
        try:
            key = call_key(original.__name__, bound.arguments)
        except _OddValueError:
            return original(*args, **kwargs)
        state = _state(parts, weights)
        found = store.find(key, state)
        if found is not None:
            return found
        device = weights[0].device if weights else torch.device("cpu")
        start = _now(device)
        output = original(*args, **kwargs)
        milliseconds = 1e3 * (_now(device) - start)
        try:
            output = asked_for(output, bound.arguments)
            store.put(key, state, output, milliseconds)
        except _OddValueError:
            pass
        return output

    return features


def call_key(name: str, arguments: Mapping[str, Any]) -> bytes:
    """SHA-256 of a call of method `name`: dtype, shape, device and bytes of every tensor, type and text of the rest.

    Raises:
        _OddValueError: an argument is neither.
    """
    digest = hashlib.sha256()  # in hardware on most processors, where BLAKE2 is not
    for part in _parts([name, arguments]):
        if isinstance(part, Tensor):
            digest.update(f"tensor {part.dtype} {tuple(part.shape)} {part.device};".encode())
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"{len(part)} {part};".encode())
    return digest.digest()


def _parts(value: Any) -> Iterator[Tensor | str]:
    """The tensors and texts that a nested value is made of, in an order and form that tell equal values."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_quantized:
            raise _OddValueError
        yield value
    elif value is None or type(value) in (bool, int, float, str, bytes, torch.dtype, torch.device):
        yield f"{type(value).__name__} {value!r}"
    elif isinstance(value, Mapping):
        yield f"mapping of {len(value)}"
        for name in sorted(value, key=str):
            yield from _parts(name)
            yield from _parts(value[name])
    elif isinstance(value, (list, tuple)):
        yield f"list of {len(value)}"  # grids and layers come as either
        for item in value:
            yield from _parts(item)
    else:
        raise _OddValueError


def asked_for(output: Any, arguments: Mapping[str, Any]) -> Any:
    """A feature method's output without the states of the tower's layers, unless the arguments ask for them."""
    if not isinstance(output, ModelOutput):
        return output
    given = {**arguments, **arguments.get("kwargs", {})}
    dropped = {name for name in ("hidden_states", "attentions") if not given.get(f"output_{name}")}
    return type(output)(**{name: value for name, value in output.items() if name not in dropped})


def copied(output: Any) -> Any:
    """The same structure with tensors of its own, detached; usable wherever the caller is, whichever of them were made
    under inference mode.

    Raises:
        _OddValueError: there is something else in it than tensors and plain values.
    """
    if isinstance(output, Tensor):
        return output.detach().clone()
    if output is None or isinstance(output, (bool, int, float, str)):
        return output
    if isinstance(output, ModelOutput):
        return type(output)(**{name: copied(value) for name, value in output.items()})
    if type(output) in (list, tuple):
        return type(output)(copied(value) for value in output)
    if type(output) is dict:
        return {name: copied(value) for name, value in output.items()}
    raise _OddValueError


def _nbytes(output: Any) -> int:
    if isinstance(output, Tensor):
        return output.numel() * output.element_size()
    if isinstance(output, Mapping):
        return sum(map(_nbytes, output.values()))
    return sum(map(_nbytes, output)) if isinstance(output, (list, tuple)) else 0


def _records_gradients(weights: Sequence[Tensor], arguments: Mapping[str, Any]) -> bool:
    if not torch.is_grad_enabled():
        return False
    given = (value for value in arguments.values() if isinstance(value, Tensor))
    return any(tensor.requires_grad for tensor in (*weights, *given))


def _state(parts: Sequence[nn.Module], weights: Sequence[Tensor]) -> tuple[Any, ...]:
    """What the features depend on beside the arguments, read without looking at a value.

    Tensors made under inference mode count no versions; nothing else may change them in place.
    """
    device = weights[0].device.type if weights else "cpu"
    attention = [getattr(getattr(part, "config", None), "_attn_implementation", None) for part in parts]
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    values = [(weight.data_ptr(), weight.dtype, 0 if weight.is_inference() else weight._version) for weight in weights]
    return (*attention, autocast, *values)


def _now(device: torch.device) -> float:
    """Seconds, when the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _name(model: nn.Module) -> str:
    known = getattr(getattr(model, "config", None), "_name_or_path", "")
    return f"{type(model).__name__} {known!r}" if known else f"a {type(model).__name__} (id {id(model)})"
