"""What a file is, at official full shapes: before and after its names are diffusers'."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hookctl.errors import InputError
from hookctl.learned.modules.gligen_tokens import BoxText
from hookctl.learned.names import official
from hookctl.learned.recognise import base_of, recognise
from tests.hookctl.learned import ldm

Shapes = dict[str, tuple[int, ...]]

FILES: dict[str, tuple[Callable[[], Shapes], str, str, str]] = {
    # what: (its tensors, kind, base model, a word of its summary)
    "GLIGEN, boxes": (ldm.gligen, "gligen box+text", "SD1.x", "fusers: 16, of 320, 640, 1280"),
    "GLIGEN, images": (
        lambda: ldm.gligen("text+image"), "gligen box+text+image", "SD1.x", "images or both",
    ),
    "GLIGEN, key points": (
        lambda: ldm.gligen("keypoint"), "gligen keypoints", "SD1.x", "at most 8 people",
    ),
    "GLIGEN, canny": (lambda: ldm.gligen("canny"), "gligen spatial", "SD1.x", "canny edges or"),
    "GLIGEN, semantic": (
        lambda: ldm.gligen("semantic"), "gligen spatial", "SD1.x", "a map: classes (152)",
    ),
    "GLIGEN, HED": (
        lambda: ldm.gligen("hed"), "gligen spatial", "SD1.x", "5 channels (latents and 1",
    ),
    "GLIGEN, inpainting": (
        lambda: ldm.gligen("inpainting"), "gligen box+text", "SD1.x", "9 channels (inpainting",
    ),
    "InstanceDiffusion": (
        ldm.instance_diffusion, "instance-diffusion", "SD1.x", "at most 30 instances",
    ),
    "IP-Adapter, SD1.5": (
        lambda: ldm.ip_adapter(ldm.SD15, ldm.projection(1024, 768)),
        "ip-adapter", "SD1.x", "4 of a CLIP embedding of width 1024 (ViT-H)",
    ),
    "IP-Adapter, SDXL": (
        lambda: ldm.ip_adapter(ldm.SDXL, ldm.projection(1280, 2048)),
        "ip-adapter", "SDXL", "4 of a CLIP embedding of width 1280 (ViT-bigG)",
    ),
    "IP-Adapter, SDXL ViT-H": (
        lambda: ldm.ip_adapter(ldm.SDXL, ldm.projection(1024, 2048)), "ip-adapter", "SDXL", "ViT-H",
    ),
    "IP-Adapter Full": (
        lambda: ldm.ip_adapter(ldm.SD15, ldm.full_projection(1280, 768)),
        "ip-adapter full", "SD1.x", "257",
    ),
    "IP-Adapter Plus": (
        lambda: ldm.ip_adapter(ldm.SD15, ldm.resampler(768, 1280, 768)),
        "ip-adapter plus", "SD1.x", "16 by a resampler of width 768, from inputs of 1280",
    ),
    "IP-Adapter Plus, SDXL": (
        lambda: ldm.ip_adapter(ldm.SDXL, ldm.resampler(1280, 1280, 2048)),
        "ip-adapter plus", "SDXL", "hidden states",
    ),
    "InstantID": (
        lambda: ldm.ip_adapter(ldm.SDXL, ldm.resampler(1280, 512, 2048)),
        "instantid", "SDXL", "IdentityNet",
    ),
    "FaceID": (
        lambda: ldm.ip_adapter(ldm.SD15, ldm.face_projection(768), 128),
        "ip-adapter faceid", "SD1.x", "low-rank weights: rank 128",
    ),
    "FaceID Portrait": (
        lambda: ldm.ip_adapter(ldm.SD15, ldm.face_projection(768, 16)),
        "ip-adapter faceid", "SD1.x", "low-rank weights: none in this file",
    ),
    "FaceID-Plus": (
        lambda: ldm.ip_adapter(ldm.SD15, ldm.face_plus_projection(768), 128),
        "ip-adapter faceid-plus", "SD1.x", "v1 and v2 have the same weights",
    ),
    "ControlNet, LDM": (lambda: ldm.controlnet(ldm.SD15), "controlnet", "SD1.x", "a control image"),
    "IdentityNet": (lambda: ldm.controlnet(ldm.SDXL), "controlnet", "SDXL", "IdentityNet"),
    "Collaborative Diffusion": (
        ldm.collaborative, "collaborative", "its own, with its autoencoder", "seg_mask, text",
    ),
    "a model": (lambda: ldm.unet(ldm.SDXL), "UNet", "SDXL", "no hook for one"),
    "a LoRA": (
        lambda: {"unet.a.attn2.to_k.lora_A.weight": (4, 768)}, "LoRA", "", "--lora FILE",
    ),
    "a LoRA of kohya": (lambda: {"lora_unet_a.lora_down.weight": (4, 8)}, "LoRA", "", "--lora"),
    "a word": (lambda: {"string_to_param.*": (1, 768)}, "textual inversion", "", "load_textual"),
    "a T2I-Adapter": (
        lambda: {"adapter.body.0.resnets.0.block1.weight": (8, 8)}, "T2I-Adapter", "", "T2IAdapter",
    ),
    "an optimizer": (
        lambda: {"state.0.exp_avg": (8, 8)}, "optimizer's state", "", "the file of the model",
    ),
}  # fmt: skip


def named(shapes: Shapes) -> Shapes:
    """By the names that a loader gives them."""
    made = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return {key: tuple(tensor.shape) for key, tensor in official(made)[0].items()}


@pytest.mark.parametrize("name", FILES)
def test_every_official_file(name: str) -> None:
    make, kind, base, says = FILES[name]
    found = recognise(named(make()))
    text = "\n".join(found.summary)
    assert (found.name, found.base) == (kind, base)
    assert says in text and text.startswith(f"kind: {kind}")
    assert found.hook == name.startswith(("GLIGEN", "Inst", "IP-", "FaceID", "Coll", "a LoRA"))


@pytest.mark.parametrize("name", [n for n in FILES if n.startswith(("GLIGEN", "Inst", "Coll"))])
def test_the_same_by_the_names_in_the_file(name: str) -> None:
    make, kind, base, says = FILES[name]
    found = recognise(make())
    assert found.name == kind and says in "\n".join(found.summary)
    assert found.base in (base, "SD1.x")


def test_a_gligen_of_other_widths() -> None:
    """As one that was trained for a small model: by what is there, not by how wide it is."""
    net = BoxText(text=48, hidden=40, out=48, k=4)
    layers = {"a.fuser.linear.weight": (16, 48)}
    file = {f"position_net.{k}": tuple(v.shape) for k, v in net.state_dict().items()} | layers
    assert recognise(file).name == "gligen box+text"
    with pytest.raises(InputError, match="reads 80 numbers per token; known are 72"):
        recognise(file | {"position_net.null_position_feature": (24,)})


def test_ldm_names() -> None:
    assert recognise(ldm.controlnet(ldm.SD15)).name == "controlnet (LDM)"
    whole = {f"model.diffusion_model.{k}": s for k, s in ldm.unet(ldm.SD15).items()}
    assert recognise(whole).name == "whole model (LDM)"


def test_raw_training_output_without_a_denoiser() -> None:
    """Its layers can't be numbered yet; what it is can be said."""
    file = ldm.ip_adapter(ldm.SD15, ldm.resampler(768, 1280, 768))
    raw = {k.replace("image_proj.", "image_proj_model."): s for k, s in file.items()}
    raw = {k.replace("ip_adapter.", "adapter_modules."): s for k, s in raw.items()}
    placed = {
        f"unet.blocks.{k.split('.')[1]}.processor.{k.split('.', 2)[2]}": s
        for k, s in file.items()
        if k.startswith("ip_adapter.")
    }
    alone = {k: s for k, s in raw.items() if not k.startswith("adapter_modules.")} | placed
    for form in (raw, raw | placed, alone):
        for shapes in (form, named(form)):
            found = recognise(shapes)
            assert found.name == "ip-adapter plus" and found.base == "SD1.x"
            assert "layers: 16" in found.facts
        assert any("those of training (accelerate)" in fact for fact in recognise(form).facts)


def without(shapes: Shapes, *starts: str) -> Shapes:
    return {key: shape for key, shape in shapes.items() if not key.startswith(starts)}


def only(shapes: Shapes, *starts: str) -> Shapes:
    return {key: shape for key, shape in shapes.items() if key.startswith(starts)}


PLUS = ldm.ip_adapter(ldm.SD15, ldm.resampler(768, 1280, 768))
WRONG: dict[str, tuple[Callable[[], Shapes], str]] = {
    "nothing known": (
        lambda: {"a": (1,), "b": (2,)}, "none of the known kinds of weights: 2 tensors, such as",
    ),
    "no fusers": (
        lambda: only(ldm.gligen(), "position_net"), r"looks like GLIGEN but lacks fusers",
    ),
    "no position net": (
        lambda: without(ldm.gligen(), "position_net"), "looks like GLIGEN but lacks a position net",
    ),
    "one of three": (
        lambda: only(ldm.instance_diffusion(), "scaleu"),
        "looks like InstanceDiffusion but lacks .* give the folder of all three",
    ),
    "no ScaleU": (
        lambda: without(ldm.instance_diffusion(), "scaleu"), "but lacks ScaleU vectors",
    ),
    "fewer formats": (
        lambda: without(ldm.instance_diffusion(), "position_net.linears_list.4"),
        "its position net reads boxes, points, scribbles, mask points of",
    ),
    "other frequencies": (
        lambda: ldm.gligen() | {"position_net.linears.0.weight": (512, 896)},
        "its position net reads 896 numbers per token; known are 832",
    ),
    "no layers": (lambda: only(PLUS, "image_proj"), "an IP-Adapter but has no ip_adapter"),
    "no projection": (lambda: only(PLUS, "ip_adapter"), "an IP-Adapter but has no image_proj"),
    "another projection": (
        lambda: {**only(PLUS, "ip_adapter"), "image_proj.x": (3,)},
        "image_proj is none that is known",
    ),
    "no dimensions": (
        lambda: PLUS | {"image_proj.latents": (16,)}, "its tensors have fewer dimensions",
    ),
    "halves": (
        lambda: {**only(PLUS, "ip_adapter"), **only(
            ldm.ip_adapter(ldm.SDXL, ldm.projection(1280, 2048)), "image_proj")},
        "its image tokens are 2048 wide, and its layers read 768: two halves",
    ),
    "another encoder": (
        lambda: PLUS | {"image_proj.proj_in.weight": (768, 999)},
        r"reads inputs of width 999; known are 512 \(InstantID\)",
    ),
    "predictors alone": (
        lambda: only(ldm.collaborative(), "model.seg_mask_conf"), "has no seg_mask_unet",
    ),
    "a ControlNet of its own": (
        lambda: {"controlnet_down_blocks.0.weight": (8, 8, 1, 1)}, "another design",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_looks_like_but_is_not(name: str) -> None:
    make, says = WRONG[name]
    with pytest.raises(InputError, match=says):
        recognise(make())


def test_base_models() -> None:
    assert [base_of(n) for n in (768, 1024, 2048, None)] == ["SD1.x", "SD2.x", "SDXL", ""]
    assert base_of(768, 16) == "SD1.x" and base_of(2048, 70) == "SDXL"
    assert base_of(2048, 45) == "other (text of width 2048, 45 transformer blocks)"
    tiny = ldm.Layout(24, (1, 2), (0, 1), 1, 48)
    found = recognise(named(ldm.ip_adapter(tiny, ldm.projection(16, 48))))
    assert found.base == "other (text of width 48, 6 transformer blocks)"
    fused = {k: s for k, s in ldm.gligen().items() if "output_blocks" not in k}
    assert recognise(named(fused)).base == "other (7 transformer blocks of 320, 640, 1280 channels)"
