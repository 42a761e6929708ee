"""RF-Solver-Edit: the official code in float64, its round trip, its values, what it refuses."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from hookctl import Editor, control
from hookctl.errors import ConflictError, InputError, UnsupportedError
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes import PAG, PromptToPrompt, RFInversion, RFSolver
from hookctl.recipes.common.features.store import FeatureKeeper
from tests.hookctl.loop.families import BY_NAME, FAMILIES
from tests.recipes.images import counted, image
from tests.recipes.literal_features import edited
from tests.recipes.literal_flow import TOKENS, Flux
from tests.recipes.runs import made, relative
from tests.recipes.test_inversions_of_families import given
from tests.recipes.test_inversions_of_families import made as of_first_order
from tests.zoo.wild.around import smaller

CAT, DOG = "a red cat", "a blue dog"
SHORT: dict[str, Any] = {"steps": 6, "arguments": {"max_sequence_length": TOKENS}}
TOLERANCE = 1e-10  # float64


def recipe(name: str = "flux", dtype: Any = torch.float32, **more: Any) -> RFSolver:
    prompt = more.pop("prompt", DOG)
    return RFSolver(made(name, dtype), more.pop("image", image()), prompt, **{**SHORT, **more})


def latents(name: str = "flux", *editors: Editor, **more: Any) -> Tensor:
    found: Tensor = recipe(name, **more).run(*editors, output_type="latent")
    return found


SLOW = pytest.mark.slow


@pytest.mark.parametrize("inject", [pytest.param(0, marks=SLOW), 3, pytest.param(6, marks=SLOW)])
def test_paper_is_the_official_code(inject: int) -> None:
    pipe = made("flux", torch.float64)
    model = Flux(pipe, 6, 64)
    x = model.encode(image())
    noise, want = edited(model, x, (CAT, DOG), [1], inject=inject, scales=(1.0, 2.0), reuse=False)
    options: dict[str, Any] = {"source_prompt": CAT, "inject": inject, "dtype": torch.float64}
    ours = recipe(paper=True, **options)
    assert relative(ours.invert(), noise) < TOLERANCE
    assert relative(ours.run(output_type="latent"), want) < TOLERANCE
    if inject:
        other = latents(**options)
        assert relative(other, want) > 1e-3  # the image's values alone, of the same level


@pytest.mark.parametrize(
    "name", ["sd3", pytest.param("flux", marks=SLOW), pytest.param("qwen_image", marks=SLOW)]
)
def test_a_round_trip_is_ten_times_better_than_eulers(name: str) -> None:
    options = {**SHORT, "steps": 15, "guidance": 1.0, "source_prompt": CAT}
    ours = recipe(name, torch.float64, prompt=CAT, inject=0, **options)
    euler = RFInversion(ours.pipe, image(), CAT, gamma=0.0, eta=0.0, **options)
    error, eulers = (relative(one.run(output_type="latent"), ours.clean) for one in (ours, euler))
    assert error * 10 < eulers


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_without_sharing_it_is_the_midpoint_rule(name: str) -> None:
    ours = recipe(name, inject=0, guidance=3.5)
    drawn: dict[str, Any] = {"embedded": 3.5} if name == "flux" else {"guidance": 3.5}
    noise = ours.invert()
    size = {"height": 128, "width": 128, "max_sequence_length": TOKENS}
    run = Trajectory(made(name), DOG, steps=6, latents=noise, **drawn, **size)
    x = noise
    for here, there in zip(run.levels[:-1], run.levels[1:], strict=True):
        a, b = here.noise, there.noise
        middle = x + (b - a) / 2 * run.predict(x, sigma=a)
        x = x + (b - a) * run.predict(middle, sigma=(a + b) / 2)
    assert torch.equal(ours.run(output_type="latent"), x)


EACH = [
    pytest.param(
        one.name, id=one.name, marks=() if one.name in ("sd3", "flux") else pytest.mark.slow
    )
    for one in FAMILIES
    if one.name not in ("sd15", "sdxl", "pixart")
]


@pytest.mark.parametrize("name", EACH)
def test_what_is_shared_and_what_it_takes(name: str) -> None:
    """In every family: as many bytes as said, and the edit is another for it."""
    family = BY_NAME[name]
    pipe = of_first_order(family)
    source, more = given(family)
    options: dict[str, Any] = {"steps": 3, "inject": 2, "guidance": 1.0, "arguments": more}
    with smaller(type(pipe)):
        ours = RFSolver(pipe, source, DOG, source_prompt=CAT, **options)
        store = ours._store()
        ours._inverted(store)
        assert store.moments == {(1, 0), (1, 1), (0, 1)}
        assert store.bytes == ours.bytes() > 0
        shared = _drawn(ours)
        assert ours.session is not None and "RFSolver (shares)" in ours.session.report()
        plain = _drawn(RFSolver(pipe, source, DOG, source_prompt=CAT, **{**options, "inject": 0}))
    assert relative(shared, plain) > 1e-5 and shared.isfinite().all()


def _drawn(ours: RFSolver) -> Tensor:
    found = ours.run(output_type="latent")
    return found if isinstance(found, Tensor) else found[0]


def test_the_same_features_at_the_same_place_change_nothing() -> None:
    ours = recipe(inject=6, text=True, sites="joint")
    store, program = ours._store(), ours._upwards()
    keeper, injector = FeatureKeeper(store), ours._injector(store)
    keeper.moment = injector.moment = (3, 0)
    ask = partial(program.predict, ours.clean, sigma=0.5, embedded=[1.0])
    with control(ours.pipe, keeper):
        plain = ask()
    with control(ours.pipe, injector):
        again = ask()
    assert torch.equal(plain, ask())
    torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-5)


def test_guidance_shares_with_both_branches() -> None:
    ours = recipe("sd3", guidance=3.0, source_prompt=CAT)
    with counted(ours.pipe, "transformer") as rows:
        shared = ours.run(output_type="latent")
    assert rows == [1] * 12 + [2] * 12
    plain = latents("sd3", guidance=3.0, source_prompt=CAT, inject=0)
    assert relative(shared, plain) > 1e-4


def test_several_images_share_each_their_own() -> None:
    images = [image(), image(1)]
    both = latents("sd3", image=images, prompt=[CAT, DOG], source_prompt="an image")
    for i, (one, prompt) in enumerate(zip(images, (CAT, DOG), strict=True)):
        alone = latents("sd3", image=one, prompt=prompt, source_prompt="an image")
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-4, rtol=1e-3)


def test_half_precision() -> None:
    found = latents(dtype=torch.bfloat16, source_prompt=CAT)
    assert found.dtype == torch.bfloat16
    assert relative(found.float(), latents(source_prompt=CAT)) < 0.5


def test_editors_act_as_the_edit_is_drawn() -> None:
    prompts = [CAT, DOG]
    options: dict[str, Any] = {"image": [image()] * 2, "prompt": prompts, "inject": 0}
    plain = latents("sd3", **options)
    routed = latents("sd3", PromptToPrompt(prompts, self_replace=0.0), **options)
    assert relative(routed[1:], plain[1:]) > 1e-4
    with pytest.raises(ConflictError, match="substitution"):
        latents("sd3", PromptToPrompt(prompts, self_replace=1.0), **{**options, "inject": 2})
    with pytest.raises(UnsupportedError, match="no steps of a scheduler, which PAG"):
        latents("sd3", PAG())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"inject": 7}, "RFSolver: inject=7; give a whole number from 0 to 6"),
        ({"inject": -1}, "RFSolver: inject=-1; give"),
        ({"memory": -1.0}, "RFSolver: memory=-1.0; give"),
        ({"sites": "cross"}, "sites='cross' matches none"),
        ({"prompt": [CAT]}, "RFSolver: image="),
        ({"memory": 1e-6}, r"RFSolver: v of 1 sites at 3 moments take .* GB are memory=; give"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], says: str) -> None:
    with counted(made("flux", torch.float32), "transformer") as rows:
        with pytest.raises(InputError, match=says):
            latents(**options)
    assert len(rows) <= 1  # that of the pattern, which is stopped before it is computed


def test_other_models_and_schedulers_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="StableDiffusionPipeline with .* is not; .*Direct"):
        recipe("sd15")
    pipe = BY_NAME["sd3"].make()
    pipe.scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    with pytest.raises(UnsupportedError, match="RFSolver needs .* first-order scheduler"):
        RFSolver(pipe, image(), CAT, steps=4).run()
