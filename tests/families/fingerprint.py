"""Everything that a session must leave as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import nn


def fingerprint(target: Any) -> dict[str, Any]:
    """What can be compared before and after: hooks, attributes, processors, flags, random state."""
    parts: dict[str, Any] = {}
    modules = (
        {"": target}
        if isinstance(target, nn.Module)
        else {n: c for n, c in target.components.items() if isinstance(c, nn.Module)}
    )
    for name, model in modules.items():
        for path, module in model.named_modules():
            at = f"{name}:{path}"
            parts[f"{at}.hooks"] = tuple(
                tuple(getattr(module, hooks))
                for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
            )
            parts[f"{at}.attributes"] = tuple(module.__dict__)
            parts[f"{at}.children"] = tuple(module._modules)
            parts[f"{at}.compiled"] = module.__dict__.get("_compiled_call_impl")
            parts[f"{at}.forward"] = module.__dict__.get("forward")
            parts[f"{at}.training"] = module.training
            processor = getattr(module, "processor", None)
            if processor is not None:
                parts[f"{at}.processor"] = id(processor)
                parts[f"{at}.backend"] = getattr(processor, "_attention_backend", None)
        parts[f"{name}.requires_grad"] = tuple(p.requires_grad for p in model.parameters())
        parts[f"{name}.weights"] = tuple(p._version for p in model.parameters())
    if not isinstance(target, nn.Module):
        # Pipelines keep numbers of their last run; methods are what we could leave behind.
        parts["pipe"] = {
            key: id(value) for key, value in target.__dict__.items() if callable(value)
        }
        scheduler = target.scheduler
        parts["scheduler"] = {
            key: id(value) for key, value in scheduler.__dict__.items() if callable(value)
        }
        parts["scheduler.step"] = scheduler.step.__func__
    parts["modes"] = torch._C._len_torch_function_stack()
    parts["grad"] = torch.is_grad_enabled()
    parts["rng"] = torch.get_rng_state().tolist()
    parts["backend"] = _AttentionBackendRegistry._active_backend
    return parts


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))


@contextmanager
def unchanged(target: Any) -> Iterator[None]:
    """Whatever happens inside, a target is left as it was found; errors pass through unchecked."""
    before = fingerprint(target)
    yield
    left = differences(before, fingerprint(target))
    assert not left, left[:5]
