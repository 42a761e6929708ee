from __future__ import annotations

import pytest
import torch

from hookctl.learned.modules.convnext import ConvNeXt
from hookctl.learned.modules.unifusion import FORMATS, Instances, UniFusion
from tests.hookctl.learned import literal_grounding as literal

PRECISION = [(torch.float32, 1e-5), (torch.float64, 1e-10)]
K, SLOTS, TEXT, STROKE, OUTLINE = 2, 3, 5, 2, 4


def tiny(dtype=torch.float64):
    net = UniFusion(
        ConvNeXt((1, 1), (4, 6)),
        text=TEXT,
        hidden=8,
        out=7,
        slots=SLOTS,
        frequencies=K,
        scribble_points=STROKE,
        mask_points=OUTLINE,
        raster_tokens=4,
        features=6,
    )
    return literal.randomise(net, 0, dtype)


def given(dtype=torch.float64):
    """Two rows: one with a drawn instance, one with box and point alone and an empty slot; and the
    third without any."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)

    masks = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=dtype)
    here = masks[..., None]
    drawn = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 0, 0]], dtype=dtype)[..., None]
    return Instances(
        masks=masks,
        phrases=draw(3, SLOTS, TEXT) * here,
        boxes=draw(3, SLOTS, 4) * here,
        points=draw(3, SLOTS, 2) * here,
        scribbles=draw(3, SLOTS, 2 * STROKE) * drawn,
        outlines=draw(3, SLOTS, 2 * OUTLINE) * drawn,
        rasters=(draw(3, SLOTS, 32, 32) < 0.4).to(dtype) * drawn[..., None],
    )


@pytest.mark.parametrize("dtype,tolerance", PRECISION)
@pytest.mark.parametrize(
    "shown", [FORMATS, ("point",), ("box", "point"), ("box", "point", "mask"), ("box", "scribble")]
)
def test_agrees_with_the_formula(dtype, tolerance, shown):
    net, places = tiny(dtype), given(dtype)
    assert net.side == 32
    got = net(places, shown)
    assert got.shape == (3, 4 * SLOTS + 4, 7)
    for row in range(3):
        slots: list[dict] = []
        for slot in range(SLOTS):
            drawn = bool(places.scribbles[row, slot].any())
            slots.append(
                {
                    "phrase": places.phrases[row, slot],
                    "box": places.boxes[row, slot],
                    "point": places.points[row, slot],
                    "scribble": places.scribbles[row, slot] if drawn else None,
                    "mask": places.outlines[row, slot] if drawn else None,
                }
                if places.masks[row, slot]
                else {}
            )
        want = literal.unifusion(net.state_dict(), slots, set(shown), places.rasters[row], K)
        torch.testing.assert_close(got[row], want, rtol=0, atol=tolerance)


def test_without_any_format_boxes_are_shown():
    net, places = tiny(), given()
    assert torch.equal(net(places, ()), net(places, ("box",)))


def test_an_instance_may_lack_a_box():
    net, places = tiny(), given()
    places.located = torch.zeros_like(places.masks)
    boxes = slice(0, SLOTS)
    without, null = net(places), net(places, ("point", "scribble", "mask"))
    assert torch.equal(without, null)
    places.located = None
    assert not torch.equal(net(places)[:, boxes], null[:, boxes])


def test_empty_rows_are_alike_whatever_is_shown():
    """The null tokens of an unconditional row are constants of the checkpoint."""
    net, places = tiny(), given()
    assert torch.equal(net(places)[2], net(places, ("point",))[2])


def test_a_network_is_made_of_the_shapes_of_its_weights():
    shapes = {name: tuple(value.shape) for name, value in tiny().state_dict().items()}
    again = UniFusion.of_shapes(shapes)
    assert {name: tuple(value.shape) for name, value in again.state_dict().items()} == shapes


def test_official_names_and_shapes():
    with torch.device("meta"):
        net = UniFusion()
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    backbone = {k for k in shapes if k.startswith("convnext_tiny_backbone.")}
    assert len(backbone) == 178
    assert shapes["convnext_tiny_backbone.downsample_layers.0.0.weight"] == (96, 3, 4, 4)
    assert shapes["convnext_tiny_backbone.stages.3.2.pwconv1.weight"] == (3072, 768)
    assert shapes["convnext_tiny_backbone.stages.0.0.gamma"] == (96,)
    want = {
        "null_positive_feature": (768,),
        "null_position_feature": (128,),
        "null_point_feature": (64,),
        "null_scribble_feature": (1280,),
        "null_polygon_feature": (16384,),
        "null_seg_feature": (3072,),
        "in_conv.weight": (3, 30, 3, 3),
        "in_conv.bias": (3,),
        "pos_embedding": (1, 64, 3072),
    }
    for i, inputs in enumerate((896, 832, 2048, 17152, 3072)):
        want |= {
            f"linears_list.{i}.0.weight": (3072, inputs),
            f"linears_list.{i}.0.bias": (3072,),
            f"linears_list.{i}.2.weight": (3072, 3072),
            f"linears_list.{i}.2.bias": (3072,),
            f"linears_list.{i}.4.weight": (768, 3072),
            f"linears_list.{i}.4.bias": (768,),
        }
    assert {k: v for k, v in shapes.items() if k not in backbone} == want
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == 160.8
    assert net.side == 512
