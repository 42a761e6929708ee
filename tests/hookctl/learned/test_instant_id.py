"""InstantID: tokens and IdentityNet, of one person or several, against diffusers and formulas."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline
from torch import Tensor

import hookctl
from hookctl.editor import WHOLE_IMAGE
from hookctl.errors import HookctlWarning, InputError, UnsupportedError
from hookctl.learned.instant_id import InstantID, from_checkpoint
from hookctl.learned.keypoints import draw_keypoints
from hookctl.learned.people import Person
from tests.hookctl.learned import identity
from tests.hookctl.learned.identity import (
    PIXELS,
    adapter,
    apart,
    drawn,
    embeds,
    identity_net,
    load_into_diffusers,
)
from tests.hookctl.learned.modules.test_resampler import literal_resampler
from tests.hookctl.learned.test_ip_adapter import ROUNDING, File, by_formula, vector

POINTS = [(0.3, 0.35), (0.7, 0.35), (0.5, 0.55), (0.35, 0.75), (0.65, 0.75)]
OTHER = [(x * 0.5 + 0.5, y * 0.5 + 0.4) for x, y in POINTS]
FACE = vector(0, 6)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return identity.pipeline()


@pytest.fixture(scope="module")
def net(pipe: Any) -> Any:
    return identity_net(pipe.unet)


def person(**options: Any) -> Person:
    return Person(FACE, POINTS, **options)


def hint(points: Any, side: int = PIXELS) -> Any:
    return draw_keypoints([[(x * side, y * side) for x, y in points]], side, side)


# -- as diffusers ----------------------------------------------------------------------------------


def of_controlnet_pipeline(kind: str, scale: float, **options: Any) -> Tensor:
    """diffusers' ControlNet pipeline with its own IP-Adapter, the ControlNet's text swapped for the
    tokens of the face."""
    base = identity.pipeline(kind)
    net = identity_net(base.unet)
    which = {"sd15": StableDiffusionControlNetPipeline, "sdxl": StableDiffusionXLControlNetPipeline}
    parts = dict(base.components)
    if kind == "sd15":
        parts["requires_safety_checker"] = False
    pipe = which[kind](**parts, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    load_into_diffusers(pipe, identity.tensors("instantid", pipe.unet))
    pipe.set_ip_adapter_scale(scale)
    given = embeds(FACE[None])
    [project] = pipe.unet.encoder_hid_proj.image_projection_layers
    with torch.no_grad():
        tokens = project(given[:, 0])

    def swap(module: Any, args: Any, kwargs: Any) -> Any:
        rows = len(args[0])  # in guess mode those with the prompt alone
        return args, {**kwargs, "encoder_hidden_states": tokens[-rows:]}

    net.register_forward_pre_hook(swap, with_kwargs=True)
    return drawn(pipe, image=hint(POINTS), ip_adapter_image_embeds=[given], **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("stop", [1.0, 0.5])
def test_instant_id_is_diffusers_with_the_text_swapped(kind: str, stop: float) -> None:
    pipe = identity.pipeline(kind)
    net = identity_net(pipe.unet)
    edit = InstantID(
        adapter("instantid", pipe.unet),
        person(),
        net,
        scale=0.6,
        control_scale=0.7,
        control_stop=stop,
    )
    wanted = of_controlnet_pipeline(
        kind, 0.6, controlnet_conditioning_scale=0.7, control_guidance_end=stop
    )
    assert apart(drawn(pipe, edit), wanted) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_guess_mode_is_diffusers(kind: str) -> None:
    pipe = identity.pipeline(kind)
    made, net = adapter("instantid", pipe.unet), identity_net(pipe.unet)
    edit = InstantID(made, person(), net, scale=0.6, control_scale=0.7, guess=True)
    wanted = of_controlnet_pipeline(kind, 0.6, controlnet_conditioning_scale=0.7, guess_mode=True)
    found = drawn(pipe, edit)
    assert apart(found, wanted) < ROUNDING
    usual = InstantID(made, person(), net, scale=0.6, control_scale=0.7)
    assert apart(drawn(pipe, usual), found) > 1e-3


@pytest.mark.slow
def test_beside_a_controlnet_of_the_pipeline(pipe: Any, net: Any) -> None:
    """Both add: of one net, with the text and with the face."""
    own = StableDiffusionControlNetPipeline(
        **pipe.components, requires_safety_checker=False, controlnet=identity_net(pipe.unet, 5)
    )
    own.set_progress_bar_config(disable=True)
    edit = InstantID(adapter("instantid", own.unet), person(), net)
    both = drawn(own, edit, image=hint(OTHER))
    assert apart(both, drawn(own, image=hint(OTHER))) > 1e-3
    assert apart(both, drawn(pipe, edit)) > 1e-3


# -- the formula -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str
)
def test_two_people_are_the_formula(dtype: torch.dtype, tolerance: float) -> None:
    """Each with tokens, points and a region; unguided rows see the tokens of nobody, and the
    points. The second is known by two pictures."""
    unet = identity.pipeline().unet.to(dtype)
    net = identity_net(unet).to(dtype)
    call = vector(0, 2, 4, 16, 16).to(dtype), 500, vector(1, 2, 9, 32).to(dtype)
    faces = [FACE[None].to(dtype), vector(3, 2, 6).to(dtype)]
    people = [
        Person(faces[0][0], POINTS, "box:0,0,0.5,1"),
        Person(faces[1], OTHER, "box:0.5,0,1,1", scale=0.5),
    ]
    edit = InstantID(adapter("instantid", unet), people, net, scale=0.6, control_scale=0.7)
    with hookctl.control(unet, edit, rows=("uncond", "cond")), torch.no_grad():
        ours = unet(*call).sample

    given = {name: x.to(dtype) for name, x in identity.tensors("instantid", unet).items()}
    own = {k.removeprefix("image_proj."): x for k, x in given.items() if k.startswith("image")}
    nobody = literal_resampler(own, torch.zeros(1, 1, 6, dtype=dtype), 1, 4)
    masks, tokens, total = [], [], None
    for face, points, left in zip(faces, (POINTS, OTHER), (True, False), strict=True):
        mask = torch.zeros(16, 16, dtype=dtype)
        mask[:, slice(0, 8) if left else slice(8, 16)] = 1
        masks.append(mask)
        tokens.append(torch.cat([nobody, literal_resampler(own, face[None], 1, 4)]))
        shown = torch.from_numpy(np.array(hint(points))).permute(2, 0, 1)[None].to(dtype) / 255
        with torch.no_grad():
            skips, middle = net(
                *call[:2],
                encoder_hidden_states=tokens[-1],
                controlnet_cond=shown.expand(2, -1, -1, -1),
                conditioning_scale=0.7,
                return_dict=False,
            )
        found = []
        for x in (*skips, middle):
            n = 16 // x.shape[-1]
            found.append(x * mask.reshape(x.shape[-1], n, x.shape[-1], n).mean((1, 3)))
        total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
    assert total is not None
    wanted = by_formula(
        unet,
        given,
        tokens,
        [0.6, 0.3],
        masks,
        call,
        down_block_additional_residuals=total[:-1],
        mid_block_additional_residual=total[-1],
    )
    assert apart(ours, wanted) < tolerance


# -- rows that it is not asked about ---------------------------------------------------------------


def test_guess_mode_leaves_out_what_it_would_drop() -> None:
    """As all rows asked and the unguided set to zero, to rounding in the guided ones alone."""
    unet = identity.pipeline().unet
    net = identity_net(unet)
    call = vector(0, 2, 4, 16, 16), 500, vector(1, 2, 9, 32)
    edit = InstantID(adapter("instantid", unet), person(), net, scale=0, guess=True)
    asked: list[int] = []
    counting = net.register_forward_pre_hook(lambda _, args: asked.append(len(args[0])))
    with hookctl.control(unet, edit, rows=("uncond", "cond")), torch.no_grad():
        ours = unet(*call).sample
    alone = call[0][:1], 500, call[2][:1]
    told = pytest.warns(HookctlWarning, match="InstantID changed nothing")
    with told, hookctl.control(unet, edit, rows=("uncond",), strict=False), torch.no_grad():
        nothing = unet(*alone).sample
    assert asked == [1]
    counting.remove()

    given = identity.tensors("instantid", unet)
    own = {k.removeprefix("image_proj."): x for k, x in given.items() if k.startswith("image")}
    faces = torch.stack([torch.zeros_like(FACE), FACE])[:, None]
    shown = torch.from_numpy(np.array(hint(POINTS))).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        skips, middle = net(
            *call[:2],
            encoder_hidden_states=literal_resampler(own, faces, 1, 4),
            controlnet_cond=shown.expand(2, -1, -1, -1),
            conditioning_scale=0.8,
            guess_mode=True,
            return_dict=False,
        )
        for x in (*skips, middle):
            x[0] = 0
        wanted = unet(
            *call, down_block_additional_residuals=skips, mid_block_additional_residual=middle
        ).sample
        assert torch.equal(nothing, unet(*alone).sample)
    assert torch.equal(ours[0], wanted[0])
    assert apart(ours, wanted) < ROUNDING


# -- strength and rows -----------------------------------------------------------------------------


@pytest.mark.slow
def test_zero_is_no_editor(pipe: Any, net: Any) -> None:
    made = adapter("instantid", pipe.unet)
    plain = drawn(pipe)
    assert torch.equal(drawn(pipe, InstantID(made, person(), net, scale=0, control_scale=0)), plain)


@pytest.mark.slow
def test_each_part_alone(pipe: Any, net: Any) -> None:
    made, plain = adapter("instantid", pipe.unet), drawn(pipe)
    tokens = drawn(pipe, InstantID(made, person()))
    points = drawn(pipe, InstantID(made, person(), net, scale=0))
    assert torch.equal(tokens, drawn(pipe, InstantID(made, person(), net, control_scale=0)))
    for one in (tokens, points):
        assert apart(one, plain) > 1e-3
    free = drawn(pipe, InstantID(made, Person(FACE), net, scale=0))  # a black picture
    assert apart(free, points) > 1e-3


@pytest.mark.slow
def test_each_prompt_has_its_people(pipe: Any, net: Any) -> None:
    made, prompts = adapter("instantid", pipe.unet), ["a red circle", "a blue square"]
    two = [
        Person(FACE, POINTS, "box:0,0,0.5,1"),
        Person(vector(3, 6), OTHER, "box:0.5,0,1,1"),
    ]
    edit = InstantID(made, [two, [person()]], net)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    size = {"height": PIXELS, "width": PIXELS, "num_inference_steps": 2, "output_type": "latent"}
    with hookctl.control(pipe, edit):
        both = pipe(prompts, generator=generators, **size).images
    assert apart(both[:1], drawn(pipe, InstantID(made, two, net))) < ROUNDING
    alone = drawn(pipe, InstantID(made, person(), net), prompt=prompts[1])
    assert apart(both[1:], alone) < ROUNDING


@pytest.mark.slow
def test_an_image_that_is_not_square(pipe: Any, net: Any) -> None:
    edit = InstantID(adapter("instantid", pipe.unet), person(region="box:0,0,0.5,1"), net)
    assert drawn(pipe, edit, width=192).shape[-2:] == (16, 24)


@pytest.mark.slow
def test_gradients_reach_identity_net() -> None:
    unet = identity.pipeline().unet.requires_grad_(False)
    made, net = adapter("instantid", unet), identity_net(unet)
    edit = InstantID(made, person(), net)
    for module in (made, net):
        module.requires_grad_(True)
    with hookctl.control(unet, edit, rows=("cond",)):
        unet(vector(0, 1, 4, 16, 16), 500, vector(1, 1, 9, 32)).sample.square().mean().backward()
    for module in (made, net):
        assert all(p.grad is not None for p in module.parameters())


@pytest.mark.slow
def test_nothing_is_left(pipe: Any, net: Any) -> None:
    before = drawn(pipe)
    drawn(pipe, InstantID(adapter("instantid", pipe.unet), person(), net))
    assert torch.equal(drawn(pipe), before)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("people", "options", "message"),
    [
        (torch.ones(6), {}, r"people\[0\]=a tensor .*; give a Person"),
        (Person(torch.ones(5)), {}, r"people\[0\]: a tensor \(5,\) given, .* \[tokens, 6\]"),
        (Person(torch.ones(6), POINTS[:4]), {}, r"people\[0\].keypoints=.*; give five points"),
        (
            Person(torch.ones(6), [(x * 512, y * 512) for x, y in POINTS]),
            {},
            "give fractions of the image",
        ),
        (
            [Person(torch.ones(6)), Person(torch.ones(6), region="full")],
            {},
            r"people\[0\] has no region, and there are 2 people",
        ),
        (Person(torch.ones(6)), {"control_scale": float("nan")}, "InstantID: control_scale=nan"),
        (Person(torch.ones(6)), {"control_stop": 2}, "control_start, control_stop=.* outside"),
    ],
)
def test_what_is_refused(pipe: Any, people: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        InstantID(adapter("instantid", pipe.unet), people, **options)


def test_another_kind_of_adapter(pipe: Any) -> None:
    with pytest.raises(InputError, match="the adapter has a ImageProjection; InstantID's has a"):
        InstantID(adapter("base", pipe.unet), person())


def test_a_net_of_another_model(pipe: Any) -> None:
    made = adapter("instantid", pipe.unet)
    with pytest.raises(UnsupportedError, match="is a Linear; give diffusers' ControlNetModel"):
        drawn(pipe, InstantID(made, person(), torch.nn.Linear(2, 2)))
    other = identity_net(identity.pipeline("sdxl").unet)
    with pytest.raises(InputError, match="cross_attention_dim=56, but the model has 32"):
        drawn(pipe, InstantID(made, person(), other))


@pytest.mark.slow
def test_from_checkpoint_and_the_official_folder(pipe: Any, net: Any, tmp_path: Path) -> None:
    net.save_pretrained(tmp_path, safe_serialization=True)
    file = File(identity.tensors("instantid", pipe.unet))
    edit = from_checkpoint(file, pipe, people=person(), identity_net=tmp_path)
    wanted = drawn(pipe, InstantID(adapter("instantid", pipe.unet), person(), net))
    assert torch.equal(drawn(pipe, edit), wanted)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(net.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match="give the folder ControlNetModel"):
        from_checkpoint(file, pipe, people=person(), identity_net=tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "ControlNetModel"


def test_what_is_no_adapter_or_net_is_refused(pipe: Any) -> None:
    with pytest.raises(InputError, match="adapter=None; give an Adapter"):
        InstantID(None, person())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="identity_net='folder'; give a ControlNetModel"):
        InstantID(adapter("instantid", pipe.unet), person(), "folder")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"people=\[\]; give at least one"):
        InstantID(adapter("instantid", pipe.unet), [])


def test_a_copy_knows_the_points(pipe: Any, net: Any) -> None:
    edit = InstantID(adapter("instantid", pipe.unet), person(), net)
    made = copy.deepcopy(edit)
    with hookctl.control(pipe, edit):
        pictures = [one._hint(one.parts[0][0], 8, 8, torch.zeros(())) for one in (edit, made)]
    assert torch.equal(*pictures)


def test_points_are_places_of_the_whole_image(pipe: Any, net: Any) -> None:
    """In a tile of it they would be drawn anew."""
    made = adapter("instantid", pipe.unet)
    assert [claim.what for claim in InstantID(made, person(), net).claims()] == [WHOLE_IMAGE]
    assert not InstantID(made, person(), net, control_scale=0).claims()
