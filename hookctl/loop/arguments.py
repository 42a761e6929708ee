"""The arguments of a denoiser call: some rows of them, and further text for all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hookctl.address import families
from hookctl.address.rows import PERTURBED
from hookctl.attention.query_lists import TextPlace
from hookctl.errors import InputError, UnsupportedError
from hookctl.hooks.caches import cache_at
from hookctl.loop.state import State
from hookctl.loop.text_lengths import MASKS

# Models that make one vector of all the text that they are given.
_POOLS = ("LuminaNextDiT2DModel", "HunyuanDiT2DModel", "Kandinsky3UNet")
_IDS = "txt_ids"  # position of each text token


def widen(state: State, extra: Mapping[str, Tensor]) -> None:
    """Append texts, name -> [1 | rows | batch, tokens, channels], to the call's own embeddings.

    One text for all rows stands in one of them, where the model allows it, and is projected once.
    """
    own = state.kwargs.get(state.text) if state.text else None
    if not isinstance(own, Tensor):
        raise UnsupportedError("this denoiser call has no text embeddings to widen")
    if own.dim() != 3:
        raise UnsupportedError(
            f"the text embeddings of this denoiser call are {tuple(own.shape)}, and only "
            "[rows, tokens, channels] can be widened"
        )
    _check_widens(state)
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
    for name in MASKS:
        mask = state.kwargs.get(name)
        if isinstance(mask, Tensor):
            if mask.dim() != 2:
                raise UnsupportedError(
                    f"{name} {tuple(mask.shape)} can't be widened; give [rows, M]"
                )
            state.kwargs[name] = F.pad(mask, (0, end - own.shape[1]), value=1)
    ids = state.kwargs.get(_IDS)
    if isinstance(ids, Tensor):
        places = sorted(state.extra_text.values(), key=lambda place: place.start)
        state.kwargs[_IDS] = torch.cat([ids, *(_ids(ids, p.stop - p.start) for p in places)], -2)
    state.kwargs[str(state.text)] = torch.cat(parts, 1)


def _ids(own: Tensor, tokens: int) -> Tensor:
    """The positions [..., tokens, axes] of a further text: as in a run of its own, from the first
    one on, by the step of the own ones (0 where no token has a position)."""
    first = own[..., :1, :]
    step = own[..., 1:2, :] - first if own.shape[-2] > 1 else torch.zeros_like(first)
    return first + step * torch.arange(tokens, device=own.device, dtype=own.dtype)[:, None]


def _check_widens(state: State) -> None:
    """Raise UnsupportedError where more text would change more than what is attended to."""
    model = families.uncompiled(state.denoiser)
    name, pools = type(model).__name__, set(families.names_of(model)) & set(_POOLS)
    streams = [
        key
        for key, value in state.kwargs.items()
        if re.match(r"encoder_hidden_states_(?!mask|image)", key) and value is not None
    ]
    if streams:
        raise UnsupportedError(
            f"{name} joins a second text ({streams[0]}) to its first inside the model, so it "
            "can't be widened"
        )
    embeds = getattr(getattr(model, "config", None), "addition_embed_type", None)
    if pools or embeds in ("text", "text_image"):
        raise UnsupportedError(
            f"{name} pools its text into one vector that acts on the whole image, so it can't be "
            "widened"
        )
    record = families.model_of(model)
    if record is not None and record.order is None and any(k == "text" for _, k in record.kinds):
        raise UnsupportedError(
            f"{name} lets its text attend to itself, which would hear a further one, so it can't "
            "be widened"
        )


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
    for name, dim in ((str(state.text), 1), *((mask, 1) for mask in MASKS), (_IDS, -2)):
        if isinstance(kwargs.get(name), Tensor):
            kwargs[name] = kwargs[name].narrow(dim, 0, state.own_text)


# First axes that are not the batch: positions of tokens, images of an adapter, blocks, what one
# entry says of every row.
_SHARED = re.compile(
    r"^(img|txt|text|latent_image|image_cond)_ids$|rotary|freqs|rope_pos|^indices_"
    r"|^ip_adapter_masks$|^padding_mask$|hidden_states_scale$|^skip_layers$"
)
_SECOND = re.compile(r"^encoder_hidden_states_llama3$")  # [layers, rows, tokens, channels]
_PAIRED = re.compile(r"^encoder_hidden_states_image$")  # Wan: the first and the last image

Spans = Sequence[tuple[int, int]]


def is_shared(name: str) -> bool:
    """Whether an argument of this name says the same of every row."""
    return _SHARED.search(name) is not None


def take_rows(state: State, spans: Spans) -> dict[str, Any]:
    """The arguments of a call for the rows start <= index < stop of each span, one after another.

    Tensors are followed into lists, tuples and mappings (added conditions, residuals of a
    ControlNet, image embeddings of an adapter). What has no entry for each row stays as it is.
    """
    batch = len(state.rows)
    # Video models also hold an entry for each frame of a row, frame fastest.
    repeats = {1, state.grid[0] if len(state.grid) == 3 else 1}
    sizes = {batch * r: r for r in sorted(repeats)}
    return {
        name: [entry for start, stop in spans for entry in value[start:stop]]
        if _is_of_rows(state, name, value)
        else _take(name, value, sizes, spans)
        for name, value in state.kwargs.items()
    }


def _is_of_rows(state: State, name: str, value: Any) -> bool:
    """Whether an argument is a list of an entry for each row: of the images or texts, or of what is
    no tensor."""
    if not isinstance(value, list) or len(value) != len(state.rows) or is_shared(name):
        return False
    return name in (state.sample, state.text) or not _tensors(value)


def _take(name: str, value: Any, sizes: Mapping[int, int], spans: Spans) -> Any:
    if is_shared(name):
        return value
    if isinstance(value, Tensor):
        if _SECOND.search(name):
            return torch.cat([value[:, start:stop] for start, stop in spans], 1)
        batch = min(sizes)
        known = {2 * batch: 2, **sizes} if _PAIRED.search(name) else sizes
        r = known.get(value.shape[0]) if value.dim() else None
        if r is None:
            if value.dim() > 1 and batch > 1 and value.shape[0] == 2 * batch:
                raise UnsupportedError(
                    f"{name} {tuple(value.shape)} has 2 entries for each of {batch} rows, of which "
                    "it is not known which belong to a row; so rows can neither be added to this "
                    "call nor asked alone"
                )
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


# -- models that know how many rows they are given -------------------------------------------------


def rows_are_fixed(state: State) -> str | None:
    """Why the denoiser must be given exactly the rows that its pipeline gives it, None if not."""
    name = type(state.pipe).__name__
    divided = bool(state.rows.where(branch=PERTURBED)) and any(
        not families.keeps_perturbed(module) for module in state.denoiser.modules()
    )
    if divided:
        return (
            f"the attention processors of {name} divide the batch into the pipeline's own "
            "branches, so none can be added; use the pipeline without PAG (the recipe PAG does "
            "the same), or pag_scale=0"
        )
    adapters = getattr(families.uncompiled(state.denoiser), "encoder_hid_proj", None)
    for module in adapters.modules() if isinstance(adapters, nn.Module) else ():
        held = module.__dict__.get("clip_embeds")
        if isinstance(held, Tensor) and held.shape[0] > 1:
            return (
                f"the FaceID adapter of this {name} keeps the images of the pipeline's own rows in "
                "the model (clip_embeds), so none can be added; use an IP-Adapter that is given "
                "its images by the call, or unload it (pipe.unload_ip_adapter())"
            )
    packing = [key for key in state.kwargs if re.search(r"_(indexes|indices)$", key)]
    if any(state.kwargs[key] is not None for key in packing):
        return (
            f"{type(state.denoiser).__name__} packs all that it is given into one sequence "
            f"({packing[0]}), so no row can be added"
        )
    if state.kwargs.get("kv_cache") is not None:
        return (
            f"{name} keeps the keys and values of its own rows from call to call (kv_cache), so "
            "none can be added; pass use_kv_cache=False to the pipeline where it takes it"
        )
    return None


def check_rows_can_change(state: State) -> None:
    """Raise UnsupportedError if the denoiser keeps outputs of one call for the next."""
    model = families.uncompiled(state.denoiser)
    cache = cache_at(model, state.clock.step)
    if cache is not None and cache.rows:
        raise UnsupportedError(
            f"{cache.name} is on in {type(model).__name__} and made for the rows of the pipeline's "
            f"own calls; a call with other rows would spoil it: {cache.cure}"
        )
