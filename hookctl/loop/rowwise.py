"""The arguments of a denoiser call that have an entry for each batch row, some rows at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.loop.state import State

# First axes that are not the batch: positions of tokens, pictures of an adapter.
_SHARED = re.compile(r"^(img|txt|text|latent_image)_ids$|rotary|freqs|^ip_adapter_masks$")

Spans = Sequence[tuple[int, int]]


def take_rows(state: State, spans: Spans) -> dict[str, Any]:
    """The arguments of a call for the rows start <= index < stop of each span, one after another.

    Tensors are followed into lists, tuples and mappings (added conditions, residuals of a
    ControlNet, image embeddings of an adapter). What has no entry for each row stays as it is.
    """
    batch = len(state.rows)
    # Video models also hold an entry for each frame of a row, frame fastest.
    repeats = {1, state.grid[0] if len(state.grid) == 3 else 1}
    sizes = {batch * r: r for r in sorted(repeats)}
    taken = {name: _take(name, value, sizes, spans) for name, value in state.kwargs.items()}
    for name, value in taken.items():
        if isinstance(value, list) and len(value) == batch and not _tensors(value):
            taken[name] = [entry for start, stop in spans for entry in value[start:stop]]
    return taken


def _take(name: str, value: Any, sizes: Mapping[int, int], spans: Spans) -> Any:
    if _SHARED.search(name):
        return value
    if isinstance(value, Tensor):
        r = sizes.get(value.shape[0]) if value.dim() else None
        if r is None:
            return value
        return torch.cat([value[start * r : stop * r] for start, stop in spans])
    if isinstance(value, Mapping):
        return {key: _take(str(key), entry, sizes, spans) for key, entry in value.items()}
    if isinstance(value, list | tuple) and _tensors(value):
        return type(value)(_take(name, entry, sizes, spans) for entry in value)
    return value


def _tensors(value: Any) -> bool:
    """Whether a list or tuple holds tensors, at whatever depth."""
    if isinstance(value, list | tuple):
        return any(_tensors(entry) for entry in value)
    return isinstance(value, Tensor)
