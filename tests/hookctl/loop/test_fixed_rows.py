"""Models that must be given their pipeline's own rows, and predictions that a pipeline cuts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookctl
from hookctl import Editor
from hookctl.errors import UnsupportedError
from hookctl.loop.calls import EVERYONE, predict
from hookctl.loop.state import Predictions, State
from hookctl.loop.step import Step
from hookctl.recipes import PAG, SAG, SEG, AttendAndExcite, LayoutGuidance
from tests import zoo
from tests.families.subjects import error

PAG_PIPE, PLAIN = zoo.PIPELINES["sd15_pag"], zoo.PIPELINES["sd15"]


class Asks(Editor):
    """Asks for the predictions of one branch once more, of other latents and another text."""

    def __init__(self, branch: str, text: Tensor | None = None) -> None:
        self.branch, self.text = branch, text
        self.found: list[tuple[Tensor, Tensor]] = []

    def combine(self, predictions: Predictions) -> Tensor:
        state = predictions.state
        rows = state.rows.where(branch=self.branch)
        latents = None if self.text is None else 0.5 * state.latents
        again = predict(state, rows, latents=latents, text=self.text, reader=EVERYONE)
        self.found.append((predictions[self.branch], again))
        return predictions.guided


@pytest.mark.parametrize("branch", ["uncond", "cond", "perturbed"])
def test_one_branch_of_a_pipeline_with_pag(branch: str) -> None:
    """Its processors take three groups of rows, so all of them are given."""
    pipe, asks = PAG_PIPE.make(), Asks(branch)
    with hookctl.control(pipe, asks):
        PAG_PIPE.run(pipe, ["a red cat", "a blue dog"], n=2)
    assert len(asks.found) == 2
    for first, again in asks.found:
        assert torch.equal(first, again)


def test_other_latents_and_text_with_pag_are_those_without() -> None:
    text = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for case in (PAG_PIPE, PLAIN):
        pipe, asks = case.make(), Asks("cond", text)
        pipe.unet.load_state_dict(PAG_PIPE.make().unet.state_dict())
        with hookctl.control(pipe, asks):
            case.run(pipe, ["a red cat", "a blue dog"], steps=1)
        found.append(asks.found[0][1])
    assert error(*found) < 1e-5


class Starts(Editor):
    """The latents that the first step is given, after the editors before this one."""

    def __init__(self) -> None:
        self.latents: list[Tensor] = []

    def denoise(self, state: State, proceed: Any) -> Any:
        self.latents.append(state.latents.clone())
        return proceed()


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: AttendAndExcite(["cat", "square"], refinements=2),
        lambda: LayoutGuidance(["cat"], [(0, 0, 0.5, 0.5)]),
    ],
)
def test_energies_of_a_pipeline_with_pag_are_those_without(make: Any) -> None:
    found = []
    for case in (PAG_PIPE, PLAIN):
        pipe, starts = case.make(), Starts()
        pipe.unet.load_state_dict(PAG_PIPE.make().unet.state_dict())
        pipe.text_encoder.load_state_dict(PAG_PIPE.make().text_encoder.state_dict())
        with hookctl.control(pipe, make(), starts):
            case.run(pipe, steps=5)
        found.append(starts.latents[0])
    assert error(*found) < 1e-4


def test_sag_acts_in_a_pipeline_with_pag() -> None:
    pipe = PAG_PIPE.make()
    plain = PAG_PIPE.run(pipe)
    with hookctl.control(pipe, SAG()):
        assert error(PAG_PIPE.run(pipe), plain) > 1e-3
    with (
        hookctl.control(pipe, SEG()),
        pytest.raises(UnsupportedError, match="divide the batch into the pipeline's own branches"),
    ):
        PAG_PIPE.run(pipe)


class Projection(nn.Module):
    """As the projection of a FaceID adapter: images of the pipeline's rows are kept in it."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.clip_embeds = torch.zeros(rows, 1, 2, 4)


def test_images_kept_in_the_model_are_refused_by_name() -> None:
    pipe = PLAIN.make()
    pipe.unet.encoder_hid_proj = Projection(2)
    with (
        hookctl.control(pipe, PAG()),
        pytest.raises(UnsupportedError, match="FaceID adapter of this StableDiffusionPipeline"),
    ):
        PLAIN.run(pipe)
    asks = Asks("cond")  # all rows are given, so the model's own are right
    with hookctl.control(pipe, asks):
        PLAIN.run(pipe)
    assert error(*asks.found[0]) < 1e-6


# -- predictions that are cut ----------------------------------------------------------------------


def test_predictions_of_references_are_cut_off() -> None:
    case = zoo.PIPELINES["flux"]
    pipe, latents = case.make(), torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    own, references = latents, torch.ones(1, 3, 8)
    predicted = torch.arange(7.0).expand(1, 8, 7).mT.contiguous()
    for given, fits in (
        (torch.cat([own, references], 1), True),
        (torch.cat([references, own], 1), False),
    ):
        step, seen = Step(), Combines()
        state = a_state(pipe, given)
        step.note(state, None, predicted, predictions=True)
        arguments = {"model_output": predicted[:, :4], "timestep": 1, "sample": own}
        if fits:
            step.take(stepped, arguments, [Attached(seen)], check=False)
            assert torch.equal(seen.cond, predicted[:, :4])
        else:
            with pytest.raises(UnsupportedError, match=r"FluxPipeline makes \(1, 4, 8\) of its"):
                step.take(stepped, arguments, [Attached(seen)], check=False)


def stepped(**given: Any) -> tuple[Tensor]:
    return (given["model_output"],)


class Combines(Editor):
    def combine(self, predictions: Predictions) -> Tensor:
        self.cond = predictions["cond"]
        return predictions.guided


class Attached:
    def __init__(self, editor: Editor) -> None:
        self.editor = editor

    def note_hook(self, *noted: Any) -> None:
        pass


def a_state(pipe: Any, model_input: Tensor) -> State:
    from hookctl.address.clock import Clock
    from hookctl.address.rows import Row, Rows

    return State(
        denoiser=pipe.transformer,
        pipe=pipe,
        rows=Rows([Row(0, "cond", 0, 0)]),
        clock=Clock(0, 1, 1.0),
        kwargs={"hidden_states": model_input},
        sample="hidden_states",
    )


class Emptying(nn.Module):
    """As HunyuanDiT does: takes the entries out of a list that it is given."""

    def forward(self, hidden_states: Tensor, timestep: int, samples: list[Tensor]) -> Tensor:
        while samples:
            hidden_states = hidden_states + samples.pop()
        return hidden_states


class AsksAgain(Editor):
    def __init__(self) -> None:
        self.again: Tensor | None = None

    def denoise(self, state: State, proceed: Any) -> Any:
        out = proceed()
        self.again = predict(state, list(state.rows))
        return out


def test_lists_that_a_model_empties_are_whole_for_the_next_call() -> None:
    model, asks = Emptying(), AsksAgain()
    given = [torch.ones(1, 2, 4, 4), torch.ones(1, 2, 4, 4)]
    with hookctl.control(model, asks, rows=("cond",)):
        out = model(torch.zeros(1, 2, 4, 4), 1, given)
    assert torch.equal(out, torch.full((1, 2, 4, 4), 2.0))
    assert asks.again is not None
    assert torch.equal(asks.again, out)
