"""ConsiStory against its formulas on matrices, its parts by brute force, and its laws."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.sites import Grid
from hookctl.errors import InputError, UnsupportedError, WordError
from hookctl.recipes import ConsiStory
from hookctl.recipes.common.features.correspondence import matched
from hookctl.recipes.common.features.otsu import otsu
from tests import zoo
from tests.recipes import runs
from tests.recipes.literal_appearance import Call, Literal
from tests.recipes.runs import made, relative

SET = ["a red cat above a blue square", "a cat", "a blue cat"]
STEPS = 4
draw, plain = partial(runs.draw, steps=STEPS), partial(runs.plain, steps=STEPS)
Story = partial(ConsiStory, SET, "cat", query_stop=0.5)


# -- the formulas ------------------------------------------------------------------------------


class Shared:
    """Two forward passes in the first half of the steps, of which the first tells the queries;
    anchors are the first two images."""

    def __init__(self, tokens: list[int], seed: int) -> None:
        self.tokens, self.seed = tokens, seed  # of the subject in each prompt
        self.literal, self.pipe = Literal(self), made("sd15", torch.float64)
        self.vanilla, self.queries, self.step = False, dict[str, Tensor](), 0
        self.maps: list[Tensor] = []  # the newest ones, [images, 16, 16]
        self.means: Tensor | None = None

    def __call__(self, call: Call) -> Tensor:
        if self.vanilla:
            self.queries[call.path] = call.q
            return call.plain()
        n = call.q.shape[2]
        if call.cross:
            p = call.probabilities(call.q, call.k)
            if n == 256:
                cond = p.chunk(2)[1].mean(1)
                columns = [x[:, t] for x, t in zip(cond, self.tokens, strict=True)]
                self.maps.append(torch.stack(columns).unflatten(1, (16, 16)))
            return p @ call.v
        if not call.path.startswith("up_blocks"):
            return call.plain()
        if self.step < STEPS // 2:
            weight = 0.9 + (0.818 - 0.9) * self.step / (STEPS // 2 - 1)
            call.q = weight * self.queries[call.path] + (1 - weight) * call.q
        if self.means is None:
            return call.plain()
        side = int(n**0.5)
        masks = [self.mask(image, side) for image in range(2)]
        return call.halves(lambda q, k, v: self.half(call, q, k, v, masks))

    def half(self, call: Call, q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor]) -> Tensor:
        out = []
        for a in range(len(q)):
            others = [b for b in range(2) if b != a]
            keys, values = (
                torch.cat([x[a], *[x[b][:, masks[b]] for b in others]], 1) for x in (k, v)
            )
            out.append(call.probabilities(q[a], keys) @ values)
        return torch.stack(out)

    def mask(self, image: int, side: int) -> Tensor:
        assert self.means is not None
        fine = F.interpolate(self.means[image][None, None], size=(side, side), mode="bilinear")
        inside = (fine >= brute_otsu(fine)).flatten()
        draw = f"{self.seed} {self.step} {(image, 0)} {Grid(side, side)}"
        generator = torch.Generator().manual_seed(random.Random(draw).getrandbits(62))
        return inside & (torch.rand(side * side, generator=generator) >= 0.5)

    @torch.no_grad()
    def draw(self, edit: ConsiStory) -> Tensor:
        negative, scale = zoo.NEGATIVE, zoo.PIPELINES["sd15"].guidance
        cond, uncond = self.pipe.encode_prompt(SET, "cpu", 1, True, [negative] * len(SET))
        self.pipe.scheduler.set_timesteps(STEPS)
        draws = [
            torch.randn(1, 4, 16, 16, generator=g, dtype=cond.dtype) for g in edit.generators()
        ]
        x = torch.cat(draws)
        with self.literal.instead(self.pipe.unet):
            for step, t in enumerate(self.pipe.scheduler.timesteps):
                self.step = step
                rows, text = torch.cat([x, x]), torch.cat([uncond, cond])
                if self.maps:
                    self.means = torch.stack(self.maps[-20:]).float().mean(0)
                for vanilla in (True, False):
                    self.vanilla = vanilla
                    noise = self.pipe.unet(rows, t, encoder_hidden_states=text).sample
                u, c = noise.chunk(2)
                x = self.pipe.scheduler.step(u + scale * (c - u), t, x).prev_sample
        return x


def brute_otsu(x: Tensor) -> float:
    """The best of all cuts between neighbouring values."""
    values = x.double().flatten().sort().values.tolist()
    best, found = -1.0, values[-1]
    for i in range(1, len(values)):
        low, high = torch.tensor(values[:i]).double(), torch.tensor(values[i:]).double()
        between = float((low.mean() - high.mean()) ** 2 * len(low) * len(high))
        if between > best * (1 + 1e-12):
            best, found = between, (values[i - 1] + values[i]) / 2
    return found


@pytest.mark.slow
def test_equals_the_formulas() -> None:
    edit = Story(seed=3)
    got = draw("sd15", edit, dtype=torch.float64)
    want = Shared([3, 2, 3], 3).draw(edit)
    assert relative(got, want) < 1e-8  # float64
    before = plain("sd15", edit, dtype=torch.float64)
    assert all(relative(a, b) > 1e-4 for a, b in zip(got, before, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_otsu_is_the_best_cut(seed: int) -> None:
    x = torch.randn(37, generator=torch.Generator().manual_seed(seed))
    assert otsu(x) == pytest.approx(brute_otsu(x), rel=1e-6)
    assert otsu(torch.ones(5)) == 1.0


def test_matches_are_the_nearest_places() -> None:
    """Features that are shifted by a column are found a column further, inside of the mask."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(64, 6, 9, generator=generator)
    features = {(0, 0): wide[..., :6], (1, 0): wide[..., 3:]}
    inside = torch.ones(6, 6, dtype=torch.bool).flatten()
    match = matched((1, 0), [(0, 0)], features, {(0, 0): inside, (1, 0): inside})
    assert match is not None and set(match.sources) == {(0, 0)}
    row, column = match.own // 6, match.own % 6
    inner = (row > 0) & (row < 5) & (column > 0) & (column < 2)  # the blur mirrors at edges
    assert inner.sum() == 4
    assert torch.equal(match.theirs[inner], match.own[inner] + 3)
    none = torch.zeros_like(inside)
    assert matched((1, 0), [(0, 0)], features, {(0, 0): none, (1, 0): inside}) is None
    assert matched((1, 0), [(0, 0)], features, {(0, 0): inside, (1, 0): none}) is None


# -- laws --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "pixart", "animatediff", "wan"])
def test_on_every_family(family: str) -> None:
    """Without a window no bit changes; with it every image moves but a single anchor."""
    before = plain(family, Story())
    nothing = Story(start=1.0)
    assert nothing.neutral() and torch.equal(draw(family, nothing), before)
    after = draw(family, Story(query_stop=0.0, dropped=0.0))
    assert all(relative(a, b) > 1e-6 for a, b in zip(after, before, strict=True))
    one = draw(family, Story(query_stop=0.0, anchors=1))
    assert relative(one[0], before[0]) < 1e-6 < relative(one[1], before[1])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_injection_is_a_second_run(family: str) -> None:
    """It changes every image that has matches, and nothing of the first run before its window."""
    pipe, call = made(family), {"num_inference_steps": STEPS, "output_type": "latent"}
    alone = Story(injected=0.0).run(pipe, **call)
    late = Story(inject_window=(1.0, 1.0)).run(pipe, **call)
    mixed = Story(inject_window=(0.25, 0.75)).run(pipe, **call)
    assert torch.equal(late, alone)
    assert relative(mixed, alone) > 1e-4
    assert not any(module._forward_hooks for module in pipe.unet.modules())


def test_one_alone_is_drawn_as_ever() -> None:
    edit = ConsiStory([SET[0]], "cat")
    assert edit.neutral() and torch.equal(draw("sd15", edit), plain("sd15", edit))


def test_draws_are_seeded() -> None:
    first = draw("sd15", Story())
    assert torch.equal(draw("sd15", Story()), first)
    assert relative(draw("sd15", Story(seed=1)), first) > 1e-6


def test_several_sets_at_once() -> None:
    edit = Story()
    both = draw("sd15", edit, n=2, generator=edit.generators(images=2))
    assert both.shape[0] == 6
    one = draw("sd15", edit, generator=edit.generators(images=2)[::2])
    assert relative(both[::2], one) < 1e-4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"subject": None}, "subject=None; give a word of every prompt"),
        ({"anchors": 0}, "anchors=0; give a whole number of 1 or more"),
        ({"dropped": 2.0}, "dropped=2.0; give a number from 0 to 1"),
        ({"inject_window": (0.5, 0.1)}, "inject_window"),
    ],
)
def test_refused_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ConsiStory(SET, **{"subject": "cat", **given})


def test_refusals() -> None:
    with pytest.raises(WordError, match="dog"):
        draw("sd15", ConsiStory(SET, "dog"))
    with pytest.raises(UnsupportedError, match="ConsiStory: .* give injected=0"):
        Story().run(made("sd3"))
