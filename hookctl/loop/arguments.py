"""The arguments of a denoiser call: some rows of them, and further text for all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hookctl.attention.query_lists import TextPlace
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.state import State

_MASK = "encoder_attention_mask"
_IDS = "txt_ids"  # position of each text token: none of them has one


def widen(state: State, extra: Mapping[str, Tensor]) -> None:
    """Append texts, name -> [1 | rows | batch, tokens, channels], to the call's own embeddings.

    One text for all rows stands in one of them, where the model allows it, and is projected once.
    """
    own = state.kwargs.get(state.text) if state.text else None
    if not isinstance(own, Tensor):
        raise UnsupportedError("this denoiser call has no text embeddings to widen")
    parts, end = [own], own.shape[1]
    alone = len(state.rows) > 1 and state.projects_texts_alone
    once: dict[str, Tensor] = {}
    for name, text in extra.items():
        if (
            text.dim() != 3
            or text.shape[2] != own.shape[2]
            or text.shape[0] not in (1, len(state.rows), own.shape[0])
        ):
            raise InputError(
                f"context {name!r} is {tuple(text.shape)}; give "
                f"[1 or {len(state.rows)}, tokens, {own.shape[2]}]"
            )
        if alone and text.shape[0] == 1:
            once[name] = text[0].to(own)
            continue
        parts.append(_repeated(text, own))
        state.extra_text[name] = TextPlace(end, end + text.shape[1])
        end += text.shape[1]
    if once:
        block = _over_rows(state, once, end)
        parts.append(_repeated(block, own))
        end += block.shape[1]
    mask = state.kwargs.get(_MASK)
    if isinstance(mask, Tensor):
        if mask.dim() != 2:
            raise UnsupportedError(f"{_MASK} {tuple(mask.shape)} can't be widened; give [rows, M]")
        state.kwargs[_MASK] = F.pad(mask, (0, end - own.shape[1]), value=1)
    ids = state.kwargs.get(_IDS)
    if isinstance(ids, Tensor):
        state.kwargs[_IDS] = F.pad(ids, (0, 0, 0, end - own.shape[1]))
    state.kwargs[str(state.text)] = torch.cat(parts, 1)


def _repeated(text: Tensor, own: Tensor) -> Tensor:
    """Video models repeat a row's text for every frame."""
    return text.to(own).repeat_interleave(own.shape[0] // text.shape[0], 0)


def _over_rows(state: State, texts: Mapping[str, Tensor], start: int) -> Tensor:
    """Texts [tokens, channels], each in the row that has least so far: [rows, tokens, channels]."""
    none = next(iter(texts.values()))[:0]
    rows = [[none] for _ in state.rows]
    ends = [start] * len(rows)
    for name, text in texts.items():
        row = ends.index(min(ends))
        rows[row].append(text)
        state.extra_text[name] = TextPlace(ends[row], ends[row] + len(text), row)
        ends[row] += len(text)
    return pad_sequence([torch.cat(parts) for parts in rows], batch_first=True)


def narrow(state: State, kwargs: dict[str, Any]) -> None:
    """Take from the arguments of a call what `widen` appended to those of `state`."""
    if not state.extra_text or state.own_text is None:
        return
    for name, dim in ((str(state.text), 1), (_MASK, 1), (_IDS, 0)):
        if isinstance(kwargs.get(name), Tensor):
            kwargs[name] = kwargs[name].narrow(dim, 0, state.own_text)


# First axes that are not the batch: positions of tokens, images of an adapter.
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
