"""One modality of a collaboration, as it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hookctl.address.families import denoiser_of, uncompiled
from hookctl.errors import InputError
from hookctl.hooks.offloading import device_of
from hookctl.learned.weights import Weights
from hookctl.loop.state import State

# (latents [images, channels, h, w], timestep, condition [images, tokens, channels] or None) ->
# logits [images, 1, h, w]
Influence = Callable[[Tensor, float, Tensor | None], Any]


@dataclass(frozen=True, eq=False)
class Collaborator:
    """One modality: a model, what it is told, and the network that says how far to trust it where.

    influence: the dynamic diffuser, a UNet2DConditionModel with one output channel (perhaps as
    `Weights`, which follow the pipeline from device to device, as may the model) or a function
    (latents, timestep, condition) -> logits [images, 1, h, w]; None for 0 everywhere. It sees the
    latents as the denoiser does, without channels that the pipeline appends.
    model: None for the pipeline's own denoiser; another one, or a whole pipeline.
    condition: text embeddings, [1 | images, tokens, channels], for the model and for its influence
    in place of the pipeline's; negative: for the unconditional rows. Without a negative one the
    model is not guided. Not for pipelines, which are conditioned through their call.
    arguments: of a pipeline's call; what is not given is that of the controlled one.
    """

    name: str
    influence: nn.Module | Weights[Any] | Influence | None = None
    model: Any = None
    condition: Tensor | None = None
    negative: Tensor | None = None
    arguments: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        label = f"Collaborator {self.name!r}"
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"Collaborator: name={self.name!r}; give a word, such as 'mask'")
        network = module_of(self.influence)
        if network is not None and not callable(network):
            raise InputError(
                f"{label}: influence is a {type(self.influence).__name__}; give a UNet with one "
                "output channel, or a function (latents, timestep, condition) -> logits"
            )
        channels = getattr(getattr(network, "config", None), "out_channels", 1)
        if channels != 1:
            raise InputError(
                f"{label}: influence has {channels} output channels; give a network with one"
            )
        for name in ("condition", "negative"):
            given = getattr(self, name)
            if given is None:
                continue
            if not isinstance(given, Tensor) or given.dim() != 3 or not given.is_floating_point():
                kind = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
                raise InputError(
                    f"{label}: {name} is {kind}; give embeddings [1 | images, tokens, channels]"
                )
            if self.is_pipeline:
                raise InputError(
                    f"{label}: {name} is given with a pipeline, which is conditioned through its "
                    "call; give arguments=, such as {'prompt_embeds': ...}"
                )
        if self.negative is not None and self.condition is None:
            raise InputError(f"{label}: negative is given without condition; give both")
        if self.arguments is not None and not self.is_pipeline:
            raise InputError(f"{label}: arguments are of a pipeline's call; give model=a pipeline")

    @property
    def is_pipeline(self) -> bool:
        return hasattr(self.model, "scheduler") and not isinstance(self.model, nn.Module)

    def ask_influence(self, x: Tensor, timestep: float, condition: Tensor | None) -> Any:
        """What the influence network returns for the latents of the conditional rows."""
        network = self.influence.like(x) if isinstance(self.influence, Weights) else self.influence
        if not isinstance(network, nn.Module):
            assert network is not None
            return network(x, timestep, condition)
        # A network of the user's may stand elsewhere.
        like = device_of(network), next(network.parameters(), x).dtype
        t = torch.tensor(timestep, device=like[0])
        return network(x.to(*like), t, None if condition is None else condition.to(*like))

    def check_images(self, state: State) -> None:
        """InputError for conditions of another number of images than the run draws."""
        label = f"Collaborator {self.name!r}"
        images = len(state.latents)
        for name in ("condition", "negative"):
            given = getattr(self, name)
            if given is not None and len(given) not in (1, images):
                raise InputError(
                    f"{label}: {name} is for {len(given)} images and the run draws {images}; give "
                    f"one for all, or {images}"
                )

    def check_sizes(self, state: State, condition: Tensor | None) -> None:
        """InputError for networks that do not fit the run's latents, or what they are told."""
        label, channels = f"Collaborator {self.name!r}", state.latents.shape[1]
        model = denoiser_of(self.model) if self.is_pipeline else module_of(self.model)
        for what, network in (("model", model), ("influence", module_of(self.influence))):
            module = uncompiled(network) if isinstance(network, nn.Module) else None
            config = getattr(module, "config", None)
            inputs = getattr(config, "in_channels", channels)
            if self.is_pipeline and what == "model":
                inputs = min(inputs, channels)  # it may append images and masks to its latents
            if inputs != channels:
                raise InputError(
                    f"{label}: {what} takes latents of {inputs} channels and the pipeline draws "
                    f"{tuple(state.latents.shape)}; give networks of one latent space"
                )
            width = getattr(config, "cross_attention_dim", None)
            if condition is not None and isinstance(width, int) and width != condition.shape[-1]:
                raise InputError(
                    f"{label}: {what} takes a condition of {width} channels, and it is given "
                    f"{tuple(condition.shape)}; give embeddings of its own as condition="
                )


def module_of(given: Any) -> Any:
    """A network itself, perhaps out of its `Weights`."""
    return given.module if isinstance(given, Weights) else given
