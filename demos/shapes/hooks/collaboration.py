"""Collaborative Diffusion over the embedded pipeline (Huang et al., arXiv 2304.10530).

A model that reads masks, and two dynamic diffusers that weigh it against the embedded one, which
reads text. A mask says where which shape is and nothing of colours; a caption says what is there
and little of where. The mask's model learns first, then the dynamic diffusers alone, as in the
paper: of the error of the mixture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..captions import describe
from ..latents import CELL
from ..text import WIDTH
from ..world import IMAGE_SIZE, SHAPES, Scene
from .places import fit_places, reserve_places, set_tokens
from .task import HELD_OUT, Base, Batch

# What a file does not say of its networks, for `hookctl.learned.load`.
# Norms over one or two channels each would take out what is even over an image: its time, and how
# far a model is trusted at that time.
SIZES = {"heads": 2, "groups": 4, "classes": 1 + len(SHAPES)}
MODEL, INFLUENCE = (32, 64, 64), (16, 32, 32)  # channels: 3.5 MB and 1.9 MB in half precision
BATCH = 24
TOGETHER = 7500  # from this step on the dynamic diffusers learn, and they alone
UNDECIDED = 800  # from this timestep on the embedded model does not see yet where objects are;
AT_EARLY = 0.75  # this share of the timesteps lies there, the others are for edges
EMPTY = 0.1  # masks left empty, for guidance
PLAIN = 0.7  # captions that say nothing of places nor of the background


def build_network(channels: int, out: int, widths: tuple[int, int, int]) -> UNet2DConditionModel:
    """A UNet like the published ones: no attention at the full resolution."""
    return UNet2DConditionModel(
        sample_size=CELL, in_channels=channels, out_channels=out, layers_per_block=1,
        block_out_channels=widths, cross_attention_dim=WIDTH, norm_num_groups=SIZES["groups"],
        use_linear_projection=True,
        attention_head_dim=SIZES["heads"],  # the number of heads, by an old slip
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


class Modules(nn.Module):
    """The mask's model and condition, and the dynamic diffusers, which begin by trusting evenly."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mask_unet = build_network(channels, channels, MODEL)
        self.linear = nn.Linear(CELL * CELL, WIDTH)
        self.of_mask, self.of_text = (build_network(channels, 1, INFLUENCE) for _ in range(2))
        for one in (self.of_mask, self.of_text):
            nn.init.zeros_(one.conv_out.weight)
            nn.init.zeros_(one.conv_out.bias)


class CollaborationTask:
    """Learns to draw after masks, and when to trust whom."""

    rate, stages = 4e-3, (TOGETHER,)
    others = tuple(
        f"{network}.{layer}"
        for network in ("mask_unet", "of_mask", "of_text")
        for layer in ("conv_in", "conv_out")
    )

    def __init__(self, base: Base) -> None:
        self.base = base
        self.module = Modules(base.unet.config.in_channels)
        self.module.to(base.device)
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        """Let the networks that are told masks find them."""
        module, rng = self.module, np.random.default_rng(0)
        set_tokens(module.linear)
        module.linear.requires_grad_(False)
        pairs = self.base.scenes(rng, 64, None)
        batch = self.base.batch(pairs, [text for _, text in pairs])
        t = self.base.times(rng, len(pairs), 1.0)
        noisy, _ = self._noisy(batch.latents, t, rng)
        tokens = module.linear(self.maps(batch.scenes))
        for network in (module.mask_unet, module.of_mask):
            run = partial(network, noisy, t, tokens)
            reserve_places(network, run)
            for _ in range(2):  # what is found changes the features
                self.found = fit_places(network, module.linear.in_features, run)

    def loss(self, rng: np.random.Generator, step: int) -> Tensor:
        pairs = self.base.scenes(rng, BATCH, None)
        plain = rng.random(BATCH) < PLAIN
        texts = [
            caption_of(scene) if p else text for p, (scene, text) in zip(plain, pairs, strict=True)
        ]
        batch = self.base.batch(pairs, texts)
        maps = self.maps(batch.scenes)
        maps[torch.from_numpy(rng.random(BATCH) < EMPTY)] = 0
        if step < TOGETHER:
            return self._errors(batch, maps, self._times(rng), rng, False)["mask"].mean()
        return self._errors(batch, maps, self._times(rng), rng, True)["mixture"].mean()

    def _errors(
        self,
        batch: Batch,
        maps: Tensor,
        t: Tensor,
        rng: np.random.Generator,
        together: bool,
    ) -> dict[str, Tensor]:
        """The errors of every sample [batch] of the mask's model; `together`, of the text's too, of
        their mean and, as the dynamic diffusers have it, of their mixture, which they alone learn
        from."""
        base = self.base
        noisy, v = self._noisy(batch.latents, t, rng)
        weight = (5.0 * (1 - base.alphas[t])).clamp(max=1.0)  # 5 / (snr + 1)

        def error(made: Tensor) -> Tensor:
            return (made.float() - v).square().mean((1, 2, 3)) * weight

        with torch.autocast(base.device, dtype=torch.bfloat16, enabled=base.device != "cpu"):
            tokens = self.module.linear(maps)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not together):
                by_mask = self.module.mask_unet(noisy, t, tokens, return_dict=False)[0]
            found = {"mask": error(by_mask)}
            if not together:
                return found
            with torch.no_grad():
                by_text = base.unet(noisy, t, batch.states, return_dict=False)[0]
            logits = [
                self.module.of_mask(noisy, t, tokens, return_dict=False)[0],
                self.module.of_text(noisy, t, batch.states, return_dict=False)[0],
            ]
        share = torch.cat(logits, 1).float().softmax(1)
        found["text"] = error(by_text)
        found["mean"] = error((by_mask + by_text) / 2)
        found["mixture"] = error(share[:, :1] * by_mask + share[:, 1:] * by_text)
        found["share"] = share[:, 0].mean((1, 2))
        return found

    def _times(self, rng: np.random.Generator) -> Tensor:
        early, u = rng.random(BATCH) < AT_EARLY, rng.random(BATCH)
        times = np.where(early, UNDECIDED + u * (1000 - UNDECIDED), u * UNDECIDED)
        return torch.from_numpy(times).long().to(self.base.device)

    def _noisy(self, z: Tensor, t: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Latents with noise, and what is to be predicted of them."""
        noise = torch.from_numpy(rng.standard_normal(z.shape, np.float32)).to(z)
        a = self.base.alphas[t].view(-1, 1, 1, 1)
        return a.sqrt() * z + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * z

    def maps(self, scenes: Sequence[Scene]) -> Tensor:
        """Where each class is, one-hot: [scenes, classes, cells]."""
        ids = torch.from_numpy(np.stack([class_ids(scene) for scene in scenes])).long()
        one_hot = F.one_hot(ids.flatten(1), SIZES["classes"]).transpose(1, 2).float()
        return one_hot.to(self.base.device)

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """Errors x 1000 of 32 held-out scenes at strong noise: of the mask's model with its own and
        with another scene's mask (where these part, masks are heeded), of the text's, of both; and
        the mask's share early and late."""
        rng = np.random.default_rng(HELD_OUT)
        pairs = self.base.scenes(rng, 32, None)
        batch = self.base.batch(pairs, [caption_of(scene) for scene, _ in pairs])
        maps = self.maps(batch.scenes)
        strong = torch.linspace(UNDECIDED, 999, 32).long().to(self.base.device)
        found: dict[str, float] = {}
        for name, given in (("", maps), (" swapped", maps.roll(1, 0))):
            errors = self._errors(batch, given, strong, np.random.default_rng(1), not name)
            share = errors.pop("share", None)
            found |= {f"{k}{name}": round(1000 * float(e.mean()), 2) for k, e in errors.items()}
            if share is not None:
                found["share early"] = round(float(share.mean()), 3)
        weak = torch.linspace(50, 350, 32).long().to(self.base.device)
        late = self._errors(batch, maps, weak, np.random.default_rng(1), True)["share"]
        return found | {"share late": round(float(late.mean()), 3)}

    def state(self) -> dict[str, Tensor]:
        """The weights under the names of the official checkpoint, whose text model is the embedded
        pipeline's own."""
        module = self.module
        networks = {
            "seg_mask_unet": module.mask_unet,
            "seg_mask_confidence_predictor": module.of_mask,
            "text_confidence_predictor": module.of_text,
        }
        found: dict[str, Tensor] = {}
        for name, network in networks.items():
            named = ldm_names(network.state_dict())
            found |= {f"model.{name}.diffusion_model.{k}": v for k, v in named.items()}
        condition = "cond_stage_model.seg_mask_cond_stage_model.linear"
        return found | {f"{condition}.{k}": v for k, v in module.linear.state_dict().items()}


def caption_of(scene: Scene) -> str:
    """What is in a scene, and nothing of where."""
    return " and ".join(describe(thing) for thing in scene.things)


def class_ids(scene: Scene) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """What is where in a scene: 0 for the background, 1 + the shape's number, [cells, cells]."""
    ids = np.zeros((CELL, CELL), np.uint8)
    side = IMAGE_SIZE // CELL
    for thing in scene.things:
        covered = thing.mask().reshape(CELL, side, CELL, side).mean((1, 3)) >= 0.5
        ids[covered] = 1 + SHAPES.index(thing.shape)
    return ids


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ROOTS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_MIDDLE = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}


def ldm_names(state: Mapping[str, Tensor], layers: int = 1) -> dict[str, Tensor]:
    """The weights of a diffusers UNet under LDM's names; layers: resnets of a down block."""
    attends = {tuple(k.split(".")[:2]) for k in state if k.startswith("up") and ".attentions." in k}
    return {_ldm(key.split("."), layers, attends): tensor for key, tensor in state.items()}


def _ldm(parts: list[str], layers: int, attends: set[tuple[str, ...]]) -> str:
    for name, root in _ROOTS.items():
        count = name.count(".") + 1
        if ".".join(parts[:count]) == name:
            return ".".join([root, *parts[count:]])
    if parts[0] == "mid_block":
        place, kind, rest = f"middle_block.{_MIDDLE['.'.join(parts[1:3])]}", parts[1], parts[3:]
    else:
        block, kind, n, rest = int(parts[1]), parts[2], int(parts[3]), parts[4:]
        if parts[0] == "down_blocks":
            number = 1 + block * (layers + 1) + (layers if kind == "downsamplers" else n)
            place = f"input_blocks.{number}"
        else:
            number = block * (layers + 1) + (layers if kind == "upsamplers" else n)
            place = f"output_blocks.{number}"
        if kind == "downsamplers":
            return ".".join([place, "0.op", *rest[1:]])
        if kind == "upsamplers":
            slot = "2" if tuple(parts[:2]) in attends else "1"
            return ".".join([place, slot, *rest])
        place = f"{place}.{int(kind == 'attentions')}"
    if kind == "resnets":
        rest = [_RESNET[rest[0]], *rest[1:]]
    return ".".join([place, *rest])
