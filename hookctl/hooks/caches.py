"""Caches that let a denoiser skip parts of itself and reuse what they gave in an earlier step.

diffusers hangs them on the modules as hooks, by `model.enable_cache(...)` or by the functions
`apply_...`; what is skipped is neither seen nor edited.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

# Names of their hooks -> what the cache is called.
_HOOKS = {
    "fbc_block_hook": "FirstBlockCache",
    "mag_cache_block_hook": "MagCache",
    "sea_cache_block": "SeaCache",
    "pyramid_attention_broadcast": "PyramidAttentionBroadcast",
    "faster_cache_block": "FasterCache",
    "faster_cache_denoiser": "FasterCache",
    "taylorseer_cache": "TaylorSeerCache",
    "text_kv_cache_block": "TextKVCache",
}
_RUNS_ALL = ("TextKVCache",)  # keeps the keys of the text only


class Cache(NamedTuple):
    """name: of the cache; skips: whether attention is skipped; cure: what switches it off."""

    name: str
    skips: bool
    cure: str


def cache_of(model: nn.Module) -> Cache | None:
    """The cache that is on in a model, None without one."""
    for path, module in model.named_modules():
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
                return Cache(name, name not in _RUNS_ALL, cure)
    return None
