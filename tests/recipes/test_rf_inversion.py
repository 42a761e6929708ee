"""RF-Inversion: the official code in float64, its two ends, editors, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from hookctl import Editor
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.noise import noise_like
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes import PromptToPrompt, RFInversion
from hookctl.recipes.common.real_images.flow import is_taught_scale
from tests.hookctl.loop.families import BY_NAME, FAMILIES
from tests.recipes.images import counted, image
from tests.recipes.literal_flow import TOKENS, FlowMatchExact, Flux, rf_edit, rf_invert
from tests.recipes.runs import made, relative
from tests.recipes.test_inversions_of_families import Keeps, given
from tests.recipes.test_inversions_of_families import made as of_first_order
from tests.zoo.wild.around import smaller

CAT = "a red cat"
SHORT: dict[str, Any] = {"steps": 6, "arguments": {"max_sequence_length": TOKENS}}
TOLERANCE = 1e-10  # float64


def recipe(name: str = "flux", **more: Any) -> RFInversion:
    return RFInversion(made(name), image(), more.pop("prompt", CAT), **{**SHORT, **more})


def latents(name: str = "flux", *editors: Editor, **more: Any) -> Tensor:
    found: Tensor = recipe(name, **more).run(*editors, output_type="latent")
    return found


def exact() -> Any:
    """A pipeline in float64 whose steps are too."""
    pipe = BY_NAME["flux"].make().to(torch.float64)
    pipe.scheduler = FlowMatchExact.from_config(pipe.scheduler.config)
    return pipe


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_it_is_the_official_code(published: bool, decay: float) -> None:
    pipe = exact()
    model = Flux(pipe, 6, 64)
    generator = torch.Generator().manual_seed(3)
    x = model.encode(image(), generator if published else None)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    upwards = 0.0 if published else 1.0
    want = rf_invert(model, x, noise, gamma=0.4, scale=upwards, published=published)
    pulls: dict[str, Any] = {
        "gamma": 0.4,
        "eta": 0.9,
        "start": 0.2,
        "stop": 0.7,
        "decay": decay,
        "seed": 3,
    }
    ours = RFInversion(pipe, image(), CAT, paper=published, **pulls, **SHORT)
    assert relative(ours.invert(), want) < TOLERANCE
    edit = rf_edit(model, want, x, CAT, eta=0.9, start=1, stop=4, power=decay, scale=3.5)
    assert relative(ours.run(output_type="latent"), edit) < TOLERANCE
    assert relative(edit, x) > 1e-2


def test_published_times_are_others() -> None:
    level, published = (recipe(times=times).invert() for times in ("level", "published"))
    assert relative(level, published) > 1e-3
    assert recipe(paper=True).times == "published" and recipe().times == "level"


def test_an_image_is_drawn_from_the_encoder_as_it_is_alone() -> None:
    pictures = [image(), image().transpose(Image.Transpose.ROTATE_180)]
    pipe = made("flux")
    both = RFInversion(pipe, pictures, [CAT, CAT], paper=True, **SHORT)
    alone = [RFInversion(pipe, one, CAT, paper=True, **SHORT) for one in pictures]
    for i, one in enumerate(alone):
        assert torch.equal(both.clean[i], one.clean[0])
        assert torch.equal(both.noise, one.noise)


EACH = [
    pytest.param(
        one.name, id=one.name, marks=() if one.name in ("sd3", "flux") else pytest.mark.slow
    )
    for one in FAMILIES
    if one.name not in ("sd15", "sdxl", "pixart")
]


@pytest.mark.parametrize("name", EACH)
def test_both_ends_of_both_pulls(name: str) -> None:
    """gamma = 1 ends on the noise, eta = 1 on the image; in every family."""
    family = BY_NAME[name]
    pipe = of_first_order(family)
    source, more = given(family)
    guided = is_taught_scale(pipe) or family.guides
    options: dict[str, Any] = {"steps": 3, "guidance": 3.0 if guided else 1.0, "arguments": more}
    keeps = Keeps()
    with smaller(type(pipe)):
        found = RFInversion(pipe, source, CAT, gamma=1.0, eta=1.0, stop=1.0, **options)
        inverted = found.invert()
        found.run(keeps, output_type="latent")
    torch.testing.assert_close(inverted, found.noise.to(inverted), atol=1e-4, rtol=1e-4)
    assert torch.equal(keeps.latents, found.clean.to(keeps.latents))


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_without_pulls_it_is_inversion_and_denoising(name: str) -> None:
    ours = recipe(name, gamma=0.0, eta=0.0, source_prompt=CAT)
    scale: dict[str, Any] = {"embedded": 1.0} if name == "flux" else {}
    size: dict[str, Any] = {"height": 128, "width": 128, "max_sequence_length": TOKENS}
    run = Trajectory(made(name), CAT, steps=6, latents=ours.clean, **scale, **size)
    run.write(ours.clean, level=6)
    for i in reversed(range(6)):
        run.invert(i, timestep="source")
    torch.testing.assert_close(ours.invert(), run.latents, atol=1e-5, rtol=1e-5)
    drawn: dict[str, Any] = {"embedded": 3.5} if name == "flux" else {"guidance": 3.5}
    plain = Trajectory(made(name), CAT, steps=6, latents=ours.invert(), **drawn, **size)
    assert torch.equal(ours.run(output_type="latent"), plain.run())


def test_the_image_is_nearer_the_more_it_pulls() -> None:
    clean = recipe().clean
    by_eta = [relative(latents(eta=eta, stop=0.7), clean) for eta in (0.0, 0.4, 0.8)]
    by_stop = [relative(latents(eta=0.8, stop=stop), clean) for stop in (0.0, 0.5, 0.9)]
    assert by_eta == sorted(by_eta, reverse=True) and by_stop == sorted(by_stop, reverse=True)
    assert relative(latents(eta=0.8, stop=0.7, decay=1.0), clean) > by_eta[-1]
    assert torch.equal(latents(), latents()) and not torch.equal(latents(), latents(seed=1))


def test_editors_act_as_the_edit_is_drawn() -> None:
    prompts = [CAT, "a red dog"]
    images: dict[str, Any] = {"prompt": prompts, "eta": 0.5}

    def two(*editors: Editor) -> Tensor:
        made_ = RFInversion(made("sd3"), [image()] * 2, **images, **SHORT)
        found: Tensor = made_.run(*editors, output_type="latent")
        return found

    plain, routed = two(), two(PromptToPrompt(prompts, self_replace=0.0))
    assert relative(routed[1:], plain[1:]) > 1e-4
    torch.testing.assert_close(routed[:1], plain[:1], atol=1e-5, rtol=1e-4)
    assert relative(plain[1:], plain[:1]) > 1e-3


def test_cost_and_noise() -> None:
    with counted(made("sd3"), "transformer") as rows:
        found = recipe("sd3")
        found.run(output_type="latent")
    assert rows == [1] * 6 + [2] * 6
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(found.noise, noise_like(found.clean, generator))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"gamma": 1.5}, "RFInversion: gamma=1.5; give a number from 0 to 1"),
        ({"eta": -0.1}, "RFInversion: eta=-0.1; give a number from 0 to 1"),
        ({"start": 0.5, "stop": 0.2}, "give a start before the stop"),
        ({"stop": 0.1}, "start=0.0, stop=0.1 hold none of 6 steps"),
        ({"stop": 1.2}, "a fraction of the schedule"),
        ({"decay": -1.0}, "RFInversion: decay=-1.0; give"),
        ({"times": "shifted"}, "RFInversion: times='shifted'; give"),
        ({"prompt": [CAT]}, "RFInversion: image="),
    ],
)
def test_wrong_arguments(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        recipe(**options)


def test_other_models_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="StableDiffusionPipeline with .* is not; .*Direct"):
        recipe("sd15")
