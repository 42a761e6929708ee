"""IP-Adapter: equal to the formula and to diffusers' own, by image, place, site, step and row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import hookctl
from hookctl.errors import InputError, UnsupportedError
from hookctl.learned.image_prompts import ImagePrompt
from hookctl.learned.ip_adapter import IPAdapter, from_checkpoint
from hookctl.learned.names import adapter_layers
from hookctl.recipes import RegionalPrompts
from tests.hookctl.learned import identity
from tests.hookctl.learned.identity import adapter, apart, drawn, embeds, load_into_diffusers

ROUNDING = 5e-6  # relative; runs of a few steps in float32


@pytest.fixture(scope="module")
def pipe() -> Any:
    return identity.pipeline()


@pytest.fixture(scope="module")
def plain(pipe: Any) -> Tensor:
    return drawn(pipe)


def vector(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or (10,), generator=torch.Generator().manual_seed(seed))


def native(*kinds: str, scale: Any, embeds: list[Tensor], **options: Any) -> Tensor:
    """A run with diffusers' own adapters, of the files that `adapter` makes with seeds 0, 1, ..."""
    pipe = identity.pipeline()
    files = [identity.tensors(kind, pipe.unet, seed) for seed, kind in enumerate(kinds)]
    load_into_diffusers(pipe, *files)
    pipe.set_ip_adapter_scale(scale)
    return drawn(pipe, ip_adapter_image_embeds=embeds, **options)


# -- as diffusers ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_base_is_diffusers(pipe: Any, plain: Tensor) -> None:
    ours = drawn(pipe, IPAdapter(adapter("base", pipe.unet), vector(0), scale=0.7))
    assert apart(ours, native("base", scale=0.7, embeds=[embeds(vector(0))])) < ROUNDING
    assert apart(ours, plain) > 1e-2
    assert torch.equal(drawn(pipe), plain)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plus", "full"])
def test_features_are_diffusers(pipe: Any, kind: str) -> None:
    """Also with another negative than zeros."""
    seen, negative = vector(0, 7, 10), vector(1, 7, 10)
    edit = IPAdapter(adapter(kind, pipe.unet), seen, scale=0.7, negative=negative)
    wanted = native(kind, scale=0.7, embeds=[embeds(seen, negative=negative)])
    assert apart(drawn(pipe, edit), wanted) < ROUNDING


@pytest.mark.slow
def test_two_images_share_a_softmax(pipe: Any) -> None:
    edit = IPAdapter(adapter("base", pipe.unet), [vector(0), vector(1)], scale=0.7)
    wanted = native("base", scale=0.7, embeds=[embeds(vector(0), vector(1))])
    assert apart(drawn(pipe, edit), wanted) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(128, 128), (128, 192)])
def test_two_images_with_masks_are_diffusers(pipe: Any, height: int, width: int) -> None:
    masks = torch.zeros(2, height, width)
    masks[0, :, : width // 3] = 1
    masks[1, height // 2 :] = 1
    shown = [
        ImagePrompt(vector(0), scale=0.9, region=masks[0]),
        ImagePrompt(vector(1), scale=0.4, region=Image.fromarray(masks[1].numpy() > 0.5)),
    ]
    size = {"height": height, "width": width}
    ours = drawn(pipe, IPAdapter(adapter("base", pipe.unet), shown), **size)
    wanted = native(
        "base",
        scale=[[0.9, 0.4]],
        embeds=[embeds(vector(0), vector(1))],
        cross_attention_kwargs={"ip_adapter_masks": [masks[None]]},
        **size,
    )
    assert apart(ours, wanted) < ROUNDING


@pytest.mark.slow
def test_two_adapters_are_diffusers(pipe: Any) -> None:
    edits = [
        IPAdapter(adapter("base", pipe.unet), vector(0), scale=0.7),
        IPAdapter(
            adapter("plus", pipe.unet, 1), vector(1, 7, 10), scale=0.3, negative=vector(2, 7, 10)
        ),
    ]
    given = [embeds(vector(0)), embeds(vector(1, 7, 10), negative=vector(2, 7, 10))]
    wanted = native("base", "plus", scale=[0.7, 0.3], embeds=given)
    assert apart(drawn(pipe, *edits), wanted) < ROUNDING


@pytest.mark.slow
def test_an_adapter_of_the_pipeline_is_added_to() -> None:
    pipe = identity.pipeline()
    load_into_diffusers(pipe, identity.tensors("base", pipe.unet))
    pipe.set_ip_adapter_scale(0.7)
    second = IPAdapter(adapter("base", pipe.unet, 1), vector(1), scale=0.3)
    ours = drawn(pipe, second, ip_adapter_image_embeds=[embeds(vector(0))])
    wanted = native("base", "base", scale=[0.7, 0.3], embeds=[embeds(vector(i)) for i in range(2)])
    assert apart(ours, wanted) < ROUNDING


@pytest.mark.slow
def test_blocks_as_in_diffusers(pipe: Any) -> None:
    scale = {"down_blocks.2.*": 0.5, "up_blocks.1.attentions.1.*": 0.9}
    edit = IPAdapter(adapter("base", pipe.unet), vector(0), scale=scale)
    config = {"down": {"block_2": [0.5]}, "up": {"block_1": [0.0, 0.9]}}
    wanted = native("base", scale=config, embeds=[embeds(vector(0))])
    assert apart(drawn(pipe, edit), wanted) < ROUNDING


# -- the formula -----------------------------------------------------------------------------------


class Literal:
    """Cross-attention by the formula, for one adapter: tokens of each row, scale and masks."""

    def __init__(
        self, k: Tensor, v: Tensor, tokens: list[Tensor], scales: list[float], masks: list[Any]
    ):
        self.k, self.v, self.tokens, self.scales, self.masks = k, v, tokens, scales, masks

    def __call__(self, attn: Any, x: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
        q = x @ attn.to_q.weight.T
        text = encoder_hidden_states
        out = self.asked(attn, q, text @ attn.to_k.weight.T, text @ attn.to_v.weight.T)
        side = int(x.shape[1] ** 0.5)
        for tokens, scale, mask in zip(self.tokens, self.scales, self.masks, strict=True):
            found = self.asked(attn, q, tokens @ self.k.T, tokens @ self.v.T)
            if mask is not None:
                n = mask.shape[0] // side
                pooled = mask.reshape(side, n, side, n).mean((1, 3)).flatten()
                found = found * pooled[:, None]
            out = out + scale * found
        made: Tensor = out @ attn.to_out[0].weight.T + attn.to_out[0].bias
        return made

    def asked(self, attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        d = q.shape[-1] // attn.heads
        heads = []
        for h in range(attn.heads):
            at = slice(h * d, (h + 1) * d)
            scores = (q[..., at] @ k[..., at].mT / d**0.5).exp()
            heads.append(scores / scores.sum(-1, keepdim=True) @ v[..., at])
        return torch.cat(heads, -1)


def by_formula(
    unet: Any,
    given: dict[str, Tensor],
    tokens: list[Tensor],
    scales: list[float],
    masks: list[Any],
    call: Any,
    **options: Any,
) -> Tensor:
    """A denoiser call with every cross-attention written out.

    tokens: of each image, [rows, tokens, channels].
    """
    before = unet.attn_processors
    processors = dict(before)
    for i, path in adapter_layers(unet).items():
        if path.endswith("attn2"):
            k, v = (given[f"ip_adapter.{i}.to_{n}_ip.weight"] for n in "kv")
            processors[f"{path}.processor"] = Literal(k, v, tokens, scales, masks)
    unet.set_attn_processor(processors)
    try:
        with torch.no_grad():
            found: Tensor = unet(*call, **options).sample
    finally:
        unet.set_attn_processor(before)
    return found


def base_tokens(given: dict[str, Tensor], e: Tensor) -> Tensor:
    made = e @ given["image_proj.proj.weight"].T + given["image_proj.proj.bias"]
    made = made.reshape(4, -1)
    return F.layer_norm(
        made, made.shape[-1:], given["image_proj.norm.weight"], given["image_proj.norm.bias"]
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str
)
def test_a_call_is_the_formula(dtype: torch.dtype, tolerance: float) -> None:
    """Rows with and without the prompt, two images with regions, scales of their own."""
    unet = identity.pipeline().unet.to(dtype)
    call = vector(0, 2, 4, 16, 16).to(dtype), 500, vector(1, 2, 9, 32).to(dtype)
    mask = torch.zeros(16, 16, dtype=dtype)
    mask[:, :5] = 1
    shown = [vector(2), vector(3)]
    edit = IPAdapter(
        adapter("base", unet),
        [
            ImagePrompt(shown[0], scale=0.9, region="box:0,0,0.3125,1"),
            ImagePrompt(shown[1].double(), scale=0.4),
        ],
        scale=0.5,
    )
    with hookctl.control(unet, edit, rows=("uncond", "cond")), torch.no_grad():
        ours = unet(*call).sample
    given = {name: x.to(dtype) for name, x in identity.tensors("base", unet).items()}
    tokens = [
        torch.stack([base_tokens(given, torch.zeros_like(e)), base_tokens(given, e)])
        for e in (x.to(dtype) for x in shown)
    ]
    wanted = by_formula(unet, given, tokens, [0.45, 0.2], [mask, None], call)
    assert apart(ours, wanted) < tolerance
    with torch.no_grad():
        assert apart(unet(*call).sample, wanted) > 1e-3


# -- strength --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"scale": 0}, {"scale": {"all": 0.0}}, {"schedule": [0.0]}, {"start": 0.5, "stop": 0.5}],
    ids=str,
)
def test_zero_strength_is_no_editor(pipe: Any, plain: Tensor, options: Any) -> None:
    edit = IPAdapter(adapter("base", pipe.unet), vector(0), **options)
    assert torch.equal(drawn(pipe, edit), plain)


@pytest.mark.slow
def test_images_without_strength_are_no_editor(pipe: Any, plain: Tensor) -> None:
    images = [ImagePrompt(torch.ones(10), scale=0)]
    assert torch.equal(drawn(pipe, IPAdapter(adapter("base", pipe.unet), images)), plain)


@pytest.mark.slow
def test_an_image_without_strength_is_as_if_not_given(pipe: Any) -> None:
    shown = [ImagePrompt(vector(0)), ImagePrompt(vector(1), scale=0)]
    both = drawn(pipe, IPAdapter(adapter("base", pipe.unet), shown))
    assert torch.equal(both, drawn(pipe, IPAdapter(adapter("base", pipe.unet), vector(0))))


@pytest.mark.slow
def test_schedule_and_window_are_scales_of_steps(pipe: Any) -> None:
    """A factor for each of two steps; a window that ends after the first."""
    made = adapter("base", pipe.unet)
    first = drawn(pipe, IPAdapter(made, vector(0), stop=0.5))
    assert torch.equal(drawn(pipe, IPAdapter(made, vector(0), schedule=[1, 0])), first)
    steady = drawn(pipe, IPAdapter(made, vector(0), scale=0.5))
    assert torch.equal(drawn(pipe, IPAdapter(made, vector(0), schedule=[0.5, 0.5])), steady)
    assert apart(first, steady) > 1e-3


# -- rows ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_prompt_has_its_images(pipe: Any) -> None:
    """As drawn alone; a prompt without images is as without the editor."""
    prompts = ["a red circle", "a blue square"]
    noise = [torch.Generator().manual_seed(i) for i in (0, 0)]
    made = adapter("base", pipe.unet)
    edit = IPAdapter(made, [[vector(0), vector(1)], []])
    with hookctl.control(pipe, edit):
        both = pipe(
            prompts,
            num_inference_steps=2,
            height=128,
            width=128,
            output_type="latent",
            generator=noise,
        ).images
    first = drawn(pipe, IPAdapter(made, [vector(0), vector(1)]))
    assert apart(both[:1], first) < ROUNDING
    assert apart(both[1:], drawn(pipe, prompt=prompts[1])) < ROUNDING


@pytest.mark.slow
def test_several_images_of_a_prompt_and_no_guidance(pipe: Any) -> None:
    made = adapter("base", pipe.unet)
    one = drawn(pipe, IPAdapter(made, vector(0)), guidance_scale=1.0)
    two = drawn(pipe, IPAdapter(made, vector(0)), guidance_scale=1.0, num_images_per_prompt=2)
    assert apart(two[:1], one) < ROUNDING


@pytest.mark.slow
def test_without_guidance_no_negative_is_asked_for(pipe: Any) -> None:
    edit = IPAdapter(adapter("plus", pipe.unet), vector(0, 7, 10))
    drawn(pipe, edit, guidance_scale=1.0)
    with pytest.raises(InputError, match="negative=None, but rows without the prompt are shown"):
        drawn(pipe, edit)


@pytest.mark.slow
def test_stacks_with_regional_prompts(pipe: Any) -> None:
    made = adapter("base", pipe.unet)
    regional = RegionalPrompts(["a blue square"], ["box:0,0,0.5,1"])
    shown = ImagePrompt(vector(0), region="box:0.5,0,1,1")
    both = drawn(pipe, regional, IPAdapter(made, shown))
    assert apart(both, drawn(pipe, regional)) > 1e-3
    assert apart(both, drawn(pipe, IPAdapter(made, shown))) > 1e-3
    assert apart(both, drawn(pipe, IPAdapter(made, shown), regional)) < ROUNDING


# -- images ----------------------------------------------------------------------------------------


def encoder() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(3)
    config = CLIPVisionConfig(
        hidden_size=10,
        intermediate_size=12,
        projection_dim=10,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return CLIPVisionModelWithProjection(config).eval()


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (height // 4, width // 4, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["base", "plus"])
def test_an_image_is_read_as_by_diffusers(pipe: Any, kind: str) -> None:
    from transformers import CLIPImageProcessor

    model, shown = encoder(), picture(40, 28)
    edit = IPAdapter(adapter(kind, pipe.unet), shown, image_encoder=model)
    ours = drawn(pipe, edit)
    theirs = identity.pipeline()
    load_into_diffusers(theirs, identity.tensors(kind, theirs.unet))
    theirs.register_modules(
        image_encoder=model, feature_extractor=CLIPImageProcessor(size=16, crop_size=16)
    )
    assert apart(ours, drawn(theirs, ip_adapter_image=shown)) < ROUNDING
    # The pipeline's own encoder is found, and another way to fit the image in.
    own = identity.pipeline()
    own.register_modules(image_encoder=model)
    assert torch.equal(drawn(own, IPAdapter(adapter(kind, own.unet), shown)), ours)
    squeezed = IPAdapter(adapter(kind, own.unet), shown, crop=False)
    assert apart(drawn(own, squeezed), ours) > 1e-4


# -- training and memory ---------------------------------------------------------------------------


def test_gradients_reach_the_adapter() -> None:
    unet = identity.pipeline().unet.requires_grad_(False)
    made = adapter("base", unet)
    edit = IPAdapter(made, vector(0))
    made.requires_grad_(True)
    with hookctl.control(unet, edit, rows=("cond",)):
        unet(vector(0, 1, 4, 16, 16), 500, vector(1, 1, 9, 32)).sample.square().mean().backward()
    grads = {name: p.grad for name, p in made.named_parameters()}
    assert all(grad is not None and float(grad.abs().max()) > 0 for grad in grads.values())


@pytest.mark.slow
def test_half_precision_follows_the_model() -> None:
    pipe = identity.pipeline()
    made = adapter("base", pipe.unet)
    edit = IPAdapter(made, vector(0), scale=0.7)
    wanted = drawn(pipe, edit, guidance_scale=2.0)
    pipe.to(torch.bfloat16)
    ours = drawn(pipe, edit, guidance_scale=2.0)
    assert ours.dtype == torch.bfloat16
    assert apart(ours.float(), wanted) < 0.2
    assert all(p.dtype == torch.float32 for p in made.parameters())


# -- refusals --------------------------------------------------------------------------------------

BASE = ImagePrompt(torch.ones(10))


@pytest.mark.parametrize(
    ("kind", "images", "options", "message"),
    [
        ("base", torch.ones(9), {}, r"images\[0\]: a tensor \(9,\) given, but this .* \[10\]"),
        ("base", torch.ones(2, 10), {}, r"adapter reads \[10\]"),
        ("base", torch.full((10,), float("nan")), {}, "not all values are finite"),
        ("base", "cat.png", {}, "'cat.png' given; a PIL image or a tensor expected"),
        ("base", ImagePrompt(face=torch.ones(10)), {}, r"face given, but .* ImagePrompt\(image="),
        ("base", ImagePrompt(), {}, "nothing given, but this adapter reads an image or its"),
        ("base", ImagePrompt(torch.ones(10), scale="x"), {}, r"images\[0\].scale='x'"),
        ("base", ImagePrompt(torch.ones(10), region="box:2,0,3,1"), {}, r"images\[0\].region"),
        ("base", ImagePrompt(torch.ones(10), region=torch.zeros(8, 8)), {}, "mask: empty"),
        ("plus", torch.ones(3, 9), {}, r"reads \[tokens, 10\]"),
        ("plus", torch.ones(3, 10), {"negative": torch.ones(3, 9)}, "IPAdapter: negative"),
        ("base", BASE, {"scale": "much"}, "IPAdapter: scale='much'"),
        ("base", BASE, {"schedule": []}, "give one factor or more"),
        ("base", BASE, {"start": 0.6, "stop": 0.2}, "give a start before the stop"),
    ],
)
def test_what_is_refused(pipe: Any, kind: str, images: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        IPAdapter(adapter(kind, pipe.unet), images, **options)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (picture(8, 8), {}, "has no image encoder; give image_encoder="),
        ([[torch.ones(10)]] * 3, {}, "images is for 3 prompts, but the pipeline draws 1"),
        (ImagePrompt(torch.ones(10), region=torch.ones(64, 128)), {}, "a mask of 128 x 64 px"),
        (BASE, {"scale": {"up_blocks.7.*": 1}}, "scale: sites='up_blocks.7.*' matches none"),
    ],
)
def test_what_does_not_fit_the_run(pipe: Any, images: Any, options: Any, message: str) -> None:
    called = []
    handle = pipe.unet.conv_in.register_forward_pre_hook(lambda *_: called.append(True))
    try:
        with pytest.raises(InputError, match=message):
            drawn(pipe, IPAdapter(adapter("base", pipe.unet), images, **options))
    finally:
        handle.remove()
    assert not called  # before any denoising


def test_an_encoder_of_another_width(pipe: Any) -> None:
    model = encoder()
    model.config.projection_dim = 12
    with pytest.raises(InputError, match="gives embedding of 12 channels, but this adapter reads"):
        drawn(pipe, IPAdapter(adapter("base", pipe.unet), picture(8, 8), image_encoder=model))


class File:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors


@pytest.mark.slow
def test_from_checkpoint(pipe: Any) -> None:
    file = File(identity.tensors("base", pipe.unet))
    edit = from_checkpoint(file, pipe, images=vector(0), scale=0.7)
    wanted = drawn(pipe, IPAdapter(adapter("base", pipe.unet), vector(0), scale=0.7))
    assert torch.equal(drawn(pipe, edit), wanted)


def test_another_base_model(pipe: Any) -> None:
    larger = identity.pipeline("sdxl")
    file = File(identity.tensors("base", larger.unet))
    with pytest.raises(InputError) as caught:
        from_checkpoint(file, pipe, images=vector(0))
    said = str(caught.value)
    assert "ip_adapter.1.to_k_ip.weight is (32, 56), but this UNet2DConditionModel needs" in said
    assert "(16, 32) at down_blocks.0.attentions.0" in said
    assert "11 cross-attention layers for a text of 56 channels, the model has 10" in said


def test_no_unet() -> None:
    with pytest.raises(UnsupportedError, match="^Linear"):
        adapter_layers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("images", "options", "said"),
    [
        ([], {}, r"images=\[\]; give at least one"),
        ([[], []], {}, r"images=\[\[\], \[\]\]; give at least one"),
        (vector(0), {"scale": {}}, r"scale=\{\}; give a number"),
        (vector(0), {"negative": vector(1)}, "negative is given, but it stands for features"),
    ],
)
def test_what_would_do_nothing_is_refused(pipe: Any, images: Any, options: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        IPAdapter(adapter("base", pipe.unet), images, **options)


def test_features_of_no_token_are_refused(pipe: Any) -> None:
    with pytest.raises(InputError, match=r"a tensor \(0, 10\) given"):
        IPAdapter(adapter("plus", pipe.unet), torch.zeros(0, 10), negative=vector(1, 1, 10))


@pytest.mark.parametrize("model", ["openai/clip", torch.nn.Linear(2, 2)])
def test_what_is_no_image_encoder_is_refused(pipe: Any, model: Any) -> None:
    edit = IPAdapter(adapter("base", pipe.unet), Image.new("RGB", (8, 8)), image_encoder=model)
    with pytest.raises(InputError, match="image_encoder=.*; give a CLIPVisionModelWithProjection"):
        edit.attach(pipe)
