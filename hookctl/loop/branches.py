"""Extra rows of a denoiser call: predictions that the pipeline did not ask for.

A guidance by perturbation needs what the denoiser says of the same latents under other conditions.
Its rows are appended to the pipeline's own call as copies of a branch that is there, tagged with a
name of their own, and cut off again before the pipeline sees the output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookctl.address import families, pipelines
from hookctl.address.rows import COND, PERTURBED, Row, Rows
from hookctl.errors import ConflictError, InputError, LayoutError, UnsupportedError
from hookctl.loop.arguments import check_rows_can_change, rows_are_fixed, take_rows
from hookctl.loop.model_input import with_texts
from hookctl.loop.outputs import cut
from hookctl.loop.state import State

_MASK = "encoder_attention_mask"


@dataclass(frozen=True, eq=False)
class Branch:
    """A branch to be added: copies of the rows of branch `of`, with all their conditions.

    text: other text embeddings for the new rows, [1 | rows of the branch, tokens, channels]; a
    pooled embedding beside the text (SDXL, SD3, Flux) stays that of the copied row.
    """

    of: str = COND
    text: Tensor | None = None


def asked_branches(
    wishes: Iterable[tuple[str, Mapping[str, Branch]]], state: State
) -> dict[str, Branch]:
    """The branches that editors want in a call, from (name of the editor, its branches) of each.

    Raises ConflictError if two want the same name, or the pipeline has it.
    """
    asked: dict[str, Branch] = {}
    owners: dict[str, str] = {}
    for owner, branches in wishes:
        for name, branch in branches.items():
            if name in asked:
                raise ConflictError(
                    f"{owners[name]} and {owner} both add a branch {name!r}; give one of "
                    "them another name"
                )
            if state.rows.where(branch=name):
                raise ConflictError(
                    f"{owner} adds a branch {name!r}, but {type(state.pipe).__name__} draws "
                    "one itself; switch off the pipeline's own guidance by perturbation "
                    "(pag_scale=0, no skip_guidance_layers), or leave the editor out"
                )
            asked[name], owners[name] = branch, owner
    return asked


def add_branches(state: State, asked: Mapping[str, Branch]) -> None:
    """Append the rows of the branches to a call. A branch whose `of` isn't in this call waits.

    (Pipelines that guide by several calls have each branch in a call of its own.)
    """
    own = len(state.rows)
    present = {row.branch for row in state.rows}
    joining = {name: branch for name, branch in asked.items() if branch.of in present}
    for name in asked.keys() - joining.keys():
        _check_present(state, name, asked[name])
    if not joining:
        return
    _check_batch(state)
    spans, rows = [(0, own)], list(state.rows)
    for name, branch in joining.items():
        copied = state.rows.where(branch=branch.of)
        spans.append((copied[0].index, copied[-1].index + 1))
        for row in copied:
            root = row.role if branch.text is None else name
            rows.append(Row(len(rows), name, row.prompt, row.image, root))
    state.kwargs = take_rows(state, spans)
    state.rows, state.own_rows = Rows(rows), own
    for name, branch in joining.items():
        if branch.text is not None:
            _set_text(state, name, branch.text)


def cut_branches(state: State, output: Any) -> Any:
    """What the denoiser returned, without the rows that were added."""
    return output if state.own_rows is None else cut(output, state.own_rows)


def _set_text(state: State, name: str, text: Tensor) -> None:
    embeddings = state.kwargs.get(state.text) if state.text else None
    rows = state.rows.where(branch=name)
    if isinstance(embeddings, list):
        each = _of_rows(name, text, len(rows))
        state.kwargs[str(state.text)] = with_texts(
            embeddings, {row.index: one for row, one in zip(rows, each, strict=True)}
        )
        return
    if not isinstance(embeddings, Tensor):
        raise UnsupportedError(f"branch {name!r} has a text, but this denoiser call has none")
    if embeddings.dim() != 3:
        raise UnsupportedError(
            f"branch {name!r} has a text, but those of this denoiser call are "
            f"{tuple(embeddings.shape)}, and only [rows, tokens, channels] can be exchanged"
        )
    if (
        text.dim() != 3
        or text.shape[0] not in (1, len(rows))
        or text.shape[1:] != embeddings[0].shape
    ):
        raise InputError(
            f"branch {name!r}: text is {tuple(text.shape)}; give [1 or {len(rows)}, "
            f"{embeddings.shape[1]}, {embeddings.shape[2]}]"
        )
    repeats = embeddings.shape[0] // len(state.rows)
    start, stop = rows[0].index * repeats, (rows[-1].index + 1) * repeats
    new = text.to(embeddings).expand(len(rows), -1, -1).repeat_interleave(repeats, 0)
    state.kwargs[str(state.text)] = torch.cat([embeddings[:start], new, embeddings[stop:]])
    mask = state.kwargs.get(_MASK)
    if isinstance(mask, Tensor):
        # The mask hides the padding of the text that was there.
        state.kwargs[_MASK] = torch.cat(
            [mask[:start], torch.ones_like(mask[start:stop]), mask[stop:]]
        )


def _of_rows(name: str, text: Tensor, rows: int) -> list[Tensor]:
    """The text of each of the new rows, where the model takes a list of them."""
    if text.dim() != 3 or text.shape[0] not in (1, rows):
        raise InputError(
            f"branch {name!r}: text is {tuple(text.shape)}; give [1 or {rows}, tokens, channels]"
        )
    return list(text.expand(rows, -1, -1).unbind())


def _check_batch(state: State) -> None:
    """Raise UnsupportedError if the rows of this call can't be added to."""
    if reason := rows_are_fixed(state):
        raise UnsupportedError(reason)
    check_rows_can_change(state)


def _check_present(state: State, name: str, branch: Branch) -> None:
    """Raise LayoutError for a branch of something that no call of this pipeline predicts."""
    own = {row.branch for row in state.rows}
    declared = families.pipeline_of(state.pipe) is not None
    sequential = set(pipelines.layout_of(state.pipe).sequential if declared else ())
    # Skip-layer guidance has its own rows in a call of their own.
    if (own | sequential) != {PERTURBED} and branch.of not in own | sequential:
        raise LayoutError(
            f"branch {name!r} copies {branch.of!r}, which this pipeline call doesn't predict; it "
            f"has: {', '.join(sorted(own | sequential))}"
        )
