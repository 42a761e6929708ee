"""Attention sites of a denoiser: found by what its modules are, of the kind that is declared."""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention, MochiAttention
from torch import nn

from hookctl.address.families.access import denoisers_of
from hookctl.address.families.processors import processor_of
from hookctl.address.families.record import Model, Order, model_of, uncompiled
from hookctl.address.sites import Site

_ATTENDS = re.compile(r"scaled_dot_product_attention|\bsoftmax\b|multi_head_attention")
_UNDECLARED = Model()


def joint_order(denoiser: nn.Module) -> Order | None:
    """'image_text', 'text_image', or None where text is attended to separately."""
    record = model_of(denoiser)
    if record is not None and record.order is not None:
        return record.order
    adds = any(_adds_keys(module) for module in uncompiled(denoiser).modules())
    return "text_image" if adds else None


def _adds_keys(module: nn.Module) -> bool:
    """Whether the image attends to the text and to itself in one call (Kandinsky 2, IF)."""
    return isinstance(module, Attention) and "AddedKV" in type(processor_of(module)).__name__


def widens_joint(denoiser: nn.Module) -> bool:
    """Whether a joint sequence may hold more text than the pipeline gave: nothing in these models
    but the attention tells text tokens from one another."""
    record = model_of(denoiser)
    return record is not None and record.widens


def attention_modules(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of everything in a denoiser that computes softmax attention itself."""
    record = model_of(denoiser) or _UNDECLARED
    for path, module in denoiser.named_modules():
        told = _fits(path, record.attending) and _forms_softmax(module)
        if (told or _attends(module)) and not _fits(path, record.softmax_free):
            if _declared(path, record) != "none":
                yield path, module


def softmax_free(denoiser: nn.Module) -> tuple[str, ...]:
    """Paths of attention without a softmax, which no edit can reach."""
    record = model_of(denoiser) or _UNDECLARED
    return tuple(
        path
        for path, module in denoiser.named_modules()
        if path
        and (
            _fits(path, record.softmax_free)
            or (_fits(path, record.attending) and not _forms_softmax(module))
        )
    )


def _attends(module: nn.Module) -> bool:
    if isinstance(module, Attention | MochiAttention | AttentionModuleMixin):
        return True
    return _looks_like_attention(module)


def _looks_like_attention(module: nn.Module) -> bool:
    """Whether a module of unknown making does attention in its own forward."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    home = type(module).__module__
    if home.startswith(("torch.", "transformers.", "peft.", "accelerate.")):
        return False
    if home.startswith("diffusers.") and not hasattr(module, "processor"):
        return False
    return _forms_softmax(module)


def _forms_softmax(module: nn.Module) -> bool:
    """Whether the forward of a module says that it attends."""
    try:
        source = inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return False
    return bool(_ATTENDS.search(source))


def sites_of(target: Any) -> tuple[Site, ...]:
    """Every attention site of a pipeline's denoisers, or of a bare one, in forward order."""
    return tuple(
        site
        for name, denoiser in denoisers_of(target)
        for site, _ in describe_sites(denoiser, name)
    )


def describe_sites(denoiser: nn.Module, name: str = "") -> tuple[tuple[Site, nn.Module], ...]:
    """Every attention site of a denoiser with its module, in the order of its forward.

    name: the denoiser's, which its paths then begin with.
    """
    model = uncompiled(denoiser)
    record = model_of(model) or _UNDECLARED
    levels = _levels(model, record)
    seen: dict[tuple[str, int, str], int] = {}
    found = []
    for path, module in attention_modules(model):
        place, block = _place(path)
        kind = _declared(path, record) or _shown(path, module)
        depth = seen.get((place, block, kind), 0)
        seen[place, block, kind] = depth + 1
        heads = getattr(module, "heads", None) or getattr(module, "num_heads", None)
        level = levels.get((place, block), levels.get("all")) if kind != "text" else None
        full = f"{name}.{path}" if name else path
        found.append((Site(full, kind, place, block, depth, level, heads), module))
    rank = {"down": 0, "mid": 1, "up": 2}
    found.sort(key=lambda pair: rank.get(pair[0].place, 0))
    return tuple(found)


def _fits(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _declared(path: str, record: Model) -> str | None:
    """The kind that a family's record gives a path."""
    if path.startswith(("encoder_hid_proj", "image_proj")):  # of an adapter's image prompts
        return "text"
    return next((kind for glob, kind in record.kinds if fnmatch.fnmatchcase(path, glob)), None)


def _shown(path: str, module: nn.Module) -> str:
    """The kind that a module itself shows."""
    if "motion_modules" in path or "temporal" in path:
        return "temporal"
    if _adds_keys(module):
        return "joint"
    if path.endswith("fuser.attn"):
        return "gated"
    crosses = getattr(module, "is_cross_attention", None)
    if crosses is None:
        crosses = bool(re.search(r"(attn2|cross)", path.rsplit(".", 1)[-1]))
    return "cross" if crosses else "self"


def _place(path: str) -> tuple[str, int]:
    if match := re.match(r"(down|up)_blocks\.(\d+)", path):
        return match[1], int(match[2])
    if path.startswith("mid_block"):
        return "mid", 0
    if match := re.search(r"(?:^|\.|_)(?:blocks|layers)\.(\d+)", path):
        return "blocks", int(match[1])
    return "other", 0


def _levels(model: nn.Module, record: Model) -> dict[Any, Fraction]:
    """Side of each block's token grid over the side of the latent."""
    config = getattr(model, "config", {})
    told = config if hasattr(config, "get") else {}
    patch = told.get("patch_size") or told.get("all_patch_size")
    patch = patch[-1] if isinstance(patch, list | tuple) else patch
    down = getattr(model, "down_blocks", None)
    if down is not None:
        halved = told.get("switch_level") or [True] * (len(down) - 1)  # Stable Cascade: not always
        sides = [Fraction(1, patch if isinstance(patch, int) else 1)]
        for halves in halved:
            sides.append(sides[-1] / (2 if halves else 1))
        levels: dict[Any, Fraction] = {("down", i): side for i, side in enumerate(sides)}
        levels |= {("up", i): side for i, side in enumerate(reversed(sides))}
        return levels | {("mid", 0): sides[-1]}
    if record.parts is not None:
        return {"all": Fraction(1)}  # a latent is packed, and its sides are of tokens
    if isinstance(patch, int) and patch > 0:
        return {"all": Fraction(1, patch)}
    return {}
