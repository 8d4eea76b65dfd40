"""Load a model by name: the embedded one, a hub id, or a folder."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmattn.errors import DataError, VlmattnError, VlmattnWarning, nearest

if TYPE_CHECKING:
    from vlmattn import Session, TextTower

DTYPES = ("auto", "float32", "bfloat16", "float16")
_SMALL = 32 * 2**20


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer.

    Attributes:
        name: what the user typed.
        model: the transformers model, in eval mode, on its device.
        processor: its processor, padding on the left.
        embedded: whether it is a scenes model that ships with the package.
        fingerprint: hub commit, or SHA-256 over the folder; part of a run's identity.
        dtype: dtype of the language model's weights, for instance "float32".
        device: device of its first weight, for instance "cpu".
        text_tower: `vlmattn.TextTower` for methods that compare patches with the question; None: there is none.
        text_fingerprint: of the text tower, like `fingerprint`; "" without one.
    """

    name: str
    model: Any
    processor: Any
    embedded: bool
    fingerprint: str
    dtype: str
    device: str
    text_tower: TextTower | None = None
    text_fingerprint: str = ""


def wrapped(loaded: Loaded, spec: str) -> Session:
    """The methods of a spec installed on a loaded model, with all that it was loaded with.

    Raises:
        VlmattnError: they do not fit it.
    """
    from vlmattn import wrap

    return wrap(loaded.model, spec, processor=loaded.processor, text_tower=loaded.text_tower)


def is_embedded(name: str) -> bool:
    """Whether the name is a model that ships with the package (asked without importing torch)."""
    from vlmattn.scenes import names

    return name in names()


def world(name: str) -> str:
    """Name of the world of scenes that a model is asked about: of a scenes model, packaged or a folder, its own.

    Raises:
        DataError: an embedded model does not say which it was trained on.
    """
    from vlmattn import scenes
    from vlmattn.eval.benchmarks.scenes import DEFAULT_WORLD
    from vlmattn.scenes import library

    if is_embedded(name):
        return scenes.version(name).world.name
    try:
        return library.recorded_version(Path(name)).world.name
    except DataError:
        return DEFAULT_WORLD


def check_name(name: str) -> str:
    """The name, if it can be a model: an embedded one, "org/name", or a folder that exists.

    Raises:
        DataError: it is none of these.
    """
    from vlmattn.scenes import names

    if name not in names() and "/" not in name and not Path(name).is_dir():
        raise DataError(
            f"there is no embedded model or folder {name!r} "
            f"({nearest(name, names())}); models on the hub are named org/name"
        )
    return name


def load(
    name: str, dtype: str | None = None, device: str | None = None, text_tower: str | Path | None = None
) -> Loaded:
    """Load a model and its processor.

    Args:
        name: an embedded model's name, a hub id such as "org/model", or a folder.
        dtype: one of `DTYPES`; None means float32 for embedded models, else what the checkpoint says.
        device: a torch device; None means the first GPU if there is one.
        text_tower: hub id or folder of the CLIP model that the vision tower is from; None: no text tower.

    Raises:
        DataError: there is no such model, or it is not an image-text-to-text one; unknown dtype or device.
        UnsupportedModelError: the text tower is no CLIP model, or that of another vision tower.
    """
    import torch

    if dtype is not None and dtype not in DTYPES:
        raise DataError(f"--dtype {dtype!r} is unknown; there are {', '.join(DTYPES)}")
    where = _device(device)
    embedded = is_embedded(name)
    if embedded:
        from vlmattn import scenes

        kind = torch.float32 if dtype in (None, "auto") else getattr(torch, str(dtype))
        model, processor = scenes.load(name, dtype=kind, device=str(where))
        fingerprint = _embedded_hash(name, model)
    else:
        model, processor = _pretrained(name, dtype or "auto")
        try:
            model = model.to(where).eval()
        except torch.OutOfMemoryError as error:
            raise DataError(
                f"{name} does not fit on {where}: {str(error).splitlines()[0]}; try --dtype bfloat16 or --device cpu"
            ) from None
        fingerprint = getattr(model.config, "_commit_hash", None) or _folder_hash(Path(name))
    processor.tokenizer.padding_side = "left"
    weight = model.get_output_embeddings().weight
    kind = str(weight.dtype).removeprefix("torch.")
    loaded = Loaded(name, model, processor, embedded, fingerprint, kind, str(weight.device))
    return loaded if text_tower is None else _with_text_tower(loaded, str(text_tower))


@contextmanager
def quiet(enabled: bool = True) -> Iterator[None]:
    """Silence the warnings and progress bars of transformers inside the block; errors and our own warnings still come
    through."""
    import warnings

    from transformers.utils import logging

    if not enabled:
        yield
        return
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("once", VlmattnWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _device(device: str | None) -> Any:
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError, ValueError) as error:
        gpus = torch.cuda.device_count()
        raise DataError(
            f"--device {device!r} cannot be used ({str(error).splitlines()[0]}); this machine has cpu"
            + (f" and cuda:0 to cuda:{gpus - 1}" if gpus else " and no GPU that torch can see")
        ) from None
    return where


def _pretrained(name: str, dtype: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForImageTextToText

    from vlmattn.scenes import names

    kind = "auto" if dtype == "auto" else getattr(torch, dtype)
    try:
        processor = _processor(name)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=kind)
    except (OSError, ValueError, KeyError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(
            f"cannot load the model {name!r}: {reason} (embedded models: "
            f"{', '.join(names())}; otherwise a hub id of an "
            "image-text-to-text model, or a folder with its files)"
        ) from error
    if not hasattr(processor, "tokenizer"):
        raise DataError(
            f"{name} has no processor with a tokenizer "
            f"({type(processor).__name__}); vlmattn needs a vision-language model"
        )
    return model, processor


def _with_text_tower(loaded: Loaded, name: str) -> Loaded:
    """The same with the text tower of a CLIP model, which must have the model's own vision tower."""
    from transformers import AutoTokenizer, CLIPModel

    from vlmattn import TextTower

    try:
        clip, tokenizer = CLIPModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(
            f"cannot load the text tower {name!r}: {reason} (give the hub id or the folder of the CLIP model that the "
            "vision tower was taken from)"
        ) from error
    fingerprint = getattr(clip.config, "_commit_hash", None) or _folder_hash(Path(name))
    tower = TextTower(clip.to(loaded.device).eval(), tokenizer)
    found = dataclasses.replace(loaded, text_tower=tower, text_fingerprint=fingerprint)
    wrapped(found, "none").remove()  # refuses the tower of another model
    return found


def _processor(name: str) -> Any:
    """The processor of a hub id or a folder; that of an exported scenes model needs no torchvision."""
    from transformers import AutoProcessor

    from vlmattn.scenes import library

    try:
        library.recorded_version(Path(name))
    except DataError:
        return AutoProcessor.from_pretrained(name)
    return library.load_processor(Path(name))


def _embedded_hash(name: str, model: Any) -> str:
    """The folder's hash; of a model that is made when it is loaded, its weights'."""
    from vlmattn import scenes
    from vlmattn.scenes import library

    if name not in library.DERIVED:
        return _folder_hash(Path(scenes.path(name)))
    from vlmattn.scenes.planted import digest

    return digest(model)


def _folder_hash(folder: Path) -> str:
    """SHA-256 over names, sizes and, of files below 32 MiB, contents: cheap for checkpoints of many gigabytes."""
    if not folder.is_dir():
        return "unknown"
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        if size < _SMALL:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def out_of_memory(error: BaseException) -> VlmattnError | None:
    """The error in our words when it is torch saying that the device is full, else None."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return VlmattnError(
            f"the device ran out of memory ({str(error).splitlines()[0]}); try a "
            "smaller --batch-size or --dtype bfloat16"
        )
    return None
