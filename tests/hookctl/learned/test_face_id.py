"""FaceID: image tokens and low-rank deltas together, as diffusers has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hookctl
from hookctl.errors import HookctlWarning, InputError
from hookctl.learned.face_id import FaceID, from_checkpoint
from hookctl.learned.image_prompts import ImagePrompt
from hookctl.learned.names import adapter_layers
from tests.hookctl.learned import identity
from tests.hookctl.learned.identity import adapter, apart, drawn, embeds, load_into_diffusers
from tests.hookctl.learned.test_ip_adapter import ROUNDING, File, vector


@pytest.fixture(scope="module")
def pipe() -> Any:
    return identity.pipeline()


def native(kind: str, scale: float, **options: Any) -> Any:
    pipe = identity.pipeline()
    load_into_diffusers(pipe, identity.tensors(kind, pipe.unet))
    pipe.set_ip_adapter_scale(scale)
    return pipe


@pytest.mark.slow
def test_face_id_is_diffusers(pipe: Any) -> None:
    edit = FaceID(adapter("faceid", pipe.unet), vector(0, 6), scale=0.7)
    ours = drawn(pipe, edit)
    theirs = native("faceid", 0.7)
    wanted = drawn(theirs, ip_adapter_image_embeds=[embeds(vector(0, 6)[None])])
    assert apart(ours, wanted) < ROUNDING
    without = drawn(
        pipe, FaceID(adapter("faceid", pipe.unet), vector(0, 6), scale=0.7, lora_scale=0)
    )
    assert apart(ours, without) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("shortcut", [False, True], ids=["v1", "v2"])
def test_face_id_plus_is_diffusers(pipe: Any, shortcut: bool) -> None:
    made = adapter("faceid-plus", pipe.unet, shortcut=shortcut)
    face, seen, negative = vector(0, 6), vector(1, 7, 10), vector(2, 7, 10)
    edit = FaceID(made, ImagePrompt(face=face, image=seen), scale=0.7, negative=negative)
    ours = drawn(pipe, edit)
    theirs = native("faceid-plus", 0.7)
    [layer] = theirs.unet.encoder_hid_proj.image_projection_layers
    layer.clip_embeds = torch.stack([negative, seen])[:, None]
    layer.shortcut = shortcut
    wanted = drawn(theirs, ip_adapter_image_embeds=[embeds(face[None])])
    assert apart(ours, wanted) < ROUNDING


def test_deltas_are_the_formula() -> None:
    """W x + s B A x on every projection of every attention layer, in all rows."""
    unet = identity.pipeline().unet.double()
    edit = FaceID(adapter("faceid", unet), vector(0, 6), scale=1e-12, lora_scale=0.6)
    call = vector(0, 2, 4, 16, 16).double(), 500, vector(1, 2, 9, 32).double()
    with hookctl.control(unet, edit, rows=("uncond", "cond")), torch.no_grad():
        ours = unet(*call).sample
    given = identity.tensors("faceid", unet)
    for i, path in adapter_layers(unet).items():
        attention = unet.get_submodule(path)
        for part in ("q", "k", "v", "out"):
            layer = attention.to_out[0] if part == "out" else getattr(attention, f"to_{part}")
            down, up = (given[f"ip_adapter.{i}.to_{part}_lora.{w}.weight"] for w in ("down", "up"))
            layer.weight.data += 0.6 * (up.double() @ down.double())
    with torch.no_grad():
        assert apart(ours, unet(*call).sample) < 1e-10


@pytest.mark.slow
def test_zero_is_no_editor(pipe: Any) -> None:
    edit = FaceID(adapter("faceid", pipe.unet), vector(0, 6), scale=0)
    assert torch.equal(drawn(pipe, edit), drawn(pipe))


@pytest.mark.slow
def test_deltas_act_in_the_window_alone(pipe: Any) -> None:
    made = adapter("faceid", pipe.unet)
    edit = FaceID(made, vector(0, 6), scale={"mid": 0.3}, stop=0.5)
    with hookctl.control(pipe, edit) as session:
        pipe("a", num_inference_steps=2, height=128, width=128, output_type="latent")
    lines = [line for line in str(session.report()).splitlines() if "linear" in line]
    assert lines and all("0-1" not in line for line in lines)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "images", "message"),
    [
        ("faceid", {}, torch.ones(5), r"a tensor \(5,\) given, but this adapter reads \[6\]"),
        (
            "faceid",
            {},
            ImagePrompt(image=torch.ones(6)),
            r"image given, .* give ImagePrompt\(face=",
        ),
        (
            "faceid-plus",
            {"shortcut": True},
            torch.ones(6),
            "face given, but this adapter reads a face's embedding and an image or its features",
        ),
    ],
)
def test_what_is_refused(pipe: Any, kind: str, options: Any, images: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FaceID(adapter(kind, pipe.unet, **options), images)


@pytest.mark.slow
def test_from_checkpoint(pipe: Any) -> None:
    file = File(identity.tensors("faceid-plus", pipe.unet))
    shown = ImagePrompt(face=vector(0, 6), image=vector(1, 7, 10))
    with pytest.raises(InputError, match="v1 and v2 can't be told apart"):
        from_checkpoint(file, pipe, images=shown)
    first, second = (
        from_checkpoint(file, pipe, images=shown, shortcut=shortcut, negative=vector(2, 7, 10))
        for shortcut in (False, True)
    )
    assert apart(drawn(pipe, first), drawn(pipe, second)) > 1e-3


@pytest.mark.slow
def test_several_faces_without_deltas(pipe: Any) -> None:
    """FaceID-Portrait: the tokens of all faces share a softmax."""
    given = {k: x for k, x in identity.tensors("faceid", pipe.unet).items() if "lora" not in k}
    faces = [vector(0, 6), vector(1, 6)]
    edit = from_checkpoint(File(given), pipe, images=faces)
    theirs = identity.pipeline()
    load_into_diffusers(theirs, given)
    # diffusers' projection has a row for each image, and here an image is a face.
    wanted = drawn(theirs, ip_adapter_image_embeds=[embeds(*faces)])
    assert apart(drawn(pipe, edit), wanted) < ROUNDING
    with pytest.raises(InputError, match="lora_scale=0.5; this file has no low-rank deltas"):
        from_checkpoint(File(given), pipe, images=faces, lora_scale=0.5)


def test_a_delta_of_another_shape(pipe: Any) -> None:
    given: dict[str, Tensor] = identity.tensors("faceid", pipe.unet)
    name = "ip_adapter.0.to_q_lora.up.weight"
    given[name] = F.pad(given[name], (0, 0, 0, 1))
    with pytest.raises(InputError, match=r"ip_adapter.0.to_q_lora.up.weight is \(17, 3\)"):
        from_checkpoint(File(given), pipe, images=vector(0, 6))


def test_length_of_an_embedding() -> None:
    from hookctl.learned.faces import check_length

    with pytest.warns(HookctlWarning, match="FaceID was trained on embeddings of length 1"):
        check_length(torch.ones(512), "images[0]", normalised=True)
    with pytest.warns(HookctlWarning, match="InstantID was trained on embeddings as the network"):
        check_length(torch.ones(512) / 512**0.5, "people[0]", normalised=False)


def test_an_adapter_without_deltas_is_refused(pipe: Any) -> None:
    with pytest.raises(InputError, match="the adapter has no low-rank deltas; use IPAdapter"):
        FaceID(adapter("base", pipe.unet), vector(0))
