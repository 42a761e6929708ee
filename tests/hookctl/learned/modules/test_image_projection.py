"""What an IP-Adapter makes of an image or a face: keys, shapes, formulas, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hookctl.errors import InputError
from hookctl.learned.modules.image_projection import (
    FacePlusProjection,
    FaceProjection,
    FullProjection,
    ImageProjection,
    kind_of,
    projection_of,
)
from tests.hookctl.learned.modules.test_resampler import (
    DTYPES,
    close,
    gelu,
    layer_norm,
    literal_layer,
    official_shapes,
    with_random_values,
)

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, out: int, given: int) -> Shapes:
    return {f"{name}.weight": (out, given), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def face(output: int) -> Shapes:
    return linear("proj.0", 1024, 512) | linear("proj.2", 4 * output, 1024) | norm("norm", output)


def face_plus(output: int) -> Shapes:
    resampler = official_shapes(output, 1280, output)
    del resampler["latents"]
    return face(output) | {f"perceiver_resampler.{name}": s for name, s in resampler.items()}


OFFICIAL: dict[str, tuple[str, Shapes]] = {
    "base SD1.5": ("base", linear("proj", 3072, 1024) | norm("norm", 768)),
    "base SDXL bigG": ("base", linear("proj", 8192, 1280) | norm("norm", 2048)),
    "base SDXL ViT-H": ("base", linear("proj", 8192, 1024) | norm("norm", 2048)),
    "full SD1.5": (
        "full",
        linear("proj.0", 1280, 1280) | linear("proj.2", 768, 1280) | norm("proj.3", 768),
    ),
    "plus SD1.5": ("plus", official_shapes(768, 1280, 768)),
    "plus SDXL": ("plus", official_shapes(1280, 1280, 2048)),
    "InstantID": ("plus", official_shapes(1280, 512, 2048)),
    "FaceID SD1.5": ("faceid", face(768)),
    "FaceID SDXL": ("faceid", face(2048)),
    "FaceID-Plus SD1.5": ("faceid-plus", face_plus(768)),
    "FaceID-Plus SDXL": ("faceid-plus", face_plus(2048)),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_official_layout(name: str) -> None:
    kind, shapes = OFFICIAL[name]
    assert kind_of(shapes) == kind
    module = projection_of(shapes, shortcut=False if kind == "faceid-plus" else None)
    assert {key: tuple(value.shape) for key, value in module.state_dict().items()} == shapes
    assert all(value.is_meta for value in module.parameters())


# -- values ----------------------------------------------------------------------------------------


def affine(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def literal_face(p: dict[str, Tensor], x: Tensor, output: int) -> Tensor:
    tokens = affine(p, "proj.2", gelu(affine(p, "proj.0", x)))
    tokens = torch.stack(tokens.split(output, -1), 1)
    return layer_norm(tokens, p["norm.weight"], p["norm.bias"])


@DTYPES
def test_base_is_the_formula(dtype: torch.dtype) -> None:
    module = with_random_values(ImageProjection(10, 6, tokens=4), dtype)
    p, x = module.state_dict(), torch.randn(3, 10, dtype=dtype)
    tokens = torch.stack(affine(p, "proj", x).split(6, -1), 1)
    close(module(x), layer_norm(tokens, p["norm.weight"], p["norm.bias"]))


@DTYPES
def test_full_is_the_formula(dtype: torch.dtype) -> None:
    module = with_random_values(FullProjection(10, 6), dtype)
    p, x = module.state_dict(), torch.randn(3, 5, 10, dtype=dtype)
    wanted = affine(p, "proj.2", gelu(affine(p, "proj.0", x)))
    close(module(x), layer_norm(wanted, p["proj.3.weight"], p["proj.3.bias"]))


@DTYPES
def test_face_is_the_formula(dtype: torch.dtype) -> None:
    module = with_random_values(FaceProjection(10, 6), dtype)
    x = torch.randn(3, 10, dtype=dtype)
    close(module(x), literal_face(module.state_dict(), x, 6))


@DTYPES
@pytest.mark.parametrize("shortcut", [False, True])
def test_face_plus_is_the_formula(dtype: torch.dtype, shortcut: bool) -> None:
    module = FacePlusProjection(
        10, 14, 16, heads=2, depth=2, head_width=8, shortcut=shortcut, strength=0.7
    )
    p = with_random_values(module, dtype).state_dict()
    face, x = torch.randn(3, 10, dtype=dtype), torch.randn(3, 5, 14, dtype=dtype)
    own = literal_face(p, face, 16)
    inner = {name.removeprefix("perceiver_resampler."): value for name, value in p.items()}
    found, read = own, affine(inner, "proj_in", x)
    for b in range(2):
        found = literal_layer(inner, f"layers.{b}", read, found, 2)
    found = layer_norm(
        affine(inner, "proj_out", found), inner["norm_out.weight"], inner["norm_out.bias"]
    )
    close(module(face, x), own + 0.7 * found if shortcut else found)


def test_tokens_of_nothing_are_not_zero() -> None:
    module: nn.Module = with_random_values(FaceProjection(10, 6), torch.float32)
    assert float(module(torch.zeros(1, 10)).abs().max()) > 0.01


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ({"weights": (3,)}, {}, "image_proj has weights, which is of no known kind"),
        ({}, {}, "image_proj has nothing"),
        (face_plus(768), {}, "v1 and v2 can't be told apart .* give shortcut=True"),
        (face(768), {"shortcut": True}, "shortcut=True, but this file is faceid"),
        (linear("proj", 8, 4), {}, "IP-Adapter base: image_proj has no norm.weight"),
    ],
)
def test_what_is_refused(shapes: Shapes, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        projection_of(shapes, **options)
