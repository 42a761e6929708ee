"""StyleAligned and reference-only against the official code's matrices, and their laws."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from hookctl import control
from hookctl.editor import Editor
from hookctl.errors import ConflictError, InputError, UnsupportedError
from hookctl.loop.images import encode
from hookctl.loop.noise import Noise
from hookctl.recipes import PromptToPrompt, ReferenceOnly, StyleAligned
from tests import zoo
from tests.recipes import runs
from tests.recipes.literal_appearance import Call, Literal
from tests.recipes.runs import made, relative

STEPS = 2
CAT = "a red cat above a blue square"
DOG = "a green dog"
BIRD = "a red bird above a red cat"
FAMILIES = ["sd15", "sdxl", "sd3", "flux", "pixart", "animatediff", "wan"]


draw = partial(runs.draw, steps=STEPS)


def plain(name: str, prompts: list[str], dtype: Any = torch.float32, **call: Any) -> Tensor:
    return runs.plain(name, StyleAligned(prompts), dtype=dtype, **{"steps": STEPS, **call})


# -- the official formulas ---------------------------------------------------------------------


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(2, keepdim=True), (x.var(2, keepdim=True) + 1e-5).sqrt()


class Shared:
    """The attention handler of the official repository: every row of a half reads its first."""

    def __init__(
        self, adain: bool = True, share: bool = True, shift: float = 0.0, scale: float = 1.0
    ) -> None:
        self.adain, self.share, self.shift, self.scale = adain, share, shift, scale

    def __call__(self, call: Call) -> Tensor:
        if call.cross:
            return call.plain()
        return call.halves(lambda q, k, v: self.half(call, q, k, v))

    def half(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        factors = torch.tensor([1.0, *[self.scale] * (len(k) - 1)], dtype=k.dtype)
        first = k[:1] * factors[:, None, None, None], v[:1].expand_as(v)
        if self.adain:
            q, k = self.aligned(q), self.aligned(k)
        if not self.share:
            return call.probabilities(q, k) @ v
        shift = torch.zeros(len(q), 1, 1, 2 * k.shape[2], dtype=q.dtype)
        shift[1:, ..., k.shape[2] :] = self.shift
        p = call.probabilities(q, torch.cat([k, first[0]], 2), shift)
        return p @ torch.cat([v, first[1]], 2)

    @staticmethod
    def aligned(x: Tensor) -> Tensor:
        mean, std = moments(x)
        new = (x - mean) / std * std[:1] + mean[:1]
        return torch.cat([x[:1], new[1:]])  # the first by itself, but for rounding


class SharedNorm(nn.Module):
    """A group norm of features joined to those of the first row of each half."""

    def __init__(self, inner: nn.GroupNorm) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        first = torch.cat([half[:1].expand_as(half) for half in x.chunk(2)])
        return self.inner(torch.cat([x, first], 2))[:, :, : x.shape[2]]


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "shared": ({}, {}),
    "aligned alone": ({"share": False}, {"share": False}),
    "shared alone": ({"adain": False}, {"adain": False}),
    "shift and scale": ({"shift": math.log(2), "scale": 0.5}, {"shift": math.log(2), "scale": 0.5}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_equals_the_official_matrices(case: str) -> None:
    ours, theirs = CASES[case]
    edit, pipe = StyleAligned([CAT, DOG, BIRD], **ours), made("sd15", torch.float64)
    with Literal(Shared(**theirs)).instead(pipe.unet):
        want = zoo.PIPELINES["sd15"].run(
            pipe, edit.prompts, steps=STEPS, generator=edit.generators()
        )
    got = draw("sd15", edit, dtype=torch.float64)
    assert relative(got, want) < 1e-9  # float64
    assert relative(got[1:], plain("sd15", edit.prompts, torch.float64)[1:]) > 1e-4


def test_group_norms_equal_joined_features() -> None:
    edit = StyleAligned([CAT, DOG], adain=False, share=False, group_norm=True)
    got = draw("sd15", edit, dtype=torch.float64)
    pipe = zoo.PIPELINES["sd15"].make().to(torch.float64)
    for module in list(pipe.unet.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, SharedNorm(child))
    want = zoo.PIPELINES["sd15"].run(pipe, edit.prompts, steps=STEPS, generator=edit.generators())
    assert relative(got[1], want[1]) < 1e-9  # float64; a duplicate of itself shifts the first a bit
    assert torch.equal(got[0], plain("sd15", edit.prompts, torch.float64)[0])
    assert not any(m._forward_hooks for m in made("sd15", torch.float64).unet.modules())


# -- laws --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_on_every_family(family: str) -> None:
    """Without strength no bit changes; with it the others move, and the first does not."""
    before = plain(family, [CAT, DOG])
    for nothing in ({"start": 1.0}, {"adain": False, "share": False}):
        assert torch.equal(draw(family, StyleAligned([CAT, DOG], **nothing)), before)
    after = draw(family, StyleAligned([CAT, DOG], scale=0.9))
    assert torch.equal(after[0], before[0])
    assert relative(after[1], before[1]) > 1e-4


def test_one_alone_is_drawn_as_ever() -> None:
    edit = StyleAligned([CAT], group_norm=True)
    assert torch.equal(draw("sd15", edit), plain("sd15", [CAT]))


def test_without_weight_the_reference_is_not_seen() -> None:
    """A shift of -inf is AdaIN alone; one of -1e4 agrees to rounding."""
    alone = draw("sd15", StyleAligned([CAT, DOG], share=False))
    assert torch.equal(draw("sd15", StyleAligned([CAT, DOG], shift=-math.inf)), alone)
    assert relative(draw("sd15", StyleAligned([CAT, DOG], shift=-1e4)), alone) < 1e-5


def test_without_guidance_and_several_images() -> None:
    edit = StyleAligned([CAT, DOG])
    both = draw("sd15", edit, n=2, guidance=1.0, generator=edit.generators(images=2))
    generators = edit.generators(images=2)
    one = draw("sd15", edit, guidance=1.0, generator=generators[1::2])
    assert relative(both[1::2], one) < 1e-5


def test_statistics_are_the_references() -> None:
    """Whatever a later editor reads of q and k has them, to 1e-4."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Look(Editor):
        sites = "self up3"

        def attention(self, call: Any) -> None:
            term = call.fold().terms[1][0]
            seen.append((term.q.tensor, call.q[0]))

    draw("sd15", StyleAligned([CAT, DOG]), Look(), steps=1)
    for q, reference in seen:
        assert torch.allclose(q.mean(-2), reference.mean(-2), atol=1e-4)
        assert torch.allclose(q.std(-2), reference.std(-2), atol=1e-3, rtol=1e-3)
    assert seen


def test_one_denoiser_call_per_step() -> None:
    calls: list[int] = []
    unet = made("sd15", torch.float32).unet
    handle = unet.conv_in.register_forward_hook(lambda m, a, out: calls.append(len(out)))
    try:
        draw("sd15", StyleAligned([CAT, DOG], group_norm=True))
    finally:
        handle.remove()
    assert calls == [4] * STEPS


# -- an image for the reference ---------------------------------------------------------------


class Record(Editor):
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def before(self, state: Any) -> None:
        self.seen.append(state.latents.clone())


@pytest.mark.parametrize("paper", [False, True])
def test_the_reference_follows_its_path(paper: bool) -> None:
    """The official transfer starts at level 5 and is never before 6 from the second turn on."""
    steps = 9
    path = torch.randn(steps + 1, 1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    record, edit = Record(), StyleAligned([CAT, DOG], path=path, paper=paper)
    drawn = draw("sd15", edit, record, steps=steps)
    assert torch.equal(drawn[0], path[steps, 0]) == paper  # the image itself, in the end
    levels = [5, *[6] * 6, 7, 8] if paper else range(steps)
    assert torch.equal(torch.stack([x[0] for x in record.seen]), path[list(levels), 0])
    start = torch.randn(1, 4, 16, 16, generator=edit.generators()[1])
    assert torch.equal(record.seen[0][1], start[0])  # the others start from their own noise


@pytest.mark.parametrize("family", ["flux", "sd3", "qwen_image"])
def test_a_path_on_other_families(family: str) -> None:
    """Levels are those of the scheduler's timesteps, whatever the denoiser is told."""
    first = Record()
    draw(family, StyleAligned([CAT, DOG]), first, steps=3)
    shape = first.seen[0][:1].shape
    path = torch.randn(4, *shape, generator=torch.Generator().manual_seed(7))
    record = Record()
    draw(family, StyleAligned([CAT, DOG], path=path), record, steps=3)
    seen = [x[:1] for x in record.seen]
    assert torch.equal(torch.stack(seen[:: len(seen) // 3]), path[:3])


def image(size: int = 128) -> Image.Image:
    ramp = np.linspace(0, 255, size).astype(np.uint8)
    return Image.fromarray(np.stack(np.broadcast_arrays(ramp[None], ramp[:, None], ramp), -1))


class ReadWrite:
    """The community pipelines' form: the noised reference is written, the others read it."""

    def __init__(self, fidelity: float) -> None:
        self.fidelity = fidelity

    def __call__(self, call: Call) -> Tensor:
        out = call.plain()
        if call.cross:
            return out
        for half, own in ((0, self.fidelity), (1, 0.0)):
            reference, row = 2 * half, 2 * half + 1
            q, k, v = (x[row : row + 1] for x in call.qkv)
            bank_k, bank_v = (x[reference : reference + 1] for x in call.qkv[1:])
            read = call.probabilities(q, torch.cat([k, bank_k], 2)) @ torch.cat([v, bank_v], 2)
            out[row] = own * out[row] + (1 - own) * read[0]
        return out


@pytest.mark.parametrize("fidelity", [0.0, 0.5, 1.0])
def test_reference_only_equals_the_official_form(fidelity: float) -> None:
    edit = ReferenceOnly([CAT, DOG], image(), fidelity=fidelity, seed=3)
    record, pipe = Record(), made("sd15", torch.float64)
    got = draw("sd15", edit, record, dtype=torch.float64)
    clean, noise = encode(pipe, image())[0], torch.Generator().manual_seed(3)
    levels = [Noise(pipe.scheduler).level(t) for t in pipe.scheduler.timesteps]
    noised = [
        level.mix(clean, torch.randn(clean.shape, generator=noise, dtype=clean.dtype))
        for level in levels
    ]
    assert torch.equal(torch.stack([x[0] for x in record.seen]), torch.stack(noised))

    class Write(Editor):
        def before(self, state: Any) -> None:
            state.latents = torch.cat([noised[state.clock.step][None], state.latents[1:]])

    with control(pipe, Write()), Literal(ReadWrite(fidelity)).instead(pipe.unet):
        want = zoo.PIPELINES["sd15"].run(
            pipe, edit.prompts, steps=STEPS, generator=edit.generators()
        )
    assert relative(got[1], want[1]) < 1e-9  # float64


def test_reference_only_repeats_and_refuses(tmp_path: Any) -> None:
    image().save(tmp_path / "reference.png")
    edit = ReferenceOnly([CAT, DOG], str(tmp_path / "reference.png"))
    assert torch.equal(draw("sd15", edit), draw("sd15", edit))
    for given, message in (
        (str(tmp_path / "none.png"), "No such file.*give a readable image"),
        (image(64), r"latents are \(4, 8, 8\), and this run draws"),
        (image().convert("L"), "image has mode 'L'"),
    ):
        with pytest.raises(InputError, match=message):
            draw("sd15", ReferenceOnly([CAT, DOG], given))
    with pytest.raises(InputError, match="fidelity=1.5; give a number from 0 to 1"):
        ReferenceOnly([CAT, DOG], image(), fidelity=1.5)


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "give the source prompt, as a list"),
        (CAT, {}, "give the source prompt, as a list"),
        ([CAT, DOG], {"shift": math.inf}, "shift=inf; give a number"),
        ([CAT, DOG], {"scale": math.nan}, "scale=nan; give a finite number"),
        ([CAT, DOG], {"stop": 2.0}, "stop=2.0; give a fraction of the schedule"),
    ],
)
def test_wrong_arguments(prompts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        StyleAligned(prompts, **options)


def test_wrong_for_the_model() -> None:
    with pytest.raises(InputError, match="a cross site; give sites where the image"):
        draw("sd15", StyleAligned([CAT, DOG], sites="cross up"))
    with pytest.raises(UnsupportedError, match="has no group norms; leave group_norm out"):
        draw("pixart", StyleAligned([CAT, DOG], group_norm=True))
    with pytest.raises(ConflictError, match="both claim the substitution"):
        draw("sd15", StyleAligned([CAT, DOG]), PromptToPrompt([CAT, DOG]))
