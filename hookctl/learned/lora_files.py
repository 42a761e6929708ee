"""What a LoRA file says of each layer of a denoiser, whatever layout it is in.

diffusers turns the layouts that are about (its own old and new one, peft's, kohya's, those of
several trainers) into names of its layers; nothing in a file is run. Here its tensors are sorted by
layer, y = W x + (alpha / rank) B A x.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hookctl.address.families import denoisers_of, linears, named_denoisers
from hookctl.errors import InputError

_FACTOR = re.compile(r"(.+?)\.?(?:lora_linear_layer|lora)[._](A|B|down|up)(?:\.\w+)?\.weight")
_OLD = re.compile(r"(.+)\.processor\.(to_\w+?)_lora\.(down|up)\.weight")
_DOWN = ("A", "down")


@dataclass(frozen=True)
class Delta:
    """The change of one layer: scale * up(down(x)).

    down: [rank, inputs], up: [outputs, rank]; of a convolution with its kernel, and 1 x 1.
    """

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class LoraFile:
    """deltas: of a denoiser's layers, by path; notes: what else is in the file, a line each."""

    deltas: Mapping[str, Delta]
    notes: tuple[str, ...] = ()


def read_lora(path: Path | str, pipe: Any) -> LoraFile:
    """The LoRA in a safetensors file, for the first denoiser of a pipeline.

    Raises FileNotFoundError without a file, InputError for one that can't be read, is no LoRA, is
    for another model, or changes layers in another way (DoRA, LyCORIS, changed biases).
    """
    path = check_path(path)
    if not hasattr(type(pipe), "lora_state_dict"):
        raise InputError(f"{path}: {type(pipe).__name__} takes no LoRAs")
    (name, model), *_ = named_denoisers(pipe)
    tensors, alphas, metadata = _read(path, pipe, name, model)
    own = {k.removeprefix(f"{name}."): x for k, x in tensors.items() if k.startswith(f"{name}.")}
    if not own and not any(k.split(".")[0].startswith("text_encoder") for k in tensors):
        own = dict(tensors)
    layers = dict(linears(denoisers_of(pipe)[0][1]))
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in own.items():
        place, side = _place(key, path)
        factors.setdefault(_layer(place, layers), {})["down" if side in _DOWN else "up"] = tensor
    if not factors:
        raise InputError(f"{path}: holds no LoRA for the {name} of {type(pipe).__name__}")
    scales = dict(_scales(alphas, name, layers))
    deltas = {p: _delta(p, pair, layers, scales, metadata, path) for p, pair in factors.items()}
    others = sorted({k.split(".")[0] for k in tensors if not k.startswith(f"{name}.")})
    left = [one for one in others if one.startswith(("text_encoder", "transformer", "unet"))]
    notes = (f"left out: {', '.join(left)}, which have no places in the image",) if left else ()
    return LoraFile(deltas, notes)


def check_path(path: Path | str) -> Path:
    """The path of a safetensors file; FileNotFoundError or InputError for another one."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; give a LoRA in safetensors")
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: is no safetensors file; other files may hold code")
    return path


def _read(
    path: Path, pipe: Any, name: str, model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors under diffusers' names, alphas by name, and what the file says of the denoiser."""
    method = type(pipe).lora_state_dict
    options: dict[str, Any] = {
        "weight_name": path.name,
        "use_safetensors": True,
        "local_files_only": True,
        "return_lora_metadata": True,
    }
    if name == "unet":
        options["unet_config"] = getattr(model, "config", None)
    if "return_alphas" in signature(method).parameters:
        options["return_alphas"] = True
    try:
        found = method(str(path.parent), **options)
    except Exception as error:  # as many kinds as there are layouts
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: can't be read as a LoRA: {reason[:300]}") from error
    tensors, *rest = found if isinstance(found, tuple) else (found,)
    metadata = rest.pop() if rest else None
    alphas = rest.pop() if rest else None
    says = {
        key.removeprefix(f"{name}."): value
        for key, value in (metadata or {}).items()
        if key.startswith(f"{name}.")
    }
    return dict(tensors), dict(alphas or {}), says


def _place(key: str, path: Path) -> tuple[str, str]:
    """The layer and the side of a tensor's name."""
    if match := _OLD.fullmatch(key):
        return f"{match[1]}.{match[2]}", match[3]
    match = _FACTOR.fullmatch(key)
    if match is None:
        raise InputError(
            f"{path}: {key!r} is no part of a LoRA (y = W x + B A x); other changes, as those of "
            "DoRA and LyCORIS, can't be kept to places"
        )
    return match[1], match[2]


def _layer(place: str, layers: Mapping[str, nn.Module]) -> str:
    """A layer by its path; the output's linear stands in a list."""
    return f"{place}.0" if place not in layers and f"{place}.0" in layers else place


def _scales(
    alphas: Mapping[str, Any], name: str, layers: Mapping[str, nn.Module]
) -> Iterator[tuple[str, float]]:
    """alpha of each layer, whose name may be that of one of its tensors."""
    for key, value in alphas.items():
        bare = key.removeprefix(f"{name}.").removesuffix(".alpha")
        tensor = bare if bare.endswith(".weight") else f"{bare}.weight"
        if old := _OLD.fullmatch(tensor):
            place = f"{old[1]}.{old[2]}"
        else:
            factor = _FACTOR.fullmatch(tensor)
            place = factor[1] if factor else bare
        yield _layer(place, layers), float(value)


def _delta(
    place: str,
    pair: Mapping[str, Tensor],
    layers: Mapping[str, Any],
    alphas: Mapping[str, float],
    says: Mapping[str, Any],
    path: Path,
) -> Delta:
    module = layers.get(place)
    if module is None:
        raise InputError(f"{path}: is for a layer {place!r}, which this model does not have")
    if set(pair) != {"down", "up"}:
        raise InputError(f"{path}: {place} has {', '.join(pair)} alone; a LoRA has down and up")
    weight = getattr(module, "base_layer", module).weight
    down, up = pair["down"], pair["up"]
    if weight.dim() == 2:  # a 1 x 1 convolution by another name
        down, up = (
            x.flatten(1) if x.dim() == 4 and x.shape[2:] == (1, 1) else x for x in (down, up)
        )
    elif down.dim() == 2:
        down, up = down[..., None, None], up[..., None, None]
    rank = down.shape[0]
    if up.shape[:2] != (weight.shape[0], rank) or down.shape[1:] != weight.shape[1:]:
        raise InputError(
            f"{path}: of {place} it has {tuple(down.shape)} and {tuple(up.shape)}; the layer is "
            f"{tuple(weight.shape)}: it is for another model"
        )
    alpha = alphas.get(place)
    if alpha is None:
        alpha = _said(says.get("alpha_pattern"), place, says.get("lora_alpha"))
    if says.get("use_rslora") and alpha is not None:
        return Delta(down, up, alpha / math.sqrt(rank))
    return Delta(down, up, 1.0 if alpha is None else alpha / rank)


def _said(pattern: Any, place: str, default: Any) -> float | None:
    """What a file's own configuration says of a layer."""
    for key, value in pattern.items() if isinstance(pattern, Mapping) else ():
        if place == key or place.endswith(f".{key}"):
            return float(value)
    return None if default is None else float(default)
