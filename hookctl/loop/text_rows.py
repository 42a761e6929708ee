"""Further texts of a denoiser call in batch rows of their own (`attention.text_rows`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.families import model_of
from hookctl.address.families.record import Model
from hookctl.address.rows import COND, Row, Rows
from hookctl.attention.text_rows import TextRows
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.arguments import is_shared
from hookctl.loop.outputs import listed, prediction_of, with_prediction
from hookctl.loop.state import State

_MASK = "encoder_attention_mask"


def add_text_rows(state: State, extra: Mapping[str, Tensor]) -> None:
    """Let texts, name -> [1 | rows, tokens, channels], run beside each row that sees the prompt."""
    own, text = state.kwargs[str(state.text)], str(state.text)
    images = state.kwargs[state.sample]
    in_lists = all(isinstance(x, list) and x and isinstance(x[0], Tensor) for x in (own, images))
    if not in_lists and not all(isinstance(x, Tensor) for x in (own, images)):
        raise UnsupportedError(
            f"{type(state.denoiser).__name__} is given several images or texts of a row, beside "
            "which no further text can stand"
        )
    rows: dict[str, dict[int, int]] = {}
    texts, sources = list(own), list(range(len(state.rows)))
    for name, given in extra.items():
        if (
            given.dim() != 3
            or given.shape[2] != own[0].shape[-1]
            or len(given) not in (1, len(state.rows))
        ):
            raise InputError(
                f"context {name!r} is {tuple(given.shape)}; give [1 or {len(state.rows)}, tokens, "
                f"{own[0].shape[-1]}]"
            )
        rows[name] = {}
        for row in state.rows.where(role=COND):
            rows[name][row.index] = len(texts)
            texts.append(given[0 if len(given) == 1 else row.index].to(own[0]))
            sources.append(row.index)
    record = model_of(state.denoiser) or Model()
    lengths = [-(-len(one) // record.text_block) * record.text_block for one in texts]
    count = len(state.rows)
    state.text_rows = TextRows(
        rows,
        {name: lengths[next(iter(places.values()))] for name, places in rows.items() if places},
        max(lengths),
        max(lengths[:count]),
        not in_lists or len(set(lengths[:count])) > 1,
        record.text_moves_image,
    )
    state.with_text_rows = {
        name: _taken(state, name, value, sources)
        for name, value in state.kwargs.items()
        if name != text
    } | (_padded(state, texts) if isinstance(own, Tensor) else {text: texts})


def _padded(state: State, texts: Sequence[Tensor]) -> dict[str, Any]:
    """Texts of all rows in one tensor, and the mask that hides what fills them up."""
    mask, longest = state.kwargs[_MASK], max(map(len, texts))
    masks = [*mask, *(mask.new_ones(len(text)) for text in texts[len(mask) :])]
    return {
        str(state.text): torch.stack([F.pad(t, (0, 0, 0, longest - len(t))) for t in texts]),
        _MASK: torch.stack([F.pad(one, (0, longest - len(one))) for one in masks]),
    }


def _taken(state: State, name: str, value: Any, sources: list[int]) -> Any:
    """An argument of the call with the entries of further rows."""
    count = len(state.rows)
    if is_shared(name):
        return value
    if isinstance(value, Tensor) and value.dim() and len(value) == count:
        return value[sources]
    if isinstance(value, Mapping):
        return {key: _taken(state, name, one, sources) for key, one in value.items()}
    if isinstance(value, list) and len(value) == count and name == state.sample:
        return [value[row] for row in sources]
    if isinstance(value, list | tuple):
        raise UnsupportedError(
            f"{name} of {type(state.denoiser).__name__} has entries for its own rows, beside which "
            "no further text can stand; leave it out"
        )
    return value


def cut_text_rows(state: State, output: Any) -> Any:
    """What the denoiser returned, without the rows of further texts."""
    if state.text_rows is None:
        return output
    listing = listed(output)
    found = prediction_of(output) if listing is None else listing
    return output if found is None else with_prediction(output, found[: len(state.rows)])


def rows_inside(state: State) -> Rows:
    """The rows that layers inside the model are given: those of texts belong to the image's prompt,
    and to a branch of their own."""
    if state.text_rows is None:
        return state.rows
    own, further = list(state.rows), list[Row]()
    for source in state.text_rows.sources:
        row = own[source]
        further.append(Row(len(own) + len(further), "text", row.prompt, row.image))
    return Rows([*own, *further])
