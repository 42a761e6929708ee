"""The names of weights: from those of latent diffusion (LDM) and of training output to diffusers'.

LDM numbers the blocks of a UNet one after the other; diffusers sorts them by resolution, into
resnets, attentions and samplers. Inside an attention block nothing differs, so what is learned
there (GLIGEN's fusers) follows from the place of its block. Segments of a name are mapped whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hookctl.errors import InputError, UnsupportedError

_RESNET = {
    ("in_layers", "0"): "norm1",
    ("in_layers", "2"): "conv1",
    ("emb_layers", "1"): "time_emb_proj",
    ("out_layers", "0"): "norm2",
    ("out_layers", "3"): "conv2",
}
_MIDDLE = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}
_ROOTS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    # ControlNet
    "middle_block_out.0": "controlnet_mid_block",
    "input_hint_block.0": "controlnet_cond_embedding.conv_in",
    **{f"input_hint_block.{2 * k + 2}": f"controlnet_cond_embedding.blocks.{k}" for k in range(6)},
    "input_hint_block.14": "controlnet_cond_embedding.conv_out",
}
# What is learned beside the frozen UNet, and is shipped together with it.
_LEARNED = re.compile(r"(^|\.)fuser\.|^position_net\.|^downsample_net\.|^scaleu_[bs]_\d+$")
# The first convolution: learned where it takes more than the latents' 4 channels.
_STEMS = ("input_blocks.0.0.weight", "conv_in.weight")
# The blocks of SD1.x that hold a transformer, in the order in which they run.
_SD1 = {
    "input_blocks": (1, 2, 4, 5, 7, 8),
    "middle_block": (1,),
    "output_blocks": (3, 4, 5, 6, 7, 8, 9, 10, 11),
}
_BLOCKS = ("down_blocks.", "up_blocks.", "mid_block.")  # as they are registered
_SPLIT = re.compile(r"(input_blocks|middle_block|output_blocks)\.(.+?)\.state\.(.+)")
_ADAPTED = re.compile(r"unet\.(.+)\.processor\.(to_[kv]_ip|to_\w+_lora)\.(.+)")


def ldm_to_diffusers(key: str, layers_per_block: int = 2) -> str:
    """The diffusers name of an LDM weight of a UNet or ControlNet, without the prefix of a file.

    Names that are no LDM names come back as they are.
    layers_per_block: of the UNet; 2 for SD1.x, SD2.x, SDXL and Collaborative Diffusion.
    """
    parts = key.split(".")
    top = parts[0]
    if top == "middle_block" and len(parts) > 2 and parts[1] in _MIDDLE:
        return f"{_MIDDLE[parts[1]]}.{_inside(parts[2:])}"
    if len(parts) > 3 and parts[1].isdecimal():
        if top == "input_blocks":
            return _down(int(parts[1]), parts[2], parts[3:], layers_per_block) or key
        if top == "output_blocks":
            return _up(int(parts[1]), parts[2], parts[3:], layers_per_block) or key
        if top == "zero_convs" and parts[2] == "0":
            return f"controlnet_down_blocks.{parts[1]}.{'.'.join(parts[3:])}"
    for count in (2, 3):
        if named := _ROOTS.get(".".join(parts[:count])):
            return ".".join((named, *parts[count:]))
    return key


def _down(number: int, slot: str, rest: list[str], layers: int) -> str | None:
    if number == 0:
        return f"conv_in.{'.'.join(rest)}" if slot == "0" else None
    level, layer = divmod(number - 1, layers + 1)
    if slot == "0" and rest[0] == "op":
        return f"down_blocks.{level}.downsamplers.0.conv.{'.'.join(rest[1:])}"
    return _layer(f"down_blocks.{level}", layer, slot, rest)


def _up(number: int, slot: str, rest: list[str], layers: int) -> str | None:
    level, layer = divmod(number, layers + 1)
    # Behind the last layer of a level: in slot 1 where it has no attention, else in slot 2.
    if slot in ("1", "2") and rest in (["conv", "weight"], ["conv", "bias"]):
        return f"up_blocks.{level}.upsamplers.0.conv.{rest[1]}"
    return _layer(f"up_blocks.{level}", layer, slot, rest)


def _layer(block: str, layer: int, slot: str, rest: list[str]) -> str | None:
    if slot == "0":
        return f"{block}.resnets.{layer}.{_inside(rest)}"
    return f"{block}.attentions.{layer}.{'.'.join(rest)}" if slot == "1" else None


def _inside(rest: list[str]) -> str:
    """What stands inside of a block; only resnets have these segments."""
    if rest[0] == "skip_connection":
        return ".".join(("conv_shortcut", *rest[1:]))
    named = _RESNET.get((rest[0], rest[1])) if len(rest) > 1 else None
    return ".".join((named, *rest[2:]) if named else rest)


def adapter_layers(denoiser: Any) -> dict[int, str]:
    """The attention layers of a denoiser by the numbers that IP-Adapter gives them.

    A layer's number is its place in the order in which a UNet registers its attention: down, up and
    middle; attention between frames, which a video model adds, is not counted. UnsupportedError for
    a denoiser without such layers.
    """
    named = getattr(denoiser, "attn_processors", None)
    paths = [path.removesuffix(".processor") for path in named or ()]
    paths = [path for path in paths if path.startswith(_BLOCKS) and "motion_modules" not in path]
    if not any(path.endswith(".attn2") for path in paths):
        raise UnsupportedError(
            f"{type(denoiser).__name__} has no cross-attention that IP-Adapter numbers, so its "
            "weights can't be placed; use a UNet such as those of SD1.x and SDXL"
        )
    paths.sort(key=lambda path: _BLOCKS.index(f"{path.partition('.')[0]}."))
    return dict(enumerate(paths))


def official(
    tensors: Mapping[str, Tensor],
    layers: Mapping[int, str] | None = None,
    layers_per_block: int = 2,
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights by the names under which their modules are published, and notes on what was done.

    What is learned of a UNet gets diffusers' names of its place there, without the frozen UNet;
    IP-Adapters come out as image_proj.* and ip_adapter.{i}.*.
    layers: `adapter_layers` of the denoiser, by which an adapter is placed whose own numbers its
    training file lacks; without them, such names stay as they are. layers_per_block: of the UNet.
    Raises InputError for two weights of one name, or an adapter of a layer that is not there.
    """
    found, notes = _joined(tensors)
    found, more = _trained_adapter(found, layers)
    notes += more
    learned = {key for key in found if _LEARNED.search(key)}
    if learned:
        stem = next((k for k in found if k in _STEMS and found[k].shape[1:2] != (4,)), "")
        stems = (stem, stem.replace("weight", "bias"))
        kept = {k: t for k, t in found.items() if k in learned or k in stems}
        if len(found) > len(kept):
            notes.append(f"left out: {len(found) - len(kept)} tensors of the frozen base model")
        found = kept
    named: dict[str, Tensor] = {}
    for key, tensor in found.items():
        name = ldm_to_diffusers(key, layers_per_block)
        if name in named:
            raise InputError(f"two weights are both {name}: the file mixes layouts")
        named[name] = tensor
    return named, notes


def _joined(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """ComfyUI's split of InstanceDiffusion under the names of the whole file.

    Its fusers stand in the order in which they run, its ScaleU vectors are numbered, and the names
    of its position net lack their prefix.
    """
    places: dict[tuple[str, str], int] = {}
    named, split = dict[str, Tensor](), False
    for key, tensor in tensors.items():
        name = key
        if matched := _SPLIT.fullmatch(key):
            block, place, rest = matched.groups()
            before = [one for one in places if one[0] == block]
            number = places.setdefault((block, place), len(before))
            if number >= len(_SD1[block]):
                raise InputError(f"{key}: SD1.x has {len(_SD1[block])} transformers in its {block}")
            at = "middle_block.1" if block == "middle_block" else f"{block}.{_SD1[block][number]}.1"
            name = f"{at}.transformer_blocks.0.fuser.{rest}"
        elif matched := re.fullmatch(r"(?:scaleu\.)?(\d+)\.scaleu_([bs])", key):
            name = f"scaleu_{matched[2]}_{matched[1]}"
        elif re.match(r"linears_list\.\d|convnext_tiny_backbone\.|null_(positive|seg)_feat", key):
            name = f"position_net.{key}"
        elif "linears_list.0.0.weight" in tensors and key.startswith(("null_", "in_conv.", "pos_")):
            name = f"position_net.{key}"
        split |= name != key
        named[name] = tensor
    return named, ["the names are those of ComfyUI's split of InstanceDiffusion"] * split


def _trained_adapter(
    tensors: Mapping[str, Tensor], layers: Mapping[int, str] | None
) -> tuple[dict[str, Tensor], list[str]]:
    """An IP-Adapter as its training leaves it: `unet`, `image_proj_model`, `adapter_modules`.

    Files in safetensors lack the adapter_modules, which shared their memory with the UNet's.
    """
    if not any(key.startswith("image_proj_model.") for key in tensors):
        return dict(tensors), []
    numbers = {path: i for i, path in (layers or {}).items()}
    named: dict[str, Tensor] = {}
    base = 0
    for key, tensor in tensors.items():
        name = key
        if key.startswith("image_proj_model."):
            name = f"image_proj.{key.removeprefix('image_proj_model.')}"
        elif key.startswith("adapter_modules."):
            name = f"ip_adapter.{key.removeprefix('adapter_modules.')}"
        elif (matched := _ADAPTED.fullmatch(key)) and numbers:
            if matched[1] not in numbers:
                raise InputError(
                    f"{key}: the denoiser has no attention layer {matched[1]}; the adapter was "
                    "trained for another base model"
                )
            name = f"ip_adapter.{numbers[matched[1]]}.{matched[2]}.{matched[3]}"
        elif key.startswith("unet.") and not matched:
            base += 1
            continue
        named.setdefault(name, tensor)  # the UNet's are the adapter's own
    notes = ["the names are those of training (accelerate)"]
    if base:
        notes.append(f"left out: {base} tensors of the frozen base model")
    return named, notes
