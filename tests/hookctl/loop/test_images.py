"""Images and latents: bit for bit what the pipelines themselves make of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import hookctl
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.autoencoders import processor_of
from hookctl.loop.images import decode, encode
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes import DDIMInversion, MultiDiffusion, ReferenceOnly
from tests import zoo
from tests.zoo.wild import WILD


def picture(side: int = 64, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (side // 8, side // 8, 3))
    return Image.fromarray(values.repeat(8, 0).repeat(8, 1).astype(np.uint8))


def arrays(images: Any) -> list[np.ndarray]:
    """Every frame of every image."""
    return [
        np.asarray(frame)
        for image in images
        for frame in (image if isinstance(image, list) else [image])
    ]


@pytest.fixture(params=list(zoo.PIPELINES))
def case(request: pytest.FixtureRequest) -> zoo.Case:
    return zoo.PIPELINES[request.param]


@pytest.mark.slow
def test_decodes_as_the_pipeline(case: zoo.Case) -> None:
    pipe = case.make()
    try:
        got = decode(pipe, case.run(pipe))
    except UnsupportedError as refused:
        assert type(pipe).__name__ in str(refused)
        return
    expected = case.run(pipe, output_type="pil")
    for ours, theirs in zip(arrays(got), arrays(expected), strict=True):
        assert np.array_equal(ours, theirs)


# Image-to-image (or video-to-video) of each family, by which its encoding is known.
TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("StableDiffusionImg2ImgPipeline", {}),
    "sdxl": ("StableDiffusionXLImg2ImgPipeline", {}),
    "sd3": ("StableDiffusion3Img2ImgPipeline", {"height": 64, "width": 64}),
    "flux": ("FluxImg2ImgPipeline", {"height": 64, "width": 64}),
    "qwen_image": ("QwenImageImg2ImgPipeline", {"height": 64, "width": 64}),
    "z_image": ("ZImageImg2ImgPipeline", {"height": 64, "width": 64}),
}
VIDEO_TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "wan": ("WanVideoToVideoPipeline", {"height": 64, "width": 64}),
    "animatediff": ("AnimateDiffVideoToVideoPipeline", {"height": 64, "width": 64}),
}
CPU = torch.Generator


class Noised(Exception):
    """Image-to-image has encoded its image."""


def encoded_by(pipe: Any, twin: str, arguments: dict[str, Any]) -> Tensor:
    """What image-to-image gives the scheduler to be noised."""
    if not hasattr(diffusers, twin):
        pytest.fail(f"this version of diffusers has no {twin}")
    kind = getattr(diffusers, twin)
    wanted = set(inspect.signature(kind.__init__).parameters)
    other = kind(**{name: part for name, part in pipe.components.items() if name in wanted})
    other.set_progress_bar_config(disable=True)
    seen: list[Tensor] = []

    def note(first: Tensor, *rest: Any, **more: Any) -> Any:
        seen.append(first)
        raise Noised

    for method in ("add_noise", "scale_noise"):
        if hasattr(other.scheduler, method):
            setattr(other.scheduler, method, note)
    try:
        with pytest.raises(Noised):
            other(**{"prompt": "a cat", "num_inference_steps": 4, "strength": 0.9} | arguments)
    finally:
        for method in ("add_noise", "scale_noise"):
            other.scheduler.__dict__.pop(method, None)
    return seen[0]


@pytest.mark.parametrize("name", [n for n in TWINS if n in zoo.PIPELINES])
def test_encodes_as_image_to_image(name: str) -> None:
    pipe = zoo.PIPELINES[name].make()
    twin, arguments = TWINS[name]
    arguments = arguments | {"image": picture(), "generator": CPU().manual_seed(3)}
    expected = encoded_by(pipe, twin, arguments)
    ours = encode(pipe, picture(), CPU().manual_seed(3))
    if expected.dim() != ours.dim():  # not packed yet
        height, width = expected.shape[-2:]
        channels = expected.numel() // (height * width)
        expected = pipe._pack_latents(expected, 1, channels, height, width)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", VIDEO_TWINS)
def test_encodes_as_video_to_video(name: str) -> None:
    pipe = zoo.PIPELINES[name].make()
    twin, arguments = VIDEO_TWINS[name]
    video = [picture(seed=i) for i in range(5)]
    if name == "wan":  # whose cleaning of texts needs a further package
        text = torch.zeros(1, 8, pipe.transformer.config.text_dim)
        arguments = arguments | {"prompt": None, "prompt_embeds": text, "guidance_scale": 1.0}
    arguments = arguments | {"video": video, "generator": CPU().manual_seed(3)}
    expected = encoded_by(pipe, twin, arguments)
    ours = encode(pipe, video, CPU().manual_seed(3))
    if name == "animatediff":  # frames first until it is noised
        ours = ours.transpose(1, 2)
    assert torch.equal(ours, expected)


def test_encodes_references_of_flux2_as_the_pipeline() -> None:
    if "flux2_klein" not in zoo.PIPELINES:
        return  # this version of diffusers has no such pipeline
    pipe = zoo.PIPELINES["flux2_klein"].make()
    pipe.vae.bn.running_mean.normal_(generator=CPU().manual_seed(0))
    pipe.vae.bn.running_var.uniform_(0.5, 2, generator=CPU().manual_seed(1))
    pixels = pipe.image_processor.preprocess(picture(128))
    expected = pipe._encode_vae_image(pixels, None)
    ours = encode(pipe, picture(128))
    assert torch.equal(ours, pipe._pack_latents(expected))
    # And back, from tokens and from what the pipeline calls latents.
    restored = decode(pipe, ours, "latent")
    z = pipe.vae.encode(pixels).latent_dist.mode()
    assert torch.allclose(restored, z, atol=1e-5)
    assert torch.equal(decode(pipe, ours, "pt"), decode(pipe, restored, "pt"))


# -- what the autoencoder's config says ------------------------------------------------------------


def with_statistics(pipe: Any) -> Any:
    pipe.vae.register_to_config(
        latents_mean=[0.5, -1.0, 0.25, 2.0], latents_std=[2.0, 0.5, 1.5, 3.0]
    )
    return pipe


def test_a_mean_and_spread_of_each_channel() -> None:
    case = zoo.PIPELINES["sdxl"]
    plain, pipe = case.make(), with_statistics(case.make())
    latents = case.run(pipe)
    assert torch.equal(decode(pipe, latents, "pt"), case.run(pipe, output_type="pt"))
    assert not torch.equal(decode(pipe, latents, "pt"), decode(plain, latents, "pt"))
    expected = encoded_by(pipe, TWINS["sdxl"][0], {"image": picture(), "generator": CPU()})
    assert torch.equal(encode(pipe, picture(), CPU()), expected)
    # Stable Diffusion 1 ignores them, and so do we.
    old = with_statistics(zoo.PIPELINES["sd15"].make())
    latents = zoo.PIPELINES["sd15"].run(old)
    assert torch.equal(decode(old, latents, "pt"), zoo.PIPELINES["sd15"].run(old, output_type="pt"))


@pytest.fixture
def overflowing() -> Iterator[Any]:
    """SDXL in float16 whose autoencoder overflows in it, as the published one does."""
    pipe = zoo.PIPELINES["sdxl"].make()
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.mul_(1e5)
        pipe.vae.decoder.conv_in.weight.mul_(1e5)
    yield pipe.to(torch.float16)


def test_float16_is_upcast_where_the_pipeline_does(overflowing: Any) -> None:
    pipe, case = overflowing, zoo.PIPELINES["sdxl"]
    latents = case.run(pipe)
    expected = case.run(pipe, output_type="pt")
    assert expected.isfinite().all()
    assert torch.equal(decode(pipe, latents, "pt"), expected)
    assert pipe.vae.dtype == torch.float16
    encoded = encoded_by(pipe, TWINS["sdxl"][0], {"image": picture(), "generator": CPU()})
    ours = encode(pipe, picture(), CPU())
    assert torch.equal(ours, encoded)
    assert ours.dtype == torch.float16
    assert ours.isfinite().all()
    assert pipe.vae.dtype == torch.float16


def test_no_numbers_are_an_error(overflowing: Any) -> None:
    pipe = overflowing
    pipe.vae.register_to_config(force_upcast=False)
    with pytest.raises(UnsupportedError, match=r"overflows in float16; call pipe\.vae\.to"):
        encode(pipe, picture())
    with pytest.raises(UnsupportedError, match=r"the image .* overflows in float16"):
        decode(pipe, torch.randn(1, 4, 8, 8, dtype=torch.float16))
    with pytest.raises(InputError, match="latents hold 1 values that are NaN"):
        latents = torch.zeros(1, 4, 8, 8, dtype=torch.float16)
        latents[0, 0, 0, 0] = torch.nan
        decode(pipe, latents)


def test_trajectory_decodes_as_the_pipeline_in_float16(overflowing: Any) -> None:
    given = {"height": 64, "width": 64}
    program = Trajectory(overflowing, ["a cat"], steps=2, generator=CPU().manual_seed(0), **given)
    program.run()
    expected = overflowing(
        "a cat",
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=CPU().manual_seed(0),
        output_type="np",
        **given,
    ).images
    assert np.array_equal(program.decode("np"), expected)


# -- sizes -----------------------------------------------------------------------------------------


def test_the_size_of_packed_latents() -> None:
    pipe, case = zoo.PIPELINES["flux"].make(), zoo.PIPELINES["flux"]
    size = {"height": 64, "width": 128}
    latents = case.run(pipe, **size)
    expected = case.run(pipe, output_type="pt", **size)
    assert torch.equal(decode(pipe, latents, "pt", size=(64, 128)), expected)
    with pytest.raises(InputError, match=r"no square image; give size=\(height, width\)"):
        decode(pipe, latents)
    with pytest.raises(InputError, match="has 16 tokens, these latents have 32"):
        decode(pipe, latents, size=(64, 64))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("a.png", "image is a str; give a PIL image"),
        (picture().convert("L"), "mode 'L'"),
        (picture().resize((60, 64)), "multiples of 8"),
        ([picture()], "takes one PIL image"),
    ],
)
def test_images_that_are_none(image: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode(zoo.PIPELINES["sd15"].make(), image)


def test_the_processor_of_an_image_encoder_is_none_of_the_pipelines_images() -> None:
    pipe = WILD["ChronoEditPipeline"].original
    assert processor_of(pipe) is pipe.video_processor
    pixels = Image.new("RGB", (32, 32), "red")
    assert encode(pipe, pixels).dim() == 5


def test_images_that_are_read_with_their_prompts() -> None:
    pipe = WILD["VisualClozeGenerationPipeline"].original
    with pytest.raises(UnsupportedError, match="reads its images together with its prompts"):
        encode(pipe, Image.new("RGB", (32, 32)))


@pytest.mark.skipif(not hasattr(diffusers, "Ideogram4Pipeline"), reason="of newer diffusers")
def test_an_autoencoder_of_flux2_in_a_pipeline_of_its_own_ways() -> None:
    pipe = WILD["Ideogram4Pipeline"].original
    with pytest.raises(UnsupportedError, match="how its latents stand to those of"):
        encode(pipe, Image.new("RGB", (64, 64)))


def test_a_pipeline_without_an_image_encoding_says_so() -> None:
    with pytest.raises(UnsupportedError, match="StableVideoDiffusionPipeline"):
        encode(zoo.PIPELINES["svd"].make(), picture())
    pipe = zoo.PIPELINES["sd15"].make()
    pipe.vae = torch.nn.Linear(1, 1)
    with pytest.raises(UnsupportedError, match="its latents stand to those of Linear is not known"):
        decode(pipe, torch.zeros(1, 4, 8, 8))


def test_recipes_work_in_float16_as_the_pipeline_does(overflowing: Any) -> None:
    """Whatever encodes or decodes: no image of NaN, no misleading refusal."""
    overflowing.scheduler = diffusers.DDIMScheduler.from_config(
        overflowing.scheduler.config, clip_sample=False
    )
    found = DDIMInversion(overflowing, picture(), "a cat", steps=2).run()
    assert found.path[-1].isfinite().all()
    assert np.isfinite(found.reconstruct(overflowing, "np")).all()
    given = {"height": 64, "width": 64, "num_inference_steps": 2}
    texts = ["a cat", "a dog"]
    with hookctl.control(overflowing, ReferenceOnly(texts, picture())):
        assert np.isfinite(overflowing(texts, output_type="np", **given).images).all()
    drawn = MultiDiffusion().run(overflowing, "a cat", output_type="np", **given)
    assert np.isfinite(drawn).all()
