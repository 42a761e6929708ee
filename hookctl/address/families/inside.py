"""Layers of a denoiser beside its attention, where trained modules are put in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from torch import nn

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
