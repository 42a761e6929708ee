"""Plug-and-Play against the official denoising loop of three rows, and its laws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hookctl import control
from hookctl.errors import ConflictError, InputError, UnsupportedError
from hookctl.recipes import DDIMInversion, DirectInversion, MasaCtrl, PlugAndPlay
from tests import zoo
from tests.recipes import runs
from tests.recipes.images import PROMPT, TARGET, image
from tests.recipes.literal_appearance import Call, Literal
from tests.recipes.runs import made, relative

STEPS = 4
draw = partial(runs.draw, steps=STEPS)
plain = partial(runs.plain, steps=STEPS)
# Layer 4 of Stable Diffusion, of which the tiny UNet's decoder has two blocks at each resolution.
BLOCK, FINER = "up_blocks.1.resnets.1", ("up_blocks.1.attentions.1", "up_blocks.2", "up_blocks.3")


# -- the official code -------------------------------------------------------------------------


class Injected:
    """`denoise_step` of pnp.py: rows [source under the empty text, unconditional, conditional]."""

    def __init__(self, pipe: Any, features: float, queries: float) -> None:
        self.pipe, self.ends = pipe, [int(STEPS * share) for share in (features, queries)]
        self.literal = Literal(self)

    def __call__(self, call: Call) -> Tensor:
        q, k = call.q, call.k
        if not call.cross and call.path.startswith(FINER) and call.step < self.ends[1]:
            q, k = (x[:1].expand_as(x) for x in (q, k))
        return call.probabilities(q, k) @ call.v

    @contextmanager
    def features(self) -> Iterator[None]:
        def inject(module: Any, args: Any, hidden: Tensor) -> Tensor:
            return hidden[:1].expand_as(hidden) if self.literal.step < self.ends[0] else hidden

        conv = self.pipe.unet.get_submodule(BLOCK).conv2
        handle = conv.register_forward_hook(inject)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def draw(self, prompt: str, path: Tensor, scale: float) -> Tensor:
        cond, uncond = self.pipe.encode_prompt(prompt, "cpu", 1, True, "")
        text = torch.cat([uncond, uncond, cond])
        self.pipe.scheduler.set_timesteps(STEPS)
        x = path[0]
        with self.literal.instead(self.pipe.unet), self.features():
            for source, t in zip(path, self.pipe.scheduler.timesteps, strict=False):
                rows = torch.cat([source, x, x])
                _, u, c = self.pipe.unet(rows, t, encoder_hidden_states=text).sample.chunk(3)
                x = self.pipe.scheduler.step(u + scale * (c - u), t, x).prev_sample
        return x


@cache
def path() -> Tensor:
    pipe = made("sd15", torch.float64)
    inverted = DDIMInversion(pipe, image(), "", steps=STEPS, guidance=1.0).run()
    return torch.stack(inverted.path)


@pytest.mark.slow
@pytest.mark.parametrize(("features", "queries"), [(0.8, 0.5), (0.5, 1.0), (1.0, 0.0)])
def test_equals_the_official_loop(features: float, queries: float) -> None:
    edit = PlugAndPlay(
        ["", TARGET], feature_stop=features, query_stop=queries, path=path(), paper=True
    )
    call = {"dtype": torch.float64, "negatives": ""}
    got = draw("sd15", edit, **call)
    pipe = made("sd15", torch.float64)
    scale = zoo.PIPELINES["sd15"].guidance
    want = Injected(pipe, features, queries).draw(TARGET, path(), scale)
    assert relative(got[1:], want) < 1e-9  # float64
    before = plain("sd15", edit, **call)
    assert relative(got[1:], before[1:]) > 1e-4


# -- laws --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl", "animatediff"])
def test_on_every_unet(family: str) -> None:
    """Without a window no bit changes; with either the edit moves, and the source does not."""
    of = {"layer": 1} if family == "animatediff" else {}  # its decoder begins at a half
    nothing = PlugAndPlay([PROMPT, TARGET], feature_stop=0.0, query_stop=0.0, **of)
    before = plain(family, nothing)
    assert nothing.neutral() and torch.equal(draw(family, nothing), before)
    for one in ({"feature_stop": 0.0}, {"query_stop": 0.0}, {}):
        after = draw(family, PlugAndPlay([PROMPT, TARGET], **one, **of))
        assert torch.equal(after[0], before[0])
        assert relative(after[1], before[1]) > 1e-4


def test_an_edit_that_says_the_same_is_the_source() -> None:
    edit = PlugAndPlay([PROMPT, PROMPT])
    first, second = draw("sd15", edit)
    assert relative(second, first) < 1e-5


def test_on_an_inverted_image() -> None:
    pipe = made("sd15")
    inverted = DirectInversion(pipe, image(), PROMPT, steps=STEPS).run()
    edit, call = PlugAndPlay([PROMPT, TARGET]), {"output_type": "latent"}
    again, edited = inverted.edit(pipe, edit, **call)
    alone, bare = inverted.edit(pipe, prompts=[PROMPT, TARGET], **call)
    assert torch.equal(again, alone) and relative(edited, bare) > 1e-4


def test_every_image_has_its_own_source() -> None:
    edit = PlugAndPlay([PROMPT, TARGET])
    both = draw("sd15", edit, n=2, generator=edit.generators(images=2))
    one = draw("sd15", edit, generator=edit.generators(seed=1))
    assert relative(both[1::2], one) < 1e-5


def test_nothing_stays_on_the_model() -> None:
    edit = PlugAndPlay([PROMPT, TARGET])
    draw("sd15", edit)
    assert not any(module._forward_hooks for module in made("sd15").unet.modules())


def test_refusals() -> None:
    with pytest.raises(InputError, match="layer=8; the decoder of this .* has 8 .* give 0 to 7"):
        draw("sd15", PlugAndPlay([PROMPT, TARGET], layer=8))
    with pytest.raises(InputError, match="a cross site"):
        draw("sd15", PlugAndPlay([PROMPT, TARGET], sites="cross"))
    for family in ("sd3", "pixart"):
        with pytest.raises(UnsupportedError, match="PlugAndPlay|no site"):
            draw(family, PlugAndPlay([PROMPT, TARGET]))
    with (
        pytest.raises(ConflictError, match="PlugAndPlay and MasaCtrl"),
        control(made("sd15"), PlugAndPlay([PROMPT, TARGET]), MasaCtrl([PROMPT, TARGET])),
    ):
        pass
