"""What the zoo says about each of its animals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .mould import Mould

PROMPTS = ("a red cat above a blue square",)
NEGATIVE = "blurry"

Rows = list[list[str]]  # one list of labels for each call of the denoiser in a step
Layout = Callable[[int, int, bool], Rows]  # of the number of prompts, images per prompt, guided


class Asked(NamedTuple):
    """What a run is asked for: lists of equal length, and how many images of each prompt."""

    prompts: list[str]
    negatives: list[str]
    guidance: float
    n: int


Inputs = Callable[[Asked], dict[str, Any]]  # the arguments of a pipeline's call


def labels(role: str, prompts: int, n: int) -> list[str]:
    """The rows of one role, images of a prompt adjacent: P1 P1 P2 P2."""
    return [f"{role}{i + 1}" for i in range(prompts) for _ in range(n)]


def negative_first(prompts: int, n: int, guided: bool) -> Rows:
    """One call, the unconditional rows before the conditional ones."""
    return [[*(labels("N", prompts, n) if guided else []), *labels("P", prompts, n)]]


def two_calls(prompts: int, n: int, guided: bool) -> Rows:
    """A conditional call, then an unconditional one."""
    return [labels(role, prompts, n) for role in ("PN" if guided else "P")]


@dataclass(frozen=True)
class Case:
    """A tiny random pipeline, and the arguments of its call for what is asked of it.

    `sites` counts the attention modules of the denoiser by kind, `examples` names some of them;
    `aside` begins the paths of those that only prepare the text and are no sites.
    `rows` gives the rows of each denoiser call in a step: P a prompt, N its negative, I the image
    without the text, X perturbed; the number is the prompt's. `frames` is the number of frames
    in the latents of a video model. `takes_n` is False where the pipeline cannot make
    several videos for each of several prompts.
    """

    name: str
    build: Callable[[], Any]
    inputs: Inputs
    sites: Mapping[str, int]
    examples: Mapping[str, str]
    rows: Layout = negative_first
    denoiser: str = "unet"
    guidance: float = 4.0
    frames: int = 1
    takes_n: bool = True
    aside: str | None = None
    notes: str = ""

    def make(self) -> Any:
        """A new pipeline, the same at each call."""
        return self._mould.copy()

    @cached_property
    def _mould(self) -> Mould:
        return Mould(self.built())

    def built(self) -> Any:
        """A pipeline from its parts; the global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe = self.build()
            sharpen(self.denoiser_of(pipe))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def denoiser_of(self, pipe: Any) -> nn.Module:
        model: nn.Module = getattr(pipe, self.denoiser)
        return model

    def run(
        self,
        pipe: Any,
        prompts: str | Sequence[str] = PROMPTS,
        negatives: str | Sequence[str] = NEGATIVE,
        steps: int = 2,
        seed: int = 0,
        n: int = 1,
        guidance: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The final latents, one entry for each image (or video), comparable bit for bit.

        Image i of the batch has its own generator, seeded with `seed` + i, so that its noise does
        not depend on its neighbours. `guidance` 1 means no guidance. Further keywords go to the
        pipeline as they are.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        negatives = [negatives] * len(prompts) if isinstance(negatives, str) else list(negatives)
        if n > 1 and not self.takes_n:
            raise ValueError(f"{self.name}: {self.notes or 'one image for a prompt'}")
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts) * n)]
        common = {
            "num_inference_steps": steps,
            "generator": generators,
            "output_type": "latent",
            "return_dict": False,
            "num_videos_per_prompt" if self.frames > 1 else "num_images_per_prompt": n,
        }
        asked = Asked(prompts, negatives, self.guidance if guidance is None else guidance, n)
        out = pipe(**{**self.inputs(asked), **common, **kwargs})
        latents: Tensor = out[0] if isinstance(out, tuple) else out
        return latents


def of_text(asked: Asked) -> dict[str, Any]:
    """Text in, images out."""
    return {
        "prompt": asked.prompts,
        "negative_prompt": asked.negatives,
        "guidance_scale": asked.guidance,
    }


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules of a denoiser by path: those with projections of their own."""
    return {path: m for path, m in model.named_modules() if attends(m)}


def attends(module: nn.Module) -> bool:
    """Whether a module projects to queries, alone or together with keys and values."""
    return any(hasattr(module, name) for name in ("to_q", "qkv", "to_qkv_mlp_proj"))


@torch.no_grad()
def sharpen(model: nn.Module, gain: float = 4.0) -> None:
    """Raise the queries' gain: fresh weights attend almost evenly, trained ones do not.

    Even attention would hide an edit that goes wrong.
    """
    for module in attention_modules(model).values():
        for norm, projection in (("norm_q", "to_q"), ("norm_added_q", "add_q_proj")):
            for name in (norm, projection):
                part = getattr(module, name, None)
                if getattr(part, "weight", None) is not None:
                    part.weight.mul_(gain)
                    if getattr(part, "bias", None) is not None:
                        part.bias.mul_(gain)
                    break
