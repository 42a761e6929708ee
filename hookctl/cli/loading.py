"""From what was typed as a model to a pipeline, with an error that says what would do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

import hookctl
from hookctl.address import families
from hookctl.cli.common import usable_device
from hookctl.cli.models import EMBEDDED, SHAPES_FLOW, class_name, find_model
from hookctl.cli.trust import INDEX, LIBRARIES, check_folder, components, read_json
from hookctl.errors import HookctlError, InputError
from hookctl.model_files import read_whole

_HEAVY = re.compile(r"text_encoder|vae|vqgan|image_encoder|safety_checker|prior|decoder")


_MODELS = (diffusers.ModelMixin, transformers.PreTrainedModel)
# What a pipeline folder may name: classes that only read their files.
_LOADABLE = (
    *_MODELS,
    diffusers.SchedulerMixin,
    diffusers.DiffusionPipeline,
    transformers.PreTrainedTokenizerBase,
    transformers.FeatureExtractionMixin,
    transformers.ImageProcessingMixin,
    transformers.ProcessorMixin,
    *([diffusers.BaseGuidance] if hasattr(diffusers, "BaseGuidance") else []),  # since 0.36
)


def load_pipeline(model: str, device: str | None = None, dtype: str | None = None) -> Any:
    """The pipeline of a folder, a model id, or an embedded one.

    A folder is read without the network, and no code of its own is run.
    """
    folder, where = find_model(model), usable_device(device)
    if model in EMBEDDED:
        kind = getattr(torch, dtype or "float32")
        return hookctl.load_shapes(flow=model == SHAPES_FLOW, device=where, dtype=kind)
    folder = folder or downloaded(model)
    check_classes(folder)
    kind = usual_dtype(dtype, where, folder)
    with _saying(f"{model}: can't be loaded as a pipeline"):
        parts = {name: read_whole(cls, path, kind) for name, cls, path in _models(folder)}
    return _from_pretrained(model, folder, torch_dtype=kind, **parts).to(where)


def load_for_survey(model: str) -> Any:
    """A pipeline or a bare denoiser of which only the form matters: weights stay on the disk."""
    folder = find_model(model, whole=False)
    if model in EMBEDDED:
        return hookctl.load_shapes(flow=model == SHAPES_FLOW, device="cpu")
    folder = folder or downloaded(model)
    if not (folder / INDEX).is_file():
        return _empty(folder)
    check_classes(folder)
    index = read_json(folder / INDEX)
    parts: dict[str, Any] = {name: None for name in index if _HEAVY.search(name)}
    for name in families.DENOISERS:
        if (folder / name / "config.json").is_file():
            parts[name] = _empty(folder / name)
    return _from_pretrained(model, folder, **parts)


def check_classes(folder: Path) -> None:
    """InputError unless everything that a pipeline folder names is a class made to be loaded."""
    index = folder / INDEX
    said = read_json(index)
    cls = getattr(diffusers, said["_class_name"], None)
    if not _is_a(cls, (diffusers.DiffusionPipeline,)):
        raise InputError(
            f"{index}: {said['_class_name']!r} is no pipeline of diffusers {diffusers.__version__}"
        )
    for name, library, named in components(said, index):
        found = _class(library, named)
        # What is not there can't be run; diffusers knows successors of some.
        if found is not None and not _is_a(found, _LOADABLE):
            raise InputError(
                f"{index}: {name!r} is {named} of {_home(library)}, which is no model, scheduler, "
                "tokenizer or processor that could be loaded"
            )
    if getattr(cls, "_load_connected_pipes", False):
        for further in _named_in(folder / "README.md"):
            check_folder(further)
            check_classes(further)


def _models(folder: Path) -> Iterator[tuple[str, Any, Path]]:
    """(name, class, folder) of each model with weights in a pipeline folder."""
    index = folder / INDEX
    for name, library, named in components(read_json(index), index):
        cls = _class(library, named)
        is_model = isinstance(cls, type) and issubclass(cls, _MODELS)
        if is_model and (folder / name / "config.json").is_file():
            yield name, cls, folder / name


def _home(library: str) -> str:
    return library if library in LIBRARIES else f"diffusers.pipelines.{library}"


def _class(library: str, name: str) -> Any:
    """A class that a pipeline folder names, None if it is not there."""
    return getattr(import_module(_home(library)), name, None)


def _is_a(cls: Any, bases: tuple[type, ...]) -> bool:
    """Whether it is a class of these, or stands for one that needs a package that is missing."""
    return isinstance(cls, type) and (issubclass(cls, bases) or type(cls).__name__ == "DummyObject")


def _named_in(card: Path) -> Iterator[Path]:
    """The other pipeline folders that a model's card names: diffusers loads them along."""
    if card.is_file():
        words = re.findall(r"[^\s\"'\[\],]+", card.read_text("utf-8", "replace")[:20_000])
        found = (Path(word) for word in dict.fromkeys(words) if len(word) < 200)
        yield from (one for one in found if one.parent != card.parent and (one / INDEX).is_file())


def _empty(folder: Path) -> nn.Module:
    """A denoiser from its configuration, without memory for its weights."""
    name = class_name(folder)
    cls: Any = getattr(diffusers, name or "", None)
    if not _is_a(cls, (nn.Module,)):
        raise InputError(
            f"{folder}: config.json names the class {name!r}, which is no model of diffusers "
            f"{diffusers.__version__}; give a pipeline folder or a denoiser that diffusers knows"
        )
    with _saying(f"{folder}: can't be made a {name}"), torch.device("meta"):
        model: nn.Module = cls.from_config(cls.load_config(str(folder)))
    return model


def downloaded(model: str) -> Path:
    """The folder of a model id, whose files are fetched, and checked like those of any folder."""
    with _saying(f"{model}: can't be had"):
        folder = Path(diffusers.DiffusionPipeline.download(model))
    check_folder(folder)
    return folder


def _from_pretrained(model: str, folder: Path, **options: Any) -> Any:
    with _saying(f"{model}: can't be loaded as a pipeline"):
        return diffusers.DiffusionPipeline.from_pretrained(
            str(folder), local_files_only=True, **options
        )


@contextmanager
def _saying(lead: str) -> Iterator[None]:
    """Whatever goes wrong with somebody's files, as an InputError: there are as many kinds of it
    as there are readers."""
    try:
        yield
    except (HookctlError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{lead}: {reason[:400]}") from error


def usual_dtype(dtype: str | None, device: torch.device, folder: Path) -> torch.dtype:
    """The dtype that was asked for, else what the family of a folder is used with there."""
    if dtype is not None:
        return getattr(torch, dtype)
    if device.type == "cpu":
        return torch.float32
    # Transformers are trained in bfloat16 and leave the range of float16.
    return torch.bfloat16 if (folder / "transformer").is_dir() else torch.float16
