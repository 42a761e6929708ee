"""Further texts of a denoiser call in batch rows of their own (`attention.text_rows`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hookctl.address.families import model_of
from hookctl.address.rows import COND, Row, Rows
from hookctl.address.sites import Site
from hookctl.attention.text_rows import TextRows
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.outputs import cut
from hookctl.loop.state import State


def add_text_rows(state: State, extra: Mapping[str, Tensor]) -> None:
    """Let texts, name -> [1 | rows, tokens, channels], run beside each row that sees the prompt."""
    own, images = state.kwargs[str(state.text)], state.kwargs[state.sample]
    flat = all(isinstance(x, list) and x and isinstance(x[0], Tensor) for x in (own, images))
    if not flat:
        raise UnsupportedError(
            f"{type(state.denoiser).__name__} is given several images or texts of a row, beside "
            "which no further text can stand"
        )
    rows: dict[str, dict[int, int]] = {}
    texts = list(own)
    for name, given in extra.items():
        if (
            given.dim() != 3
            or given.shape[2] != own[0].shape[-1]
            or len(given)
            not in (
                1,
                len(state.rows),
            )
        ):
            raise InputError(
                f"context {name!r} is {tuple(given.shape)}; give [1 or {len(state.rows)}, tokens, "
                f"{own[0].shape[-1]}]"
            )
        rows[name] = {}
        for row in state.rows.where(role=COND):
            rows[name][row.index] = len(texts)
            texts.append(given[0 if len(given) == 1 else row.index].to(own[0]))
    block = record.text_block if (record := model_of(state.denoiser)) else 1
    lengths = [-(-len(one) // block) * block for one in texts]
    count = len(state.rows)
    state.text_rows = TextRows(
        rows,
        {name: lengths[next(iter(places.values()))] for name, places in rows.items() if places},
        max(lengths),
        max(lengths[:count]),
        len(set(lengths[:count])) > 1,
    )
    state.further_texts = texts[count:]


def with_text_rows(state: State, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call with the rows of further texts."""
    if state.text_rows is None:
        return arguments
    sources, text = [*range(len(state.rows)), *state.text_rows.sources], str(state.text)
    taken = {n: _taken(state, n, v, sources) for n, v in arguments.items() if n != text}
    return taken | {text: [*arguments[text], *state.further_texts]}


def _taken(state: State, name: str, value: Any, sources: list[int]) -> Any:
    """An argument of the call with the entries of further rows."""
    count = len(state.rows)
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
    return output if state.text_rows is None else cut(output, len(state.rows))


def own_rows_of(state: State, hidden: Tensor) -> Tensor:
    """The part of a block's tokens, [rows, tokens, channels], that belongs to the own rows."""
    return hidden if state.text_rows is None else hidden[: len(state.rows)]


def with_further(state: State, site: Site, own: Tensor, hidden: Tensor) -> Tensor:
    """A block's tokens with other ones of the own rows, whose images those of the further rows are
    copies of."""
    found = state.text_rows
    assert found is not None  # there are further rows
    images = hidden.shape[1] - (0 if site.kind == "self" else found.longest)
    copies = torch.cat([own[found.sources, :images], hidden[len(own) :, images:]], 1)
    return torch.cat([own, copies])


def further_of(state: State, own: Iterable[int]) -> list[int]:
    """The further rows beside some of the own ones, by index."""
    found = state.text_rows
    wanted, count = set(own), len(state.rows)
    return [count + i for i, row in enumerate(found.sources if found else ()) if row in wanted]


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
