"""From what was typed as a model to a pipeline, with an error that says what would do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

import hookctl
from hookctl.address import families
from hookctl.cli.common import usable_device
from hookctl.cli.models import INDEX, SHAPES, class_name, find_model
from hookctl.errors import InputError

_HEAVY = re.compile(r"text_encoder|vae|vqgan|image_encoder|safety_checker|prior|decoder")


def load_pipeline(model: str, device: str | None = None, dtype: str | None = None) -> Any:
    """The pipeline of a folder, a model id, or the embedded one.

    A folder is read without the network, and no code of its own is run.
    """
    folder, where = find_model(model), usable_device(device)
    if model == SHAPES:
        return hookctl.load_shapes(device=where, dtype=getattr(torch, dtype or "float32"))
    pipe = _from_pretrained(model, folder, torch_dtype=_dtype(dtype, where, folder))
    return pipe.to(where)


def load_for_survey(model: str) -> Any:
    """A pipeline or a bare denoiser of which only the form matters: weights stay on the disk."""
    folder = find_model(model, whole=False)
    if model == SHAPES:
        return hookctl.load_shapes(device="cpu")
    if folder is None:
        return _from_pretrained(model, None)
    if not (folder / INDEX).is_file():
        return _empty(folder)
    index = json.loads((folder / INDEX).read_text("utf-8"))
    parts: dict[str, Any] = {name: None for name in index if _HEAVY.search(name)}
    for name in families.DENOISERS:
        if (folder / name / "config.json").is_file():
            parts[name] = _empty(folder / name)
    return _from_pretrained(model, folder, **parts)


def _empty(folder: Path) -> nn.Module:
    """A denoiser from its configuration, without memory for its weights."""
    name = class_name(folder)
    cls: Any = getattr(diffusers, name or "", None)
    if not _is_model(cls):
        raise InputError(
            f"{folder}: config.json names the class {name!r}, which is no model of diffusers "
            f"{diffusers.__version__}; give a pipeline folder or a denoiser that diffusers knows"
        )
    with torch.device("meta"):
        model: nn.Module = cls.from_config(cls.load_config(str(folder)))
    return model


def _is_model(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, nn.Module)


def _from_pretrained(model: str, folder: Path | None, **options: Any) -> Any:
    try:
        return diffusers.DiffusionPipeline.from_pretrained(
            str(folder or model), local_files_only=folder is not None, **options
        )
    except (OSError, ValueError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{model}: can't be loaded as a pipeline: {reason[:400]}") from error


def _dtype(dtype: str | None, device: torch.device, folder: Path | None) -> torch.dtype:
    if dtype is not None:
        return getattr(torch, dtype)
    if device.type == "cpu":
        return torch.float32
    # Transformers are trained in bfloat16 and leave the range of float16.
    transformer = folder is not None and (folder / "transformer").is_dir()
    return torch.bfloat16 if transformer else torch.float16
