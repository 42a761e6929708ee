"""IdentityNet over the embedded pipeline (InstantID, arXiv 2401.07519): a look, and where it is.

A ControlNet, begun as a copy of the frozen denoiser's encoder, that reads the tokens of the look in
place of the text, and the picture of five points: here the corners and the middle of an object's
box. The adapter, which was trained before, stays as it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from hookctl.learned.adapter import Adapter, adapter_of
from hookctl.learned.keypoints import draw_keypoints

from ..load import load_shapes
from ..world import IMAGE_SIZE, Scene, Thing
from .identity import IdentityTask, caption, draw, show
from .identity_encoder import WEIGHTS, load_encoder
from .task import EARLY, HELD_OUT, Base

ADAPTER = WEIGHTS / "identity.safetensors"
FOLDER = WEIGHTS / "identity_net"
HINT = (8, 16, 24, 32)  # channels of what reads the picture of points
OPEN = 0.25  # deviation of the last layer that reads the points, at first
BATCH = 8  # half of the adapter's: twice the steps of a time
AT_EARLY = 0.85  # share of timesteps where places are decided
NO_POINTS, NO_FACE, NO_TEXT = 0.1, 0.1, 0.1


def build_net(unet: UNet2DConditionModel) -> ControlNetModel:
    """An untrained ControlNet of a UNet, which adds nothing yet.

    Its layers that add are zero, as they are officially; what reads the picture of points is not.
    Behind its own zero layer, and six others by which a picture fades to a ten-thousandth, points
    would not be found in the steps that a CPU takes.
    """
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=HINT)
    reader: Any = net.controlnet_cond_embedding
    for layer in (reader.conv_in, *reader.blocks):
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.normal_(reader.conv_out.weight, std=OPEN)
    return net.requires_grad_(True)


def points_of(thing: Thing) -> list[tuple[float, float]]:
    """The five points of an object, (x, y) as fractions of the image: in place of eyes and corners
    of the mouth those of its box, of the nose its middle."""
    x0, y0, x1, y1 = (side / IMAGE_SIZE for side in thing.box)
    return [(x0, y0), (x1, y0), ((x0 + x1) / 2, (y0 + y1) / 2), (x0, y1), (x1, y1)]


def load_adapter(path: Path = ADAPTER, device: str = "cpu") -> Adapter:
    """The trained adapter, frozen."""
    return adapter_of(load_file(path)).float().requires_grad_(False).to(device)


class IdentityNetTask(IdentityTask):
    """Learns to draw an object where its points are."""

    others = ("conv_in", "controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid")
    module: Any

    def __init__(self, base: Base) -> None:
        self.base = base
        self.encoder = load_encoder(device=base.device)
        self.adapter = load_adapter(device=base.device)
        self.module = build_net(base.unet).to(base.device)
        self.shared = show(self.adapter, base.unet)
        self.given = torch.empty(0)  # pictures of points, [rows, 3, 128, 128] from 0 to 1

    def loss(self, rng: np.random.Generator, step: int) -> Tensor:
        scenes, looks = draw(rng, BATCH)
        texts = ["" if rng.random() < NO_TEXT else caption(scene, rng) for scene in scenes]
        faces = self.faces(looks, rng)
        faces[torch.from_numpy(rng.random(BATCH) < NO_FACE)] = 0
        self.given = self.hints(scenes)
        self.given[torch.from_numpy(rng.random(BATCH) < NO_POINTS)] = 0
        t = self.base.times(rng, BATCH, AT_EARLY)
        return self.error(scenes, looks, texts, faces, t, rng).mean()

    def predict(self, noisy: Tensor, t: Tensor, states: Tensor) -> Tensor:
        tokens = self.shared["tokens"]
        skips, middle = self.module(noisy, t, tokens, self.given, return_dict=False)
        found: Tensor = self.base.unet(
            noisy,
            t,
            states,
            down_block_additional_residuals=skips,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        return found

    def hints(self, scenes: Sequence[Scene]) -> Tensor:
        """The pictures of the points of scenes of one object, [scenes, 3, 128, 128]."""
        size = np.array([IMAGE_SIZE, IMAGE_SIZE])
        drawn = [
            draw_keypoints([(np.array(points_of(scene.things[0])) * size).tolist()], *size.tolist())
            for scene in scenes
        ]
        pictures = torch.from_numpy(np.stack([np.asarray(one) for one in drawn]))
        return (pictures.permute(0, 3, 1, 2).float() / 255).to(self.base.device)

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """The loss x 1000 of 32 held-out scenes at strong noise with their points, without any and
        with those of another scene; where these part, the points are heeded."""
        rng = np.random.default_rng(HELD_OUT)
        scenes, looks = draw(rng, 32)
        texts = [caption(scene, rng) for scene in scenes]
        faces, hints = self.faces(looks, rng), self.hints(scenes)
        t = torch.linspace(EARLY, 999, 32).long().to(self.base.device)
        found = {}
        ways = {"true": hints, "null": torch.zeros_like(hints), "other": hints.roll(1, 0)}
        for name, given in ways.items():
            self.given = given
            error = self.error(scenes, looks, texts, faces, t, np.random.default_rng(1))
            found[name] = round(1000 * float(error.mean()), 2)
        return found

    def state(self) -> dict[str, Tensor]:
        """The weights by diffusers' names, as the official folder has them."""
        return dict(self.module.state_dict())


def write_folder(weights: Path, folder: Path = FOLDER) -> None:
    """A folder in the official layout of a trained file: its configuration beside the weights."""
    net = build_net(load_shapes("cpu").unet)
    net.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
    folder.mkdir(parents=True, exist_ok=True)
    net.save_config(folder)
    shutil.copyfile(weights, folder / "diffusion_pytorch_model.safetensors")
