"""From a file to an editor: what is recognised, checked and handed to a builder."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from safetensors.torch import save_file

from hookctl.errors import InputError
from hookctl.learned import load
from hookctl.learned.loading import BUILDERS, open_source, options_of
from hookctl.learned.names import adapter_layers, ldm_to_diffusers
from tests.hookctl.learned import ldm
from tests.hookctl.learned.builders import Built

HERE = "tests.hookctl.learned.builders"
TINY = ldm.Layout(24, (1, 2), (0, 1), 1, 768)


@pytest.fixture(autouse=True)
def builders(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BUILDERS:
        function = "face" if name == "ip-adapter faceid-plus" else "build"
        monkeypatch.setitem(BUILDERS, name, f"{HERE}:{function}")
    monkeypatch.setitem(BUILDERS, "collaborative", f"{HERE}:handing_on")


def denoiser(text: int = 768, blocks: int = 16) -> Any:
    """A UNet with as many transformers as SD1.x, or fewer."""
    cross, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    levels = (cross,) * 3 + (plain,) if blocks == 16 else (plain, cross)
    up = tuple(name.replace("Down", "Up") for name in reversed(levels))
    return UNet2DConditionModel(
        block_out_channels=(8, 8, 8, 8)[: len(levels)],
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=text,
        down_block_types=levels,
        up_block_types=up,
    )


def saved(path: Path, shapes: ldm.Shapes, **more: Any) -> Path:
    """A file of zeros, in the tables of the official ones."""
    parts: dict[str, Any] = {}
    for key, shape in shapes.items():
        top, _, rest = key.partition(".")
        nested = top in ("image_proj", "ip_adapter")
        at = parts.setdefault(top, {}) if nested else parts
        at[rest if nested else key] = torch.zeros(()).expand(shape)
    torch.save(parts | more, path)
    return path


def narrow(shapes: ldm.Shapes) -> ldm.Shapes:
    """With blocks 8 channels wide, so that a file is small."""
    return {k: (8, s[1]) if k.endswith("_ip.weight") else s for k, s in shapes.items()}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    shapes = narrow(ldm.ip_adapter(ldm.SD15, ldm.projection(1024, 768)))
    return saved(tmp_path / "ip.bin", shapes)


def test_an_adapter(adapter: Path) -> None:
    pipe = denoiser()
    made = load(adapter, pipe, strength=0.5)
    assert isinstance(made, Built) and made.pipe is pipe
    assert made.options == {"strength": 0.5, "boxes": None}
    assert len(made.checkpoint.tensors) == 4 + 32
    assert made.checkpoint.path == adapter
    assert load(str(adapter), pipe) is not made


def test_a_training_file_of_grounding(tmp_path: Path) -> None:
    fusers = {k: s for k, s in ldm.gligen().items() if ".fuser.alpha" in k or ".linear." in k}
    net = {k: s for k, s in ldm.gligen().items() if k.startswith("position_net.")}
    model = {k: torch.zeros(()).expand(s) for k, s in (fusers | net).items()}
    model["input_blocks.0.0.weight"] = torch.zeros(()).expand(320, 4, 3, 3)
    path = tmp_path / "gligen.pth"
    averaged = {key: tensor + 1 for key, tensor in model.items()}
    torch.save({"model": model, "ema": averaged, "opt": {"state": {0: torch.zeros(2)}}}, path)
    source = open_source(path)
    assert source.kind.name == "gligen box+text" and source.kind.base == "SD1.x"
    assert source.notes == (
        f"of the file, 'ema' is used: {len(model)} tensors",
        f"left out: model ({len(model)}), opt (1)",
        "left out: 1 tensors of the frozen base model",
    )
    wanted = {ldm_to_diffusers(key) for key in fusers} | set(net)
    made = load(path, denoiser(), weights="model")
    assert isinstance(made, Built) and set(made.checkpoint.tensors) == wanted
    assert not any(tensor.any() for tensor in made.checkpoint.tensors.values())


def test_raw_training_output_is_placed_by_the_denoiser(tmp_path: Path) -> None:
    pipe = denoiser()
    layers = adapter_layers(pipe)
    shapes = narrow(ldm.ip_adapter(ldm.SD15, ldm.projection(1024, 768)))
    raw: dict[str, torch.Tensor] = {"unet.conv_in.bias": torch.zeros(8)}
    for key, shape in shapes.items():
        top, number, rest = key.split(".", 2) if "_ip." in key else ("", "", key)
        if top:
            raw[f"unet.{layers[int(number)]}.processor.{rest}"] = torch.full(shape, float(number))
        else:
            raw[key.replace("image_proj.", "image_proj_model.")] = torch.zeros(shape)
    save_file(raw, tmp_path / "model.safetensors")
    made = load(tmp_path, pipe)  # the folder of a checkpoint
    assert isinstance(made, Built) and set(made.checkpoint.tensors) == set(shapes)
    for i in range(1, 32, 2):
        assert (made.checkpoint.tensors[f"ip_adapter.{i}.to_k_ip.weight"] == i).all()
    assert open_source(tmp_path).kind.name == "ip-adapter"


def test_three_files_of_comfyui(tmp_path: Path) -> None:
    given = ldm.instance_diffusion()
    fusers: dict[str, Any] = {"input_blocks": {}, "middle_block": {}, "output_blocks": {}}
    scaled: dict[str, Any] = {}
    net = {}
    for key, shape in given.items():
        tensor = torch.zeros(()).expand(shape)
        if ".fuser." in key:
            block, number, rest = key.split(".", 2)
            place = "1" if block == "middle_block" else number
            entry = fusers[block].setdefault(place, {"params": {"n_heads": 8}, "state": {}})
            entry["state"][rest.partition(".fuser.")[2]] = tensor
        elif key.startswith("scaleu_"):
            scaled.setdefault(key.split("_")[2], {})[key[:8]] = tensor
        elif key.startswith("position_net."):
            net[key.removeprefix("position_net.")] = tensor
    for name, data in (("fusers", fusers), ("scaleu", scaled), ("position_net", net)):
        torch.save(data, tmp_path / f"{name}.ckpt")
    source = open_source(tmp_path)
    assert source.kind.name == "instance-diffusion" and source.kind.base == "SD1.x"
    assert "of fusers.ckpt, position_net.ckpt, scaleu.ckpt" in source.notes
    assert "scaleu_b_11" in source.checkpoint.tensors
    with pytest.raises(InputError, match="fusers.ckpt: looks like InstanceDiffusion|lacks a posi"):
        open_source(tmp_path / "fusers.ckpt")


def test_options(adapter: Path, tmp_path: Path) -> None:
    pipe = denoiser()
    assert list(options_of(open_source(adapter).kind)) == ["strength", "boxes"]
    with pytest.raises(InputError) as raised:
        load(adapter, pipe, strenght=1)
    assert str(raised.value) == (
        f"{adapter}: 'strenght' is no option of ip-adapter (did you mean 'strength'?); there are: "
        "strength, boxes, weights"
    )
    with pytest.raises(InputError, match="weights='ema', and the file holds one set of them"):
        load(adapter, pipe, weights="ema")
    shapes = narrow(ldm.ip_adapter(ldm.SD15, ldm.face_plus_projection(768)))
    face = saved(tmp_path / "face.bin", shapes)
    with pytest.raises(InputError) as raised:
        load(face, pipe)
    assert str(raised.value) == (
        f"{face}: ip-adapter faceid-plus needs the option shortcut (FaceID-Plus v1 and v2 have "
        "the same weights: say which it is, shortcut=True for v2)"
    )
    with pytest.raises(InputError, match=r"face.bin: shortcut=3; give True or False"):
        load(face, pipe, shortcut=3)
    assert isinstance(load(face, pipe, shortcut=True), Built)


@pytest.mark.slow
def test_options_that_go_on_to_an_editor(tmp_path: Path) -> None:
    pipe = denoiser()
    many = saved(tmp_path / "many.ckpt", ldm.collaborative())
    made = load(many, pipe, images=3, scale=0.5)
    assert isinstance(made, Built) and made.options == {"images": 3, "scale": 0.5}
    with pytest.raises(
        InputError, match="'sclae' is no option .* there are: images, scale, mask, "
    ):
        load(many, pipe, sclae=0.5)


def test_another_base_model(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        load(adapter, denoiser(2048))
    assert str(raised.value) == (
        f"{adapter}: is of the kind ip-adapter for SD1.x, and the pipeline's model is other (text "
        "of width 2048, 16 transformer blocks)"
    )
    with pytest.raises(InputError, match=r"is other \(text of width 768, 6 transformer blocks\)"):
        load(adapter, denoiser(blocks=6))
    small = saved(tmp_path / "small.bin", ldm.ip_adapter(TINY, ldm.projection(1024, 768)))
    assert isinstance(load(small, denoiser(blocks=6)), Built)
    with pytest.raises(InputError, match="holds no denoiser"):
        load(adapter, object())


def test_a_video_model_of_the_same_base(adapter: Path) -> None:
    """What it has between frames is no layer of its base."""
    with torch.device("meta"):
        unet = UNetMotionModel(
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            cross_attention_dim=768,
            down_block_types=("CrossAttnDownBlockMotion",) * 3 + ("DownBlockMotion",),
            up_block_types=("UpBlockMotion", *("CrossAttnUpBlockMotion",) * 3),
            num_attention_heads=2,
            motion_num_attention_heads=2,
        )
    assert isinstance(load(adapter, unet), Built)


@pytest.mark.parametrize("named", sorted(set(BUILDERS.values())))
def test_every_builder_is_there(named: str) -> None:
    module, _, function = named.partition(":")
    parameters = inspect.signature(getattr(import_module(module), function)).parameters
    assert list(parameters)[:2] == ["checkpoint", "pipe"]


def test_a_kind_without_a_builder(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILDERS, "ip-adapter", "hookctl.learned.nowhere:build")
    with pytest.raises(InputError, match="ip-adapter, which can't be attached yet"):
        load(adapter, denoiser())
    monkeypatch.delitem(BUILDERS, "ip-adapter")
    with pytest.raises(InputError, match="ip-adapter, which can't be attached as a hook$"):
        load(adapter, denoiser())


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ({"<a>": (1, 8)}, "textual inversion, which can't be attached as a hook; it is for:"),
        ({"a": (4, 8)}, "none of the known kinds of weights: 1 tensors"),
        (ldm.unet(TINY), "is of the kind UNet, which can't be attached as a hook"),
        ({"image_proj.x": (3,)}, "looks like an IP-Adapter but has no ip_adapter"),
    ],
)
def test_what_is_no_hook(shapes: ldm.Shapes, says: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.bin", shapes)
    with pytest.raises(InputError, match=says) as raised:
        load(path, denoiser())
    assert str(raised.value).startswith(f"{path}: ")
