"""`hookctl bench learned`: what hooks of trained modules cost, beside diffusers' own pipelines.

Runs of a Stable Diffusion of random weights with random modules: insert (GLIGEN), a further term of
attention (IP-Adapter), that with residuals (InstantID), several models (Collaborative Diffusion).
The forms of a case have the same weights and draw the same latents, or there are no figures.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hookctl import learned
from hookctl.bench.calls import Bench
from hookctl.bench.measure import OURS, PLAIN, Case, Form
from hookctl.cli import bench_peers
from hookctl.cli.bench_peers import SWAP, Runs
from hookctl.learned.adapter import Adapter, adapter_for
from hookctl.learned.collaborative import CollaborativeDiffusion, Collaborator
from hookctl.learned.files import Checkpoint
from hookctl.learned.gligen import build
from hookctl.learned.keypoints import draw_keypoints
from hookctl.learned.modules.image_projection import ImageProjection
from hookctl.learned.modules.resampler import Resampler

BOXES = [(0.05, 0.1, 0.45, 0.6), (0.5, 0.4, 0.95, 0.95)]
PHRASES = ["a red circle", "a blue square"]
POINTS = [(0.35, 0.4), (0.65, 0.4), (0.5, 0.55), (0.4, 0.7), (0.6, 0.7)]
CLIP, FACE = 1024, 512  # widths of an image's embedding and of a face's
GATE, SCALE, GUIDANCE = 0.5, 0.6, 7.5


def cases(bench: Bench, quick: bool) -> Iterator[Case]:
    """Every hook. quick: small latents."""
    # diffusers' GLIGEN draws no other latents than those of 4 channels.
    pipe = bench_peers.wide(bench, 32 if quick else 64, in_channels=4, out_channels=4)
    runs = LearnedRuns(pipe, bench)
    yield runs.insert()
    yield runs.term()
    yield runs.residuals()
    yield runs.collaboration()


class LearnedRuns(Runs):
    """Runs under trained modules as forms of cases."""

    group = "learned"

    def _to(self, module: Any) -> Any:
        return module.to(self.bench.device, self.bench.dtype).eval().requires_grad_(False)

    def _pipeline(self, cls: Any, **parts: Any) -> Any:
        """One of diffusers' pipelines with the parts of this one, and others in their place."""
        taken = inspect.signature(cls).parameters
        own = {name: part for name, part in self.pipe.components.items() if name in taken}
        found = cls(**{**own, **parts}, requires_safety_checker=False)
        found.set_progress_bar_config(disable=True)
        return found

    def _compared(
        self, name: str, peer: str, editor: Any, theirs: Form, plain: Form | None = None
    ) -> Case:
        def run() -> Tensor:
            return self.run(SWAP[0])

        forms: dict[str, Form] = {OURS: run, peer: theirs, PLAIN: plain or run}
        return self.case(name, peer, forms, {OURS: self.ours(editor)}, steps=bench_peers.STEPS)

    # -- the hooks -------------------------------------------------------------------------------

    def insert(self) -> Case:
        """GLIGEN's gated layers in every block and every step, against diffusers' gated UNet."""
        from diffusers import StableDiffusionGLIGENPipeline, UNet2DConditionModel

        torch.manual_seed(1)
        gated: Any = UNet2DConditionModel(**{**self.pipe.unet.config, "attention_type": "gated"})
        gated.load_state_dict(self.pipe.unet.state_dict(), strict=False)
        for name, parameter in gated.named_parameters():
            if name.endswith(("alpha_attn", "alpha_dense")):
                nn.init.constant_(parameter, GATE)
        gated = self._to(gated)
        own = {k: x for k, x in gated.state_dict().items() if "fuser" in k or "position_net" in k}
        editor = build(
            Checkpoint(Path("gligen"), own), self.pipe, boxes=BOXES, phrases=PHRASES, stop=1.0
        )
        pipe = self._pipeline(StableDiffusionGLIGENPipeline, unet=gated)
        given: dict[str, Any] = {
            "gligen_boxes": [list(box) for box in BOXES],
            "gligen_phrases": PHRASES,
        }
        return self._compared(
            "GLIGEN (insert)",
            "diffusers",
            editor,
            lambda: self.run(SWAP[0], pipe, gligen_scheduled_sampling_beta=1.0, **given),
        )

    def term(self) -> Case:
        """IP-Adapter's attention to an image's four tokens, against diffusers' processors."""
        torch.manual_seed(2)
        width = self.pipe.unet.config.cross_attention_dim
        adapter = self._to(adapter_for(self.pipe.unet, ImageProjection(CLIP, width)))
        embedding = torch.randn(1, CLIP).to(self.bench.device, self.bench.dtype)
        pipe = self._adapted(type(self.pipe), adapter)
        shown = self._shown(embedding)
        return self._compared(
            "IP-Adapter (term)",
            "diffusers",
            learned.IPAdapter(adapter, embedding, scale=SCALE),
            lambda: self.run(SWAP[0], pipe, ip_adapter_image_embeds=[shown]),
        )

    def residuals(self) -> Case:
        """InstantID's term and its ControlNet, against diffusers' ControlNet pipeline, whose text
        is swapped for the face's tokens."""
        from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

        torch.manual_seed(3)
        unet = self.pipe.unet
        projection = Resampler(64, unet.config.cross_attention_dim, FACE, heads=1)
        adapter = self._to(adapter_for(unet, projection))
        levels = self.pipe.vae_scale_factor.bit_length()
        net: Any = ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=(16,) * levels
        )
        for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            nn.init.normal_(layer.weight, std=0.05)
        net = self._to(net)
        face = 10 * torch.randn(1, FACE).to(self.bench.device, self.bench.dtype)
        editor = learned.InstantID(
            adapter, learned.Person(face, POINTS), net, scale=SCALE, control_scale=SCALE
        )
        theirs = copy.deepcopy(net)
        pipe = self._adapted(StableDiffusionControlNetPipeline, adapter, controlnet=theirs)
        shown = self._shown(face)
        with torch.no_grad():
            tokens = adapter.image_proj(shown)
        shown = shown[:, None]  # images, and vectors of each
        theirs.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "encoder_hidden_states": tokens}),
            with_kwargs=True,
        )
        side = self.side * self.pipe.vae_scale_factor
        hint = draw_keypoints([[(x * side, y * side) for x, y in POINTS]], side, side)
        options: dict[str, Any] = {"image": hint, "controlnet_conditioning_scale": SCALE}
        return self._compared(
            "InstantID (term, residuals)",
            "diffusers",
            editor,
            lambda: self.run(SWAP[0], pipe, ip_adapter_image_embeds=[shown], **options),
        )

    def collaboration(self) -> Case:
        """Two models and the networks that weigh them, against a loop by hand."""
        second = copy.deepcopy(self.pipe.unet)
        networks = [self._network(seed) for seed in (4, 5)]
        cond, uncond = self.pipe.encode_prompt(SWAP[1], self.bench.device, 1, True)
        editor = CollaborativeDiffusion(
            [
                Collaborator("own", networks[0]),
                Collaborator("second", networks[1], second, cond, uncond),
            ]
        )

        def by_hand() -> Tensor:
            own = self.pipe.encode_prompt(SWAP[0], self.bench.device, 1, True)
            models = [(self.pipe.unet, *own), (second, cond, uncond)]
            scheduler = self.pipe.scheduler
            scheduler.set_timesteps(bench_peers.STEPS, device=self.bench.device)
            x = self.noise(1) * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                seen = scheduler.scale_model_input(x, t)
                logits = [n(seen, t, m[1]).sample for n, m in zip(networks, models, strict=True)]
                shares = torch.cat(logits, 1).float().softmax(1).to(x)
                mixed = torch.zeros_like(x)
                for i, (unet, told, nothing) in enumerate(models):
                    both = unet(torch.cat([seen, seen]), t, torch.cat([nothing, told])).sample
                    u, c = both.split(len(seen))
                    mixed += shares[:, i : i + 1] * (u + GUIDANCE * (c - u))
                x = scheduler.step(mixed, t, x).prev_sample
            return x

        return self._compared("Collaborative Diffusion", "by hand", editor, by_hand)

    def _network(self, seed: int) -> Any:
        """A dynamic diffuser: a small UNet with one output channel."""
        from diffusers import UNet2DConditionModel

        torch.manual_seed(seed)
        given = self.pipe.unet.config
        made = UNet2DConditionModel(
            sample_size=self.side,
            in_channels=given.in_channels,
            out_channels=1,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=given.cross_attention_dim,
            attention_head_dim=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
        return self._to(made)

    def _adapted(self, cls: Any, adapter: Adapter, **parts: Any) -> Any:
        """One of diffusers' pipelines over a copy of the UNet with an adapter of its own."""
        pipe = self._pipeline(cls, unet=copy.deepcopy(self.pipe.unet), **parts)
        file: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        for name, x in adapter.state_dict().items():
            part, _, rest = name.partition(".")
            file[part][rest] = x.clone()
        pipe.load_ip_adapter([file], subfolder=None, weight_name=None, image_encoder_folder=None)
        pipe.set_ip_adapter_scale(SCALE)
        return pipe

    def _shown(self, embedding: Tensor) -> Tensor:
        """An image as diffusers takes it: without it, and with it."""
        return torch.stack([torch.zeros_like(embedding), embedding])
