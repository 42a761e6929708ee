from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import GLIGENTextBoundingboxProjection

from hookctl.learned.modules.convnext import ConvNeXt
from hookctl.learned.modules.fourier import fourier
from hookctl.learned.modules.gligen_tokens import (
    BoxText,
    BoxTextImage,
    Downsampler,
    Keypoints,
    SpatialMap,
)
from tests.hookctl.learned import literal_grounding as literal

PRECISION = [(torch.float32, 1e-5), (torch.float64, 1e-10)]
K = 3


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)


def shapes_of(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def count(module):
    return round(sum(p.numel() for p in module.parameters()) / 1e6, 2)


def test_fourier_features_go_frequency_by_frequency_sines_first():
    numbers = draw(2, 5, 4)
    got = fourier(numbers, K)
    assert got.shape == (2, 5, 24)
    for row in range(2):
        for slot in range(5):
            want = literal.fourier(numbers[row, slot], K)
            torch.testing.assert_close(got[row, slot], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype,tolerance", PRECISION)
def test_box_and_text(dtype, tolerance):
    net = literal.randomise(BoxText(6, 10, 7, K), 0, dtype)
    boxes, phrases = draw(2, 4, 4, dtype=dtype), draw(2, 4, 6, seed=1, dtype=dtype)
    masks = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]], dtype=dtype)
    got = net(boxes, masks, phrases)
    for row in range(2):
        for slot in range(4):
            m = int(masks[row, slot])
            want = literal.box_text(net.state_dict(), boxes[row, slot], phrases[row, slot], m, K)
            torch.testing.assert_close(got[row, slot], want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype,tolerance", PRECISION)
def test_box_text_and_image(dtype, tolerance):
    net = literal.randomise(BoxTextImage(6, 10, 7, K), 0, dtype)
    boxes, phrases = draw(1, 3, 4, dtype=dtype), draw(1, 3, 6, seed=1, dtype=dtype)
    images = draw(1, 3, 6, seed=2, dtype=dtype)
    masks, texts, pictures = (
        torch.tensor([m], dtype=dtype) for m in ((1, 1, 0), (1, 0, 0), (0, 1, 0))
    )
    got = net(boxes, masks, phrases, images, texts, pictures)
    assert got.shape == (1, 6, 7)
    w = net.state_dict()
    for slot in range(3):
        box = literal.fourier(boxes[0, slot], K) if masks[0, slot] else w["null_position_feature"]
        text = phrases[0, slot] if texts[0, slot] else w["null_text_feature"]
        image = images[0, slot] if pictures[0, slot] else w["null_image_feature"]
        for token, features, name in ((slot, text, "text"), (3 + slot, image, "image")):
            want = literal.mlp(torch.cat([features, box]), w, f"linears_{name}")
            torch.testing.assert_close(got[0, token], want, rtol=0, atol=tolerance)


def test_diffusers_makes_the_same_tokens():
    """Its networks for text and for text with images; its frequencies are in single precision."""
    boxes, phrases, images = (draw(2, 4, n, seed=n + 1) for n in (4, 6, 6))
    masks = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.float64)
    texts, pictures = masks.roll(1, 0), masks.flip(1)
    for kind, ours in (("text-only", BoxText(6, 512, 7)), ("text-image", BoxTextImage(6, 512, 7))):
        theirs = GLIGENTextBoundingboxProjection(6, 7, kind).double()
        literal.randomise(theirs, 0, torch.float64)
        ours.double().load_state_dict(theirs.state_dict())
        if kind == "text-only":
            got, want = ours(boxes, masks, phrases), theirs(boxes, masks, phrases)
        else:
            got = ours(boxes, masks, phrases, images, texts, pictures)
            want = theirs(
                boxes, masks, phrases_masks=texts, image_masks=pictures,
                phrases_embeddings=phrases, image_embeddings=images,
            )  # fmt: skip
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype,tolerance", PRECISION)
def test_keypoints(dtype, tolerance):
    net = literal.randomise(Keypoints(2, 3, 6, 10, 7, K), 0, dtype)
    points = draw(1, 6, 2, dtype=dtype)
    masks = torch.tensor([[1, 0, 1, 0, 0, 1]], dtype=dtype)
    got = net(points, masks)
    for token in range(6):
        person, joint = divmod(token, 3)
        m = int(masks[0, token])
        want = literal.keypoint(net.state_dict(), person, joint, points[0, token], m, K)
        torch.testing.assert_close(got[0, token], want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype,tolerance", PRECISION)
@pytest.mark.parametrize("classes", [None, 5])
def test_maps(dtype, tolerance, classes):
    backbone = ConvNeXt((1, 2), (4, 6))
    net = SpatialMap(backbone, tokens=9, features=6, hidden=10, out=7, classes=classes)
    literal.randomise(net, 0, dtype)
    assert net.side == 24
    maps = draw(2, classes or 3, 30, 36, dtype=dtype)
    got = net(maps, torch.tensor([1.0, 0.0], dtype=dtype))
    for row, m in enumerate((1, 0)):
        want = literal.spatial(net.state_dict(), maps[row], m, 24)
        torch.testing.assert_close(got[row], want, rtol=0, atol=tolerance)


def test_the_downsampler_takes_the_first_channels():
    net = literal.randomise(Downsampler(1, 2, 3), 0, torch.float64)
    maps = draw(2, 3, 16, 16)
    got = net(maps, (4, 4))
    w = net.state_dict()
    x = F.conv2d(maps[:, :1], w["layers.0.weight"], w["layers.0.bias"], stride=2, padding=1)
    want = F.conv2d(literal.silu(x), w["layers.2.weight"], w["layers.2.bias"], stride=2, padding=1)
    torch.testing.assert_close(got, want)
    assert net(maps, (5, 6)).shape == (2, 3, 5, 6)


@pytest.mark.parametrize(
    "net",
    [
        BoxText(6, 10, 7, K),
        BoxTextImage(6, 10, 7, K),
        Keypoints(2, 3, 6, 10, 7, K),
        SpatialMap(ConvNeXt((1, 2), (4, 6)), tokens=9, features=6, hidden=10, out=7, classes=5),
        Downsampler(2, 3, 4),
    ],
)
def test_a_network_is_made_of_the_shapes_of_its_weights(net):
    again = type(net).of_shapes(shapes_of(net))
    assert shapes_of(again) == shapes_of(net)


MLP = {
    "0.bias": (512,),
    "2.weight": (512, 512),
    "2.bias": (512,),
    "4.weight": (768, 512),
    "4.bias": (768,),
}


def mlp_shapes(name, inputs):
    return {f"{name}.0.weight": (512, inputs)} | {f"{name}.{k}": v for k, v in MLP.items()}


def test_official_names_and_shapes():
    with torch.device("meta"):
        box, both, joints = BoxText(), BoxTextImage(), Keypoints()
        edges, classes = SpatialMap(), SpatialMap(classes=152)
        canny, normal, semantic = Downsampler(), Downsampler(3), Downsampler(152, 16)
    assert shapes_of(box) == {
        "null_positive_feature": (768,),
        "null_position_feature": (64,),
        **mlp_shapes("linears", 832),
    }
    assert shapes_of(both) == {
        "null_text_feature": (768,),
        "null_image_feature": (768,),
        "null_position_feature": (64,),
        **mlp_shapes("linears_text", 832),
        **mlp_shapes("linears_image", 832),
    }
    assert shapes_of(joints) == {
        "person_embeddings": (8, 768),
        "keypoint_embeddings": (17, 768),
        "null_person_feature": (768,),
        "null_xy_feature": (32,),
        **mlp_shapes("linears", 800),
    }
    backbone = {k: v for k, v in shapes_of(edges).items() if k.startswith("convnext")}
    assert len(backbone) == 178
    assert shapes_of(edges) == backbone | {
        "pos_embedding": (1, 64, 768),
        "null_feature": (768,),
        **mlp_shapes("linears", 768),
    }
    extra = {"in_conv.weight": (3, 152, 3, 3), "in_conv.bias": (3,)}
    assert shapes_of(classes) == shapes_of(edges) | extra
    assert edges.side == 256
    for net, first, second in (
        (canny, (4, 1, 4, 4), (8, 4, 4, 4)),
        (normal, (4, 3, 4, 4), (8, 4, 4, 4)),
        (semantic, (16, 152, 4, 4), (8, 16, 4, 4)),
    ):
        found = shapes_of(net)
        assert found["layers.0.weight"] == first and found["layers.2.weight"] == second
    assert [count(net) for net in (box, joints, both, edges)] == [1.08, 1.09, 2.17, 28.92]
