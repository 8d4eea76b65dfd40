"""What is captured at the vision tower: a key of the content of every image, and features that sessions may share."""

from __future__ import annotations

import functools
import hashlib
import inspect
import operator
import threading
import time
import types
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils import ModelOutput

from vlmattn.errors import CallError


def content_key(tensor: Tensor, start: int = 0) -> int:
    """CRC-32 of a tensor's bytes, continued from `start`; floats count as bfloat16, so that the model's dtype is no
    matter."""
    if tensor.is_floating_point():
        tensor = tensor.bfloat16()
    return zlib.crc32(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes(), start)


def content_keys(split: Callable[[Mapping[str, Any]], Sequence[Tensor]], arguments: Mapping[str, Any]) -> list[int]:
    """The content key of every image in a feature method's arguments."""
    return [content_key(pixels) for pixels in split(arguments)]


def tapped(
    original: Callable[..., Any], look: Callable[[Mapping[str, Any]], Any], put: Callable[[Any], None]
) -> Callable[..., Any]:
    """`original` with a look at its arguments: `put` receives what `look` makes of them before it runs."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def features(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        put(look(arguments))
        return original(*args, **kwargs)

    return features


def outermost(original: Callable[..., Any], behind: Callable[..., Any], local: threading.local) -> Callable[..., Any]:
    """`behind`, but `original` inside another feature method: some models send videos through the method of images.

    Args:
        original: the method, bound.
        behind: the same with more to it.
        local: the same for all feature methods of a model.
    """

    @functools.wraps(original)
    @torch.compiler.disable
    def features(*args: Any, **kwargs: Any) -> Any:
        if local.__dict__.get("encoding", False):
            return original(*args, **kwargs)
        local.encoding = True
        try:
            return behind(*args, **kwargs)
        finally:
            local.encoding = False

    return features


class VisionStore:
    """Vision features that sessions on one model share, so that a sweep runs the tower once per batch of images.

    `session.share_vision(store)` makes the model's feature methods (`get_image_features`, `get_video_features`) look
    here first. A call whose arguments all equal those of an earlier one, pixels and grids to the last bit, in the same
    order and number, gets a copy of what that one returned, without running tower and projector; outputs are
    bit-identical. What a call holds is one entry: the same image in another batch is another entry.

    Sharing is left out, and the tower runs, where a method needs to see what happens inside the tower, where a module
    is in training mode, where gradients of tower, projector or pixels are recorded, and where an argument or output is
    of a kind that cannot be compared or copied. Hooks of your own on the tower do not run for a shared call. Hidden
    states and attentions of the tower's layers are neither kept nor returned unless the call asks for them
    (`output_hidden_states`, `output_attentions`).

    Entries belong to one model as it is, and are dropped when it changes. Every call looks at the multimodal model
    without its language model: at modules (which, of which class, with which forward hooks), at parameters and buffers
    (replaced, moved, cast, written in place), at instance attributes that are plain values, containers of such,
    functions or tensors (a LoRA's `scaling`, a switched-off adapter), at the configuration (`vision_feature_layer`),
    and at autocast.

    Not noticed are writes through `parameter.data.add_(...)` and other views that count no versions, in-place writes to
    tensors made under `torch.inference_mode()`, changes inside attributes of other kinds (objects of your own),
    functions patched into a class or module of Python, hooks on all modules, and settings of PyTorch such as
    `torch.backends`: call `clear()` after them. One store may serve several threads.

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
        self._state: State | None = None
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

    def find(self, key: bytes, state: State) -> Any:
        """A copy of the output stored under `key`, in the caller's inference mode; None if there is none.

        Args:
            key: of the call.
            state: of the model now; entries made in another are dropped.
        """
        with self._lock:
            if self._state is None or not state.same(self._state):
                self._drop()
                self._state = state
            entry = self._entries.get(key)
            if entry is None:
                self.misses += 1
                return None
            self.hits += 1
            self.saved_ms += entry.milliseconds
        return copied(entry.output)

    def put(self, key: bytes, state: State, output: Any, milliseconds: float) -> None:
        """Store a copy of `output`, which took so long to compute, if there is room."""
        size = _nbytes(output)
        with self._lock:
            if self._state is None or not state.same(self._state) or key in self._entries:
                return
            if self.stored_bytes + size > self.max_bytes:
                self.left_out += 1
                return
            self._entries[key] = _Entry(copied(output), milliseconds)
            self.stored_bytes += size

    def _drop(self) -> None:
        self._entries.clear()
        self.stored_bytes, self._state = 0, None

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
    original: Callable[..., Any], store: VisionStore, model: nn.Module, root: nn.Module, apart: nn.Module | None = None
) -> Callable[..., Any]:
    """`original`, a feature method, behind a store.

    Args:
        original: the method, bound.
        store: where its outputs are kept.
        model: the wrapped model, to which the store must belong.
        root: the module whose method it is; features depend on it and on what is in it when the method is called.
        apart: a module in `root` that the method does not run, such as the language model.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    @torch.compiler.disable  # a compiled model calls it as it is: there is nothing in it to trace
    def features(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        modules = _modules(root, apart)
        weights = [weight for module in modules for weight in module._parameters.values() if weight is not None]
        if any(module.training for module in modules) or _records_gradients(weights, bound.arguments):
            return original(*args, **kwargs)
        store.bind(model)
        device = weights[0].device if weights else torch.device("cpu")
        try:
            key = call_key(original.__name__, bound.arguments)
            state = read_state(modules, getattr(apart, "config", None), device)
        except _OddValueError:
            return original(*args, **kwargs)
        found = store.find(key, state)
        if found is not None:
            return found
        start = _now(device)
        output = original(*args, **kwargs)
        milliseconds = 1e3 * (_now(device) - start)
        with suppress(_OddValueError):  # what cannot be copied is not kept
            output = asked_for(output, bound.arguments)
            store.put(key, state, output, milliseconds)
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


@dataclass(frozen=True, eq=False)
class State:
    """What the features depend on beside the arguments of a call, read without looking at a value of a tensor.

    Things are told by weak references, never by address: an address is used again when its thing is gone.
    """

    things: tuple[weakref.ref[Any], ...]
    facts: tuple[Any, ...]

    def same(self, other: State) -> bool:
        """Whether nothing has changed between the two, as far as can be seen."""
        return (
            len(self.things) == len(other.things)
            and all(map(operator.is_, self.things, other.things))  # a thing has one plain reference as long as it lives
            and self.facts == other.facts
        )


_CAPTURE = "transformers.utils.output_capturing"
"""Where the hooks come from that transformers leaves on a tower when its layers' states are first asked for."""

_BASE = frozenset({*nn.Module().__dict__, "_output_capturing_hooks_installed"})
"""Instance attributes that every module has, and the mark of those hooks."""

_PLAIN = frozenset({bool, int, float, complex, str, bytes, torch.dtype, torch.device})
_FUNCTIONS = frozenset({types.FunctionType, types.MethodType, functools.partial})


def _modules(root: nn.Module, apart: nn.Module | None) -> list[nn.Module]:
    """`root` and the modules in it, each once, in a fixed order, without `apart` and what is only in there."""
    found: dict[nn.Module, None] = {}
    waiting = [root]
    while waiting:
        module = waiting.pop()
        if module is not apart and module not in found:
            found[module] = None
            waiting += [child for child in module._modules.values() if child is not None]
    return list(found)


def read_state(modules: Sequence[nn.Module], apart: Any, device: torch.device) -> State:
    """The state of a model.

    Args:
        modules: all that the features may depend on; the first is the one whose method computes them, so that hooks on
            it, and functions and tensors that a call leaves on it, are no matter.
        apart: a configuration that is no matter, wherever it is met.
        device: where the weights are, for autocast.

    Raises:
        _OddValueError: a parameter or buffer has no memory that can be told.
    """
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    things: list[weakref.ref[Any]] = []
    facts: list[Any] = [autocast]
    configs: dict[int, PretrainedConfig] = {}
    for module in modules:
        things.append(weakref.ref(module))
        facts.append(type(module))
        for name, child in module._modules.items():
            facts.append(name)
            if child is not None:
                things.append(weakref.ref(child))
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                facts.append(name)
                if tensor is not None:
                    _tell(tensor, things, facts)
        inner = module is not modules[0]
        for hooks in (module._forward_pre_hooks, module._forward_hooks) if inner else ():
            for number, hook in hooks.items():
                if getattr(hook, "__module__", "") != _CAPTURE:
                    facts.append(number)  # none is given twice
        for name, value in module.__dict__.items():
            kind = type(value)
            if name in _BASE or value is None:
                continue
            if kind in _PLAIN:
                facts += (name, value)
            elif kind in (list, tuple, dict, set):
                facts += (name, _frozen(value, apart))
            elif isinstance(value, PretrainedConfig):
                facts += (name, id(value))
                configs[id(value)] = value
            elif inner and kind in _FUNCTIONS:
                facts.append(name)
                things.append(weakref.ref(value))
            elif inner and isinstance(value, Tensor):
                facts.append(name)
                _tell(value, things, facts)
    facts += (_frozen(config, apart) for config in configs.values())
    return State(tuple(things), tuple(facts))


def _tell(tensor: Tensor, things: list[weakref.ref[Any]], facts: list[Any]) -> None:
    """Note which tensor this is, where its memory lies, and how often it was written."""
    try:
        things += (weakref.ref(tensor), weakref.ref(tensor.untyped_storage()))
        facts += (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    except (RuntimeError, NotImplementedError) as error:
        raise _OddValueError from error
    facts.append(0 if tensor.is_inference() else tensor._version)  # those of inference mode count none


def _frozen(value: Any, apart: Any) -> Any:
    """A nested value as it is now, for comparison: plain values, containers and configurations; None for the rest."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind in (list, tuple):
        return kind, *[_frozen(item, apart) for item in value]
    if kind is dict:
        return kind, *value, *[_frozen(item, apart) for item in value.values()]
    if kind is set:
        return frozenset(value)
    if isinstance(value, PretrainedConfig) and value is not apart:
        return kind, _frozen(value.__dict__, apart)
    return None


def _now(device: torch.device) -> float:
    """Seconds, when the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _name(model: nn.Module) -> str:
    known = getattr(getattr(model, "config", None), "_name_or_path", "")
    return f"{type(model).__name__} {known!r}" if known else f"a {type(model).__name__} (id {id(model)})"
