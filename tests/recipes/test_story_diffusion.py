"""StoryDiffusion against the official code's masks over whole batches, and its laws."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hookctl import control
from hookctl.errors import InputError
from hookctl.recipes import StoryDiffusion
from tests import zoo
from tests.recipes import runs
from tests.recipes.literal_appearance import Call, Literal
from tests.recipes.runs import made, relative

CAT, DOG, BIRD = "a red cat above a blue square", "a green dog", "a red bird above a red cat"
STEPS = 2
draw = partial(runs.draw, steps=STEPS)
Always = partial(StoryDiffusion, start=0.0, plain=(0.0, 0.0))


def plain(name: str, prompts: list[str], dtype: Any = torch.float32, **call: Any) -> Tensor:
    return runs.plain(name, StoryDiffusion(prompts), dtype=dtype, **{"steps": STEPS, **call})


# -- the official code -------------------------------------------------------------------------


class Consistent:
    """`SpatialAttnProcessor2_0`: the references write their tokens into a bank, then each further
    image reads it; every pass over n + 1 images with masks [(n + 1) L, (n + 1) L]."""

    def __init__(self, count: int, sampled: float, seed: int) -> None:
        self.count, self.sampled, self.seed = count, sampled, seed
        self.turn, self.literal = 0, Literal(self)
        self.bank: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}

    def draw(self, what: object) -> random.Random:
        # The official code draws from generators that nothing seeds.
        return random.Random(f"{self.seed} {self.literal.step} {self.turn} {what}")

    def mask(self, tokens: int) -> Tensor:
        total = self.count + 1
        generator = torch.Generator().manual_seed(self.draw(tokens).getrandbits(62))
        chosen = torch.rand(total * tokens, generator=generator) < self.sampled
        matrix = chosen[None].repeat(total, 1)
        for i in range(total):
            matrix[i, self.count * tokens :] = False
            matrix[i, i * tokens : (i + 1) * tokens] = True
        return matrix.repeat_interleave(tokens, 0)

    def __call__(self, call: Call) -> Tensor:
        if call.cross or not call.path.startswith("up_blocks"):
            return call.plain()
        key = (call.step, call.path)
        write = self.turn == 0
        if write:
            self.bank[key] = call.k, call.v
        number = self.draw(call.path.removesuffix(".processor")).random()
        if call.step < 5:
            return call.plain() if write else self.attend(call, None)
        if number > (0.3 if call.step < 20 else 0.1):
            size = self.count * call.q.shape[2]
            mask = self.mask(call.q.shape[2])
            return self.attend(call, mask[:size, :size] if write else mask[size:])
        return call.plain()

    def attend(self, call: Call, mask: Tensor | None) -> Tensor:
        images = call.q.shape[0] // 2
        k, v = call.k, call.v
        if self.turn:
            k, v = (
                torch.cat(
                    [
                        part
                        for half in zip(bank.chunk(2), own.chunk(2), strict=True)
                        for part in half
                    ]
                )
                for bank, own in zip(self.bank[call.step, call.path], (k, v), strict=True)
            )
        q, k, v = (torch.stack([joined(half) for half in x.chunk(2)]) for x in (call.q, k, v))
        bias = 0.0 if mask is None else torch.zeros(mask.shape).to(q).masked_fill(~mask, -torch.inf)
        out = call.probabilities(q, k, bias) @ v
        return torch.cat([half.unflatten(1, (images, -1)).transpose(0, 1) for half in out])


def beside(bank: Tensor, own: Tensor) -> Tensor:
    """Rows of the bank and own ones, half by half."""
    halves = zip(bank.chunk(2), own.chunk(2), strict=True)
    return torch.cat([part for half in halves for part in half])


def joined(x: Tensor) -> Tensor:
    """Images [images, heads, tokens, channels] as one sequence, [heads, images * tokens, ...]."""
    return x.transpose(0, 1).flatten(1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_official_code(seed: int) -> None:
    """Two references and two further images over 22 steps, in float64."""
    prompts, steps = [CAT, DOG, BIRD, "a blue cat"], 22
    edit = StoryDiffusion(prompts, references=2, seed=seed, sites="self up", paper=True)
    got = draw("sd15", edit, steps=steps, dtype=torch.float64)
    pipe, noises = made("sd15", torch.float64), edit.generators()
    official, parts = Consistent(2, 0.5, seed), []
    for official.turn, (first, stop) in enumerate([(0, 2), (2, 3), (3, 4)]):
        official.literal.step = -1
        with official.literal.instead(pipe.unet):
            parts.append(
                zoo.PIPELINES["sd15"].run(
                    pipe, prompts[first:stop], steps=steps, generator=noises[first:stop]
                )
            )
    want = torch.cat(parts)
    assert relative(got, want) < 1e-8  # float64, over 22 steps
    before = plain("sd15", prompts, torch.float64, steps=steps)
    assert all(relative(a, b) > 1e-4 for a, b in zip(got, before, strict=True))


# -- laws --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "sd15",
        "sdxl",
        "sd3",
        "flux",
        "flux2_klein",
        "qwen_image",
        "z_image",
        "pixart",
        "animatediff",
        "wan",
    ],
)
def test_on_every_family(family: str) -> None:
    """Without strength no bit changes; with it further images move, and one reference does not."""
    before = plain(family, [CAT, DOG])
    for nothing in ({"start": 1.0}, {"sampled": 0.0}, {"plain": (1.0, 1.0)}):
        edit = StoryDiffusion([CAT, DOG], **nothing)
        assert edit.neutral() and torch.equal(draw(family, edit), before)
    after = draw(family, Always([CAT, DOG], references=1))
    assert torch.equal(after[0], before[0])
    assert relative(after[1], before[1]) > 1e-4
    both = draw(family, Always([CAT, DOG]))
    assert relative(both[0], before[0]) > 1e-4


def test_one_alone_is_drawn_as_ever() -> None:
    edit = StoryDiffusion([CAT])
    assert edit.neutral() and torch.equal(draw("sd15", edit), plain("sd15", [CAT]))


def test_further_images_do_not_change_the_references() -> None:
    few, more = (
        draw("sd15", Always([CAT, DOG])),
        draw("sd15", Always([CAT, DOG, BIRD], references=2)),
    )
    assert relative(more[:2], few) < 1e-5


def test_the_order_of_a_set_does_not_matter() -> None:
    """With all tokens looked at, so that the draw is the same."""
    edit = Always([CAT, DOG, BIRD], sampled=1.0)
    turned = Always([BIRD, CAT, DOG], sampled=1.0)
    noises = edit.generators()
    other = draw("sd15", turned, generator=[noises[2], *noises[:2]])
    assert relative(other[[1, 2, 0]], draw("sd15", edit)) < 1e-4


def test_several_sets_at_once() -> None:
    """Image j of each prompt belongs to set j."""
    edit = Always([CAT, DOG])
    both = draw("sd15", edit, n=2, generator=edit.generators(images=2))
    one = draw("sd15", edit, generator=edit.generators(images=2)[1::2])
    assert relative(both[1::2], one) < 1e-5


def test_draws_are_seeded() -> None:
    edit, other = (StoryDiffusion([CAT, DOG], start=0.0, seed=seed) for seed in (0, 1))
    first = draw("sd15", edit)
    assert torch.equal(draw("sd15", edit), first)
    assert relative(draw("sd15", other), first) > 1e-5


def test_the_report_says_where_it_acted() -> None:
    pipe, edit = made("sd15"), Always([CAT, DOG])
    with control(pipe, edit) as session:
        zoo.PIPELINES["sd15"].run(pipe, edit.prompts, steps=STEPS, generator=edit.generators())
    assert "StoryDiffusion" in str(session.report()) and "extend" in str(session.report())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"references": 3}, "references=3; give a whole number from 1 to 2"),
        ({"sampled": 1.5}, "sampled=1.5; give a number from 0 to 1"),
        ({"plain": (0.3, 2.0)}, "plain=2.0; give a number from 0 to 1"),
        ({"start": 0.5, "stop": 0.2}, "start"),
    ],
)
def test_refusals(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        StoryDiffusion([CAT, DOG], **given)
    with (
        pytest.raises(InputError, match="cross site"),
        control(made("sd15"), StoryDiffusion([CAT, DOG], sites="cross")),
    ):
        pass
