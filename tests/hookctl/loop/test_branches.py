"""Extra rows: copies of a branch, tagged, predicted, and cut off again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hookctl
from hookctl import Editor
from hookctl.errors import ConflictError, InputError, LayoutError, UnsupportedError
from hookctl.loop.branches import Branch
from tests import zoo
from tests.families.subjects import error
from tests.hookctl.drawing import TWO, draw

FAMILIES = ["sd15", "sdxl", "controlnet", "sd3", "flux", "pixart", "wan", "animatediff", "svd"]
FAMILIES += [name for name in ("z_image",) if name in zoo.PIPELINES]
TOLERANCE = 1e-5  # fp32; a wider batch sums in another order


class Copies(Editor):
    """Adds branches and keeps what comes of them."""

    sites = "self, joint"

    def __init__(self, **branches: Branch) -> None:
        self.added, self.rows, self.seen = branches, [], []
        self.predictions: list[dict[str, Tensor]] = []

    def branches(self, state: Any) -> Any:
        return self.added

    def attention(self, call: Any) -> None:
        self.seen.append(call)

    def denoise(self, state: Any, proceed: Any) -> Any:
        self.rows.append(state.rows)
        return proceed()

    def combine(self, predictions: Any) -> Tensor:
        self.predictions.append(dict(predictions.branches))
        return predictions.guided


def both(name: str, *editors: Editor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """(with editors, plain)"""
    case = zoo.PIPELINES[name]
    pipe = case.make()
    return draw(case, pipe, *editors, **kwargs), case.run(pipe, TWO, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_predicts_what_its_original_does(name: str) -> None:
    """And the pipeline gets its own rows, as if nothing had been added."""
    copies = Copies(again=Branch())
    result, plain = both(name, copies)
    assert error(result, plain) < (1e-3 if name == "svd" else TOLERANCE)  # sigma 700
    assert copies.predictions
    for parts in copies.predictions:
        assert parts["again"].shape == parts["cond"].shape
        assert error(parts["again"], parts["cond"]) < TOLERANCE


@pytest.mark.parametrize("name", ["sd15", "flux", "wan", "animatediff"])
def test_no_branch_changes_no_bit(name: str) -> None:
    result, plain = both(name, Copies())
    assert torch.equal(result, plain)


@pytest.mark.parametrize("kwargs", [{"n": 2}, {"guidance": 1.0}])
def test_rows_are_tagged_as_what_they_copy(kwargs: dict[str, Any]) -> None:
    copies = Copies(again=Branch(), other=Branch(of="cond"))
    both("sd15", copies, steps=1, **kwargs)
    [rows] = copies.rows
    cond = rows.where(branch="cond")
    for name in ("again", "other"):
        new = rows.where(branch=name)
        assert [(r.prompt, r.image) for r in new] == [(r.prompt, r.image) for r in cond]
        assert all(r.role == "cond" for r in new)
    assert [r.index for r in rows] == list(range(len(rows)))
    assert rows.where(role="cond") == rows.where("cond") + rows.where("again") + rows.where("other")
    call = copies.seen[0]
    assert call.q.shape[0] == len(rows)
    assert call.grid is not None


def test_it_joins_the_call_that_holds_its_original() -> None:
    """Where guidance is two calls, only one of them is longer."""
    copies = Copies(again=Branch(of="uncond"))
    both("wan", copies, steps=1)
    assert [{r.branch for r in rows} for rows in copies.rows] == [{"cond"}, {"uncond", "again"}]
    [parts] = copies.predictions
    assert error(parts["again"], parts["uncond"]) < TOLERANCE


@pytest.mark.parametrize("name", ["sd15", "animatediff"])
def test_a_text_of_its_own(name: str) -> None:
    """Drawn from one noise, the copy with the other prompt's text predicts what the other does."""

    class Swapped(Copies):
        def branches(self, state: Any) -> Any:
            text = state.kwargs[state.text]
            repeats = text.shape[0] // len(state.rows)  # frames
            rows = [row.index * repeats for row in state.rows.where(branch="cond")]
            return {"swapped": Branch(text=text[rows].flip(0))}

        def combine(self, predictions: Any) -> Tensor:
            swapped = predictions.state.rows.where("swapped")
            assert {row.role for row in swapped} == {"swapped"}  # no edits of the prompt's words
            return super().combine(predictions)

    swapped, shape = Swapped(), (4, 3, 8, 8) if name == "animatediff" else (4, 16, 16)
    both(name, swapped, steps=1, latents=torch.randn(1, *shape).repeat(2, *[1] * len(shape)))
    [parts] = swapped.predictions
    assert error(parts["swapped"], parts["cond"].flip(0)) < TOLERANCE
    assert error(parts["swapped"], parts["cond"]) > 1e-4


# -- refused ---------------------------------------------------------------------------------------


class Others(Copies):
    pass


def test_two_editors_of_one_name() -> None:
    with pytest.raises(ConflictError, match="Copies and Others both add a branch 'again'"):
        both("sd15", Copies(again=Branch()), Others(again=Branch()))


@pytest.mark.slow
def test_a_pipeline_with_that_branch() -> None:
    with pytest.raises(ConflictError, match="StableDiffusionPAGPipeline draws one itself"):
        both("sd15_pag", Copies(perturbed=Branch()))
    with pytest.raises(UnsupportedError, match="divide the batch"):
        both("sd15_pag", Copies(again=Branch()))
    result, plain = both("sd15_pag", Copies(again=Branch()), pag_scale=0.0)
    assert error(result, plain) < TOLERANCE


def test_a_branch_of_nothing() -> None:
    with pytest.raises(LayoutError, match=r"copies 'image'.* it has: cond, uncond"):
        both("sd15", Copies(again=Branch(of="image")))


def test_a_text_of_another_shape() -> None:
    with pytest.raises(InputError, match=r"branch 'again': text is \(1, 3, 5\)"):
        both("sd15", Copies(again=Branch(text=torch.zeros(1, 3, 5))))


# -- output forms, training, compilation -----------------------------------------------------------


@pytest.mark.parametrize("form", ["tuple", "output"])
def test_the_callers_own_form_of_output(form: str) -> None:
    case = zoo.PIPELINES["sd15"]
    unet = case.make().unet
    inputs = (torch.randn(2, 4, 16, 16), torch.tensor(5), torch.randn(2, 77, 32))
    with hookctl.control(unet, Copies(again=Branch()), rows=("uncond", "cond")), torch.no_grad():
        out = unet(*inputs, return_dict=form == "output")
        plain = out.sample if form == "output" else out[0]
    assert plain.shape == (2, 4, 16, 16)
    with torch.no_grad():
        assert error(plain, unet(*inputs).sample) < TOLERANCE


def test_gradients_through_a_checkpointed_call() -> None:
    """The whole call is made again in backward, with the same rows."""
    from torch.utils.checkpoint import checkpoint

    unet = zoo.PIPELINES["sd15"].make().unet
    text = torch.randn(2, 77, 32)

    def grad(x: Tensor, again: bool) -> Tensor:
        x = x.clone().requires_grad_()

        def call(y: Tensor) -> Tensor:
            return unet(y, torch.tensor(5), text).sample

        with hookctl.control(unet, Copies(again=Branch()), rows=("uncond", "cond")):
            out = checkpoint(call, x, use_reentrant=False) if again else call(x)
            (found,) = torch.autograd.grad(out.square().sum(), x)
        return found

    x = torch.randn(2, 4, 16, 16)
    assert error(grad(x, True), grad(x, False)) < TOLERANCE
