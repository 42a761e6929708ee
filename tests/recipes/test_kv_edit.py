"""KV-Edit: the official code in float64, the background to the bit, memory, what it refuses."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from PIL import Image
from torch import Tensor

from hookctl import Editor, control
from hookctl.address.regions import Region
from hookctl.errors import ConflictError, InputError, UnsupportedError
from hookctl.recipes import PAG, KVEdit, PromptToPrompt, RFInversion
from hookctl.recipes.common.features.places import EditPass, SourcePass, in_latents
from tests.hookctl.loop.families import BY_NAME, FAMILIES
from tests.recipes.images import counted, image
from tests.recipes.literal_flow import TOKENS
from tests.recipes.literal_kv_edit import Cut, kv_edit, without_inversion
from tests.recipes.runs import made, relative
from tests.recipes.test_inversions_of_families import given
from tests.recipes.test_inversions_of_families import made as of_first_order
from tests.zoo.wild.around import smaller

CAT, DOG = "a red cat", "a blue dog"
SHORT: dict[str, Any] = {"steps": 6, "skip": 1, "arguments": {"max_sequence_length": TOKENS}}
TOLERANCE = 1e-10  # float64
LEFT = Region.box(0, 0, 0.5, 1)


def recipe(name: str = "flux", dtype: Any = torch.float32, **more: Any) -> KVEdit:
    options = {"source_prompt": CAT, **SHORT, **more}
    picture, prompt = options.pop("image", image()), options.pop("prompt", DOG)
    mask = options.pop("mask", LEFT)
    return KVEdit(made(name, dtype), picture, prompt, mask, **options)


def latents(name: str = "flux", *editors: Editor, **more: Any) -> Tensor:
    found: Tensor = recipe(name, **more).run(*editors, output_type="latent")
    return found


def uneven() -> Image.Image:
    """A mask whose edge runs through tokens and cells."""
    pixels = Image.new("L", (128, 128))
    pixels.paste(255, (12, 20, 93, 77))
    return pixels


def packed(model: Cut, pixels: Image.Image) -> Tensor:
    x = torch.from_numpy(np.asarray(pixels) > 127)[None, None].double()
    cells = (torch.nn.functional.interpolate(x, (16, 16), mode="bilinear") > 0).double()
    z = cells.expand(1, 4, 16, 16).view(1, 4, 8, 2, 8, 2).permute(0, 2, 4, 1, 3, 5)
    return z.reshape(1, 64, 16)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "more",
    [
        {},
        pytest.param({"bias": 0.0}, marks=SLOW),
        pytest.param({"separate": True}, marks=SLOW),
        pytest.param({"restart": True}, marks=SLOW),
        pytest.param({"skip": 0}, marks=SLOW),
        {"inversion": False},
    ],
    ids=str,
)
def test_paper_is_the_official_code(more: dict[str, Any]) -> None:
    model = Cut(made("flux", torch.float64), 6, 64)
    x = model.encode(image())
    mask = packed(model, uneven())
    ours = recipe(dtype=torch.float64, paper=True, mask=uneven(), seed=3, **more)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    said: dict[str, Any] = {"scales": (1.5, 5.5), "skip": more.get("skip", 1)}
    said["bias"] = more.get("bias", 1.0)
    if more.get("inversion", True):
        start = noise if "restart" in more else None
        separate = "separate" in more
        want = kv_edit(model, x, mask, (CAT, DOG), noise=start, separate=separate, **said)
    else:
        want = without_inversion(model, x, mask, (CAT, DOG), noise=noise, **said)
    found = ours.run(output_type="latent")
    assert relative(found, want) < TOLERANCE
    assert relative(want, x) > 1e-2
    assert torch.equal(found * (1 - mask), x * (1 - mask))
    if more.get("inversion", True):
        other = latents(dtype=torch.float64, mask=uneven(), seed=3, **more)
        assert relative(other, want) > 1e-4  # levels of their own


EACH = [
    pytest.param(one.name, id=one.name, marks=() if one.name == "sd3" else pytest.mark.slow)
    for one in FAMILIES
    if one.name not in ("sd15", "sdxl", "pixart")
]


@pytest.mark.parametrize("name", EACH)
def test_the_background_is_the_images_and_memory_is_as_said(name: str) -> None:
    family = BY_NAME[name]
    pipe = of_first_order(family)
    source, more = given(family)
    scales = {"guidance": 1.0, "inversion_guidance": 1.0}
    with smaller(type(pipe)):
        ours = KVEdit(pipe, source, DOG, LEFT, steps=3, skip=1, arguments=more, **scales)
        program, store = ours._source()
        keeper = SourcePass(store, separate=False)
        injector = EditPass(store, bias=0.0)
        with torch.no_grad(), control(pipe, keeper):
            ask = partial(ours._velocity, program, [1.0])
            path = keeper.invert(ask, ours.clean, program, 1, published=False)
        assert store.moments == {(1, 0), (2, 0)}
        assert store.bytes == ours.bytes()
        again = ours._program(ours.prompts, [1.0])
        with torch.no_grad(), control(pipe, injector):
            z = ours._drawn(again, injector, path, in_latents(store.cells, again))
        x, z = (program.unpacked(one) for one in (path[3], z))
    half = store.cells.shape[-1] // 2
    assert torch.equal(x[..., half:], z[..., half:])
    assert not torch.equal(x[..., :half], z[..., :half])


@pytest.mark.parametrize("inversion", [True, False])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_outside_the_mask_it_is_the_image_bit_for_bit(name: str, inversion: bool) -> None:
    ours = recipe(name, inversion=inversion)
    found = ours.run(output_type="latent")
    program = ours._program(ours.prompts, [1.0])
    x, z = program.unpacked(ours.clean), program.unpacked(found)
    assert torch.equal(x[..., 8:], z[..., 8:]) and not torch.equal(x[..., :8], z[..., :8])
    assert ours.session is not None and "KVEdit (shares)" in ours.session.report()
    for mask in (np.array([[True, False]] * 2), LEFT):
        assert torch.equal(latents(name, inversion=inversion, mask=mask), found)


def test_a_mask_of_everything_is_sampling_from_the_inverted_image() -> None:
    every = Region.box(0, 0, 1, 1)
    ours = recipe(mask=every, guidance=2.0, skip=0)
    assert ours.bytes() == 0
    found = ours.run(output_type="latent")
    plain = RFInversion(
        ours.pipe,
        image(),
        DOG,
        gamma=0.0,
        eta=0.0,
        source_prompt=CAT,
        guidance=2.0,
        inversion_guidance=1.5,
        steps=6,
        arguments=SHORT["arguments"],
    )
    torch.testing.assert_close(found, plain.run(output_type="latent"), atol=1e-4, rtol=1e-4)


def test_memory_is_that_of_the_background() -> None:
    whole = 4 * 2 * 64 * 32 * 4 * 5  # sites, k and v, tokens, channels, bytes, levels
    assert recipe(mask=(0, 0, 0.25, 0.5)).bytes() == whole * 7 // 8
    assert recipe().bytes() == whole // 2
    assert recipe(inversion=False).bytes() == whole // 10


def test_cost() -> None:
    ours = recipe()
    with counted(ours.pipe, "transformer") as rows:
        ours.run(output_type="latent")
        assert rows == [1] * 6 + [1] * 5
        rows.clear()
        latents(inversion=False)
    assert rows == [1] * 10


def test_several_images_and_editors() -> None:
    images, prompts = [image(), image(1)], [CAT, DOG]
    options: dict[str, Any] = {"image": images, "prompt": prompts, "source_prompt": ["a", "b"]}
    both = latents("sd3", **options)
    for i in range(2):
        one = {name: value[i] for name, value in options.items()}
        torch.testing.assert_close(both[i : i + 1], latents("sd3", **one), atol=1e-3, rtol=1e-3)
    with pytest.raises(ConflictError, match="substitution"):
        latents("sd3", PromptToPrompt(prompts, self_replace=1.0), **options)
    with pytest.raises(UnsupportedError, match="no steps of a scheduler, which PAG"):
        latents("sd3", PAG())
    with pytest.raises(UnsupportedError, match="KVEdit: asks for two texts in turn as it is set"):
        latents("sd3", PromptToPrompt(prompts), inversion=False)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"skip": 6}, "KVEdit: skip=6; give a whole number from 0 to 5"),
        ({"mask": np.ones((4, 8))}, "a mask of 4 x 8 for an image of 128 x 128 px"),
        ({"mask": np.zeros((8, 8))}, "mask"),
        ({"mask": torch.ones(1, 64, 16)}, "mask"),
        ({"memory": -1.0}, "KVEdit: memory=-1.0; give"),
        ({"memory": 1e-6}, "KVEdit: k/v of 4 sites at 5 moments take .* GB are memory=; give"),
        ({"bias": float("nan")}, "KVEdit: bias=nan; give"),
        ({"prompt": [CAT]}, "KVEdit: image="),
    ],
)
def test_wrong_arguments(options: dict[str, Any], says: str) -> None:
    with counted(made("flux", torch.float32), "transformer") as rows:
        with pytest.raises(InputError, match=says):
            latents(**options)
    assert len(rows) <= 1  # that of the pattern, which is stopped before it is computed


@pytest.mark.parametrize("more", [{"restart": True}, {"inversion": False}])
def test_noise_does_not_depend_on_the_images_beside(more: dict[str, Any]) -> None:
    other = Image.fromarray(255 - np.asarray(image()))
    both = latents(image=[image(), other], prompt=[DOG, CAT], **more)
    alone = latents(image=other, prompt=CAT, **more)
    assert relative(both[1], alone[0]) < 1e-5


def test_what_is_free_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hookctl.recipes.common.features.store.free_bytes", lambda device: 1e5)
    with pytest.raises(InputError, match=r"take 0.000164 GB on cpu, and 0.0001 GB are free there"):
        latents()


def test_other_models_and_schedulers_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="StableDiffusionPipeline with .* is not; .*Direct"):
        recipe("sd15")
    pipe = BY_NAME["sd3"].make()
    pipe.scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    with pytest.raises(UnsupportedError, match="KVEdit needs .* first-order scheduler"):
        KVEdit(pipe, image(), CAT, LEFT, steps=4, skip=1).run()
