"""Facts per model family, with a generic fallback: the one place where diffusers is known.

A family says how a pipeline lays out its batch, in which order a joint sequence holds text and
image, and which tokenizer fills which stretch of the text. What is not listed here falls back to
the classes, names and shapes that the model itself shows.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
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
from torch import Tensor, nn

from hookctl.address.rows import COND, PERTURBED, UNCOND, Layout
from hookctl.address.sites import Site
from hookctl.errors import InputError, UnsupportedError

DENOISERS = ("unet", "transformer", "dit", "prior")

BATCHED = Layout({1: (COND,), 2: (UNCOND, COND)})
POSITIVE_FIRST = Layout({1: (COND,), 2: (COND, UNCOND)})
SEQUENTIAL = Layout({1: (COND,), 2: (UNCOND, COND)}, sequential=(COND, UNCOND))
# A second call of the positive rows alone is skip-layer guidance.
BATCHED_THEN_SKIP = Layout({1: (PERTURBED,), 2: (UNCOND, COND)}, unguided={1: (COND,)})
PAG = Layout(
    {1: (COND,), 2: (UNCOND, COND), 3: (UNCOND, COND, PERTURBED)}, unguided={2: (COND, PERTURBED)}
)
PIX2PIX = Layout({1: (COND,), 3: (COND, "image", UNCOND)})

_LAYOUTS: tuple[tuple[str, Layout], ...] = (
    (r"PAG", PAG),
    (r"InstructPix2Pix", PIX2PIX),
    (r"StableDiffusion3", BATCHED_THEN_SKIP),
    (r"ZImage|StableCascade|Lumina(?!2)", POSITIVE_FIRST),
    (
        r"Flux|QwenImage|Wan|CogView4|HunyuanVideo|HunyuanImage|SkyReels|Chroma|Cosmos"
        r"|Kandinsky[56]|Krea2|Ovis|LongCat|Bria",
        SEQUENTIAL,
    ),
)

# Order of a joint sequence, by denoiser class.
_IMAGE_FIRST = r"SD3|HunyuanVideo|HunyuanImage|Mochi|HiDream|JoyImage|ErnieImage|ZImage"
_TEXT_FIRST = (
    r"Flux|Chroma|Bria|LongCat|Ovis|QwenImage|AuraFlow|CogVideoX|ConsisID|CogView|GlmImage|Krea2"
    r"|Lumina2|PRX"
)
_SINGLE_STREAM = r"single_(transformer_)?blocks"


@dataclass(frozen=True)
class TextStream:
    """A stretch of the text sequence: which tokenizer fills it, from which position on.

    length: tokens that the pipeline pads to by default (None: the tokenizer's maximum); prompts:
    the arguments whose texts are in it. Where there are two, two encoders share the positions.
    """

    tokenizer: Any
    start: int = 0
    length: int | None = None
    prompts: tuple[str, ...] = ("prompt",)


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


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside a `torch.compile` wrapper, or the module itself."""
    return getattr(module, "_orig_mod", module)


def layout_of(pipe: Any) -> Layout:
    name = type(pipe).__name__
    return next((layout for pattern, layout in _LAYOUTS if re.search(pattern, name)), BATCHED)


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


def is_guided(pipe: Any) -> bool | None:
    """Whether classifier-free guidance is on, or None where the pipeline does not say."""
    try:
        value = pipe.do_classifier_free_guidance
    except Exception:  # a property over state that exists only during a call
        return None
    single = isinstance(value, Tensor) and value.numel() == 1
    return bool(value) if single or isinstance(value, bool | int) else None


def text_streams(pipe: Any) -> tuple[TextStream, ...]:
    """How the text sequence that the attention sees is made up of tokenizers.

    Raises UnsupportedError if the pipeline has no text.
    """
    name = type(pipe).__name__
    first: Any = getattr(pipe, "tokenizer", None)
    if re.search(r"StableDiffusion3", name):
        clip = first.model_max_length
        third = getattr(pipe, "tokenizer_3", None)
        t5 = (TextStream(third, clip, 256, ("prompt_3",)),) if third is not None else ()
        return (TextStream(first, prompts=("prompt", "prompt_2")), *t5)
    if re.search(r"^Flux", name) and getattr(pipe, "tokenizer_2", None) is not None:
        return (TextStream(pipe.tokenizer_2, 0, 512, ("prompt_2",)),)
    if re.search(r"^PixArt", name):
        return (TextStream(first, 0, 300 if "Sigma" in name else 120),)
    if re.search(r"^Wan", name):
        return (TextStream(first, 0, 512),)
    if first is None:
        first = getattr(pipe, "tokenizer_2", None)
    if first is None:
        raise UnsupportedError(
            f"{name} has no tokenizer, so words can't be addressed; use token positions on a "
            "pipeline with a text encoder"
        )
    if "XL" in name and getattr(pipe, "tokenizer_2", None) is not None:
        return (TextStream(first, prompts=("prompt", "prompt_2")),)
    return (TextStream(first),)


# What `encode_prompt` gives beside the sequence, which comes first, and where.
_ENCODED: tuple[tuple[str, dict[str, int]], ...] = (
    (r"StableDiffusionXL|StableDiffusion3", {"pooled": 2}),
    (r"^Flux", {"pooled": 1}),
    (r"^PixArt", {"mask": 1}),
)


def encoded_places(pipe: Any) -> dict[str, int]:
    """Where a pipeline's `encode_prompt` returns the pooled text and the mask of the tokens."""
    name = type(pipe).__name__
    return next((places for pattern, places in _ENCODED if re.search(pattern, name)), {})


def attention_modules(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of everything in a denoiser that computes attention itself."""
    for path, module in denoiser.named_modules():
        if isinstance(module, Attention | MochiAttention | AttentionModuleMixin):
            name = type(processor_of(module)).__name__
            if not _SOFTMAX_FREE.search(name) and not _ASIDE.search(path):
                yield path, module
        elif not type(module).__module__.startswith("diffusers.") and _looks_like_attention(module):
            yield path, module


# Attention among text or picture tokens on their way in, before they meet the image.
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


def describe_sites(denoiser: nn.Module) -> tuple[tuple[Site, nn.Module], ...]:
    """Every attention site of a denoiser with its module, in the order of its forward."""
    model = uncompiled(denoiser)
    order = joint_order(model)
    levels = _levels(model)
    seen: dict[tuple[str, int, str], int] = {}
    found = []
    for path, module in attention_modules(model):
        place, block = _place(path)
        kind = _kind(path, module, order)
        depth = seen.get((place, block, kind), 0)
        seen[place, block, kind] = depth + 1
        heads = getattr(module, "heads", None) or getattr(module, "num_heads", None)
        site = Site(
            path, kind, place, block, depth, levels.get((place, block), levels.get("all")), heads
        )
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
    patch = config.get("patch_size") if hasattr(config, "get") else None
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


def bypasses_sdpa(module: nn.Module) -> bool:
    """Whether the module's attention backend is one that never calls SDPA."""
    processor = processor_of(module)
    if not hasattr(processor, "_attention_backend"):
        return False
    backend = processor._attention_backend or _AttentionBackendRegistry._active_backend
    name = str(getattr(backend, "value", backend))
    return name != "native" and not name.startswith("_native_")


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
    return None


def keeps_perturbed(module: nn.Module) -> bool:
    """Whether a module attends to all rows alike; PAG's processors take the perturbed ones out."""
    return not type(processor_of(module)).__name__.startswith("PAG")


def counts_text(module: nn.Module) -> bool:
    """Whether a cross-attention tells text and picture keys apart by how many there are."""
    return getattr(module, "add_k_proj", None) is not None


def text_call(module: nn.Module) -> int:
    """Which attention call of a module's forward is the model's own, counted from 0.

    Adapters attend after the model does; Wan attends to its image context before.
    """
    wan = type(module).__name__ == "WanAttention"
    return int(wan and getattr(module, "add_k_proj", None) is not None)
