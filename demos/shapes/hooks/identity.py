"""Identity over the embedded pipeline: a look of a reference picture (InstantID, 2401.07519).

The encoder's embedding becomes a few tokens by a Perceiver resampler, which every cross-attention
of the frozen denoiser reads beside the text. Captions say shape, size and background, and of the
colour nothing or anything: the look must come from the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hookctl.learned.adapter import Adapter, adapter_for
from hookctl.learned.modules.resampler import Resampler
from hookctl.learned.names import adapter_layers

from ..text import WIDTH
from ..world import COLOUR_NAMES, Scene, sample_scene
from .identity_encoder import CHANNELS, load_encoder, references
from .looks import Look, render_looks, sample_look, say
from .task import HELD_OUT, Base

TOKENS, DEPTH, HEADS, LATENT = 4, 2, 2, 128
QUIET = 0.3  # of the text's own values, with which the tokens' begin
BATCH = 16
AT_EARLY = 0.4  # share of timesteps where the layout is decided
NO_FACE, NO_TEXT = 0.1, 0.1  # for guidance
COLOURED = 0.3  # share of captions that say a colour, which has nothing to do with the look
UNSAID = 0.3  # share of captions that leave the background open


def build_adapter(unet: nn.Module) -> Adapter:
    """An untrained adapter of InstantID's form."""
    image_proj = Resampler(LATENT, WIDTH, CHANNELS, heads=HEADS, depth=DEPTH, tokens=TOKENS)
    adapter = adapter_for(unet, image_proj)
    for name, parameter in adapter.ip_adapter.named_parameters():
        if "to_v_ip" in name:
            parameter.data *= QUIET
    return adapter


class Showing:
    """The adapter's term at a cross-attention while it learns, as an attention processor.

    Written out, so that it trains fast and is what the editor that loads the adapter is tested
    against. layer: of the adapter; shared: {"tokens": [rows, tokens, text]} of all layers.
    """

    def __init__(self, layer: Any, shared: Mapping[str, Tensor]) -> None:
        self.layer, self.shared = layer, shared

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, tokens = heads(attn.to_q(hidden_states)), self.shared["tokens"]
        pairs = (
            (attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)),
            (self.layer["to_k_ip"](tokens), self.layer["to_v_ip"](tokens)),
        )
        text, face = (F.scaled_dot_product_attention(q, heads(k), heads(v)) for k, v in pairs)
        return attn.to_out[0]((text + face).transpose(1, 2).flatten(2))


def show(adapter: Adapter, unet: Any) -> dict[str, Tensor]:
    """Put an adapter in a UNet for its training; returns what its layers share, to be filled."""
    shared: dict[str, Tensor] = {}
    for i, path in adapter_layers(unet).items():
        if str(i) in adapter.ip_adapter:
            unet.get_submodule(path).set_processor(Showing(adapter.layer(str(i)), shared))
    return shared


class IdentityTask:
    """Learns to draw a look that a picture shows."""

    others: tuple[str, ...] = ("image_proj.latents", "image_proj.proj_in", "ip_adapter")
    rate, stages = 2e-3, ()

    def __init__(self, base: Base) -> None:
        self.base = base
        self.encoder = load_encoder(device=base.device)
        self.module = self.adapter = build_adapter(base.unet).to(base.device)
        self.shared = show(self.adapter, base.unet)

    def loss(self, rng: np.random.Generator, step: int) -> Tensor:
        scenes, looks = draw(rng, BATCH)
        texts = [caption(scene, rng) for scene in scenes]
        faces = self.faces(looks, rng)
        faces[torch.from_numpy(rng.random(BATCH) < NO_FACE)] = 0
        texts = ["" if rng.random() < NO_TEXT else text for text in texts]
        t = self.base.times(rng, BATCH, AT_EARLY)
        return self.error(scenes, looks, texts, faces, t, rng).mean()

    def faces(self, looks: Sequence[Look], rng: np.random.Generator) -> Tensor:
        """Embeddings [looks, 512] of other pictures of these looks."""
        pictures = render_looks(*references(looks, rng))
        return self.encoder(pictures.to(self.base.device))

    def error(
        self,
        scenes: Sequence[Scene],
        looks: Sequence[Look],
        texts: Sequence[str],
        faces: Tensor,
        t: Tensor,
        rng: np.random.Generator,
    ) -> Tensor:
        """The v-prediction's squared error of every sample, weighed as in the base's training."""
        base = self.base
        z = base.basis.encode(render_looks(scenes, [[look] for look in looks]).to(base.device))
        noise = torch.from_numpy(rng.standard_normal(z.shape, np.float32)).to(z)
        a = base.alphas[t].view(-1, 1, 1, 1)
        noisy, v = a.sqrt() * z + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * z
        with torch.autocast(base.device, dtype=torch.bfloat16, enabled=base.device != "cpu"):
            self.shared["tokens"] = self.adapter.image_proj(faces[:, None])
            made = self.predict(noisy, t, base.states(texts))
        error = (made.float() - v).square().mean((1, 2, 3))
        return error * (5.0 * (1 - a)).clamp(max=1.0).flatten()  # 5 / (snr + 1)

    def predict(self, noisy: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """The denoiser's v of noisy latents, [batch, 12, 16, 16]."""
        found: Tensor = self.base.unet(noisy, t, states, return_dict=False)[0]
        return found

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """The loss x 1000 of 32 held-out scenes with their look's tokens, with those of nothing and
        of another look; where these part, the tokens are heeded."""
        rng = np.random.default_rng(HELD_OUT)
        scenes, looks = draw(rng, 32)
        texts = [caption(scene, rng) for scene in scenes]
        faces = self.faces(looks, rng)
        t = torch.linspace(100, 900, 32).long().to(self.base.device)
        ways = {"true": faces, "null": torch.zeros_like(faces), "other": faces.roll(1, 0)}
        return {
            name: round(1000 * float(self.error(
                scenes, looks, texts, given, t, np.random.default_rng(1)).mean()), 2)
            for name, given in ways.items()
        }  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """The weights by the names of the official ip-adapter.bin."""
        return dict(self.module.state_dict())


def draw(rng: np.random.Generator, count: int) -> tuple[list[Scene], list[Look]]:
    """Scenes of one object each, and its look."""
    return [sample_scene(rng, 1) for _ in range(count)], [sample_look(rng) for _ in range(count)]


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """What a scene's object is and, mostly, the background; the colour, if said, is any."""
    colour = str(rng.choice(COLOUR_NAMES)) if rng.random() < COLOURED else None
    text = say(replace(scene.things[0], pattern="plain"), colour)
    return text if rng.random() < UNSAID else f"{text} on a {scene.background} background"
