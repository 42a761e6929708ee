"""What the scheduler is given is what is declared that a pipeline makes of its predictions.

For every pipeline the branches that an editor's `combine` finds must add up to what the pipeline
made of them itself: u + g (c - u), with weights of sum 1, so that what an editor adds to a
prediction leads where it should.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hookctl import Branch, Editor, control
from hookctl.address import families
from hookctl.errors import UnsupportedError
from hookctl.loop.calls import predict
from hookctl.loop.state import Predictions, State
from hookctl.recipes import PAG, SAG
from tests.families.subjects import error
from tests.families.wild import CASES, drawn, same
from tests.zoo.wild import WILD, Wild

# They guide otherwise than by u + g (c - u): by a norm, the first channels, frame by frame, masks.
OWN_WAY = {
    *("HunyuanImagePipeline", "LuminaPipeline", "Lumina2Pipeline", "LongCatImagePipeline"),
    *("QwenImageEditPipeline", "QwenImageEditPlusPipeline", "QwenImageEditInpaintPipeline"),
    *("SanaSprintPipeline", "SanaSprintImg2ImgPipeline", "StableVideoDiffusionPipeline"),
    *("LEditsPPPipelineStableDiffusion", "LEditsPPPipelineStableDiffusionXL"),
}
# Refused with their reason.
REFUSED = (
    "without a call of pipe.scheduler.step",
    "packs texts and videos into one sequence",
    "in a way unknown here",
    "gives its denoiser several images in each row",
    "guides by images, steps or masks of its own",
)
UNTOLD = {
    "PixArtSigmaPAGPipeline",  # its rows, at the settings that it is drawn with
    "ShapEPipeline",
    "ShapEImg2ImgPipeline",
}
SECONDS = 0.5  # of the cheap ones


class Weights(Editor):
    """The weights of the branches in what the scheduler is given, by least squares."""

    def __init__(self) -> None:
        self.found: list[tuple[dict[str, float], float]] = []

    def combine(self, predictions: Predictions) -> Tensor:
        given = predictions.guided.double()
        parts = [predictions[name].double() for name in predictions.branches]
        given = given[: len(parts[0])].flatten()  # DiT steps its unconditional rows as well
        matrix = torch.stack([part.flatten() for part in parts], 1)
        weights = torch.linalg.lstsq(matrix, given[:, None]).solution
        left = float((matrix @ weights - given[:, None]).norm() / given.norm())
        named = zip(predictions.branches, weights[:, 0].tolist(), strict=True)
        self.found.append((dict(named), left))
        return predictions.guided


def is_declared(case: Wild) -> bool:
    return families.record.PIPELINES.get(case.kind) is not None


def hands_otherwise(case: Wild) -> bool:
    record = families.record.PIPELINES.get(case.kind)
    return record is not None and record.handing is not None


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=case.name,
            marks=()
            if (hands_otherwise(case) or case.kind.startswith("IF")) and case.seconds < SECONDS
            else pytest.mark.conformance,
        )
        for case in CASES
        if is_declared(case) and case.name not in UNTOLD
    ],
)
def test_branches_add_up_to_what_is_stepped(case: Wild) -> None:
    pipe, weights = case.make(), Weights()
    try:
        with control(pipe, weights, strict=False):
            drawn(case, pipe)
    except UnsupportedError as reason:
        assert any(why in str(reason) for why in REFUSED), reason
        return
    assert weights.found
    for found, left in weights.found:
        assert found["cond"] > 0, found
        if case.kind not in OWN_WAY:
            assert left < 1e-3, left
            assert sum(found.values()) == pytest.approx(1.0, abs=1e-2)


class AsksAgain(Editor):
    """How far a prediction asked for at the same latents is from the step's own."""

    def __init__(self) -> None:
        self.worst = 0.0

    def combine(self, predictions: Predictions) -> Tensor:
        state = predictions.state
        found = predict(state, state.rows, latents=state.latents)
        for row in state.rows:
            one = predictions.handed(found[row.index : row.index + 1], state.latents)
            first = state.rows.where(branch=row.branch)[0].index
            own = predictions[row.branch][row.index - first][None]
            self.worst = max(self.worst, error(one, own))
        return predictions.guided


@pytest.mark.parametrize(
    "name",
    [
        "MarigoldDepthPipeline",  # its image stands before its latents
        "MarigoldIntrinsicsPipeline",
        "KandinskyV22InpaintPipeline",  # image and mask stand behind them
        "IFPipeline",
        "StableDiffusionLatentUpscalePipeline",
        "PRXPixelPipeline",
    ],
)
def test_latents_are_put_where_they_stand(name: str) -> None:
    case = WILD[name]
    pipe, asks = case.make(), AsksAgain()
    with control(pipe, asks, strict=False):
        drawn(case, pipe)
    assert asks.worst < 1e-5


@pytest.mark.parametrize(
    ("name", "editor"),
    [
        ("MarigoldDepthPipeline", SAG(threshold=0.0)),
        ("MarigoldNormalsPipeline", SAG(threshold=0.0)),
        pytest.param("KandinskyV22InpaintPipeline", SAG(threshold=0.0), marks=pytest.mark.slow),
        ("IFImg2ImgPipeline", SAG(threshold=0.0)),
        ("IFPipeline", PAG(sites="self, joint")),  # keys of the text before those of the image
        ("FluxKontextPipeline", PAG()),  # references behind the target
        ("LTXImageToVideoPipeline", PAG()),
        ("SanaWMPipeline", PAG()),  # steps tokens of a video
        pytest.param("DreamLitePipeline", PAG(), marks=pytest.mark.slow),
        ("KandinskyPriorPipeline", PAG()),
    ],
)
def test_guidance_on_odd_layouts(name: str, editor: Editor) -> None:
    case = WILD[name]
    pipe = case.make()
    plain = drawn(case, pipe)
    with control(pipe, editor) as session:
        assert not same(drawn(case, pipe), plain)
    assert "changed the prediction" in session.report()
    assert same(drawn(case, pipe), plain)


@pytest.mark.parametrize("name", ["LTX2Pipeline", "Kandinsky6TI2VAPipeline"])
def test_a_sound_beside_the_image_keeps_its_rows(name: str) -> None:
    """Rows that are added for a branch are taken out of all that the denoiser returns."""
    case = WILD[name]
    pipe = case.make()
    plain = drawn(case, pipe)
    with control(pipe, PAG()):
        guided = drawn(case, pipe)
    assert [one.shape for one in guided] == [one.shape for one in plain] and len(plain) == 2


@pytest.mark.parametrize("name", ["Kandinsky5T2VPipeline", "Kandinsky6TI2VAPipeline"])
def test_a_text_that_hears_itself_in_the_model_is_not_widened(name: str) -> None:
    class Widens(Editor):
        def context(self, state: State) -> dict[str, Tensor]:
            return {"more": torch.zeros(1, 4, 32)}

    case = WILD[name]
    pipe = case.make()
    with control(pipe, Widens()), pytest.raises(UnsupportedError, match="would hear a further"):
        drawn(case, pipe)


def test_texts_of_four_dimensions_are_neither_widened_nor_exchanged() -> None:
    class Widens(Editor):
        def context(self, state: State) -> dict[str, Tensor]:
            return {"more": torch.zeros(1, 4, 8)}

    class Exchanges(Editor):
        def branches(self, state: State) -> dict[str, Branch]:
            return {"more": Branch(text=torch.zeros(1, 16, 8))}

        def combine(self, predictions: Predictions) -> Tensor:
            return predictions.guided

    case = WILD["SanaWMPipeline"]
    for editor, why in ((Widens(), "can be widened"), (Exchanges(), "can be exchanged")):
        pipe = case.make()
        with control(pipe, editor), pytest.raises(UnsupportedError, match=why):
            drawn(case, pipe)


@pytest.mark.parametrize(
    "name",
    ["SkyReelsV2DiffusionForcingPipeline", "SkyReelsV2DiffusionForcingImageToVideoPipeline"],
)
def test_steps_by_a_copied_scheduler_are_told(name: str) -> None:
    case = WILD[name]
    pipe = case.make()
    with (
        control(pipe, PAG()),
        pytest.raises(UnsupportedError, match=r"without a call of pipe\.scheduler\.step"),
    ):
        drawn(case, pipe)


def test_latents_that_are_not_alone_are_not_assigned() -> None:
    """Where images are joined to the latents without the scheduler, which are whose is unknown."""

    class Zeros(Editor):
        def before(self, state: State) -> None:
            state.latents = torch.zeros_like(state.latents)

    case = WILD["MarigoldDepthPipeline"]
    pipe = case.make()
    with control(pipe, Zeros()), pytest.raises(UnsupportedError, match="joins images to its lat"):
        drawn(case, pipe)


def test_an_interrupted_run_leaves_no_latents() -> None:
    """Latents that an editor gave a step which was never taken are not those of the next run."""
    case = WILD["StableDiffusionPipeline"]
    pipe = case.make()

    class Stops(Editor):
        stopping = True

        def before(self, state: State) -> None:
            if self.stopping:
                state.latents = torch.zeros_like(state.latents)

    def interrupted(*args: object, **kwargs: object) -> None:
        raise RuntimeError("stopped")

    plain, stops = drawn(case, pipe), Stops()
    with control(pipe, stops, strict=False):
        step = pipe.scheduler.step
        pipe.scheduler.step = interrupted
        with pytest.raises(RuntimeError, match="stopped"):
            drawn(case, pipe)
        pipe.scheduler.step = step
        stops.stopping = False
        assert same(drawn(case, pipe), plain)
