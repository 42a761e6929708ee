"""How the attention of a module is computed: by SDPA, by its own softmax, or out of reach."""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import (
    AttnAddedKVProcessor,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor,
    CustomDiffusionAttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    SlicedAttnAddedKVProcessor,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import nn

from hookctl.address.families.record import names_of
from hookctl.errors import UnsupportedError


def processor_of(module: nn.Module) -> Any:
    return getattr(module, "processor", None)


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
    if any(name.startswith("QwenImage21") for name in names_of(processor_of(module))):
        return (
            "its processor attends by a call for each part of the sequence, and keeps the text's "
            "keys for the steps after the first"
        )
    takes = getattr(processor_of(module), "_SUPPORTED_BACKENDS", None)
    flex = takes and all("flex" in str(getattr(one, "value", one)) for one in takes)
    if flex or "Kandinsky6SRAttnProcessor" in names_of(processor_of(module)):
        return "its processor takes the flex backend alone, whose block masks nothing else reads"
    return None


def keeps_perturbed(module: nn.Module) -> bool:
    """Whether a module attends to all rows alike; PAG's processors take the perturbed ones out."""
    return not any(name.startswith("PAG") for name in names_of(processor_of(module)))


def counts_text(module: nn.Module) -> bool:
    """Whether a cross-attention tells text and image keys apart by how many there are."""
    return getattr(module, "add_k_proj", None) is not None


def text_call(module: nn.Module) -> int:
    """Which attention call of a module's forward is the model's own, counted from 0.

    Adapters attend after the model does; Wan attends to its image context before.
    """
    wan = "WanAttention" in names_of(module)
    return int(wan and getattr(module, "add_k_proj", None) is not None)
