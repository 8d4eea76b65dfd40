"""The one call: `wrap` installs methods on a model, the `Session` owns everything that must be undone."""

from __future__ import annotations

import dataclasses
import operator
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from vlmattn import chat
from vlmattn import context as contexts
from vlmattn import report as reports
from vlmattn import spec as specs
from vlmattn.context import CompressedContext as CompressedContext
from vlmattn.errors import AlreadyWrappedError, BudgetError, CallError, SpecError
from vlmattn.kernels.dispatch import BACKENDS
from vlmattn.methods.base import Method, Resizer
from vlmattn.methods.compressor import Compressor
from vlmattn.patches import families as family_registry
from vlmattn.patches.engine import Engine
from vlmattn.patches.prompt import answered
from vlmattn.patches.stats import Statistic, collect, per_token
from vlmattn.patches.text_tower import TextTower as TextTower
from vlmattn.patches.vision import VisionStore as VisionStore
from vlmattn.report import Report
from vlmattn.spans import Geometry

if TYPE_CHECKING:
    from PIL.Image import Image

BICUBIC = 3
"""`PIL.Image.Resampling.BICUBIC`; PIL itself is the caller's."""

# weak on both sides: the model's hooks hold the engine, the engine its session, and all three may be collected together
_SESSIONS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Session]] = weakref.WeakKeyDictionary()


def wrap(model: nn.Module, spec: specs.Spec, processor: Any = None, *, text_tower: TextTower | None = None) -> Session:
    """Install methods on a pretrained vision-language model. **The model is changed in place until `remove()`.**

    Args:
        model: a supported transformers model with its language-model head, in eval mode when it runs.
        spec: text such as `"fastv(keep=0.5)"`, a method object, a list of both, or `"none"` for a session that only
            reports.
        processor: the model's processor; needed by `session.geometry`, and by methods that read the question.
        text_tower: `vlmattn.TextTower`, the text half of the CLIP model that the vision tower is from; needed by
            methods that compare patches with the question.

    Returns:
        The session, also usable as a context manager.

    Raises:
        UnsupportedModelError: no family file describes the model, or it lacks what a method requires.
        SpecError, BudgetError, LayerError: the spec is wrong or does not fit the model.
        AlreadyWrappedError: the model carries a session already.
    """
    methods = specs.parse(spec)
    known = _SESSIONS.get(model) if isinstance(model, nn.Module) else None
    first = None if known is None else known()
    if first is not None:
        raise AlreadyWrappedError(
            f"this model already carries the session {first.spec!r}: "
            "call its remove() first, or join the specs with '+'"
        )
    engine = Engine(model, methods, text_tower)
    engine.install()
    session = Session(engine, processor)
    _SESSIONS[model] = weakref.ref(session)
    return session


class Session:
    """Methods installed on one model; made by `wrap`. Leaving the context and `remove()` take the same road."""

    def __init__(self, engine: Engine, processor: Any = None) -> None:
        self._engine = engine
        engine.owner = self
        self.processor = processor
        self.active = True

    @property
    def model(self) -> nn.Module:
        """The wrapped model."""
        return self._engine.model

    @property
    def methods(self) -> tuple[Method, ...]:
        """The installed methods, in the order of the spec."""
        return self._engine.methods

    @property
    def spec(self) -> str:
        """Canonical text of the installed methods."""
        return specs.text(self.methods)

    def set(self, path: str, value: Any) -> None:
        """Change one parameter of an installed method, such as `set("fastv.keep", 0.3)`; from the next prompt on.

        Start a fresh cache after a change: a conversation under way keeps the tokens it kept, while its attention edits
        and head gains follow what is installed now.

        Raises:
            SpecError, BudgetError, LayerError: path or value do not fit; the session stays as it was.
            CallError: the session was removed.
        """
        self._alive()
        self._engine.configure(specs.replace(self.methods, path, value))

    def report(self) -> Report:
        """What the last prefill with images did.

        Raises:
            CallError: no prompt with an image went through this session yet.
        """
        plan = self._engine.last
        if plan is None:
            raise CallError("nothing to report: no prompt with an image has gone through this session yet")
        dtype = next(self._engine.text_model.parameters()).dtype
        engine = self._engine
        report = reports.build(plan, self.spec, engine.family.name, engine.dims, dtype.itemsize, engine.last_second)
        if (clock := self._engine.program.clock) is not None:
            report = dataclasses.replace(report, selection_ms=1e3 * clock.seconds)
        if not plan.steps:
            return report
        mass = collect(plan, self._engine.dims.num_layers)["visual_mass"].mean("sample", "head")
        shares = [None if layer in plan.skipped else share for layer, share in enumerate(mass.values[0].tolist())]
        return dataclasses.replace(report, visual_mass=shares)

    def record(self, on: bool = True) -> None:
        """Start (or stop) keeping statistics of attention, from the next prompt on; see `stats`.

        One row a step is measured beside the model's own attention; outputs stay bit for bit the same.
        """
        self._alive()
        self._engine.configure(self.methods, record=on)

    def time_selection(self, on: bool = True) -> None:
        """Start (or stop) measuring how long choosing tokens takes, from the next prompt on: `report().selection_ms`.

        That is the time of what pruners do beside the model's own pass: looks inside the vision tower, scores and
        decisions, not the gathering of what is left. On a GPU every part of it is waited for, which slows the prefill.
        """
        self._alive()
        self._engine.configure(self.methods, timed=on)

    def use_backend(self, name: str | None) -> None:
        """Compute attention edits by a named backend: `rows` (fast) or `reference` (naive, for comparison); None: the
        fastest.

        Raises:
            SpecError: there is no such backend.
        """
        self._alive()
        if name is not None and name not in BACKENDS:
            raise SpecError(f"unknown attention backend {name!r}: expected one of {', '.join(BACKENDS)}")
        self._engine.configure(self.methods, backend=name or "rows")

    def share_vision(self, store: VisionStore | None) -> None:
        """Take vision features from a store and leave new ones there, from the next call on; None: share no longer.

        Sessions on the same model that share a store, one after the other, run the vision tower once for equal images.
        What they compute is bit for bit the same. Methods that need to see inside the tower run it all the same.

        Raises:
            CallError: it is not a `VisionStore`, it holds features of another model, or the session was removed.
        """
        self._alive()
        if store is not None and not isinstance(store, VisionStore):
            raise CallError(f"share_vision({store!r}): give a vlmattn.VisionStore, or None to stop sharing")
        self._engine.share(store)

    @contextmanager
    def prompt(self, length: int) -> Iterator[None]:
        """Inside, only the first `length` columns of a forward pass count as the prompt.

        A bare `model(input_ids=prompt + answer)` cannot know where the prompt ends, and methods look at its last
        token. This says it, so that scoring an answer in one pass gives the logits that generating it step by step
        gives.
        """
        with self._engine.prompt_ends(length):
            yield

    @contextmanager
    def question(self, asked: str | Sequence[str]) -> Iterator[None]:
        """Inside, `asked` is what is compared with the image, instead of the text behind it in the prompt.

        Args:
            asked: one question for all samples of a batch, or a list of one each.

        Raises:
            CallError: there is no question.
        """
        questions = [asked] if isinstance(asked, str) else list(asked)
        if not questions or not all(isinstance(question, str) for question in questions):
            raise CallError(f"question({asked!r}): give a text, or a list of one text a sample")
        with self._engine.during("questions", tuple(questions)):
            yield

    @contextmanager
    def segments(self, ranges: Sequence[Sequence[tuple[int, int]]]) -> Iterator[None]:
        """Inside, these are the segments that `pine` orders, instead of the images of a prompt.

        Args:
            ranges: per sample the columns of the padded prompt, from and to (not included), such as
                `[[(5, 25), (25, 45)]]`.

        Raises:
            CallError: these are no ranges.
        """
        try:
            given = tuple(tuple((operator.index(start), operator.index(stop)) for start, stop in row) for row in ranges)
        except (TypeError, ValueError):
            raise CallError(
                f"segments({ranges!r}): give for every sample pairs of columns, [[(5, 25), (25, 45)]]"
            ) from None
        with self._engine.during("segments", given):
            yield

    @property
    def compresses(self) -> bool:
        """Whether questions about images go through `compress`."""
        return any(isinstance(method, Compressor) for method in self.methods)

    def compress(self, image: Image | Sequence[Image], query: str | None = None) -> CompressedContext:
        """Read an image once, for many questions; needs a method that does it, such as `context(keep=0.05)`.

        The model describes the image, and what the method keeps of the prompt is what all answers go on from:

            with session.compress(image) as context:
                context.answer("What colour is the car?")
                context.answer("How many people are there?")

        `report` then tells what the context holds; its MACs are those of the prefill that read the image.

        Args:
            image: a PIL image, or several for one prompt.
            query: what the description is asked for with; None: the method's.

        Raises:
            CallError: no method of the session compresses, `wrap` got no processor, or the session was removed.
            DataError: the processor has no chat template.
        """
        return contexts.of_image(self, image, query)

    def compress_inputs(self, inputs: Mapping[str, Any]) -> CompressedContext:
        """As `compress`, for the finished model inputs of one unpadded prompt with an image and the query.

        Questions are put as tokens then: `context.generate(ids)`.
        """
        return contexts.of_inputs(self, inputs)

    def stats(self) -> Mapping[str, Statistic]:
        """What attention did in the last generation with images, by name, each a tensor with named axes.

        After `record()`: `visual_mass`, `sink_mass`, `entropy` (nats) and `max` per step, layer, sample and head.
        With a
        method that reinforces heads, recorded or not: `divergence` and `gain` per layer, sample and head.

        Raises:
            CallError: nothing was recorded.
        """
        plan = self._engine.last
        found = {} if plan is None else collect(plan, self._engine.dims.num_layers)
        if not found:
            raise CallError("nothing was recorded: call session.record() before generating with an image")
        return found

    @contextmanager
    def images(self, pictures: Sequence[Image]) -> Iterator[list[Image]]:
        """The pictures as the installed methods want the processor to see them; inside, prompts about them may run.

        Only methods that act on images (`downsample`) make a difference; without one the pictures come back as they
        are. Make the inputs from what comes back, and call the model inside:

            with session.images([picture]) as pictures:
                inputs = processor(images=pictures, text=text, return_tensors="pt")
                model.generate(**inputs)

        Raises:
            CallError: `wrap` got no processor, or the session was removed.
            BudgetError: the processor does not make as few tokens of a picture as its budget says.
        """
        self._alive()
        resizer = self._engine.program.resizer
        found = list(pictures) if resizer is None else [self._resized(resizer, picture) for picture in pictures]
        with self._engine.during("resized", True):
            yield found

    def answer(self, image: Image, text: str, **generate_kwargs: Any) -> str:
        """Ask one question about one image, by the processor's chat template; works with methods that act on images.

        Args:
            image: RGB.
            text: the question.
            generate_kwargs: of `model.generate`, such as `max_new_tokens`.

        Returns:
            The answer without special tokens.

        Raises:
            CallError, BudgetError: as `images`.
            DataError: the processor has no chat template.
        """
        self._alive()
        if self.processor is None:
            raise CallError("answer needs the processor: call wrap(model, spec, processor=processor)")
        with self.images([image]) as (picture,):
            if self.compresses:
                with self.compress(picture) as context:
                    return context.answer(text, **generate_kwargs)
            inputs = chat.encode(self.model, self.processor, [picture], [chat.turn("user", text, 1)])
            with torch.inference_mode():
                tokens = cast(Any, self.model).generate(**inputs, **generate_kwargs)
        new = tokens[0, inputs["input_ids"].shape[1] :]
        return str(self.processor.tokenizer.decode(new, skip_special_tokens=True)).strip()

    def _resized(self, resizer: Resizer, picture: Image) -> Image:
        """A picture in the size that the resizer wants."""
        side = self._engine.family.token_side
        if self.processor is None or side is None:
            raise CallError(f"{resizer} needs the processor: call wrap(model, spec, processor=processor)")
        images = self.processor.image_processor
        rows, columns = resizer.cells(*self._grid(picture))
        smaller = picture.resize((columns * side(images), rows * side(images)), BICUBIC)
        made = self._grid(smaller)
        if made != (rows, columns):
            raise BudgetError(
                f"{resizer}: of an image for {rows} x {columns} tokens the processor makes {made[0]} x {made[1]}: give "
                f"a larger `keep`, or lower the processor's smallest size (size={getattr(images, 'size', None)})"
            )
        return smaller

    def _grid(self, picture: Image) -> tuple[int, int]:
        """Rows and columns of visual tokens that the processor makes of a picture."""
        inputs = self.processor.image_processor(images=[picture], return_tensors="pt")
        ((_, height, width),) = self._engine.family.input_grids(self._engine.config, inputs)
        return height, width

    def token_divergence(self, inputs: Mapping[str, Any], sequences: Tensor) -> Statistic:
        """How much every head depends on the image at every generated token: VHD, the distance of its output from that
        of a run without the image (arXiv 2412.13949, equation 4; no outlier rule).

        One pass over the prompts and their answers, with the installed methods and the same text without its images
        beside. `vlmattn.methods.attend.vhr.total_divergence` makes T-VHD of it, the paper's signal: tokens with a low
        one are more often hallucinated.

        Args:
            inputs: what `generate()` was called with, tensors by name.
            sequences: `(B, N + T)` long, what it returned, prompts included; one sequence a prompt.

        Returns:
            `(T, L, B, H)` fp32 with the axes token, layer, sample and head; row t is where token t was decided.

        Raises:
            CallError: inputs and sequences do not match, there is no image, or the session was removed.
        """
        self._alive()
        engine, before = self._engine, self._engine.last
        longer = answered(engine.family, inputs, sequences)
        engine.configure(self.methods, divergence=True)
        try:
            with torch.no_grad(), self.prompt(inputs["input_ids"].shape[1]):
                self.model(**longer, use_cache=False)
            if engine.last is None or engine.last is before:
                raise CallError("there is nothing to compare: the prompts hold no image")
            return per_token(engine.last, engine.dims.num_layers)
        finally:
            engine.last = before
            engine.configure(self.methods, divergence=False)

    def geometry(self, images: Sequence[Image], inputs: Mapping[str, Any]) -> list[Geometry]:
        """The pixels behind the visual tokens.

        Args:
            images: the PIL images of a batch, in order.
            inputs: what the processor made of them.

        Returns:
            One map per image, in pixels of the original image.

        Raises:
            CallError: `wrap` got no processor, or images and inputs do not match.
        """
        if self.processor is None:
            raise CallError("geometry needs the processor: call wrap(model, spec, processor=processor)")
        family = self._engine.family
        grids = family.input_grids(self._engine.config, inputs)
        if len(grids) != len(images):
            raise CallError(f"{len(images)} images were given, but the inputs hold {len(grids)}")
        processor = self.processor.image_processor
        return [family.geometry(processor, image.size, grid) for image, grid in zip(images, grids, strict=True)]

    def remove(self) -> None:
        """Undo everything; the model is bit for bit what it was. Calling it again does nothing."""
        if self.active:
            self.active = False
            _SESSIONS.pop(self.model, None)
            self._engine.remove()

    def _alive(self) -> None:
        if not self.active:
            raise CallError(f"the session {self.spec!r} was removed: wrap the model again")

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "" if self.active else ", removed"
        return f"<vlmattn.Session {self.spec!r} on {type(self.model).__name__}{state}>"


def families() -> list[dict[str, Any]]:
    """The supported model families, one dict of facts each."""
    return [family.as_dict() for family in family_registry.supported()]


def methods_info() -> list[dict[str, Any]]:
    """The registered methods, one dict each, with name, kind, paper and parameters."""
    return [info.as_dict() for info in specs.registry().values()]
