"""Extra rows of a denoiser call: predictions that the pipeline did not ask for.

A guidance by perturbation needs what the denoiser says of the same latents under other conditions.
Its rows are appended to the pipeline's own call as copies of a branch that is there, tagged with a
name of their own, and cut off again before the pipeline sees the output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hookctl.address import families, pipelines
from hookctl.address.latent import text_tokens
from hookctl.address.rows import COND, PERTURBED, Row, Rows
from hookctl.errors import ConflictError, InputError, LayoutError, UnsupportedError
from hookctl.loop.arguments import check_rows_can_change, rows_are_fixed, take_rows
from hookctl.loop.outputs import cut
from hookctl.loop.state import State
from hookctl.loop.text_lengths import RowText, can_pad, put_texts


@dataclass(frozen=True, eq=False)
class Branch:
    """A branch to be added: copies of the rows of branch `of`, with all their conditions.

    text: other text embeddings for the new rows, [1 | rows of the branch, tokens, channels]; a
    pooled embedding beside the text (SDXL, SD3, Flux) stays that of the copied row. Where the model
    has a mask for padding, the text may have another length than the call's. mask: which tokens of
    it count, bool [1 | rows, tokens]; None for all.
    """

    of: str = COND
    text: Tensor | None = None
    mask: Tensor | None = None


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
            _check_text(state, owner, name, branch)
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
            _set_text(state, name, branch)


def cut_branches(state: State, output: Any) -> Any:
    """What the denoiser returned, without the rows that were added."""
    return output if state.own_rows is None else cut(output, state.own_rows)


def _check_text(state: State, owner: str, name: str, branch: Branch) -> None:
    """Raise InputError or UnsupportedError unless a branch's text can stand in rows of the call."""
    rows, text = state.rows.where(branch=branch.of), branch.text
    if text is None or not rows:
        return
    embeddings = state.kwargs.get(state.text) if state.text else None
    if embeddings is None:
        raise UnsupportedError(
            f"{owner}: branch {name!r} has a text, but this denoiser call has none"
        )
    own = embeddings[0].shape
    if len(own) != 2:
        raise UnsupportedError(
            f"{owner}: branch {name!r} has a text, but those of this denoiser call are "
            f"{(len(embeddings), *own)}, and only [rows, tokens, channels] can be exchanged"
        )
    fits = text.dim() == 3 and text.shape[0] in (1, len(rows)) and text.shape[2:] == own[1:]
    alone = isinstance(embeddings, list) or can_pad(state, state.kwargs)  # of any length
    if not fits or (text.shape[1] != own[0] and not alone):
        raise InputError(
            f"{owner}: branch {name!r}: text is {tuple(text.shape)}; give [1 or {len(rows)}, "
            f"{'tokens' if alone else own[0]}, {own[1]}]"
        )
    if branch.mask is not None and branch.mask.shape not in ((1, text.shape[1]), text.shape[:2]):
        raise InputError(
            f"{owner}: branch {name!r}: mask is {tuple(branch.mask.shape)}; give one of its text, "
            f"{list(text.shape[:2])}"
        )


def _set_text(state: State, name: str, branch: Branch) -> None:
    rows, text, mask = state.rows.where(branch=name), branch.text, branch.mask
    assert text is not None  # the caller looked
    texts = {
        row.index: RowText(one, mask=None if mask is None else mask[i if len(mask) > 1 else 0])
        for i, (row, one) in enumerate(zip(rows, text.expand(len(rows), -1, -1), strict=True))
    }
    put_texts(state, state.kwargs, texts)
    state.own_text = text_tokens(state.kwargs[str(state.text)], state.kwargs, state.denoiser)


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
