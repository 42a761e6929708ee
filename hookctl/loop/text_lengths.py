"""Texts in rows of a denoiser call, of any number of tokens.

Where rows of one call have texts of several lengths, all are padded to the longest under the
model's mask, as a pipeline pads the prompts of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address import families
from hookctl.errors import UnsupportedError
from hookctl.loop.state import State

MASKS = ("encoder_hidden_states_mask", "encoder_attention_mask", "encoder_mask")
POOLED, ADDED = "pooled_projections", "added_cond_kwargs"

Batch = Tensor | list[Tensor]


@dataclass(frozen=True, eq=False)
class RowText:
    """The text of a row, as a denoiser takes it.

    sequence: [tokens, channels]; pooled: [channels] where the family has such (SDXL, SD3, Flux);
    mask: which tokens count, bool [tokens], None for all.
    """

    sequence: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None


def put_texts(
    state: State, kwargs: dict[str, Any], rows: Mapping[int, RowText], count: int | None = None
) -> None:
    """Make these the texts of some rows of a call, pooled forms and masks included.

    kwargs: the call's arguments, which are changed; count: how many rows they have, None for
    `state.rows`. Raises UnsupportedError where the model has no mask for what lengths there are.
    """
    count, name = len(state.rows) if count is None else count, str(state.text)
    before = kwargs[name]
    text = with_rows(before, {row: one.sequence for row, one in rows.items()}, count)
    if text is None:
        raise _unsupported(state, "has texts of a form unknown here")
    if isinstance(text, Tensor) and isinstance(before, Tensor):
        if text.shape[1] != before.shape[1] and kwargs.get("txt_ids") is not None:
            raise _unsupported(state, "numbers the tokens of its texts")
        kwargs.update(_masks(state, kwargs, rows, text, count))
    kwargs[name] = text
    pooled = {row: one.pooled for row, one in rows.items() if one.pooled is not None}
    if pooled and isinstance(kwargs.get(POOLED), Tensor):
        kwargs[POOLED] = with_rows(kwargs[POOLED], pooled, count)
    added = kwargs.get(ADDED)
    if pooled and isinstance(added, Mapping) and "text_embeds" in added:
        embeds = with_rows(added["text_embeds"], pooled, count)
        kwargs[ADDED] = {**added, "text_embeds": embeds}


def can_pad(state: State, kwargs: Mapping[str, Any]) -> bool:
    """Whether texts of other lengths than that of the call can stand in its rows."""
    return _hides_padding(state) is not None and kwargs.get("txt_ids") is None


def check_lengths(state: State, texts: Iterable[Tensor], who: str) -> None:
    """Raise UnsupportedError unless texts [tokens, channels] can stand in rows of the call."""
    own = state.kwargs.get(state.text) if state.text else None
    if not isinstance(own, Tensor) or can_pad(state, state.kwargs):
        return
    others = sorted({len(text) for text in texts} - {own.shape[1]})
    if others:
        raise UnsupportedError(
            f"{who}: texts of {', '.join(map(str, others))} tokens can't stand in rows of a call "
            f"whose own has {own.shape[1]}, since {type(state.denoiser).__name__} has no mask that "
            "would hide padding; give texts of as many tokens as the prompt's"
        )


def _hides_padding(state: State) -> str | None:
    record = families.model_of(state.denoiser)
    return None if record is None else record.hides_padding


def _masks(
    state: State, kwargs: Mapping[str, Any], rows: Mapping[int, RowText], text: Tensor, count: int
) -> dict[str, Tensor | None]:
    """The mask that lets the model see of each row's text what counts; none where it needs none."""
    before, now = kwargs[str(state.text)].shape[1], text.shape[1]
    lengths = {len(one.sequence) for one in rows.values()}
    lengths |= set() if len(rows) == count else {before}
    hidden = any(one.mask is not None and not bool(one.mask.all()) for one in rows.values())
    if len(lengths) > 1 and _hides_padding(state) is None:
        raise _unsupported(state, "has no mask for texts of several lengths in one batch")
    name = next((one for one in MASKS if one in kwargs), None)  # a mask, or none as yet
    given = kwargs.get(name) if name else None
    if not isinstance(given, Tensor):
        # An encoder may tell of padding that the pipeline keeps to itself.
        if len(lengths) == 1 and (not hidden or name is None):
            return {}
        name = name or _hides_padding(state)
        given = torch.ones(count, before, dtype=torch.bool)
    if given.dim() != 2:
        raise _unsupported(state, "has a mask of a form unknown here")
    own = F.pad(given, (0, now - before)) if now > before else given[:, :now]
    masks = {
        row: torch.ones(len(one.sequence)) if one.mask is None else one.mask
        for row, one in rows.items()
    }
    masks = {row: F.pad(mask, (0, now - len(mask))) for row, mask in masks.items()}
    new = with_rows(own, masks, count)
    assert name is not None and isinstance(new, Tensor)
    # As Qwen-Image's pipelines: no mask where nothing is hidden.
    return {name: None if name == MASKS[0] and bool(new.bool().all()) else new.to(text.device)}


def _unsupported(state: State, said: str) -> UnsupportedError:
    return UnsupportedError(f"{type(state.pipe or state.denoiser).__name__} {said}")


def repeats_of(batch: Batch, count: int) -> int:
    """How often a row stands in a batch: video models repeat it for every frame."""
    return max(1, len(batch) // count)


def with_rows(batch: Batch, rows: Mapping[int, Tensor], count: int) -> Batch | None:
    """A batch of so many rows with some replaced, as long as the longest; None if they are of
    another form."""
    repeats = repeats_of(batch, count)
    places = {row * repeats + i: value for row, value in rows.items() for i in range(repeats)}
    every: Sequence[Tensor] = [places.get(i, own) for i, own in enumerate(batch)]
    like = batch[0]
    if any(one.dim() != like.dim() or one.shape[1:] != like.shape[1:] for one in every):
        return None
    every = [one.to(like) for one in every]
    if isinstance(batch, list):
        return list(every)
    if like.dim() < 2:
        return torch.stack(list(every)) if len({len(one) for one in every}) == 1 else None
    longest = max(len(one) for one in every)
    return torch.stack([padded(one, longest) for one in every])


def padded(text: Tensor, tokens: int) -> Tensor:
    """A text [tokens, channels] with zeros behind it."""
    return F.pad(text, (0, 0, 0, tokens - len(text)))
