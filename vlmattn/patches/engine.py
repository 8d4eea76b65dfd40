"""The engine: installs methods on one model and carries their decisions out.

It uses forward pre-hooks, one registered attention name and instance attributes, nothing else; everything is undone
by an `ExitStack`. See `passes.py` for what happens inside a forward pass.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn

from vlmattn.cost import Dims
from vlmattn.errors import CallError, SpecError
from vlmattn.methods.base import Method, Pruner
from vlmattn.patches import cache as caches
from vlmattn.patches import families
from vlmattn.patches.attention import Registration
from vlmattn.patches.passes import Pass, begin_decode, begin_prefill, read_prompt
from vlmattn.patches.vision import tapped
from vlmattn.plan import Plan

IMAGES = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")


@dataclass
class _Call:
    """What the multimodal model was called with, for the text model's hook."""

    ids: Tensor | None
    images: bool


class Engine:
    """Methods installed on one model.

    Args:
        model: a supported vision-language model with its language-model head.
        methods: what to install.

    Raises:
        UnsupportedModelError: no family describes the model, or its attention implementation cannot be served.
        LayerError, SpecError: a method does not fit this model, or two methods collide.
    """

    def __init__(self, model: nn.Module, methods: Sequence[Method]) -> None:
        self.model = model
        self.family = families.find(model)
        self.config: Any = model.config
        self.multimodal = self.family.part(model, "multimodal")
        self.text_model = self.family.part(model, "text_model")
        self.layers = list(getattr(self.text_model, self.family.layers))
        self.dims = Dims.from_config(self.text_model.config)
        self.last: Plan | None = None
        self._local = threading.local()
        self._signatures = {
            module: inspect.signature(module.forward) for module in (model, self.multimodal, self.text_model)
        }
        self._setup = ExitStack()
        self._stack = ExitStack()
        self.methods: tuple[Method, ...] = ()
        self.schedule: dict[int, Pruner] = {}
        self._plan_methods(methods)

    def _plan_methods(self, methods: Sequence[Method]) -> None:
        """Take `methods` over if they fit this model."""
        schedule: dict[int, Pruner] = {}
        for method in methods:
            if not isinstance(method, Pruner):
                raise SpecError(f"{method} is of kind {method.kind!r}, which this version cannot install")
            layer = method.resolve_layer(self.dims.num_layers)
            if method.is_noop:
                continue
            if layer in schedule:
                raise SpecError(
                    f"{schedule[layer]} and {method} both prune before layer {layer}: "
                    "give one of them another before_layer"
                )
            schedule[layer] = method
        self.methods, self.schedule = tuple(methods), dict(sorted(schedule.items()))

    @property
    def needs(self) -> frozenset[str]:
        """Union of what the active methods need."""
        return frozenset(need for pruner in self.schedule.values() for need in pruner.needs)

    # Installing and undoing

    def install(self) -> None:
        """Hook the model. On any error everything is undone."""
        with ExitStack() as stack:
            hooks: list[tuple[nn.Module, Callable[..., Any]]] = [
                (self.model, self._on_model),
                (self.multimodal, self._on_multimodal),
                (self.text_model, self._on_text),
                *((layer, functools.partial(self._on_layer, i)) for i, layer in enumerate(self.layers)),
            ]
            for module, hook in hooks:
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.callback(self.text_model.register_forward_hook(self._after_text, always_call=True).remove)
            self._replace(stack, self.model, "generate", self._guarded_generate(self.model.generate))
            self._configure()
            self._stack = stack.pop_all()

    def configure(self, methods: Sequence[Method]) -> None:
        """Exchange the methods of an installed engine; if they do not fit, the old ones stay."""
        self._plan_methods(methods)
        self._configure()

    def _configure(self) -> None:
        """Install what depends on the methods: a fresh attention name and the taps they need."""
        registration = Registration(self.text_model.config)
        self._setup.close()
        with ExitStack() as stack:
            stack.callback(registration.remove)
            if "content_key" in self.needs:
                for place, (name, split) in enumerate(self.family.feature_methods.items()):
                    put = functools.partial(self._put_keys, place)
                    self._replace(stack, self.multimodal, name, tapped(getattr(self.multimodal, name), split, put))
            self._setup = stack.pop_all()

    def remove(self) -> None:
        """Undo everything; the model is bit for bit what it was."""
        self._setup.close()
        self._stack.close()

    @staticmethod
    def _replace(stack: ExitStack, owner: nn.Module, name: str, value: Any) -> None:
        """Put an attribute on an instance, and what was there back on exit."""
        had, before = name in owner.__dict__, owner.__dict__.get(name)
        setattr(owner, name, value)

        def undo() -> None:
            owner.__dict__.pop(name, None)
            if had:
                owner.__dict__[name] = before

        stack.callback(undo)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse copies: a copied hook would act for the wrong model."""
        raise CallError("a wrapped model cannot be copied or pickled: call session.remove() first, then wrap the copy")

    # Hooks

    def _arguments(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name, however they were passed."""
        return dict(self._signatures[module].bind_partial(*args, **kwargs).arguments)

    def _on_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.schedule:
            return
        if module.training:
            raise CallError("pruning is for inference: call model.eval() first, or session.remove() to train")
        if self._arguments(module, args, kwargs).get("labels") is not None:
            raise CallError(
                "labels do not fit pruned logits: call without labels, or remove the session to compute a loss"
            )

    def _on_multimodal(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = self._arguments(module, args, kwargs)
        given = (arguments.get(name) for name in IMAGES)
        images = any(any(v is not None for v in x.values()) if isinstance(x, dict) else x is not None for x in given)
        self._local.call = _Call(arguments.get("input_ids"), images)

    def _on_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call: _Call | None = self._local.__dict__.pop("call", None)
        keys: dict[int, list[int]] = self._local.__dict__.pop("keys", {})
        arguments = self._arguments(module, args, kwargs)
        extra = arguments.pop("kwargs", {})
        arguments |= extra
        self._local.__dict__.pop("live", None)
        if call is not None and call.images:
            if call.ids is None:
                if self.schedule:
                    raise CallError("pruning finds the visual tokens by their ids: pass input_ids, not inputs_embeds")
                return None
            ahead = max(call.ids.shape[1] - (self._local.__dict__.get("prompt_length") or call.ids.shape[1]), 0)
            plan = read_prompt(self.family, self.config, call.ids, ahead, arguments, keys)
            if plan is not None:
                live, changed = begin_prefill(self, plan, arguments)
                self.last = plan
                return self._enter(live, changed)
        plan = caches.plan_of(arguments.get("past_key_values"))
        if plan is not None and plan.stages:
            return self._enter(*begin_decode(plan, arguments))
        return None

    def _enter(self, live: Pass, changed: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        if live.busy:
            self._local.live = live
        caches.set_inside(changed.get("past_key_values"), True)
        self._local.cache = changed.get("past_key_values")
        return (), changed

    def _after_text(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        caches.set_inside(self._local.__dict__.pop("cache", None), False)
        live: Pass | None = self._local.__dict__.pop("live", None)
        if live is not None:
            live.plan.settle()

    def _on_layer(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        live: Pass | None = self._local.__dict__.get("live")
        return None if live is None else live.enter(index, args, kwargs)

    def _put_keys(self, place: int, keys: list[int]) -> None:
        self._local.__dict__.setdefault("keys", {})[place] = keys

    def _guarded_generate(self, original: Any) -> Callable[..., Any]:
        """`generate` as it is, after refusing options under which pruning would silently go wrong.

        It also notes where the prompt ends: assisted decoding sends guessed tokens through the prefill.
        """

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if self.schedule:
                config = kwargs.get("generation_config") or getattr(self.model, "generation_config", None)
                option = {name: kwargs.get(name, getattr(config, name, None)) for name in REFUSED_OPTIONS}
                for name, refused in REFUSED_OPTIONS.items():
                    if refused(option[name]):
                        raise CallError(f"generate({name}={option[name]!r}) does not go with pruning: {WAY_OUT[name]}")
            inputs = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
            before = self._local.__dict__.get("prompt_length")
            self._local.prompt_length = inputs.shape[1] if isinstance(inputs, Tensor) and inputs.ndim == 2 else None
            try:
                return original(*args, **kwargs)
            finally:
                self._local.prompt_length = before

        return generate


REFUSED_OPTIONS: dict[str, Callable[[Any], bool]] = {
    "use_cache": lambda value: value is False,
    "prefill_chunk_size": lambda value: value is not None,
}
WAY_OUT = {
    "use_cache": "every step would choose other tokens; leave use_cache on",
    "prefill_chunk_size": "the prompt must arrive in one piece; leave it unset",
}
