"""The trainer of grounding: how instances are given, what is learned, and files that load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import hookctl
from hookctl.demos import grounding
from hookctl.demos.shapes.detect import detect
from hookctl.demos.shapes.hooks import instances, ways
from hookctl.demos.shapes.hooks.instances import InstancesTask
from hookctl.demos.shapes.hooks.task import Base
from hookctl.demos.shapes.hooks.ways import WAYS, Way, draw_way, in_slots, mirrored, place_of
from hookctl.demos.shapes.world import Thing
from hookctl.learned import Instance, load
from hookctl.learned.instance_diffusion import InstanceDiffusion
from hookctl.learned.modules.unifusion import FORMATS, Instances

STAR = Thing("star", "red", "striped", "small", (32, 48))
SQUARE = Thing("square", "blue", centre=(96, 80))


def test_a_place_in_every_format() -> None:
    place = place_of(STAR)
    x0, y0, x1, y1 = np.array(STAR.box) / 128
    assert place.box.tolist() == [x0, y0, x1, y1]
    assert place.point.tolist() == [(x0 + x1) / 2, (y0 + y1) / 2]
    low, high = place.box[:2] - 2 / 128, place.box[2:] + 2 / 128  # contours are of whole pixels
    for points in (place.scribble.reshape(-1, 2), place.outline.reshape(-1, 2)):
        assert (points >= low).all() and (points <= high).all()
    rows, columns = np.nonzero(place.raster)
    assert abs(rows.mean() / ways.RASTER - 48 / 128) < 0.05
    assert abs(columns.mean() / ways.RASTER - 32 / 128) < 0.05


def given(way: Way) -> Instances:
    def encode(texts: object) -> Tensor:
        assert texts == ["a small striped red star", "a blue square"]
        return torch.tensor([[1.0, 1.0], [2.0, 2.0]])

    return in_slots([(STAR, SQUARE), ()], np.random.default_rng(0), way, encode, 2, "cpu")


def test_things_lie_in_slots_and_have_what_the_way_gives() -> None:
    made = given(Way(FORMATS, box=0.0, stroke=1.0, mask=0.0))
    assert made.masks.sum(1).tolist() == [2, 0]
    assert made.phrases.sum(-1).unique().tolist() == [0, 2, 4]
    assert made.located is not None and not made.located.any()
    assert made.scribbles[0].any(-1).sum() == 2 and not made.outlines.any()
    assert not made.rasters.any() and not made.boxes[1].any()


def test_mirrored_places_are_opposite() -> None:
    made = given(Way(FORMATS))
    other = mirrored(made)
    assert torch.allclose(mirrored(other).boxes, made.boxes, atol=1e-6)
    used = made.masks > 0
    assert torch.allclose(other.points[used], 1 - made.points[used])
    assert not other.boxes[~used].any()


def test_ways_are_drawn_by_their_shares() -> None:
    assert sum(share for share, _ in WAYS) == pytest.approx(1)
    rng = np.random.default_rng(0)
    drawn = [draw_way(rng) for _ in range(400)]
    assert all(one in drawn for _, one in WAYS)


@pytest.mark.slow  # two passes of the embedded denoiser and back
def test_a_step_learns_of_every_part_and_its_file_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(instances, "BATCH", 2)
    task = InstancesTask(Base("cpu"))
    task.loss(np.random.default_rng(3), 2000).backward()
    learned = [name for name, p in task.module.named_parameters() if p.grad is not None]
    for part in ("position_net", "fusers.0.attn", "fusers.16.ff", "scaleu_b.0"):
        assert any(name.startswith(part) for name in learned)
    assert task.base.unet.conv_in.weight.grad is None
    path = tmp_path / "instances.safetensors"
    save_file({k: v.detach().contiguous() for k, v in task.state().items()}, path)
    edit = load(path, task.base.pipe, instances=[Instance("a red star", point=(0.2, 0.5))])
    assert isinstance(edit, InstanceDiffusion) and edit.gains is not None


@pytest.mark.slow  # draws an image
def test_the_shipped_weights_draw_instances_at_their_places() -> None:
    pipe = hookctl.load_shapes()
    pipe.set_progress_bar_config(disable=True)
    things = [
        Instance("a red circle", box=(0.11, 0.23, 0.39, 0.52)),
        Instance("a blue square", point=(0.75, 0.625)),
    ]
    text = "a red circle and a blue square on a white background"
    with hookctl.control(pipe, load(grounding.WEIGHTS, pipe, instances=things)):
        image = pipe(
            text, num_inference_steps=25, guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0),
        ).images[0]  # fmt: skip
    found = detect(image)
    circle, square = found.find("circle", "red"), found.find("square", "blue")
    assert circle is not None and square is not None
    assert np.hypot(circle.centre[0] - 32, circle.centre[1] - 48) < 10
    assert np.hypot(square.centre[0] - 96, square.centre[1] - 80) < 10
