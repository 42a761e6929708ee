"""Layers of a denoiser beside its attention, where trained modules are put in."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from hookctl.address.families.record import model_of, names_of
from hookctl.address.sites import Site

# Blocks of these norms add the attention's output to the residual stream as it is; others scale it.
_PLAIN_NORMS = ("layer_norm", "layer_norm_i2vgen", "ada_norm", "ada_norm_continuous")
_STEMS = ("conv_in", "patch_embedding", "x_embedder", "pos_embed.proj", "img_in")


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every linear layer, convolutions among them, those that carry a LoRA
    once, with it."""
    for path, module in model.named_modules():
        if _is_linear(getattr(module, "base_layer", None)):
            yield path, module
        elif _is_linear(module) and not _of_lora(path):
            yield path, module


def _is_linear(module: Any) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros"
    return isinstance(module, nn.Linear)


def _of_lora(path: str) -> bool:
    """Whether a linear layer is a part of an adapted one."""
    return path.endswith(".base_layer") or ".lora_" in path


def stem_of(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Path and module of the layer that takes the latents in, None if it is not known."""
    for path in _STEMS:
        module: Any = model
        for name in path.split("."):
            module = getattr(module, name, None)
        if isinstance(module, nn.Module):
            return path, module
    return None


def plain_blocks(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Self-attention -> its transformer block, of those that add what it gives as it is."""
    found: dict[nn.Module, nn.Module] = {}
    for block in model.modules():
        if type(block) is BasicTransformerBlock and block.norm_type in _PLAIN_NORMS:
            found[block.get_submodule("attn1")] = block
    return found


class Block(NamedTuple):
    """A transformer block: of its streams the names of the arguments, in the order in which it
    returns them; the image's is the first of `IMAGE_STREAMS` among them. site: of its attention."""

    module: nn.Module
    site: Site
    streams: tuple[str, ...]

    @property
    def image(self) -> str:
        return next(name for name in IMAGE_STREAMS if name in self.streams)


IMAGE_STREAMS = ("hidden_states", "x", "visual_embed", "vis")  # or text's and image's, if one
_TEXT, _SOUNDS = "encoder_hidden_states", ("audio_hidden_states", "aud")
_TEXT_FIRST = (
    "AuraFlowJointTransformerBlock BriaFiboTransformerBlock BriaSingleTransformerBlock "
    "BriaTransformerBlock ChromaSingleTransformerBlock ChromaTransformerBlock "
    "Flux2SingleTransformerBlock Flux2TransformerBlock Flux3SingleTransformerBlock "
    "FluxSingleTransformerBlock FluxTransformerBlock JointTransformerBlock "
    "LongCatImageSingleTransformerBlock LongCatImageTransformerBlock "
    "OvisImageSingleTransformerBlock OvisImageTransformerBlock QwenImageTransformerBlock"
).split()
_TEXT_LAST = (
    "CogVideoXBlock CogView3PlusTransformerBlock CogView4TransformerBlock ConsisIDBlock "
    "EasyAnimateTransformerBlock GlmImageTransformerBlock HiDreamImageTransformerBlock "
    "HunyuanImageSingleTransformerBlock HunyuanImageTransformerBlock "
    "HunyuanVideo15TransformerBlock HunyuanVideoSingleTransformerBlock "
    "HunyuanVideoTokenReplaceSingleTransformerBlock HunyuanVideoTokenReplaceTransformerBlock "
    "HunyuanVideoTransformerBlock JoyImageEditPlusTransformerBlock JoyImageTransformerBlock "
    "MochiTransformerBlock MotifVideoSingleTransformerBlock MotifVideoTransformerBlock"
).split()
_WITH_SOUND = ("LTX2VideoTransformerBlock", "Kandinsky6FusedTransformerDecoderBlock")


def streams_of(kind: type[nn.Module]) -> tuple[str, ...]:
    """The streams of a class of blocks, as `Block` has them; none without the image's."""
    parameters = inspect.signature(kind.forward).parameters
    image = next((stream for stream in IMAGE_STREAMS if stream in parameters), None)
    if image is None:
        return ()
    names = names_of(kind)
    if any(name in _TEXT_FIRST for name in names):
        return (_TEXT, image)
    if any(name in _TEXT_LAST for name in names):
        return (image, _TEXT)
    if any(name in _WITH_SOUND for name in names):
        return (image, *(sound for sound in _SOUNDS if sound in parameters))
    return (image,)


def _at(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:  # a further denoiser, whose paths begin with its name
        return model.get_submodule(path.partition(".")[2])


def blocks_of(model: nn.Module, sites: Iterable[Site]) -> dict[str, Block]:
    """The transformer blocks that hold attention sites of the image, by path, in model order."""
    found: dict[str, Block] = {}
    record = model_of(model)
    inner = () if record is None else record.attending  # a module of the block's holds them
    for site in sites:
        path = site.path.rpartition(".")[0]
        if any(fnmatch.fnmatchcase(site.path, glob) for glob in inner):
            path = path.rpartition(".")[0]
        if site.kind not in ("self", "joint", "temporal") or not path:
            continue
        module = _at(model, path)
        if type(module).forward is nn.Module.forward and not isinstance(module, nn.ModuleList):
            path = path.rpartition(".")[0]  # a block calls its parts one by one (Kandinsky 6)
            module = _at(model, path)
        if path in found:
            continue
        if streams := streams_of(type(module)):
            found[path] = Block(module, site, streams)
    return found
