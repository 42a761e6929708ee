"""Caches that let a denoiser skip parts of itself and reuse what they gave in an earlier step.

diffusers hangs them on the modules as hooks, by `model.enable_cache(...)` or by the functions
`apply_...`; what is skipped is neither seen nor edited. Token merging (tomesd), which leaves
attention without places in the image, and FreeNoise's split inference, which leaves it without
whole rows, are found here too.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

from torch import nn

TEXTS = "TextKVCache"  # of the keys and values of texts alone
# Names of their hooks -> what the cache is called.
_HOOKS = {
    "fbc_block_hook": "FirstBlockCache",
    "mag_cache_block_hook": "MagCache",
    "sea_cache_block": "SeaCache",
    "pyramid_attention_broadcast": "PyramidAttentionBroadcast",
    "faster_cache_block": "FasterCache",
    "faster_cache_denoiser": "FasterCache",
    "taylorseer_cache": "TaylorSeerCache",
    "text_kv_cache_block": TEXTS,
}


class Cache(NamedTuple):
    """name: of the cache; effect: what it does to edited attention, "" for nothing; cure: what
    switches it off; rows: whether it keeps what the rows of a call gave; blocks_edits: whether what
    attention is left can't be edited either."""

    name: str
    effect: str
    cure: str
    rows: bool = True
    blocks_edits: bool = False


_SKIPS = "skips it in some steps"
_MERGED = Cache(
    "token merging",
    "leaves it without places in the image",
    "call tomesd.remove_patch(pipe)",
    rows=False,
)
_SPLIT = Cache(
    "FreeNoise's split inference",
    "shows it parts of a batch, whose rows can't be told",
    "load the pipeline anew and leave out enable_free_noise_split_inference()",
    blocks_edits=True,
)
_BY_CLASS = {"ToMeBlock": _MERGED, "SplitInferenceModule": _SPLIT}


# When a model was last looked at, and what was found: a model has thousands of modules.
_looked: weakref.WeakKeyDictionary[nn.Module, tuple[int, Cache | None]] = (
    weakref.WeakKeyDictionary()
)


def cache_at(model: nn.Module, step: int) -> Cache | None:
    """The cache that is on in a model at a step of a run; looked for once in a run."""
    found = _looked.get(model)
    if found is None or step <= found[0]:
        found = _looked[model] = step, cache_of(model)
    return found[1]


def cache_of(model: nn.Module) -> Cache | None:
    """The cache that is on in a model, None without one."""
    for path, module in model.named_modules():
        if found := _BY_CLASS.get(type(module).__name__):
            return found
        registry = getattr(module, "_diffusers_hook", None)
        for hook in getattr(registry, "hooks", {}):
            if hook in _HOOKS:
                name = _HOOKS[hook]
                cure = "call disable_cache() on the model"
                if not getattr(model, "is_cache_enabled", False):
                    where = f"model.get_submodule({path!r})" if path else "model"
                    cure = (
                        "remove its hooks from the model's modules, as by "
                        f"{where}._diffusers_hook.remove_hook({hook!r})"
                    )
                return Cache(name, "" if name == TEXTS else _SKIPS, cure)
    return None
