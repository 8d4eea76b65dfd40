"""An image as a compressed context, for many questions; made by `session.compress`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmattn import chat
from vlmattn.errors import CallError
from vlmattn.methods.compressor import Compressor
from vlmattn.patches import compress as parts

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmattn.session import Session


class CompressedContext:
    """What is left of an image and the query about it: keys and values that every later question goes on from.

    Questions do not see each other. Leaving the context, or `close()`, frees the keys and values.

    Attributes:
        description: ids `(n,)` of the description that was written, for the record; it is not part of the context.
        kept: per image the indices (raster order) of the visual tokens that stayed.
        entries: tokens that the cache of each decoder layer holds.
    """

    def __init__(self, session: Session, prompt: Tensor, written: Any, turns: chat.Turns | None) -> None:
        engine = session._engine
        self._session = session
        self._method = _method(session)
        self._prompt = prompt
        self._turns = turns
        self._positions = parts.positions(engine.family, engine.model)
        self._cache: Any = written.past_key_values
        self.description: Tensor = written.sequences[0, prompt.shape[1] :]
        parts.compress(self._method, self._cache)
        self.entries: list[int] = parts.held(self._cache)
        engine.last = dataclasses.replace(self._cache.plan, steps=[])
        stage = self._cache.plan.holding(0)
        columns = range(prompt.shape[1]) if stage is None else stage.positions[0].tolist()
        spans = self._cache.plan.spans[0]
        self.kept = [[c - s.start for c in columns if s.start <= c < s.start + s.length] for s in spans]

    def answer(self, question: str, **generate_options: Any) -> str:
        """Answer a question in text.

        Args:
            question: put as a new user turn behind the query.
            generate_options: of the model's `generate`, such as `max_new_tokens`.

        Raises:
            CallError: the context was made of model inputs, so that nobody knows how to write a turn, or is closed.
            DataError: the chat template cannot be continued.
        """
        tokens = self.generate(self.ids(question), **generate_options)
        return self._session.processor.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()

    def ids(self, question: str) -> Tensor:
        """`(1, n)` long, the tokens of a new user turn with the question, up to where the answer begins."""
        if self._turns is None:
            raise CallError("this context was made of model inputs: put questions as tokens, context.generate(ids)")
        further = [chat.turn("assistant", self._method.reply), chat.turn("user", question)]
        return parts.as_row(chat.continuation(self._session.processor, self._turns, further), self._prompt)

    def generate(self, ids: Tensor, **generate_options: Any) -> Any:
        """What the model generates behind the context and some new tokens.

        Args:
            ids: `(1, n)` long, n at least 1.
            generate_options: of the model's `generate`; beams and several return sequences are possible.

        Returns:
            `(rows, new)` long, the new tokens only; with `return_dict_in_generate` what `generate` returns, whose
            `sequences` start with the prompt.

        Raises:
            CallError: no tokens or several rows, the context is closed, or the session was removed.
        """
        self._check(ids)
        engine, model = self._session._engine, self._session.model
        whole = torch.cat([self._prompt, ids.to(self._prompt.device)], 1)
        cache = parts.branch(self._cache, _rows(model, generate_options))
        engine.last = cache.plan
        with parts.going_on(engine.family, model, self._positions):
            out = model.generate(  # type: ignore[operator]
                input_ids=whole, attention_mask=torch.ones_like(whole), past_key_values=cache, **generate_options
            )
        return out[:, whole.shape[1] :] if isinstance(out, Tensor) else out

    def _check(self, ids: Tensor) -> None:
        self._session._alive()
        if self._cache is None:
            raise CallError("this context is closed: compress the image again")
        if _method(self._session) != self._method:
            raise CallError(f"this context was made by {self._method}: compress the image again after a change of it")
        if ids.ndim != 2 or len(ids) != 1 or ids.shape[1] < 1:
            raise CallError(f"generate(ids of shape {tuple(ids.shape)}): expected one row of at least one new token")

    def close(self) -> None:
        """Free the keys and values."""
        self._cache = None

    def __enter__(self) -> CompressedContext:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def of_image(session: Session, image: Image | Sequence[Image], query: str | None) -> CompressedContext:
    """The context of an image, or of several in one prompt; see `Session.compress`."""
    if session.processor is None:
        raise CallError("compress needs the processor: call wrap(model, spec, processor=processor)")
    method = _method(session)
    images = list(image) if isinstance(image, Sequence) else [image]
    turns = [chat.turn("user", method.query if query is None else query, len(images))]
    return of_inputs(session, chat.encode(session.model, session.processor, images, turns), turns)


def of_inputs(session: Session, inputs: Mapping[str, Any], turns: chat.Turns | None = None) -> CompressedContext:
    """The context of a finished prompt; see `Session.compress_inputs`."""
    method, engine = _method(session), session._engine
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if ids.shape[0] != 1 or (mask is not None and not bool(mask.bool().all())):
        raise CallError(f"compress takes one unpadded prompt, these inputs have {ids.shape[0]} rows or padding")
    if not bool(torch.isin(ids, torch.tensor(engine.family.placeholders(engine.config), device=ids.device)).any()):
        raise CallError("compress needs a prompt with an image, this one has none")
    with engine.inside_call(), torch.no_grad():
        written = session.model.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=method.new_tokens,
            min_new_tokens=2,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
        )
        return CompressedContext(session, ids, written, turns)


def _method(session: Session) -> Compressor:
    session._alive()
    for method in session.methods:
        if isinstance(method, Compressor):
            return method
    raise CallError(
        f"no method of the session {session.spec!r} compresses an image: wrap the model with 'context(keep=0.05)'"
    )


def _rows(model: Any, options: Mapping[str, Any]) -> int:
    """How many rows `generate` makes of one prompt."""
    config = options.get("generation_config") or model.generation_config
    wanted = (options.get(name, getattr(config, name, None)) for name in ("num_beams", "num_return_sequences"))
    return max(number or 1 for number in wanted)
