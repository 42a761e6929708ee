"""Programs drive every family: a plain run is the pipeline's own, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hookctl import AttentionCall, Editor, control
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.packing import packed, side_of_token, unpacked
from hookctl.loop.trajectory import Trajectory
from tests.families.fingerprint import unchanged
from tests.hookctl.loop.families import BY_NAME, FAMILIES, Family, generators
from tests.zoo.wild import WILD


def marks(family: Family) -> Any:
    return pytest.mark.slow if family.name in ("sd15", "sdxl") or "Edit" in family.name else ()


EACH = [pytest.param(family, id=family.name, marks=marks(family)) for family in FAMILIES]
EVERY = [
    pytest.param(family, guidance, id=f"{family.name}-{guidance:g}", marks=marks(family))
    for family in FAMILIES
    for guidance in ([1.0, 4.0] if family.guides else [1.0])
]
SOME = [BY_NAME[name] for name in ("flux", "z_image", "qwen_image", "wan") if name in BY_NAME]


def tensor(images: Any) -> Tensor:
    return images if isinstance(images, Tensor) else torch.as_tensor(np.asarray(images))


def noise(like: Tensor, seed: int = 5) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)


def check(family: Family, guidance: float, pipe: Any = None, images: bool = False) -> Trajectory:
    """A program's latents, and images, are those of the pipeline."""
    pipe = family.make() if pipe is None else pipe
    expected = family.drawn(pipe, guidance)
    with unchanged(pipe):
        run = family.program(pipe, guidance)
        run.run()
        latents = run.decode("latent")
    assert torch.equal(latents, expected)
    # There and back, in the form that masks and noise have.
    assert torch.equal(run.packed(run.unpacked()), run.latents)
    if images:
        shown = family.drawn(pipe, guidance, output_type="np")
        assert torch.equal(tensor(run.decode("np")), tensor(shown))
    return run


@pytest.mark.parametrize(("family", "guidance"), EVERY)
def test_a_plain_program_is_the_pipelines_run(family: Family, guidance: float) -> None:
    check(family, guidance)


@pytest.mark.slow
@pytest.mark.parametrize("family", EACH)
def test_images_and_bfloat16(family: Family) -> None:
    guidance = 4.0 if family.guides else 1.0
    check(family, guidance, images=True)
    check(family, guidance, family.make().to(torch.bfloat16), images=True)


SETTINGS = [
    ("z_image", {"cfg_normalization": 0.7}),
    ("z_image", {"cfg_truncation": 0.3}),
    ("LTXPipeline", {"guidance_rescale": 0.7}),
    ("sd15", {"guidance_rescale": 0.7}),
    ("flux", {"height": 64, "width": 128}),
    ("flux2_klein", {"height": 64, "width": 128}),
    ("qwen_image", {"height": 64, "width": 128}),
    ("LTXPipeline", {"height": 32, "width": 64}),
]


@pytest.mark.parametrize(
    ("name", "more"), [case for case in SETTINGS if case[0] in BY_NAME], ids=str
)
def test_settings_and_sizes(name: str, more: dict[str, Any]) -> None:
    family = BY_NAME[name]
    run = check(replace(family, more=family.more | more), 4.0, images="height" in more)
    if "height" in more:
        assert run.size == (more["height"], more["width"])


def test_references_of_several_sizes() -> None:
    if "flux2_klein" not in BY_NAME:
        return  # this version of diffusers has no such pipeline
    sizes = [(64, 96), (64, 64)]
    given = {"image": [Image.fromarray(np.zeros((*s, 3), np.uint8)) for s in sizes]}
    family = replace(BY_NAME["flux2_klein"], more=given)
    run = check(family, 4.0)
    whole = run.template.arguments["hidden_states"].shape[1]
    assert run.latents.shape[1] == 64 and whole == 64 + 24 + 16


def test_guided_decoding_of_ltx() -> None:
    """Whose decoder may be told how much noise it is given."""
    family = BY_NAME["LTXPipeline"]
    pipe = family.make()
    config = {**pipe.vae.config, "timestep_conditioning": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.vae = type(pipe.vae).from_config(config).eval()
    told = {"decode_timestep": 0.05, "decode_noise_scale": 0.025}
    check(replace(family, more=told), 1.0, pipe, images=True)


# -- editors ---------------------------------------------------------------------------------------


class Acts(Editor):
    """Halves values of conditional rows, guides less, and scales what each step makes."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def attention(self, call: AttentionCall) -> None:
        for row in call.rows.where(role="cond"):
            call.replace(row, v=0.5 * call.v[row.index])

    def combine(self, predictions: Any) -> Tensor:
        self.seen.append((predictions.state.clock, tuple(predictions.branches)))
        return predictions.guided + 0.1 * predictions["cond"]

    def after(self, state: Any) -> None:
        state.latents = 0.9 * state.latents


@pytest.mark.parametrize("family", EACH)
def test_editors_act_in_a_program_as_in_the_pipeline(family: Family) -> None:
    pipe, guidance = family.make(), 4.0 if family.guides else 1.0
    theirs, ours = Acts(), Acts()
    with control(pipe, theirs):
        expected = family.drawn(pipe, guidance)
    with control(pipe, ours):
        run = family.program(pipe, guidance)
        run.run()
    assert torch.equal(run.decode("latent"), expected)
    assert not torch.equal(expected, family.drawn(pipe, guidance))
    assert [branches for _, branches in ours.seen] == [branches for _, branches in theirs.seen]
    assert {c.step for c, _ in ours.seen} == {c.step for c, _ in theirs.seen} == {0, 1, 2}
    assert set(ours.seen[0][1]) == ({"cond", "uncond"} if family.guides else {"cond"})


# -- predictions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EACH)
def test_the_guided_prediction_is_what_is_stepped(family: Family) -> None:
    pipe, handed = family.make(), list[Tensor]()

    class Keeps(Editor):
        def combine(self, predictions: Any) -> Tensor:
            handed.append(predictions.guided)
            return predictions.guided + 0.0

    run = family.program(pipe, 4.0 if family.guides else 1.0)
    with control(pipe, Keeps(), strict=False):
        predicted = run.predict(run.latents, 0)
        assert not handed  # nobody combines what no step follows
        run.denoise(0)
    assert torch.equal(predicted, handed[0])


@pytest.mark.parametrize("family", EACH)
def test_one_prompts_conditions_alone(family: Family) -> None:
    if len(family.prompts) < 2:
        return
    run = family.program(family.make(), 4.0 if family.guides else 1.0)
    x = noise(run.latents)
    both = run.predict(x, 1)
    for i in range(2):
        alone = run.predict(x[i : i + 1], 1, prompt=i)
        torch.testing.assert_close(alone, both[i : i + 1], atol=1e-4, rtol=1e-3)
    other = run.predict(x[:1], 1, prompt=1)
    assert (other - both[:1]).abs().max() > 1e-3
    with pytest.raises(InputError, match="2 latents for 1 images of prompt 0"):
        run.predict(x, 1, prompt=0)
    with pytest.raises(InputError, match="prompt=2; this run has the prompts 0 to 1"):
        run.predict(x, 1, prompt=2)


# What the denoiser is told of a share of noise s.
TIMES = {
    "flux": lambda s: s,
    "flux2_klein": lambda s: s,
    "qwen_image": lambda s: s,
    "FluxKontextPipeline": lambda s: s,
    "z_image": lambda s: 1 - s,
    "sd3": lambda s: 1000 * s,
    "wan": lambda s: 1000 * s,
    "WanPipeline of two denoisers": lambda s: 1000 * s,
    "LTXPipeline": lambda s: 1000 * s,
    "HunyuanVideoPipeline": lambda s: 1000 * s,
}


@pytest.mark.parametrize("name", [name for name in TIMES if name in BY_NAME])
def test_predictions_between_levels(name: str) -> None:
    family, told = BY_NAME[name], list[float]()
    pipe = family.make()
    run = family.program(pipe, 1.0)
    x = noise(run.latents)
    for level in (0, 1, run.steps):
        at_sigma = run.predict(x, sigma=run.levels[level].noise)
        assert torch.equal(at_sigma, run.predict(x, level))

    def tells(module: Any, args: Any, kwargs: Any) -> None:
        told.append(float(kwargs["t" if "t" in kwargs else "timestep"].flatten()[0]))

    sigma = 0.5 * (run.levels[1].noise + run.levels[2].noise)
    _, *others = handles = [
        model.register_forward_pre_hook(tells, with_kwargs=True)
        for model in (pipe.transformer, getattr(pipe, "transformer_2", None))
        if model is not None
    ]
    between = run.predict(x, sigma=sigma)
    for handle in handles:
        handle.remove()
    assert told == [pytest.approx(TIMES[name](sigma), rel=1e-5)]
    assert between.shape == x.shape
    assert not any(torch.equal(between, run.predict(x, i)) for i in (1, 2))
    assert len(others) == (name == "WanPipeline of two denoisers")


def test_wans_second_denoiser_takes_over() -> None:
    family = BY_NAME["WanPipeline of two denoisers"]
    pipe = family.make()
    run, asked = family.program(pipe, 1.0), list[str]()
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: asked.append(name))
    for sigma in (1.0, 0.9, 0.86, 0.1):
        run.predict(run.latents, sigma=sigma)
    assert asked == ["transformer"] * 2 + ["transformer_2"] * 2


@pytest.mark.parametrize("name", [n for n in ("flux", "HunyuanVideoPipeline") if n in BY_NAME])
def test_the_scale_that_a_model_was_taught(name: str) -> None:
    family = BY_NAME[name]
    pipe = family.make()
    runs = {g: family.program(pipe, 1.0, embedded=g) for g in (1.0, 6.0)}
    x = noise(runs[1.0].latents)
    one, six = (runs[g].predict(x, 1) for g in (1.0, 6.0))
    assert not torch.equal(one, six)
    assert torch.equal(runs[1.0].predict(x, 1, embedded=6.0), six)
    mixed = runs[1.0].predict(x, 1, embedded=[1.0, 6.0])
    torch.testing.assert_close(mixed, torch.cat([one[:1], six[1:]]), atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match=r"embedded=\[1.0\]; give one scale, or one for each of 2"):
        runs[1.0].predict(x, 1, embedded=[1.0])


@pytest.mark.parametrize("family", EACH)
def test_the_refined_inverse_leads_back(family: Family) -> None:
    pipe = family.make()
    run = family.program(pipe, 1.0, steps=12)
    run.write(noise(run.latents), level=12)
    wanted, errors = run.latents, []
    for refine in (0, 15):
        run.solver.forget()
        run.write(wanted, level=12)
        run.invert(11, refine=refine)
        run.denoise(11)
        errors.append(float((run.latents - wanted).norm() / wanted.norm()))
    assert errors[1] < max(1e-4, 1e-2 * errors[0]), errors


# -- the grid of packed latents --------------------------------------------------------------------


@pytest.mark.parametrize("family", EACH)
def test_masks_and_noise_of_the_grid(family: Family) -> None:
    run = family.program(family.make(), 1.0)
    before, grid = run.latents, run.unpacked()
    assert grid.dim() in (4, 5)
    mask = torch.zeros(grid.shape[-2:])
    mask[: grid.shape[-2] // 2] = 1
    fresh = noise(grid)
    run.write(fresh, mask)
    rows = grid.shape[-2] // 2
    after = run.unpacked()
    assert torch.equal(after[..., :rows, :], fresh.to(after)[..., :rows, :])
    assert torch.equal(after[..., rows:, :], grid[..., rows:, :])
    assert run.latents.shape == before.shape
    wrong = torch.zeros(grid.shape[-2] + 2, grid.shape[-1])
    with pytest.raises(InputError, match="mask"):
        run.write(fresh, wrong)


def test_the_grid_of_fibo_is_that_of_its_own_unpacking() -> None:
    pipe = WILD["BriaFiboPipeline"].original
    tokens, side = torch.randn(1, 6, 4), side_of_token(pipe)
    theirs = pipe._unpack_latents_no_patch(tokens, 2 * side, 3 * side, pipe.vae_scale_factor)
    grid = unpacked(pipe, tokens, (2, 3))
    assert torch.equal(grid[:, :, 0], theirs)
    assert torch.equal(packed(pipe, grid), tokens)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOME, ids=lambda family: family.name)
def test_levels_outside_the_schedule(family: Family) -> None:
    run = family.program(family.make(), 1.0)
    x = run.latents
    with pytest.raises(InputError, match="level 4; this run has the levels 0 to 3"):
        run.predict(x, 4)
    with pytest.raises(InputError, match=r"sigma.*1\.5"):
        run.predict(x, sigma=1.5)
    with pytest.raises(InputError, match="give one of them"):
        run.predict(x)
    with pytest.raises(InputError, match="give one of them"):
        run.predict(x, 1, sigma=0.5)


def test_what_a_family_lacks_is_told() -> None:
    for name in ("sd15", "sd3", "flux", "wan"):
        pipe = BY_NAME[name].make()
        with pytest.raises(InputError, match="image: .* takes none; it has no references"):
            Trajectory(pipe, "a cat", image=Image.new("RGB", (64, 64)))
    pipe = BY_NAME["sd15"].make()
    with pytest.raises(UnsupportedError, match="has no time between its timesteps"):
        run = Trajectory(pipe, "a cat", steps=2)
        run.predict(run.latents, sigma=0.5)
    with pytest.raises(UnsupportedError, match="was taught no scale of guidance; give guidance="):
        Trajectory(pipe, "a cat", steps=2, embedded=3.5)
    with pytest.raises(InputError, match=r"embedded=1e\+300; give a number from -1e\+38 to 1e\+38"):
        Trajectory(BY_NAME["flux"].make(), "a cat", steps=2, embedded=1e300)
    with pytest.raises(InputError, match="guidance_scale=5.0; give guidance"):
        Trajectory(pipe, "a cat", steps=2, guidance_scale=5.0)
    if "flux2_klein" in BY_NAME:
        pipe = BY_NAME["flux2_klein"].make()
        with pytest.raises(InputError, match="negative='blurry': .* it is always empty"):
            BY_NAME["flux2_klein"].program(pipe, 4.0, negative="blurry")
        pipe.register_to_config(is_distilled=True)
        with pytest.raises(InputError, match="its model is distilled; give guidance=1"):
            BY_NAME["flux2_klein"].program(pipe, 4.0)
    edits = BY_NAME["QwenImageEditPlusPipeline"]
    with pytest.raises(InputError, match="can't prepare a run .* Give what its call needs besides"):
        edits.program(edits.make(), 1.0, image=None)
    with pytest.raises(InputError, match="2 generators for 1 images"):
        BY_NAME["flux"].program(BY_NAME["flux"].make(), 1.0, prompts=["a"], generator=generators(2))
