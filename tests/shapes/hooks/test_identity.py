"""Identity on the embedded world: looks are read right, trainers learn what they say and write what
the loader reads, and the weights that come along do what they were trained for."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import hookctl
from hookctl.demos import identity as demo
from hookctl.demos.shapes import train_hooks
from hookctl.demos.shapes.hooks import identity, identity_encoder, identity_net
from hookctl.demos.shapes.hooks.identity import IdentityTask
from hookctl.demos.shapes.hooks.identity_encoder import embedding_of, load_encoder
from hookctl.demos.shapes.hooks.looks import (
    Look,
    hue_apart,
    nearest_colour,
    read_look,
    render_looks,
    say,
)
from hookctl.demos.shapes.hooks.task import Base
from hookctl.demos.shapes.render import drawn, render, to_uint8
from hookctl.demos.shapes.world import SHADE, SHAPES, Scene, Thing
from hookctl.learned import Person, load
from tests.marks import examples

LARGEST = 10_000_000  # bytes of a file that ships


@cache
def base() -> Base:
    return Base("cpu")


@cache
def task() -> IdentityTask:
    torch.manual_seed(0)
    return IdentityTask(Base("cpu"))


@cache
def net_task() -> Any:
    torch.manual_seed(0)
    return identity_net.IdentityNetTask(Base("cpu"))


@pytest.mark.parametrize("background", ["white", "gray", "black"])
def test_looks_are_read_as_they_were_drawn(background: str) -> None:
    for i, shape in enumerate(SHAPES):
        look = Look(72.0 * i + 7, 0.16 * i)
        scene = Scene((Thing(shape, "red", size="large", centre=(48, 80)),), background)
        seen = read_look(to_uint8(render_looks([scene], [[look]]))[0])
        assert seen is not None and seen.found.shape == shape
        assert hue_apart(seen.look, look) < 1 and abs(seen.look.depth - look.depth) < 0.01
        assert np.abs(np.subtract(seen.found.box, scene.things[0].box)).max() <= 1


def test_bars_are_where_the_world_has_them() -> None:
    """A look is drawn as the world draws its own patterns: only the paint differs."""
    scene = Scene((Thing("cross", "red", "striped", centre=(40, 56)),), "gray")
    mine = render_looks([scene], [[Look(0, 1 - SHADE)]])[0]
    own = render([scene])[0]
    background = own[:, :1, :1]

    def share(picture: Tensor, channel: int) -> Tensor:
        apart = picture[channel] - background[channel]
        return apart / apart.abs().max()

    torch.testing.assert_close(share(mine, 1), share(own, 1), atol=0.05, rtol=0)


def test_no_object_is_no_look() -> None:
    assert read_look(np.full((128, 128, 3), 255, np.uint8)) is None


def test_words() -> None:
    thing = Thing("star", "orange", "striped", "large")
    assert say(thing) == "a large star" and say(thing, "blue") == "a large blue star"
    assert say(Thing("circle", "red"), "orange") == "an orange circle"
    assert nearest_colour(Look(359, 0.5)) == "red" and nearest_colour(Look(230, 0)) == "blue"
    assert hue_apart(Look(350, 0), Look(20, 0)) == 30


def test_the_shipped_encoder_knows_a_look_again() -> None:
    """The embedding follows the look, whatever has it."""
    encoder = load_encoder()
    pictures = render_looks(
        [Scene((Thing(s, "red", size=z, centre=c),), b) for s, z, c, b in (
            ("circle", "large", (40, 40), "white"), ("square", "medium", (88, 64), "black"),
            ("circle", "large", (40, 40), "white"), ("circle", "large", (40, 40), "white"))],
        [[Look(170, 0.5)], [Look(170, 0.5)], [Look(230, 0.5)], [Look(170, 0.0)]],
    )  # fmt: skip
    found = encoder(pictures) / identity_encoder.LENGTH
    near = found @ found.T
    assert near[0, 1] > 0.7 and near[0, 1] > near[0, 2] + 0.2 and near[0, 1] > near[0, 3] + 0.2


def test_a_picture_is_embedded_as_faces_are() -> None:
    image = drawn([Scene((Thing("star", "green"),))])[0]
    found = embedding_of(image)
    assert found.shape == (512,) and found.norm() == pytest.approx(20, rel=1e-4)


@pytest.mark.parametrize(
    "name", examples(["identity_encoder", "identity", "identity_net"], ["identity"])
)
def test_the_trainer_takes_steps_and_resumes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (identity, identity_encoder, identity_net):
        monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr(train_hooks, "LOOK", 10**9)
    given = [name, "--out", str(tmp_path), "--device", "cpu"]

    def train(minutes: float, *further: str) -> dict[str, Any]:
        assert train_hooks.main([*given, "--minutes", str(minutes), *further]) == 0
        kept: dict[str, Any] = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        return kept

    first = train(1e-6)
    assert first["step"] == 1
    then = train(first["spent"] / 60 + 1e-6, "--resume")
    assert then["step"] == 2 and then["spent"] > first["spent"]
    assert any(not torch.equal(w, first["module"][n]) for n, w in then["module"].items())
    assert (tmp_path / f"{name}.safetensors").stat().st_size < LARGEST
    assert json.loads((tmp_path / f"{name}.json").read_text()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["identity_encoder", "identity", "identity_net"])
def test_every_weight_learns(name: str) -> None:
    """And the frozen denoiser does not."""
    makers = {
        "identity_encoder": lambda: identity_encoder.IdentityEncoderTask(base()),
        "identity": task,
        "identity_net": net_task,
    }
    made: Any = makers[name]()
    made.module.zero_grad(set_to_none=True)
    made.loss(np.random.default_rng(0), 0).backward()
    lacking = [n for n, p in made.module.named_parameters() if p.grad is None]
    assert not lacking
    assert all(p.grad is None for p in made.base.unet.parameters())


def predicted(edit: Any, texts: list[str], noisy: Tensor, t: Tensor, states: Tensor) -> Tensor:
    unet = base().unet
    with torch.no_grad(), hookctl.control(unet, edit, rows=("cond",) * len(texts)):
        found: Tensor = unet(noisy, t, states, return_dict=False)[0]
    return found


@pytest.mark.slow
def test_the_loader_reads_what_is_written(tmp_path: Path) -> None:
    """The editor of the written file predicts what its training did."""
    made, texts = task(), ["a circle"]
    save_file(made.state(), tmp_path / "identity.safetensors")
    face, noisy = 2 * torch.randn(1, 512), torch.randn(1, 12, 16, 16)
    t, states = torch.tensor([600]), base().states(texts)
    edit = load(tmp_path / "identity.safetensors", base().unet, people=Person(face[0]), scale=1.0)
    with torch.no_grad():
        made.shared["tokens"] = made.adapter.image_proj(face[:, None])
        wanted = made.predict(noisy, t, states)
    torch.testing.assert_close(predicted(edit, texts, noisy, t, states), wanted)


@pytest.mark.slow
def test_the_net_is_read_from_its_folder(tmp_path: Path) -> None:
    made, texts = net_task(), ["a circle"]
    torch.manual_seed(1)
    for layer in (*made.module.controlnet_down_blocks, made.module.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.05)
    save_file(made.state(), tmp_path / "net.safetensors")
    identity_net.write_folder(tmp_path / "net.safetensors", tmp_path / "net")
    scene = Scene((Thing("circle", "red", centre=(32, 80)),))
    points = identity_net.points_of(scene.things[0])
    face, noisy = 2 * torch.randn(1, 512), torch.randn(1, 12, 16, 16)
    t, states = torch.tensor([600]), base().states(texts)
    options = {"scale": 1.0, "control_scale": 1.0, "identity_net": tmp_path / "net"}
    edit = load(demo.ADAPTER, base().unet, people=Person(face[0], points), **options)
    with torch.no_grad():
        made.shared["tokens"] = made.adapter.image_proj(face[:, None])
        made.given = made.hints([scene])
        wanted = made.predict(noisy, t, states)
    torch.testing.assert_close(predicted(edit, texts, noisy, t, states), wanted)


@pytest.mark.slow
def test_shipped_weights_load_and_at_no_strength_change_nothing() -> None:
    pipe = hookctl.load_shapes(device="cpu")
    files = [demo.ADAPTER, identity_encoder.FILE, demo.NET / "diffusion_pytorch_model.safetensors"]
    assert all(0 < file.stat().st_size < LARGEST for file in files)
    face = embedding_of(drawn([Scene((Thing("star", "green"),))])[0])
    points = identity_net.points_of(Thing("circle", "red"))

    def made(*edits: Any) -> Tensor:
        given = {"num_inference_steps": 2, "output_type": "latent"}
        with hookctl.control(pipe, *edits):
            found: Tensor = pipe(
                "a circle", generator=torch.Generator().manual_seed(0), **given
            ).images
        return found

    plain = pipe("a circle", num_inference_steps=2, output_type="latent",
                 generator=torch.Generator().manual_seed(0)).images  # fmt: skip

    def edit(scale: float, control: float) -> Any:
        return load(demo.ADAPTER, pipe, people=Person(face, points), identity_net=demo.NET,
                    scale=scale, control_scale=control)  # fmt: skip

    assert torch.equal(made(edit(0.0, 0.0)), plain)
    assert not torch.equal(made(edit(1.0, 0.0)), plain)
    assert not torch.equal(made(edit(0.0, 1.0)), plain)


@pytest.mark.long  # five ways of 25 steps; the preset of it is drawn by `make test`
def test_the_demo_of_one_seed(tmp_path: Path) -> None:
    report = demo.run(tmp_path, seed=0, seeds=1)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "grid.png").is_file()
    look, text = report["methods"]["look"], report["methods"]["text"]
    assert look["hue"] < 25 and look["cosine"] > text["cosine"]
    assert list(report["methods"])[:3] == ["text", "look", "look, any colour"]
