"""LoRAs as they are typed, and on a pipeline."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hookctl.cli.common import number
from hookctl.cli.trust import check_weights
from hookctl.errors import InputError
from hookctl.preset import LoraSpec


def add_lora(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--lora",
        action="append",
        type=_read,
        default=[],
        metavar="FILE[:W]",
        help="a LoRA in safetensors, put on the model, and its weight (default: 1); "
        "may be repeated",
    )


def _read(text: str) -> LoraSpec:
    path, colon, weight = text.rpartition(":")
    try:
        return LoraSpec(Path(path), number(weight)) if colon else LoraSpec(Path(text))
    except argparse.ArgumentTypeError:  # a colon of the path
        return LoraSpec(Path(text))


def check_loras(loras: Sequence[LoraSpec]) -> None:
    """Raises FileNotFoundError or InputError for files that can't be LoRAs."""
    for lora in loras:
        if lora.path.suffix != ".safetensors":
            raise InputError(f"LoRA {lora.path}: is no safetensors file; other files may hold code")
        if not lora.path.is_file():
            raise FileNotFoundError(f"LoRA {lora.path}: there is no such file")
        check_weights(lora.path)
    if loras and find_spec("peft") is None:
        raise InputError("a LoRA needs the package peft; pip install peft")


def said(loras: Sequence[LoraSpec]) -> list[dict[str, Any]]:
    return [{"path": lora.path, "weight": lora.weight} for lora in loras]


def put_on(pipe: Any, loras: Sequence[LoraSpec]) -> None:
    """Add LoRAs to a pipeline; InputError if one does not fit it."""
    names = []
    for i, lora in enumerate(loras):
        if not hasattr(pipe, "load_lora_weights"):
            raise InputError(f"LoRA {lora.path}: {type(pipe).__name__} takes no LoRAs")
        names.append(f"lora{i}")
        try:
            pipe.load_lora_weights(
                str(lora.path.parent),
                weight_name=lora.path.name,
                adapter_name=names[-1],
                use_safetensors=True,  # else a file that fails is tried as a pickle
                local_files_only=True,
            )
            pipe.set_adapters(names, [one.weight for one in loras[: len(names)]])
        except Exception as error:  # as many kinds as there are formats
            reason = " ".join(str(error).split())
            raise InputError(
                f"LoRA {lora.path}: does not fit {type(pipe).__name__}: {reason[:300]}"
            ) from error
