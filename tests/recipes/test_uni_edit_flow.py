"""UniEdit-Flow: both official codes in float64, its inverse, its mask, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hookctl import Editor
from hookctl.errors import InputError, UnsupportedError
from hookctl.recipes import PAG, PromptToPrompt, RFInversion, UniEditFlow
from tests.hookctl.loop.families import BY_NAME, FAMILIES
from tests.recipes.images import counted, image
from tests.recipes.literal_flow import SD3, TOKENS, Flux
from tests.recipes.literal_uni_edit import uni_edit, uni_inv
from tests.recipes.runs import made, relative
from tests.recipes.test_inversions_of_families import given
from tests.recipes.test_inversions_of_families import made as of_first_order
from tests.zoo.wild.around import smaller

CAT, DOG = "a red cat", "a blue dog"
SHORT: dict[str, Any] = {"steps": 6, "arguments": {"max_sequence_length": TOKENS}}
TOLERANCE = 1e-10  # float64


def recipe(name: str = "sd3", dtype: Any = torch.float32, **more: Any) -> UniEditFlow:
    prompt = more.pop("prompt", DOG)
    return UniEditFlow(made(name, dtype), more.pop("image", image()), prompt, **{**SHORT, **more})


def latents(name: str = "sd3", *editors: Editor, **more: Any) -> Tensor:
    found: Tensor = recipe(name, **more).run(*editors, output_type="latent")
    return found


@pytest.mark.parametrize("zero_init", [False, True])
def test_paper_is_the_official_code_of_flux(zero_init: bool) -> None:
    model = Flux(made("flux", torch.float64), 6, 64)
    x = model.encode(image())
    times = [*model.timesteps, torch.tensor(0.0)]

    def velocity(x: Tensor, i: int, prompt: str) -> Tensor:
        return model.velocity(x, times[i].to(x.dtype) / 1000, prompt, 1.0)

    inverted = uni_inv(velocity, x, model.sigmas, 4, zero_init)
    want = uni_edit(velocity, inverted, model.sigmas, 4, (CAT, DOG), 5.0, signed=False)
    options: dict[str, Any] = {"source_prompt": CAT, "zero_init": zero_init}
    ours = recipe("flux", torch.float64, paper=True, **options)
    assert ours.taken == 4
    assert relative(ours.invert(), inverted) < TOLERANCE
    assert relative(ours.run(output_type="latent"), want) < TOLERANCE
    assert relative(latents("flux", dtype=torch.float64, **options), want) < TOLERANCE
    assert relative(want, x) > 1e-2


def test_paper_is_the_official_code_of_diffusers() -> None:
    pipe = made("sd3", torch.float64)
    model, vae = SD3(pipe, 6), made("sd3").vae.config
    sigmas = pipe.scheduler.sigmas.tolist()
    times = [*model.timesteps, torch.tensor(0.0)]
    x = model.encode(image()) / vae.scaling_factor + vae.shift_factor
    x = x * vae.scaling_factor + vae.shift_factor  # in the place of (x - shift) * scaling

    def velocity(x: Tensor, i: int, prompt: str) -> Tensor:
        text, _, pooled, _ = model.text(prompt)
        found: Tensor = pipe.transformer(
            x, timestep=times[i].expand(1), encoder_hidden_states=text, pooled_projections=pooled
        ).sample
        return found

    inverted = uni_inv(velocity, x, sigmas, 3)
    want = uni_edit(velocity, inverted, sigmas, 3, (CAT, DOG), 5.0, signed=True)
    options: dict[str, Any] = {"source_prompt": CAT, "mask": "signed", "dtype": torch.float64}
    ours = recipe(paper=True, **options)
    assert ours.taken == 3  # of 3.6
    assert relative(ours.invert(), inverted) < TOLERANCE
    assert relative(ours.run(output_type="latent"), want) < TOLERANCE
    assert relative(latents(**options), want) > 1e-3


def test_the_inverse_of_eulers_steps() -> None:
    """With equal prompts it is sampling, and the round trip is nearer than a naive one."""
    options = {**SHORT, "steps": 15}
    ours = recipe(dtype=torch.float64, prompt="", alpha=1.0, **options)
    naive = RFInversion(ours.pipe, image(), "", gamma=0.0, eta=0.0, guidance=1.0, **options)
    again, other = (one.run(output_type="latent") for one in (ours, naive))
    assert relative(again, ours.clean) * 3 < relative(other, ours.clean)


def test_equal_texts_are_sampling() -> None:
    """m is 0 then; in the official code it is NaN."""
    same = recipe(source_prompt=DOG, alpha=1.0)
    plain = RFInversion(same.pipe, image(), DOG, gamma=0.0, eta=0.0, guidance=1.0, **SHORT)
    plain.invert = same.invert  # type: ignore[method-assign]
    found = same.run(output_type="latent")
    torch.testing.assert_close(found, plain.run(output_type="latent"), atol=1e-5, rtol=1e-4)
    assert all(not m.any() for m in same.masks)
    assert latents(source_prompt=DOG, paper=True).isnan().any()


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_mask_is_that_of_the_image(name: str) -> None:
    ours = recipe(name, source_prompt=CAT)
    ours.run(output_type="latent")
    assert len(ours.masks) == ours.taken == 4
    assert all(m.shape == (1, 16, 16) and m.min() == 0 and m.max() == 1 for m in ours.masks)
    weak, strong = (
        relative(latents(name, source_prompt=CAT, omega=omega), ours.clean) for omega in (0.0, 5.0)
    )
    assert weak < strong


EACH = [
    pytest.param(one.name, id=one.name, marks=() if one.name == "sd3" else pytest.mark.slow)
    for one in FAMILIES
    if one.name not in ("sd15", "sdxl", "pixart")
]


@pytest.mark.parametrize("name", EACH)
def test_every_family(name: str) -> None:
    family = BY_NAME[name]
    pipe = of_first_order(family)
    source, more = given(family)
    options: dict[str, Any] = {"steps": 3, "source_prompt": CAT, "arguments": more}
    with smaller(type(pipe)):
        if len(family.prompts) == 1:
            with pytest.raises(
                UnsupportedError, match="UniEditFlow: .* reads one prompt at a time"
            ):
                UniEditFlow(pipe, source, DOG, **options).run()
            return
        ours = UniEditFlow(pipe, source, DOG, **options)
        found = ours.run(output_type="latent")
    drawn = found if isinstance(found, Tensor) else found[0]
    assert drawn.isfinite().all() and all(m.max() == 1 for m in ours.masks)


def test_several_images_have_masks_of_their_own() -> None:
    images, sources = [image(), image(1)], [CAT, "a green tree"]
    prompts = [DOG, CAT]
    both = latents(image=images, prompt=prompts, source_prompt=sources)
    for i in range(2):
        alone = latents(image=images[i], prompt=prompts[i], source_prompt=sources[i])
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-3, rtol=1e-3)


def test_cost() -> None:
    ours = recipe()
    with counted(ours.pipe, "transformer") as rows:
        ours.run(output_type="latent")
        assert rows == [1] * 5 + [2] * 4
        rows.clear()
        latents(zero_init=True, guidance=3.0)
    assert rows == [1] * 4 + [4] * 4


def test_editors_act_between_source_and_edit() -> None:
    plain = latents(source_prompt=CAT)
    routed = latents("sd3", PromptToPrompt([CAT, DOG], self_replace=0.0), source_prompt=CAT)
    assert relative(routed, plain) > 1e-4
    with pytest.raises(UnsupportedError, match="no steps of a scheduler, which PAG"):
        latents("sd3", PAG())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"alpha": 0.0}, "UniEditFlow: alpha=0.0; give a number above 0, at most 1"),
        ({"alpha": 0.01}, "UniEditFlow: alpha=0.01; give so much that one of 6 steps is taken"),
        ({"omega": -1.0}, "UniEditFlow: omega=-1.0; give"),
        ({"mask": "squared"}, "UniEditFlow: mask='squared'; give one of absolute, signed"),
        ({"source_prompt": [CAT, DOG]}, "source_prompt=.* has 2 entries for 1 images"),
        ({"prompt": [CAT]}, "UniEditFlow: image="),
    ],
)
def test_wrong_arguments(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        recipe(**options)


def test_other_models_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="StableDiffusionPipeline with .* is not; .*Direct"):
        recipe("sd15")
