"""InstanceDiffusion: each instance has a caption of its own and a place, however it is given.

Wang et al., "InstanceDiffusion: Instance-level Control for Image Generation", arXiv 2402.03290
(CVPR 2024). Three things were trained on Stable Diffusion 1.5: UniFusion (`modules.unifusion`)
makes tokens of captions with boxes, points, scribbles and masks, gated self-attention reads them
(`grounding`), and ScaleU scales the decoder's features. ScaleU is always on, in every row and step:
with strength=0 the run is that of the model with ScaleU, not of the model itself.

`recipes.MultiInstanceSampler` in the same stack draws each instance alone at first; its images are
then grounded by their own instance.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookctl.address.families import denoiser_of, sites_of, uncompiled
from hookctl.address.per_prompt import PerPrompt
from hookctl.address.regions import bit_sets
from hookctl.address.sites import Selector, matcher
from hookctl.arguments import checked, is_list, is_text, refusal, shown
from hookctl.editor import Claim
from hookctl.errors import InputError
from hookctl.hooks.skips import concats
from hookctl.learned.clip_features import features_of, phrase_features
from hookctl.learned.files import Checkpoint
from hookctl.learned.grounding import Fade, Grounding, Layout
from hookctl.learned.instances import Instance, Located, as_row, located
from hookctl.learned.modules.gated_attention import GatedSelfAttention
from hookctl.learned.modules.scale_u import ScaleU
from hookctl.learned.modules.unifusion import BOX, FORMATS, MASK, POINT, UniFusion
from hookctl.learned.networks import filled, fusers_of, options_of, part
from hookctl.learned.weights import Weights
from hookctl.loop.inserting import InsertCall
from hookctl.loop.state import FeatureCall, State
from hookctl.run_state import RunState

# Of the schedule, for which the layers are on: the README's example.
SHARE = 0.8


@dataclass(frozen=True)
class InstanceNetwork:
    """What a checkpoint holds: the tokenizer, the layers by the path of their block, the gains of
    features (None: without)."""

    tokenizer: UniFusion
    fusers: Mapping[str, GatedSelfAttention]
    gains: ScaleU | None = None


class InstanceDiffusion(Grounding):
    """Draw instances by their captions at their places.

        edit = InstanceDiffusion(network, [Instance("a red cat", box=(0.1, 0.2, 0.5, 0.9)), ...])

    network: of a checkpoint (`learned.load`). instances: for every prompt, or a list of lists, one
    for each; as many as the checkpoint has slots (30). formats: which ways to say where the model
    is shown, of "box", "point", "scribble", "mask"; None for the published choice: all if a
    scribble is given, else box, point and mask with a mask, else box and point, else point.
    masked: inside the layers, at the finest resolution, image tokens see their own instance alone
    (published, and off in the official configurations); what is in no instance sees what is not.
    strength, blocks, start, stop, decay, back, sites: as for `GLIGEN`.
    """

    _encoded: RunState[dict[str, Tensor]] = RunState(factory=dict)
    _masks: RunState[dict[Any, Tensor]] = RunState(factory=dict)
    _finest: RunState[frozenset[str]] = RunState(frozenset())

    @checked(own=("instances", "formats"))
    def __init__(
        self,
        network: InstanceNetwork,
        instances: Sequence[Instance] | Sequence[Sequence[Instance]],
        *,
        formats: Collection[str] | None = None,
        masked: bool = False,
        strength: float | Sequence[float] = 1.0,
        blocks: Mapping[str, float] | None = None,
        start: float = 0.0,
        stop: float = SHARE,
        decay: float = 0.0,
        back: float = 1.0,
        sites: Selector = None,
    ) -> None:
        fade = Fade(start, stop, decay, back)
        super().__init__(network.fusers, strength=strength, blocks=blocks, fade=fade, sites=sites)
        self.network, self.masked = network, masked
        self.tokenizer = Weights(network.tokenizer)
        self.gains = None if network.gains is None else Weights(network.gains)
        self._scales = network.gains is not None and not network.gains.neutral
        if self._scales:  # in every step
            self.start, self.stop = 0.0, 1.0
        net = network.tokenizer
        self.instances = PerPrompt(
            instances, f"{self.name}: instances", lambda one, name: located(one, net, name)
        )
        slots = net.slots
        for given in self.instances.lists:
            if len(given) > slots:
                raise InputError(
                    f"{self.name}: {len(given)} instances of a prompt; the checkpoint was trained "
                    f"with {slots} at most"
                )
        if not self.instances.items:
            raise InputError(f"{self.name}: instances={shown(instances)}; give at least one")
        self.formats = self._formats(formats)
        if masked:
            for one in self.instances.items:
                if one.region is None:
                    raise InputError(
                        f"{self.name}: masked=True, and an instance has neither box nor mask; give "
                        "one of them to each"
                    )

    def _formats(self, formats: Collection[str] | None) -> tuple[str, ...] | None:
        if formats is None:
            return None
        several = is_list(formats) or isinstance(formats, Set)
        if not several or not formats or not all(is_text(f) and f in FORMATS for f in formats):
            raise refusal(f"{self.name}: formats", formats, f"some of {', '.join(FORMATS)}")
        return tuple(formats)

    def neutral(self) -> bool | None:
        return bool(super().neutral()) and not self._scales

    def claims(self) -> Sequence[Claim]:
        found = list(super().claims())
        if self._scales:  # twice would be another model than was trained
            cure = "The checkpoint brings them: leave the other out, or give one all instances"
            found.append(Claim("gains of ScaleU", window=self.window(), cure=cure))
        return found

    def attach(self, target: Any) -> None:
        super().attach(target)
        found = [site for site in sites_of(target) if matcher(self.sites)(site)]
        finest = max((s.resolution for s in found if s.resolution is not None), default=None)
        self._finest = frozenset(s.path for s in found if s.resolution == finest)
        if self.network.gains is not None:
            widths = tuple(c.backbone_channels for c in concats(uncompiled(denoiser_of(target))))
            if widths != self.network.gains.widths:
                raise InputError(
                    f"{self.name}: ScaleU is for decoder concats of {self.network.gains.widths} "
                    f"channels and the model has {widths}; the checkpoint is for another model"
                )

    def begin(self, state: State) -> None:
        super().begin(state)
        self.instances.check_prompts(state.rows)
        captions = [one.caption for one in self.instances.items if isinstance(one.caption, str)]
        self._encoded = phrase_features(state.pipe, captions, self.name)
        for one in self.instances.items:
            features_of(one.caption, self._encoded, self.network.tokenizer.text, self.name)
        self._masks = {}

    def features(self, call: FeatureCall) -> None:
        if self.gains is not None and self._scales:
            gains = self.gains.like(call.backbone)
            call.backbone, call.skip = gains(call.order, call.backbone, call.skip)

    # -- tokens ------------------------------------------------------------------------------------

    def _of(self, layout: Layout) -> Sequence[Located]:
        """The instances of a layout."""
        if layout.prompt is None:
            return ()
        found: Sequence[Located] = self.instances[layout.prompt]
        if layout.instance is None:
            return found
        return found[layout.instance : layout.instance + 1]

    def _shown(self, given: Sequence[Located]) -> Collection[str]:
        """The formats that the model is shown."""
        if self.formats is not None:
            return self.formats
        if any(one.drawn for one in given):
            return FORMATS
        if any(one.mask is not None for one in given):
            return (BOX, POINT, MASK)
        return (BOX, POINT) if any(one.box for one in given) else (POINT,)

    def _tokens(self, layout: Layout, like: Tensor) -> Tensor:
        given, net = self._of(layout), self.tokenizer.like(like)
        features = [features_of(one.caption, self._encoded, net.text, self.name) for one in given]
        tokens: Tensor = net(as_row(given, features, net, like), self._shown(given))[0]
        return tokens

    # -- masked self-attention ---------------------------------------------------------------------

    def _mask(self, layouts: Sequence[Layout], call: InsertCall) -> Tensor | None:
        if not self.masked or call.site.path not in self._finest or call.grid is None:
            return None
        height, width = call.grid
        masks = [self._mask_of(layout, height, width) for layout in layouts]
        return torch.stack(masks)[:, None].to(call.hidden.device)

    def _mask_of(self, layout: Layout, height: int, width: int) -> Tensor:
        """What the image tokens of a row may see, bool [N, N + M]: of the image what shares a
        region with them; tokens of an instance's box and mask inside of it, all others always."""
        key = layout, height, width
        if key in self._masks:
            return self._masks[key]
        net, given = self.network.tokenizer, self._of(layout)
        count, slots = height * width, net.slots
        seen = torch.ones(count, count + 4 * slots + net.raster_tokens, dtype=torch.bool)
        regions = [one.region for one in given]
        held = [region for region in regions if region is not None]
        if held:
            bits = bit_sets(held, height, width)
            seen[:, :count] = (bits[:, None] & bits) != 0
            inside = torch.zeros(count, slots, dtype=torch.bool)
            for i, region in enumerate(held):
                inside[:, i] = region.tokens(height, width)
            seen[:, count : count + slots] = inside
            seen[:, count + 3 * slots : count + 4 * slots] = inside
        self._masks[key] = seen
        return seen


@options_of(InstanceDiffusion)
def build(checkpoint: Checkpoint, pipe: Any, **options: Any) -> InstanceDiffusion:
    """The editor of a checkpoint with diffusers' names; options: of `InstanceDiffusion`."""
    tensors = checkpoint.tensors
    gains = {name: tensor for name, tensor in tensors.items() if name.startswith("scaleu_")}
    network = InstanceNetwork(
        filled(UniFusion.of_shapes, part(tensors, "position_net."), "position_net"),
        fusers_of(tensors, pipe),
        filled(ScaleU.of_shapes, gains, "ScaleU") if gains else None,
    )
    return InstanceDiffusion(network, **options)
