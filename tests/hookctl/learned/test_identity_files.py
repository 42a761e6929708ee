"""Files of images and faces as prompts, by `hookctl.learned.load`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hookctl.errors import InputError
from hookctl.learned import FaceID, ImagePrompt, InstantID, IPAdapter, Person, load
from hookctl.learned.modules.image_projection import FacePlusProjection, FaceProjection
from hookctl.learned.modules.resampler import Resampler
from hookctl.learned.names import adapter_layers
from tests.hookctl.learned import identity
from tests.hookctl.learned.identity import adapter, drawn, identity_net, tensors
from tests.hookctl.learned.test_instant_id import POINTS
from tests.hookctl.learned.test_ip_adapter import vector


@pytest.fixture(scope="module")
def pipe() -> Any:
    return identity.pipeline()


def with_projection(kind: str, unet: Any, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A file with a projection of published widths."""
    layers = {k: x for k, x in tensors(kind, unet).items() if k.startswith("ip_adapter")}
    torch.manual_seed(0)
    return layers | {f"image_proj.{k}": x for k, x in module.state_dict().items()}


@pytest.mark.slow
def test_safetensors_and_pickles(pipe: Any, tmp_path: Path) -> None:
    given = tensors("base", pipe.unet)
    save_file(given, tmp_path / "a.safetensors")
    nested: dict[str, dict[str, torch.Tensor]] = {"ip_adapter": {}, "image_proj": {}}
    for name, x in given.items():
        part, _, rest = name.partition(".")
        nested[part][rest] = x
    torch.save(nested, tmp_path / "a.bin")
    wanted = drawn(pipe, IPAdapter(adapter("base", pipe.unet), vector(0), scale=0.7))
    for name in ("a.safetensors", "a.bin"):
        edit = load(tmp_path / name, pipe, images=vector(0), scale=0.7)
        assert isinstance(edit, IPAdapter)
        assert torch.equal(drawn(pipe, edit), wanted)


@pytest.mark.slow
def test_as_training_leaves_it(pipe: Any, tmp_path: Path) -> None:
    """accelerate's safetensors: the layers by their places in the UNet alone."""
    given = tensors("base", pipe.unet)
    layers = adapter_layers(pipe.unet)
    raw = {}
    for name, x in given.items():
        part, _, rest = name.partition(".")
        if part == "image_proj":
            raw[f"image_proj_model.{rest}"] = x
        else:
            number, _, rest = rest.partition(".")
            raw[f"unet.{layers[int(number)]}.processor.{rest}"] = x
    raw = dict(sorted(raw.items()))  # as alphabetical order would put them
    save_file(raw, tmp_path / "model.safetensors")
    edit = load(tmp_path / "model.safetensors", pipe, images=vector(0))
    wanted = drawn(pipe, IPAdapter(adapter("base", pipe.unet), vector(0)))
    assert torch.equal(drawn(pipe, edit), wanted)


@pytest.mark.slow
def test_faces(pipe: Any, tmp_path: Path) -> None:
    face = vector(0, 512) / vector(0, 512).norm()
    save_file(
        with_projection("faceid", pipe.unet, FaceProjection(512, 32)), tmp_path / "f.safetensors"
    )
    edit = load(tmp_path / "f.safetensors", pipe, images=face, lora_scale=0.5)
    assert isinstance(edit, FaceID) and edit.lora_scale == 0.5
    drawn(pipe, edit)
    plus = FacePlusProjection(512, 1280, 32, heads=1)
    save_file(with_projection("faceid-plus", pipe.unet, plus), tmp_path / "p.safetensors")
    shown = ImagePrompt(face=face, image=vector(1, 7, 1280))
    with pytest.raises(InputError, match="give shortcut=True for v2"):
        load(tmp_path / "p.safetensors", pipe, images=shown)
    edit = load(
        tmp_path / "p.safetensors", pipe, images=shown, shortcut=True, negative=vector(2, 7, 1280)
    )
    drawn(pipe, edit)


@pytest.mark.slow
def test_instant_id(pipe: Any, tmp_path: Path) -> None:
    module = Resampler(16, 32, 512, heads=1)
    save_file(with_projection("instantid", pipe.unet, module), tmp_path / "i.safetensors")
    identity_net(pipe.unet).save_pretrained(tmp_path / "ControlNetModel")
    person = Person(20 * vector(0, 512) / vector(0, 512).norm(), POINTS)
    edit = load(
        tmp_path / "i.safetensors", pipe, people=person, identity_net=tmp_path / "ControlNetModel"
    )
    assert isinstance(edit, InstantID) and edit.controls
    drawn(pipe, edit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs the option images"),
        ({"images": torch.ones(10), "sclae": 1}, "'sclae' is no option .*did you mean 'scale'"),
        ({"images": torch.ones(11)}, r"a tensor \(11,\) given, but this adapter reads \[10\]"),
    ],
)
def test_what_is_refused(pipe: Any, tmp_path: Path, options: Any, message: str) -> None:
    save_file(tensors("base", pipe.unet), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=message):
        load(tmp_path / "a.safetensors", pipe, **options)
