"""Facts per family of denoisers, with a generic fallback: the one place where diffusers is known.

A family says which of its modules are attention sites, of what kind, in which order a joint
sequence holds text and image, and how a processor is brought to SDPA. What is not listed here
falls back to the classes, names and shapes that the model itself shows.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor,
    CustomDiffusionAttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    MochiAttention,
    SlicedAttnAddedKVProcessor,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import nn

from hookctl.address.sites import Site
from hookctl.errors import InputError, UnsupportedError

DENOISERS = ("unet", "transformer", "dit", "prior")

# Order of a joint sequence, by denoiser class.
_IMAGE_FIRST = r"SD3|HunyuanVideo|HunyuanImage|Mochi|HiDream|JoyImage|ErnieImage|ZImage"
_TEXT_FIRST = (
    r"Flux|Chroma|Bria|LongCat|Ovis|QwenImage|AuraFlow|CogVideoX|ConsisID|CogView|GlmImage|Krea2"
    r"|Lumina2|PRX"
)
_SINGLE_STREAM = r"single_((transformer|dit)_)?blocks"
# Models whose blocks attend jointly by a module that does not show it, but for those of `_REFINES`.
_JOINT_THROUGHOUT = r"AuraFlow|CogVideoX|ConsisID|CogView|Lumina2|ZImage"
_REFINES = re.compile(r"refiner")


def denoiser_of(target: Any) -> nn.Module:
    """The denoiser of a pipeline, or the bare denoiser itself.

    Raises InputError if there is none.
    """
    if isinstance(target, nn.Module):
        return target
    for name in DENOISERS:
        module = getattr(target, name, None)
        if isinstance(module, nn.Module):
            return module
    raise InputError(
        f"target is a {type(target).__name__}, which holds no denoiser "
        f"({', '.join(DENOISERS)}); give a pipeline or a torch module"
    )


def denoisers_of(target: Any) -> tuple[tuple[str, nn.Module], ...]:
    """Every denoiser of a pipeline by its name, the first one first; or the bare one itself.

    Raises InputError if there is none.
    """
    first = denoiser_of(target)
    found = [("", first)]
    second = getattr(target, "transformer_2", None) if target is not first else None
    if isinstance(second, nn.Module):
        found.append(("transformer_2", second))
    return tuple(found)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside a `torch.compile` wrapper, or the module itself."""
    return getattr(module, "_orig_mod", module)


def joint_order(denoiser: nn.Module) -> str | None:
    """'image_text', 'text_image', or None where text is attended to separately."""
    name = type(uncompiled(denoiser)).__name__
    if re.search(_IMAGE_FIRST, name):
        return "image_text"
    return "text_image" if re.search(_TEXT_FIRST, name) else None


def widens_joint(denoiser: nn.Module) -> bool:
    """Whether a joint sequence may hold more text than the pipeline gave: nothing in these models
    but the attention tells text tokens from one another."""
    return type(uncompiled(denoiser)).__name__ in (
        "SD3Transformer2DModel",
        "FluxTransformer2DModel",
    )


def attention_modules(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of everything in a denoiser that computes attention itself."""
    for path, module in denoiser.named_modules():
        if isinstance(module, Attention | MochiAttention | AttentionModuleMixin):
            name = type(processor_of(module)).__name__
            if not _SOFTMAX_FREE.search(name) and not _ASIDE.search(path):
                yield path, module
        elif not type(module).__module__.startswith("diffusers.") and _looks_like_attention(module):
            yield path, module


# Attention among text or image tokens on their way in, before they meet the image.
_ASIDE = re.compile(
    r"^(encoder_hid_proj|image_proj|context_embedder|context_refiner|cap_embedder|txt_)"
)
_SOFTMAX_FREE = re.compile(r"SanaLinear|SanaMultiscale")
_ATTENDS = re.compile(r"scaled_dot_product_attention|\bsoftmax\b|multi_head_attention")


def _looks_like_attention(module: nn.Module) -> bool:
    """Whether a module of unknown making does attention in its own forward."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    if type(module).__module__.startswith(("torch.", "transformers.", "peft.", "accelerate.")):
        return False
    try:
        source = inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return False
    return bool(_ATTENDS.search(source))


def processor_of(module: nn.Module) -> Any:
    return getattr(module, "processor", None)


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
    order = joint_order(model)
    throughout = re.search(_JOINT_THROUGHOUT, type(model).__name__)
    levels = _levels(model)
    seen: dict[tuple[str, int, str], int] = {}
    found = []
    for path, module in attention_modules(model):
        place, block = _place(path)
        kind = "joint" if throughout and not _REFINES.search(path) else _kind(path, module, order)
        depth = seen.get((place, block, kind), 0)
        seen[place, block, kind] = depth + 1
        heads = getattr(module, "heads", None) or getattr(module, "num_heads", None)
        level = levels.get((place, block), levels.get("all"))
        full = f"{name}.{path}" if name else path
        site = Site(full, kind, place, block, depth, level, heads)
        found.append((site, module))
    rank = {"down": 0, "mid": 1, "up": 2}
    found.sort(key=lambda pair: rank.get(pair[0].place, 0))
    return tuple(found)


def _place(path: str) -> tuple[str, int]:
    if match := re.match(r"(down|up)_blocks\.(\d+)", path):
        return match[1], int(match[2])
    if path.startswith("mid_block"):
        return "mid", 0
    if match := re.search(r"(?:^|\.|_)(?:blocks|layers)\.(\d+)", path):
        return "blocks", int(match[1])
    return "other", 0


def _kind(path: str, module: nn.Module, order: str | None) -> str:
    if path.endswith("fuser.attn"):  # GLIGEN: the image and its grounding tokens
        return "gated"
    if "motion_modules" in path or "temporal" in path:
        return "temporal"
    if order is not None and (
        getattr(module, "add_k_proj", None) is not None or re.search(_SINGLE_STREAM, path)
    ):
        return "joint"
    if order is not None and not hasattr(module, "is_cross_attention"):
        return "joint"
    crosses = getattr(module, "is_cross_attention", None)
    if crosses is None:
        crosses = bool(re.search(r"(attn2|cross)", path.rsplit(".", 1)[-1]))
    return "cross" if crosses else "self"


def _levels(model: nn.Module) -> dict[Any, Fraction]:
    """Side of each block's token grid over the side of the latent."""
    down = getattr(model, "down_blocks", None)
    if down is not None:
        count = len(down)
        levels: dict[Any, Fraction] = {}
        for i in range(count):
            levels["down", i] = Fraction(1, 2**i)
            levels["up", i] = Fraction(1, 2 ** (count - 1 - i))
        levels["mid", 0] = Fraction(1, 2 ** (count - 1))
        return levels
    config = getattr(model, "config", {})
    patches = config if hasattr(config, "get") else {}
    patch = patches.get("patch_size") or patches.get("all_patch_size")
    if isinstance(patch, list | tuple):
        patch = patch[-1]
    if isinstance(patch, int) and patch > 0:
        return {"all": Fraction(1, patch)}
    return {}


_SDPA_FORMS = {
    AttnProcessor: AttnProcessor2_0,
    SlicedAttnProcessor: AttnProcessor2_0,
    XFormersAttnProcessor: AttnProcessor2_0,
    AttnAddedKVProcessor: AttnAddedKVProcessor2_0,
    SlicedAttnAddedKVProcessor: AttnAddedKVProcessor2_0,
    IPAdapterAttnProcessor: IPAdapterAttnProcessor2_0,
    CustomDiffusionAttnProcessor: CustomDiffusionAttnProcessor2_0,
}


def sdpa_form(module: nn.Module) -> tuple[type, dict[str, Any]] | None:
    """The class and state of a processor that does what the module's does, ending in SDPA.

    Eager, sliced and xformers processors form the attention matrix or bypass SDPA, and a backend
    may replace SDPA. None if the module's own will do; processors of unknown making have no such
    form (see `spells_out`). Raises UnsupportedError for one that can't be caught at all.
    """
    processor = processor_of(module)
    kind = type(processor)
    if kind in _SDPA_FORMS:
        return _SDPA_FORMS[kind], processor.__dict__
    if bypasses_sdpa(module):
        return kind, processor.__dict__ | {"_attention_backend": AttentionBackendName.NATIVE}
    if "XFormers" in kind.__name__:
        raise UnsupportedError(
            f"{kind.__name__} has no SDPA form; call "
            "disable_xformers_memory_efficient_attention() before control()"
        )
    return None


# Attention backends that end in torch's own function; `_native_npu` and `_native_xla` do not.
_THROUGH_SDPA = (
    "native",
    "_native_math",
    "_native_cudnn",
    "_native_efficient",
    "_native_flash",
)


def bypasses_sdpa(module: nn.Module) -> bool:
    """Whether the module's attention backend is one that never calls SDPA."""
    processor = processor_of(module)
    if not hasattr(processor, "_attention_backend"):
        return False
    backend = processor._attention_backend or _AttentionBackendRegistry._active_backend
    name = str(getattr(backend, "value", backend))
    return name not in _THROUGH_SDPA


def spells_out(module: nn.Module) -> bool:
    """Whether a module, or its processor, forms its attention matrix itself."""
    processor = processor_of(module)
    known = type(module).__module__.startswith("diffusers.")
    if not known:
        return _spells_out(type(module).forward)
    return processor is not None and _spells_out(type(processor).__call__)


@functools.cache
def _spells_out(function: Any) -> bool:
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return False
    if re.search(r"scaled_dot_product_attention|dispatch_attention_fn", source):
        return False
    return bool(re.search(r"softmax|get_attention_scores", source))


def uncatchable(module: nn.Module) -> str | None:
    """Why the attention of a module can't be caught, or None if it can."""
    if isinstance(module, nn.MultiheadAttention):
        return (
            "torch.nn.MultiheadAttention computes its attention where nothing can be caught; "
            "build the layer on scaled_dot_product_attention"
        )
    takes = getattr(processor_of(module), "_SUPPORTED_BACKENDS", None)
    if takes and all("flex" in str(getattr(one, "value", one)) for one in takes):
        return "its processor takes the flex backend alone, whose block masks nothing else reads"
    return None


def keeps_perturbed(module: nn.Module) -> bool:
    """Whether a module attends to all rows alike; PAG's processors take the perturbed ones out."""
    return not type(processor_of(module)).__name__.startswith("PAG")


def counts_text(module: nn.Module) -> bool:
    """Whether a cross-attention tells text and image keys apart by how many there are."""
    return getattr(module, "add_k_proj", None) is not None


def text_call(module: nn.Module) -> int:
    """Which attention call of a module's forward is the model's own, counted from 0.

    Adapters attend after the model does; Wan attends to its image context before.
    """
    wan = type(module).__name__ == "WanAttention"
    return int(wan and getattr(module, "add_k_proj", None) is not None)
