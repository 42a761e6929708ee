"""MultiDiffusion: against literal loops with a solver for each path, and the laws."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

import hookctl
from hookctl import Editor
from hookctl.address.clock import Clock
from hookctl.errors import ConflictError, InputError, UnsupportedError, WordError
from hookctl.loop.noise import Level
from hookctl.recipes import PAG, SAG, FreeU, MultiDiffusion, PromptToPrompt
from hookctl.recipes.common.canvas import plain_colours
from hookctl.recipes.common.canvas.plain_colours import Bootstrapping
from hookctl.recipes.common.canvas.tiles import Tile, tiles_of
from tests import zoo
from tests.families.fingerprint import differences, fingerprint
from tests.families.subjects import error
from tests.recipes.runs import TWO
from tests.recipes.runs import draw_two as draw

SD15 = zoo.PIPELINES["sd15"]  # made for a latent of 16 x 16
WIDE = {"height": 128, "width": 224}  # 16 x 28
TOLERANCE = 1e-4  # fp32, over a few steps


# -- the published loops ---------------------------------------------------------------------------


@torch.no_grad()
def literal(
    pipe: Any,
    start: Tensor,
    texts: list[str],
    masks: Tensor,
    tiles: list[Tile],
    steps: int,
    backgrounds: Any = None,
    bootstrap: int = 0,
) -> Tensor:
    """Every path steps by itself, with a copy of the solver of its own; then they are averaged.

    texts: the background's, then the regions'; masks: [texts, height, width].
    """
    cond, uncond = pipe.encode_prompt(texts, "cpu", 1, True, ["blurry"] * len(texts))
    pipe.scheduler.set_timesteps(steps)
    x = start * pipe.scheduler.init_noise_sigma
    solvers = {(w, r): copy.deepcopy(pipe.scheduler) for w in tiles for r in range(len(texts))}
    for i, t in enumerate(pipe.scheduler.timesteps):
        value, count = torch.zeros_like(x), torch.zeros_like(x)
        for tile in tiles:
            for r in range(len(texts)):
                mask = tile.cut(masks[r])
                if not mask.any():
                    continue
                view, solver = tile.cut(x), solvers[tile, r]
                if r and i < bootstrap:
                    view = torch.where(mask > 0, view, backgrounds(i, tile))
                both = torch.cat([view, view])
                given = solver.scale_model_input(both, t)
                text = torch.cat([uncond[r : r + 1], cond[r : r + 1]])
                u, c = pipe.unet(given, t, text).sample.chunk(2)
                new = solver.step(u + 4.0 * (c - u), t, view).prev_sample
                tile.add(new * mask, value)
                tile.add(mask.expand_as(new), count)
        x = value / count
    return x


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler]
)
@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.slow  # a run for each tile
def test_a_panorama_is_the_average_of_stepped_tiles(scheduler: Any, wrap: bool) -> None:
    """With multistep solvers too, whose memory each literal tile keeps for itself."""
    pipe = SD15.make()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    start = torch.randn(1, 4, 16, 28, generator=torch.Generator().manual_seed(1))
    tiles = tiles_of(16, 28, (16, 16), (4, 4), wrap=wrap)
    want = literal(pipe, start, TWO[:1], torch.ones(1, 16, 28), tiles, 4)
    edit = MultiDiffusion(stride=4, wrap=wrap)
    with hookctl.control(pipe, edit):
        got = SD15.run(pipe, TWO[0], steps=4, latents=start, **WIDE)
    assert error(got, want) < TOLERANCE
    assert error(SD15.run(pipe, TWO[0], steps=4, latents=start, **WIDE), want) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("bootstrap", [0.0, 0.5])
def test_regions_are_what_the_official_loop_makes_of_them(
    bootstrap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overlapping regions over several tiles, round which plain colours stand at first."""
    pipe = SD15.make()
    start = torch.randn(1, 4, 16, 28, generator=torch.Generator().manual_seed(1))
    boxes = [(0.0, 0.0, 0.5, 1.0), (0.25, 0.5, 0.75, 1.0)]
    masks = torch.zeros(3, 16, 28)
    masks[1, :, :14] = 1
    masks[2, 8:, 7:21] = 1
    masks[0] = (1 - masks[1:].sum(0)).clamp(min=0)
    tiles = tiles_of(16, 28, (16, 16), (6, 6))
    colour = torch.randn(1, 4, 1, 1)
    monkeypatch.setattr(
        Bootstrapping,
        "_colour",
        lambda self, pipe, index, w: colour.expand(1, 4, w.height, w.width),
    )
    pipe.scheduler.set_timesteps(2)
    levels = [pipe.scheduler.alphas_cumprod[t] for t in pipe.scheduler.timesteps]

    def backgrounds(i: int, tile: Tile) -> Tensor:
        return levels[i].sqrt() * colour + (1 - levels[i]).sqrt() * tile.cut(start)

    texts = ["a red cat", "a blue dog", "a tree"]
    steps = int(2 * bootstrap)
    want = literal(pipe, start, texts, masks, tiles, 2, backgrounds, steps)
    edit = MultiDiffusion(texts[1:], boxes, stride=6, bootstrap=bootstrap)
    with hookctl.control(pipe, edit):
        got = SD15.run(pipe, texts[0], steps=2, latents=start, **WIDE)
    assert error(got, want) < TOLERANCE


# -- laws ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart", "animatediff", "wan"])
def test_one_tile_is_the_plain_run(name: str) -> None:
    case = zoo.PIPELINES[name]
    pipe = case.make()
    plain = case.run(pipe, TWO)
    before = fingerprint(pipe)
    assert torch.equal(draw(case, pipe, MultiDiffusion(tile=16)), plain)
    wide = draw(case, pipe, MultiDiffusion(tile=6, stride=5))
    assert wide.shape == plain.shape and error(wide, plain) > 1e-4
    assert not differences(before, fingerprint(pipe))
    assert torch.equal(case.run(pipe, TWO), plain)


@pytest.mark.parametrize("bootstrap", [0.0, 1.0])
def test_one_full_region_is_a_run_of_its_text(bootstrap: float) -> None:
    """Bit for bit: what is bootstrapped is outside of the region."""
    pipe = SD15.make()
    plain = SD15.run(pipe, "a blue dog")
    edit = MultiDiffusion(["a blue dog"], [(0, 0, 1, 1)], bootstrap=bootstrap)
    with hookctl.control(pipe, edit):
        assert torch.equal(SD15.run(pipe, "a red cat"), plain)


def test_regions_of_each_prompt() -> None:
    """A list for each prompt; an image is what it is alone."""
    pipe = SD15.make()
    texts, boxes = (
        [["a tree"], ["a dog", "a cat"]],
        [["box:0,0,0.5,1"], [(0, 0, 1, 0.5), (0.5, 0.5, 1, 1)]],
    )
    both = draw(SD15, pipe, MultiDiffusion(texts, boxes, bootstrap=0))
    for p, prompt in enumerate(TWO):
        with hookctl.control(pipe, MultiDiffusion(texts[p], boxes[p], bootstrap=0)):
            alone = SD15.run(pipe, prompt, seed=p)
        assert error(both[p : p + 1], alone) < TOLERANCE
    with pytest.raises(InputError, match="is for 3 prompts"):
        draw(SD15, pipe, MultiDiffusion([["a"]] * 3, [[(0, 0, 1, 1)]] * 3))


def test_denoiser_calls_are_those_of_tiles_and_regions() -> None:
    class Count(Editor):
        sites = "self mid"

        def __init__(self) -> None:
            self.grids: list[Any] = []

        def attention(self, call: Any) -> None:
            self.grids.append(call.latent)

    count, pipe = Count(), SD15.make()
    draw(SD15, pipe, MultiDiffusion(stride=4), count, steps=2, **WIDE)
    assert count.grids == [(16, 16)] * 4 * 2
    count = Count()
    # The left region lies in two of three tiles, and is all that the first one holds.
    region = MultiDiffusion(["a tree"], [(0, 0, 0.75, 1)], stride=6)
    draw(SD15, pipe, region, count, steps=1, **WIDE)
    assert len(count.grids) == 1 + 2 + 2


def test_round_the_sides_there_is_no_seam() -> None:
    """Rolling the canvas rolls the image."""
    pipe = SD15.make()
    start = torch.randn(2, 4, 16, 28, generator=torch.Generator().manual_seed(2))
    edit = MultiDiffusion(stride=7, wrap=True)
    one = draw(SD15, pipe, edit, latents=start, **WIDE)
    rolled = draw(SD15, pipe, edit, latents=start.roll(7, -1), **WIDE)
    assert error(rolled, one.roll(7, -1)) < TOLERANCE
    images = edit.run(pipe, TWO[0], latents=start[:1], num_inference_steps=1, **WIDE)
    assert [image.size for image in images] == [(224, 128)]


# -- together with others --------------------------------------------------------------------------


@pytest.mark.slow
def test_others_act_in_every_tile() -> None:
    pipe, edit = SD15.make(), MultiDiffusion(stride=6)
    alone = draw(SD15, pipe, edit, **WIDE)
    p2p = PromptToPrompt(TWO, self_replace=1.0, self_resolution=1.0)
    for other in (PAG(), FreeU(), p2p):
        both = draw(SD15, pipe, edit, other, **WIDE)
        assert error(both, alone) > 1e-3, other.name
        assert error(both, draw(SD15, pipe, other, **WIDE)) > 1e-3, other.name
        assert error(both, draw(SD15, pipe, other, edit, **WIDE)) < TOLERANCE, other.name


def test_what_needs_the_whole_image_is_refused() -> None:
    with pytest.raises(ConflictError, match="MultiDiffusion and SAG both claim the whole image"):
        draw(SD15, SD15.make(), MultiDiffusion(), SAG())


def test_bad_input() -> None:
    for given, match in (
        ({"tile": 0}, "tile=0"),
        ({"stride": (4, 4, 4)}, "stride=(4, 4, 4)"),
        ({"texts": ["a"], "regions": []}, "as many of both"),
        ({"texts": ["a"], "regions": [(0, 0, 2, 1)]}, "regions"),
        ({"bootstrap": 2.0}, "bootstrap=2.0"),
    ):
        with pytest.raises(InputError, match="MultiDiffusion") as caught:
            MultiDiffusion(**given)
        assert match in str(caught.value)
    for case, editor, kind, match in (
        ("z_image", MultiDiffusion(tile=16), UnsupportedError, "no such tensor"),
        ("controlnet", MultiDiffusion(), UnsupportedError, "ControlNet"),
        ("sd15", MultiDiffusion(stride=17), InputError, "smaller stride"),
    ):
        with pytest.raises(kind, match=match):
            draw(zoo.PIPELINES[case], zoo.PIPELINES[case].make(), editor)


def test_there_are_no_maps_of_tiles() -> None:
    """The first tile's would be taken for the whole image's."""
    editors = MultiDiffusion(stride=12, bootstrap=0), hookctl.Maps("cat")
    pipe = SD15.make()
    with hookctl.control(pipe, *editors) as session:
        pipe("a cat", num_inference_steps=1, output_type="latent", **WIDE)
    with pytest.raises(WordError, match="drawn by tiles"):
        session.maps["cat"]


def test_colours_are_those_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever call of it asks (guidance may take two), and however many images there are."""
    monkeypatch.setattr(
        Bootstrapping, "_colour", lambda self, pipe, index, w: torch.full((1, 4, 1, 1), 1.0 * index)
    )
    monkeypatch.setattr(plain_colours, "level_of", lambda state: Level(1.0, 0.0))
    monkeypatch.setattr(plain_colours, "unit_noise_of", lambda state: state.latents)
    tiles = tiles_of(4, 8, (4, 4), (4, 4))

    def shown(images: int, calls: int) -> list[float]:
        colours, found = Bootstrapping(3), []
        latents = torch.zeros(images, 4, 4, 8)
        for step in range(4):
            state: Any = SimpleNamespace(clock=Clock(step, 4, 1.0), latents=latents, pipe=None)
            if not step:
                colours.begin(state)
            for _ in range(calls):
                each = [colours.outside(state, t, r)[0, 0, 0, 0] for t in tiles for r in (1, 2)]
            found += [float(one) for one in each]
        return found

    assert len(set(shown(1, 1))) > 4
    assert shown(1, 1) == shown(1, 2) == shown(3, 1)


def test_words_of_prompts_are_not_looked_for_in_texts_of_regions() -> None:
    """Their tokens are those of other words there."""
    edit, regions = PromptToPrompt(TWO), MultiDiffusion(["a tree"], ["box:0,0,0.5,1"])
    with pytest.raises(ConflictError, match="both claim the texts that rows see"):
        draw(SD15, SD15.make(), regions, edit)
