"""The official file of a Collaborative Diffusion: its models, dynamic diffusers and conditions.

    model.{mask,text}_unet.diffusion_model.*                   a model for each modality
    model.{mask,text}_confidence_predictor.diffusion_model.*   its dynamic diffuser
    cond_stage_model.{mask,text}_cond_stage_model.*            what makes its condition

("seg_mask" for mask). The networks are LDM UNets without attention at the full resolution. What a
mask says goes through one linear layer: class ids at 32 x 32 -> one-hot [19, 1024] -> [19, 640],
one token for each class, whose place is inside of the token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from hookctl.address.families import denoiser_of
from hookctl.arguments import checked
from hookctl.arguments.values import is_list
from hookctl.errors import InputError
from hookctl.learned.collaborative.collaborator import Collaborator
from hookctl.learned.collaborative.editor import CollaborativeDiffusion
from hookctl.learned.fit import load_into
from hookctl.learned.names import ldm_to_diffusers
from hookctl.learned.weights import Weights

CLASSES, HEADS, GROUPS = 19, 32, 32  # of the published files; shapes do not tell them
ORDER = ("mask", "text", "sketch")
_NETWORK = re.compile(r"model\.(\w+?)_(unet|confidence_predictor)\.(?:diffusion_model\.)?(.+)")
_CONDITION = re.compile(r"cond_stage_model\.(\w+?)_cond_stage_model\.(.+)")


class File(Protocol):
    """What is read of a checkpoint."""

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...


@dataclass
class Modality:
    """The tensors of one modality, by their names inside of each part."""

    unet: dict[str, Tensor] = field(default_factory=dict)
    predictor: dict[str, Tensor] = field(default_factory=dict)
    condition: dict[str, Tensor] = field(default_factory=dict)


def modalities_of(tensors: Mapping[str, Tensor]) -> dict[str, Modality]:
    """The modalities of a file, in the order of the paper."""
    found: dict[str, Modality] = {}
    for key, tensor in tensors.items():
        if matched := _NETWORK.fullmatch(key):
            name, part, rest = matched.groups()
            modality = found.setdefault(_plain(name), Modality())
            (modality.unet if part == "unet" else modality.predictor)[rest] = tensor
        elif matched := _CONDITION.fullmatch(key):
            found.setdefault(_plain(matched[1]), Modality()).condition[matched[2]] = tensor
    known = [name for name in ORDER if name in found]
    return {name: found[name] for name in [*known, *(n for n in found if n not in known)]}


@checked(own=("checkpoint", "mask", "sketch", "text"))
def from_checkpoint(
    checkpoint: File,
    pipe: Any,
    *,
    mask: Any = None,
    sketch: Any = None,
    text: Tensor | None = None,
    guided: bool = False,
    classes: int = CLASSES,
    heads: int = HEADS,
    groups: int = GROUPS,
    **options: Any,
) -> CollaborativeDiffusion:
    """The editor that a composed checkpoint is, for a pipeline of its latent space and schedule.

    mask: class ids, an image of mode L or P or the path of one, an array or a tensor [height,
    width]; sketch: an image of lines, likewise, 0 to 255; one for all images, or a list with one
    for each. text: embeddings [1 | images, tokens, channels], by default the pipeline's own. A
    modality without a model of its own in the file is the pipeline's own denoiser.
    guided: models of masks and sketches see an empty one in the unconditional rows, for those that
    were trained so; the published ones were not, and are left unguided.
    classes: of a mask; heads, groups: of the networks' attention and norms, which a file does not
    say. options: of `CollaborativeDiffusion`.

    Raises InputError for a file without dynamic diffusers, for what does not fit, and for a
    modality whose condition is not given.
    """
    modalities = modalities_of(checkpoint.tensors)
    if not any(one.predictor for one in modalities.values()):
        raise InputError(
            "this file holds no dynamic diffusers (model.*_confidence_predictor.*): it is no "
            "composed Collaborative Diffusion checkpoint"
        )
    given = {"mask": mask, "sketch": sketch, "text": text}
    models = []
    for name, one in modalities.items():
        if not one.unet and not one.predictor:
            continue
        condition = negative = None
        if name == "text":
            condition = text
        else:
            condition, negative = _pictured(name, one, given.get(name), classes)
        networks: dict[str, Any] = {}
        for part, tensors in (("unet", one.unet), ("confidence_predictor", one.predictor)):
            if tensors:
                who = f"model.{name}_{part}"
                networks[part] = Weights(unet_of(tensors, heads=heads, groups=groups, who=who))
        collaborator = Collaborator(
            name,
            networks.get("confidence_predictor"),
            networks.get("unet"),
            condition,
            negative if guided else None,
        )
        models.append(collaborator)
    denoiser_of(pipe)  # or there is none
    return CollaborativeDiffusion(models, **options)


def unet_of(
    tensors: Mapping[str, Tensor], *, heads: int = HEADS, groups: int = GROUPS, who: str = "model"
) -> UNet2DConditionModel:
    """A diffusers UNet with the weights of an LDM one, as large and deep as their shapes say.

    heads, groups: of its attention and its norms; who: what errors call it. In float32 at least.
    """
    levels = 1 + sum(key.endswith(".0.op.weight") for key in tensors)
    blocks = {key.split(".")[1] for key in tensors if key.startswith("input_blocks.")}
    layers, rest = divmod(len(blocks), levels)
    if rest or layers < 2 or "input_blocks.0.0.weight" not in tensors:
        raise InputError(
            f"{who}: {len(blocks)} input blocks at {levels} resolutions are no LDM UNet; give the "
            "official file"
        )
    layers -= 1
    named = {ldm_to_diffusers(key, layers): tensor for key, tensor in tensors.items()}
    try:
        config = _config(named, levels, layers)
    except KeyError as missing:
        raise InputError(f"{who}: {missing} is missing in the file; is it cut off?") from None
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            **config,
            layers_per_block=layers,
            attention_head_dim=heads,
            norm_num_groups=groups,
        )
    # Files may keep matrices alone in half precision.
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    nn.Module.to(unet, reduce(torch.promote_types, dtypes, torch.float32))  # diffusers' own warns
    load_into(unet, named, who=who)
    return unet.eval().requires_grad_(False)


def _config(named: Mapping[str, Tensor], levels: int, layers: int) -> dict[str, Any]:
    """What the shapes of a UNet's weights, under diffusers' names, say of it."""
    downs = [f"down_blocks.{i}" for i in range(levels)]
    attends = [any(k.startswith(f"{down}.attentions.") for k in named) for down in downs]
    depths = [_count(named, f"{down}.attentions.0.transformer_blocks.") or 1 for down in downs]
    keys = [k for k in named if k.endswith("attn2.to_k.weight")]
    projected = next((named[k] for k in named if k.endswith("proj_in.weight")), None)
    return {
        "in_channels": named["conv_in.weight"].shape[1],
        "out_channels": len(named["conv_out.weight"]),
        "block_out_channels": tuple(len(named[f"{d}.resnets.0.conv1.weight"]) for d in downs),
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        "up_block_types": tuple(
            "CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)
        ),
        "transformer_layers_per_block": tuple(depths),
        "cross_attention_dim": named[keys[0]].shape[1] if keys else 1280,
        "use_linear_projection": projected is not None and projected.dim() == 2,
    }


def _count(named: Mapping[str, Tensor], prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in named if key.startswith(prefix)})


# -- conditions ------------------------------------------------------------------------------------


def _pictured(
    name: str, modality: Modality, given: Any, classes: int
) -> tuple[Tensor | None, Tensor | None]:
    """The tokens of a picture, [1 | images, tokens, channels], and those of an empty one."""
    weight = next((t for t in modality.condition.values() if t.dim() == 2), None)
    bias = next((t for t in modality.condition.values() if t.dim() == 1), None)
    side = 0 if weight is None else round(weight.shape[1] ** 0.5)
    if weight is None or side * side != weight.shape[1]:
        raise InputError(
            f"cond_stage_model.{name}_cond_stage_model holds no linear layer over a square map, so "
            f"what the {name} model is told is not known"
        )
    if given is None:
        raise InputError(
            f"this collaboration has a {name} model, and {name}= is not given; give an image of it"
        )
    pictures = list(given) if is_list(given) else [given]
    encode = mask_vectors if name == "mask" else sketch_vectors
    weight, bias = (None if t is None else _precise(t) for t in (weight, bias))
    assert weight is not None
    vectors = torch.stack([encode(one, side, classes) for one in pictures]).to(weight)
    tokens = F.linear(vectors, weight, bias)
    return tokens, F.linear(torch.zeros_like(vectors[:1]), weight, bias)


def mask_vectors(mask: Any, side: int = 32, classes: int = CLASSES) -> Tensor:
    """The places of each class in a mask of class ids, one-hot, [classes, side * side]."""
    ids = _small(mask, side, "mask")
    if int(ids.max()) >= classes:
        raise InputError(
            f"mask holds the class {int(ids.max())}, and this model knows 0 to {classes - 1}; give "
            "class ids, not colours"
        )
    return F.one_hot(ids.long().flatten(), classes).T.float()


def sketch_vectors(sketch: Any, side: int = 32, classes: int = CLASSES) -> Tensor:
    """A sketch as one vector, 0 to 1, [1, side * side]."""
    return _small(sketch, side, "sketch").flatten()[None] / 255


def _small(image: Any, side: int, name: str) -> Tensor:
    """An image of one channel, by nearest neighbours (of the cells' centres), [side, side]."""
    if isinstance(image, str | Path):
        image = _opened(image, name)
    array = np.asarray(image.cpu() if isinstance(image, Tensor) else image)
    if array.ndim == 3 and array.shape[2] == 3 and bool((array == array[..., :1]).all()):
        array = array[..., 0]  # grey, as an image of mode RGB
    plain = array.ndim == 2 and array.size and array.dtype.kind in "bui"
    if not plain or int(array.min()) < 0 or int(array.max()) > 255:
        kind = f"{array.dtype} of shape {array.shape}"
        raise InputError(
            f"{name} is {kind}; give whole numbers [height, width] from 0 to 255, or an image of "
            "mode L or P, not of colours"
        )
    small = Image.fromarray(array.astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
    return torch.from_numpy(np.asarray(small).astype(np.float32))


def _opened(path: str | Path, name: str) -> Image.Image:
    """The image in a file, as it is there: a palette's numbers are what a mask says."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except OSError as error:
        raise InputError(f"{name}={str(path)!r} can't be read as an image: {error}") from None


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _plain(name: str) -> str:
    return name.removeprefix("seg_")
