"""Cyclic and selective one-way diffusion, and the flow between regions."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import hookctl
from hookctl import control
from hookctl.address.regions import Region
from hookctl.demos.grown import cases, surroundings
from hookctl.demos.one_way import Watched, draw
from hookctl.demos.shapes.world import BACKGROUNDS
from hookctl.editor import WHOLE_IMAGE, Claim, Editor
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.images import encode
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes import CyclicOneWay, OneWayFlow, SelectiveOneWay
from hookctl.recipes.cyclic_one_way import DIVERSE, NEGATIVE, SUPPRESS
from tests import zoo
from tests.marks import examples
from tests.recipes.literal_appearance import Call, Literal
from tests.recipes.literal_one_way import Cow
from tests.recipes.runs import made, relative

SD15 = zoo.PIPELINES["sd15"]
TOLERANCE = 1e-10  # float64, through some thirty steps guided by 7.5
CAT, DOG = "a red cat above a blue square", "a green dog"
LEFT = (0.0, 0.0, 0.5, 1.0)


def image(size: int = 64) -> Image.Image:
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    return Image.fromarray(np.stack(np.broadcast_arrays(ramp[None], ramp[:, None], ramp), -1))


def program(prompt: str = CAT, cls: type[CyclicOneWay] = CyclicOneWay, **options: Any) -> Any:
    common = {"at": (64, 0), "size": (128, 128), "steps": 10, "cycles": 1}
    return cls(made("sd15"), image(), prompt, **common, **options)


def latents(prompt: str = CAT, **options: Any) -> Tensor:
    out: Tensor = program(prompt, **options).run(output_type="latent")
    return out


@cache
def cyclic() -> Tensor:
    """Of the program as it is."""
    return latents()


# -- flow between regions ----------------------------------------------------------------------


def flow(anneal: bool, cut: bool) -> OneWayFlow:
    flows = [("rest", "left", -math.inf if cut else -2.0), ("left", "rest", 1.5)]
    return OneWayFlow({"left": LEFT}, flows, anneal=anneal)


@pytest.mark.parametrize(("anneal", "cut"), [(False, False), (True, False), (False, True)])
def test_flow_equals_the_written_out_bias(anneal: bool, cut: bool) -> None:
    def attend(call: Call) -> Tensor:
        if call.cross:
            return call.plain()
        side = int(call.q.shape[2] ** 0.5)
        left = (torch.arange(side) < side / 2).repeat(side).double()
        share = 1 - call.step / 2 if anneal else 1.0
        inwards = -torch.inf if cut else -2.0 * share
        bias = 1.5 * share * (1 - left)[:, None] * left
        bias = bias.masked_fill((left[:, None] * (1 - left)) > 0, inwards)
        return call.probabilities(call.q, call.k, bias) @ call.v

    pipe, run = made("sd15", torch.float64), zoo.PIPELINES["sd15"].run
    with Literal(attend).instead(pipe.unet):
        want = run(pipe, CAT)
    with control(pipe, flow(anneal, cut)):
        got = run(pipe, CAT)
    assert relative(got, want) < 1e-9  # float64
    assert relative(got, run(pipe, CAT)) > 1e-4


def test_no_strength_is_no_flow_bit_for_bit() -> None:
    pipe, run = made("sd15"), zoo.PIPELINES["sd15"].run
    with control(pipe, OneWayFlow({"left": LEFT}, [("rest", "left", 0.0)])):
        assert torch.equal(run(pipe, CAT), got := run(pipe, CAT))
    assert torch.equal(run(pipe, CAT), got)


# -- the cycles --------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_cycles_and_writes_it_is_sampling_of_the_inverted_canvas() -> None:
    pipe = made("sd15")
    want = program()
    want.cycles, want.writes, want.final_eta = 0, False, 0.0
    canvas = Image.new("RGB", (128, 128), (128, 128, 128))
    canvas.paste(image(), (64, 0))
    run = Trajectory(pipe, [CAT], steps=10, guidance=7.5, width=128, height=128)
    run.write(encode(pipe, canvas), level=10)
    for level in reversed(range(5, 10)):
        run.invert(level)
    assert torch.equal(want.run(output_type="latent"), run.run())
    assert relative(cyclic(), run.latents) > 1e-3  # a cycle is not nothing


@pytest.mark.slow
def test_the_seed_takes_nothing_from_the_text() -> None:
    """The last thing written is the image's own; all else follows the prompt."""
    a, b = latents(CAT, finish=0.0), latents(DOG, finish=0.0)
    clean = encode(made("sd15"), image())
    for x in (a, b):
        assert torch.equal(x[..., :8, 8:], clean)
    assert relative(a[..., 8:, :], b[..., 8:, :]) > 1e-3
    assert torch.equal(cyclic(), latents())  # its noise is its seed's


@pytest.mark.slow
def test_cost_and_rows_of_the_suppression() -> None:
    rows: list[int] = []
    conv = made("sd15").unet.conv_in
    handle = conv.register_forward_hook(lambda m, args, out: rows.append(len(out)))
    try:
        latents()
        plain, rows[:] = list(rows), []
        latents(paper=True)
    finally:
        handle.remove()
    assert plain == [1] * 7 + [1] * 5 + [2] * 2 + [2] * 5
    assert rows == [2] * 7 + [2] * 5 + [4] * 2 + [2] * 5


FURTHER = {"negative": "", "suppress": "", "diverse": "a dog"}


@pytest.mark.parametrize("texts", examples([{}, FURTHER], [FURTHER]))
def test_paper_is_the_official_code(texts: dict[str, str]) -> None:
    """In float64: a mask that cuts cells, two images, one generator for all noise."""
    pipe = SD15.make().to(torch.float64)
    images = [image(), image().transpose(Image.Transpose.ROTATE_90)]
    pixels = np.random.default_rng(0).integers(0, 2, (64, 64)).astype(np.uint8)
    pixels[:32, :32] = 0
    black = Image.fromarray(pixels * 255)  # the official masks are black where the image counts
    common = {"steps": 10, "at": (64, 0), "cycles": 2, "seed": 3}
    official = tuple(texts.values()) or (NEGATIVE, SUPPRESS, DIVERSE)
    want = Cow(pipe, images, black, [CAT, DOG], canvas=128, texts=official, **common).run()
    given = {"region": ~Region.mask(black), "size": (128, 128), **common, **texts}
    ours = CyclicOneWay(pipe, images, [CAT, DOG], paper=True, **given)
    assert relative(ours.run(output_type="latent"), want) < TOLERANCE
    whole = CyclicOneWay(pipe, images, [CAT, DOG], paper=True, **{**given, "region": None})
    assert relative(whole.run(output_type="latent"), want) > 1e-3


def test_official_levels_of_the_fresh_noise() -> None:
    """One level too noisy: the signal kept is that between the levels before."""
    for paper in (False, True):
        it = program(paper=paper)
        run = it._inverted_canvas(it._encoded(torch.Generator())[1], torch.Generator())
        run.write(torch.ones_like(run.latents))
        it._disturb(run, torch.Generator().manual_seed(3))
        pair = [run.levels[i - paper].signal for i in (it.low, it.high)]
        keep = pair[1] / pair[0]
        noise = torch.randn(run.latents.shape, generator=torch.Generator().manual_seed(3))
        assert torch.allclose(run.latents, keep + (1 - keep**2) ** 0.5 * noise, atol=1e-5)
        assert run.level == it.high


def test_an_image_does_not_depend_on_those_beside() -> None:
    images = [image(), image().transpose(Image.Transpose.ROTATE_90)]
    given = {"at": (64, 0), "size": (128, 128), "steps": 4, "cycles": 1, "final_eta": 0.5}

    def drawn(images: Any, prompts: Any) -> Tensor:
        found: Tensor = CyclicOneWay(made("sd15"), images, prompts, **given).run(
            output_type="latent"
        )
        return found

    assert relative(drawn(images, [CAT, DOG])[1:], drawn(images[1], DOG)) < 1e-4


@pytest.mark.slow
def test_selective_without_strength_is_cyclic() -> None:
    none = latents(cls=SelectiveOneWay, spread=0.0, isolate=0.0)
    assert torch.equal(none, cyclic())
    assert relative(latents(cls=SelectiveOneWay, related=(0, 0.5, 1, 1)), none) > 1e-5


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0.8}, "give 0 <= finish <= start < top <= 1"),
        ({"at": (60, 0)}, "must be multiples of 8"),
        ({"at": (72, 0)}, "must be multiples of 8 and lie inside"),
        ({"suppress": "a cat"}, "give suppress and diverse, both or neither"),
        ({"image_size": (0, 64)}, "give a width and a height of 1 to"),
        ({"image_size": (96, 96)}, "must be multiples of 8 and lie inside"),
        ({"paper": True, "top": 1.0}, "top=1.0 leaves no noisier level"),
    ],
)
def test_wrong_programs(options: dict[str, Any], message: str) -> None:
    given = {"at": (64, 0), "size": (128, 128), **options}
    with pytest.raises(InputError, match=message):
        CyclicOneWay(made("sd15"), image(), CAT, **given)


@pytest.mark.parametrize(
    ("regions", "flows", "message"),
    [
        ({}, [], "name at least one"),
        ({"rest": LEFT}, [], "none 'rest'"),
        ({"left": LEFT}, [("right", "left", 1.0)], "with names of left, rest"),
        ({"left": LEFT}, [("rest", "left", math.inf)], "give a finite strength, or -inf"),
        ({"left": (0.5, 0, 0.2, 1)}, [], r"regions\['left'\]: box: 0.5"),
    ],
)
def test_wrong_flows(regions: Any, flows: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        OneWayFlow(regions, flows)


def test_editors_act_in_all_of_it() -> None:
    seen: list[int] = []

    class Count(Editor):
        def before(self, state: Any) -> None:
            seen.append(state.clock.step)

    program().run(Count(), output_type="latent")
    assert seen == [3, 4, 5, 6, 7, 8, 9]  # the steps of one cycle, then to the end


def test_the_image_alone_is_shown_to_no_editor_of_the_canvas() -> None:
    grids: dict[str, set[Any]] = {"anywhere": set(), "of the canvas": set()}

    class Anywhere(Editor):
        sites = "self @1"
        kind = "anywhere"

        def attention(self, call: Any) -> None:
            grids[self.kind].add((call.grid.height, call.grid.width))

    class OfTheCanvas(Anywhere):
        kind = "of the canvas"

        def claims(self) -> list[Claim]:
            return [Claim(WHOLE_IMAGE, shared=True)]

    program().run(Anywhere(), OfTheCanvas(), output_type="latent")
    assert grids == {"anywhere": {(8, 8), (16, 16)}, "of the canvas": {(16, 16)}}


def test_images_are_resized() -> None:
    drawn = CyclicOneWay(made("sd15"), image(128), CAT, image_size=(64, 64), at=(8, 0))
    assert drawn.pasted.images[0].size == (64, 64) and drawn.pasted.cells == (1, 0, 8, 8)


@pytest.mark.long  # several whole runs
def test_the_flow_carries_the_background_of_an_image() -> None:
    """On the embedded pipeline: into the scene with it, and not when it is turned about."""
    pipe = hookctl.load_shapes()
    pipe.set_progress_bar_config(disable=True)
    scenes = cases(seed=1, count=4, said=False)
    shares, apart = {}, {}
    for name in ("COW", "SOW", "SOW turned about"):
        watched = Watched()
        drawn = draw(pipe, name, scenes, seed=0, watched=watched)
        shares[name] = watched.figures()["attention_into_image"]
        apart[name] = [
            np.abs(surroundings(p) - BACKGROUNDS[c.background]).mean()
            for c, p in zip(scenes, drawn, strict=True)
        ]
    assert shares["SOW turned about"] < 0.7 * shares["COW"] < 0.7 * shares["SOW"]
    assert np.mean(apart["SOW"]) < 40 < np.mean(apart["SOW turned about"])


@pytest.mark.parametrize("cls", [CyclicOneWay, SelectiveOneWay])
def test_fresh_noise_that_steps_do_not_take(cls: type[CyclicOneWay]) -> None:
    """Found before anything is drawn, with what would do."""
    flow, given = made("sd3"), {"at": (0, 0), "size": (64, 64), "steps": 4, "cycles": 1}
    with pytest.raises(UnsupportedError, match=rf"{cls.__name__}: eta.*takes no eta.*give 0"):
        cls(flow, image(32), CAT, **given)
