"""GLIGEN: what is to be where, by boxes with phrases or images, by joints, or by a map.

Li et al., "GLIGEN: Open-Set Grounded Text-to-Image Generation", arXiv 2301.07093 (CVPR 2023). The
checkpoint's tokenizer makes grounding tokens, which gated self-attention reads in every block
(`grounding`). Trained on Stable Diffusion 1.4, whose weights it leaves as they are, so it can be
attached to any fine-tuned 1.x. The strength is 1 for a first part of the schedule and then 0; the
published parts are the defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hookctl.address.families import denoiser_of, uncompiled
from hookctl.address.rows import Row, Rows
from hookctl.address.sites import Selector
from hookctl.arguments import checked, shown, whole
from hookctl.errors import InputError, UnsupportedError
from hookctl.learned.files import Checkpoint
from hookctl.learned.gligen_inputs import Given, Inputs, Maps, Objects, Persons
from hookctl.learned.gligen_stem import Inpainting, MapChannels, Stem
from hookctl.learned.grounding import Fade, Grounding, Layout
from hookctl.learned.modules.gated_attention import GatedSelfAttention
from hookctl.learned.modules.gligen_tokens import (
    SLOTS,
    BoxText,
    BoxTextImage,
    Downsampler,
    Keypoints,
    Shapes,
    SpatialMap,
)
from hookctl.learned.networks import filled, fusers_of, options_of, part
from hookctl.learned.weights import Weights
from hookctl.loop.inserting import StemCall
from hookctl.loop.state import State

Tokenizer = BoxText | BoxTextImage | Keypoints | SpatialMap


@dataclass(frozen=True)
class GLIGENNetwork:
    """What a checkpoint holds: the tokenizer, the layers by the path of their block, and of maps
    and inpainting the first convolution, of maps the network that makes channels of them."""

    tokenizer: Tokenizer
    fusers: Mapping[str, GatedSelfAttention]
    stem: Stem | None = None
    downsampler: Downsampler | None = None

    @property
    def share(self) -> float:
        """Of the schedule, for which the official examples keep it on."""
        if isinstance(self.tokenizer, SpatialMap):
            edges = self.downsampler is None or self.downsampler.channels == 1
            return 0.9 if edges and self.tokenizer.classes is None else 0.7
        if isinstance(self.tokenizer, BoxTextImage) or self.stem is not None:
            return 1.0
        return 0.3


class GLIGEN(Grounding):
    """Draw objects in boxes, persons by their joints, or a picture after a map.

        edit = GLIGEN(network, boxes=[(0.1, 0.2, 0.5, 0.9)], phrases=["a cat"])

    network: of a checkpoint (`learned.load`); which of the following it reads depends on it. Each
    is for every prompt of the run, or a list, one for each prompt.
    boxes: (x0, y0, x1, y1), fractions of the canvas; phrases: one for each box, or its features;
    images: likewise, PIL images of the object or their CLIP embeddings, None for none; style: an
    image whose style the picture shall have; clip: what reads images, a transformers CLIPModel.
    keypoints: for each person its joints (x, y), None for one that is not seen.
    maps: an image of edges, depth or normals (from -1 to 1 as a tensor), or of class numbers.
    inpaint: the image that is kept outside of the boxes; seed: of the noise put on it.
    Images may be paths of files, too.
    slots: how many objects the checkpoint was trained with.
    strength: of the layers, a number or one for each prompt; blocks: further factors by selectors
    of self-attention, such as {"up": 0.5}. start, stop: fractions of the schedule between which
    they act, stop=None for the published one; decay: over how much of it they fade out then; back:
    when they act again. sites: self-attention after which they act.

    strength=0 leaves a run bit for bit as it was.
    """

    @checked(own=("boxes", "phrases", "images", "style", "clip", "keypoints", "maps", "inpaint"))
    def __init__(
        self,
        network: GLIGENNetwork,
        *,
        boxes: Any = None,
        phrases: Any = None,
        images: Any = None,
        style: Any = None,
        clip: Any = None,
        keypoints: Any = None,
        maps: Any = None,
        inpaint: Any = None,
        seed: int = 0,
        slots: int = SLOTS,
        strength: float | Sequence[float] = 1.0,
        blocks: Mapping[str, float] | None = None,
        start: float = 0.0,
        stop: float | None = None,
        decay: float = 0.0,
        back: float = 1.0,
        sites: Selector = None,
    ) -> None:
        end = max(start, network.share) if stop is None else stop
        super().__init__(
            network.fusers,
            strength=strength,
            blocks=blocks,
            fade=Fade(start, end, decay, back),
            sites=sites,
        )
        self.network = network
        self.tokenizer = Weights[nn.Module](network.tokenizer)
        given = Given(boxes, phrases, images, style, clip, keypoints, maps, inpaint)
        self._check_given(given)
        whole(slots, f"{self.name}: slots", least=1, most=1000)
        net = network.tokenizer
        self.inputs: Inputs
        self.channels: MapChannels | Inpainting | None = None
        if isinstance(net, Keypoints):
            self.inputs = Persons(self.name, net, keypoints)
        elif isinstance(net, SpatialMap):
            self.inputs = of_maps = Maps(self.name, net, maps)
            if network.stem is not None:
                self.channels = MapChannels(of_maps, network.downsampler)
        else:
            self.inputs = objects = Objects(self.name, net, slots, given)
            if not objects.boxes.items and style is None:
                raise InputError(f"{self.name}: boxes={shown(boxes)}; give at least one")
            if network.stem is not None:
                self.channels = Inpainting(self.name, inpaint, objects, seed)
                self.start, self.stop = 0.0, 1.0  # what is known is kept in every step

    def _check_given(self, given: Given) -> None:
        """Raise InputError unless the arguments are those that the checkpoint reads."""
        net = self.network.tokenizer
        if isinstance(net, Keypoints):
            what, needed, optional = "joints of persons", {"keypoints"}, set[str]()
        elif isinstance(net, SpatialMap):
            what, needed, optional = "a map", {"maps"}, set[str]()
        elif isinstance(net, BoxTextImage):
            what, needed = "boxes with phrases and images", {"boxes"}
            optional = {"phrases", "images", "style", "clip"}
        else:
            what, needed, optional = "boxes with phrases", {"boxes", "phrases"}, set[str]()
        if self.network.stem is not None and not isinstance(net, SpatialMap):
            what, needed = f"{what}, and an image to inpaint", needed | {"inpaint"}
        present = given.present
        for name in sorted(needed - present):
            raise InputError(f"{self.name}: {name} is missing; this checkpoint reads {what}")
        for name in sorted(present - needed - optional):
            raise InputError(f"{self.name}: {name} is given; this checkpoint reads {what}")

    def attach(self, target: Any) -> None:
        super().attach(target)
        if self.network.stem is None:
            return
        layer = getattr(uncompiled(denoiser_of(target)), "conv_in", None)
        weight = self.network.stem.weight
        if not isinstance(layer, nn.Conv2d) or layer.weight.shape[0] != weight.shape[0]:
            raise InputError(
                f"{self.name}: the checkpoint's first convolution {tuple(weight.shape)} does not "
                "fit the model's; it is for another model"
            )
        further, own = weight.shape[1] - layer.in_channels, layer.in_channels
        if isinstance(self.channels, Inpainting):
            if getattr(target, "vae", None) is None:
                raise UnsupportedError(f"{self.name}: inpainting needs a pipeline with a VAE")
            wanted = own + 1
        else:
            net = self.network.downsampler
            wanted = 1 if net is None else net.out
        if further != wanted:
            raise InputError(
                f"{self.name}: the checkpoint's first convolution takes {further} channels beside "
                f"the latents, and {wanted} are made; the model's own takes {own}"
            )

    def begin(self, state: State) -> None:
        super().begin(state)
        self.inputs.check_prompts(state.rows)
        self.inputs.begin(state.pipe)
        if isinstance(self.channels, Inpainting):
            self.channels.begin(state)

    def _tokens(self, layout: Layout, like: Tensor) -> Tensor:
        tokens: Tensor = self.tokenizer.like(like)(*self.inputs.arguments(layout, like))[0]
        return tokens

    # -- further channels --------------------------------------------------------------------------

    def _entering(self, rows: Rows, fade: float) -> list[Row]:
        """The rows that enter with further channels: of inpainting in every step."""
        if not fade and not isinstance(self.channels, Inpainting):
            return []
        each = self.strengths
        return [r for r in rows if each[0 if self._one_strength else r.prompt]]

    def before(self, state: State) -> None:
        if isinstance(self.channels, Inpainting):
            rows = self._entering(state.images, 1.0)
            if rows:
                self.channels.put(state, rows)

    def stem(self, call: StemCall) -> None:
        stem, channels = self.network.stem, self.channels
        if stem is None or channels is None:
            return
        rows = self._entering(call.rows, self.fade.at(call.clock))
        if rows:
            prompts = {r.prompt: r for r in call.rows}
            made = {prompt: channels.extra(row, call.input) for prompt, row in prompts.items()}
            extra = torch.stack([made[row.prompt] for row in call.rows])
            stem.apply(call, extra, rows)


def tokenizer_of(weights: Mapping[str, Tensor]) -> Tokenizer:
    """The tokenizer of some weights, told by their names."""
    kinds: dict[str, Callable[[Shapes], Tokenizer]] = {
        "null_text_feature": BoxTextImage.of_shapes,
        "person_embeddings": Keypoints.of_shapes,
        "pos_embedding": SpatialMap.of_shapes,
    }
    kind = next((kinds[name] for name in kinds if name in weights), BoxText.of_shapes)
    return filled(kind, weights, "position_net")


@options_of(GLIGEN)
def build(checkpoint: Checkpoint, pipe: Any, **options: Any) -> GLIGEN:
    """The editor of a checkpoint with diffusers' names; options: of `GLIGEN`."""
    tensors = checkpoint.tensors
    weight, below = tensors.get("conv_in.weight"), part(tensors, "downsample_net.")
    network = GLIGENNetwork(
        tokenizer_of(part(tensors, "position_net.")),
        fusers_of(tensors, pipe),
        None if weight is None else Stem(weight.float(), tensors.get("conv_in.bias")),
        filled(Downsampler.of_shapes, below, "downsample_net") if below else None,
    )
    return GLIGEN(network, **options)
