"""The denoiser once more, for one branch of a call: what an editor asks beside the pipeline."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from hookctl.address.families import uncompiled
from hookctl.address.rows import Rows
from hookctl.errors import UnsupportedError
from hookctl.loop.calls import prediction_of
from hookctl.loop.context import narrow
from hookctl.loop.energy import called
from hookctl.loop.nested import Reading, reading_in
from hookctl.loop.rowwise import take_rows
from hookctl.loop.state import State


def predict_again(state: State, branch: str, latents: Tensor) -> Tensor:
    """The prediction for the rows of a branch of `state`, from other latents at the same time.

    latents: [pictures, ...] in the scheduler's space. All further conditions are those of the
    rows, and the editors that change the model act on them as they do in the pipeline's own call;
    nobody's read-outs are served.
    """
    rows = state.rows.where(branch=branch)
    if not rows:
        raise UnsupportedError(
            f"{branch!r} can't be predicted again: the last denoiser call of this turn has only "
            f"the rows {state.rows!r}"
        )
    arguments = take_rows(state, [(rows[0].index, rows[-1].index + 1)])
    narrow(state, arguments)
    arguments[state.sample] = state.model_input(latents, arguments[state.sample])
    state.asking = Rows([replace(row, index=i) for i, row in enumerate(rows)])
    try:
        with reading_in(Reading(uncompiled(state.denoiser), None)):
            prediction = prediction_of(called(state.denoiser, arguments))
    finally:
        state.asking = None
    if prediction is None:
        raise UnsupportedError(f"{type(state.denoiser).__name__} returns no tensor of predictions")
    return prediction
