"""Collaborative editing: Imagic for each modality, under unchanged influence maps.

Huang et al., "Collaborative Diffusion for Multi-Modal Face Generation and Editing", arXiv
2304.10530 (CVPR 2023), section 3.4, after Kawar et al., "Imagic", arXiv 2210.09276. For every
modality m, with c_m the wanted condition and L the denoising loss of the image,

    A   e_m     = argmin_e L(e, theta_m), from c_m
    B   theta'_m = argmin_theta L(e_m, theta)
    C   draw from the collaboration of the theta'_m with alpha c_m + (1 - alpha) e_m, one alpha for
        all

Stages A and B are `Imagic`'s, each of one model alone; theta' is a low-rank change beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hookctl import arguments
from hookctl.address.families import named_denoisers, uncompiled
from hookctl.address.rows import COND, UNCOND
from hookctl.arguments import checked
from hookctl.errors import InputError
from hookctl.learned.collaborative import CollaborativeDiffusion, Collaborator
from hookctl.learned.weights import Weights
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes.imagic import Imagic
from hookctl.session import control

Progress = Callable[[str, int, int], None]
SWEEP = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)  # as published


class CollaborativeImagic:
    """An image fitted to a condition of each modality, and changed towards all of them.

        mask = Collaborator("mask", influence_of_mask, mask_unet, condition=mask_tokens)
        text = Collaborator("text", influence_of_text)
        edit = CollaborativeImagic(pipe, [mask, text], image, "a face with a beard").fit()
        images = edit.draw(alphas=(0.5, 1.0, 1.5), seed=0)

    models: the collaboration, a list of `Collaborator` or a `CollaborativeDiffusion` (such as a
        loaded checkpoint), whose models see the wanted conditions; no pipelines among them, and the
        pipeline's own denoiser once at most. image: PIL, mode RGB; prompt: of the wanted image.
    alphas, guidance, steps, eta: of `draw`, unless it is given others. The published model knows no
        guidance, and draws with eta = 1.
    checkpoint: a safetensors file for each modality, mask.safetensors -> mask-text.safetensors.
    fitting: further arguments of `Imagic`, the same for all (text_steps, model_rate, window ...).
        The published numbers are 500 steps at 1e-3, and 1000 at 1e-6 over all weights.

    `fitted` has the `Imagic` of each modality by name. Raises InputError for what can't be fitted.
    """

    @checked(own=("models",))
    def __init__(
        self,
        pipe: Any,
        models: CollaborativeDiffusion | Sequence[Collaborator],
        image: Any,
        prompt: str,
        *,
        alphas: Sequence[float] = SWEEP,
        guidance: float = 1.0,
        steps: int = 50,
        eta: float = 0.0,
        seed: int = 0,
        checkpoint: str | Path | None = None,
        **fitting: Any,
    ) -> None:
        given = models if isinstance(models, CollaborativeDiffusion) else None
        editor = CollaborativeDiffusion(models) if given is None else given  # type: ignore[arg-type]
        self.pipe, self.prompt, self.seed = pipe, prompt, seed
        self.alphas, self.guidance, self.steps, self.eta = tuple(alphas), guidance, steps, eta
        self._editor = editor
        arguments.check_image(image, "CollaborativeImagic: image")
        self.size = {"height": image.size[1], "width": image.size[0]}
        (name, own), *_ = named_denoisers(pipe)
        like = next(own.parameters())
        self.models = tuple(_at_hand(one, like) for one in editor.models)
        self._check(own)
        self.fitted: dict[str, Imagic] = {}
        for one in self.models:
            # The model alone: the same pipeline around another denoiser.
            alone = pipe
            if one.model is not None:
                alone = copy.copy(pipe)
                setattr(alone, name, one.model)
            self.fitted[one.name] = Imagic(
                alone,
                image,
                prompt,
                embeddings=one.condition,
                steps=steps,
                seed=seed,
                checkpoint=None if checkpoint is None else _beside(Path(checkpoint), one.name),
                **fitting,
            )

    def _check(self, own: Any) -> None:
        """InputError for models that can't be fitted one by one."""
        seen: list[Any] = []
        for one in self.models:
            if one.is_pipeline:
                raise InputError(
                    f"CollaborativeImagic: model {one.name!r} is a pipeline, whose condition can't "
                    "be fitted; give its denoiser, with condition="
                )
            if one.condition is not None and len(one.condition) > 1:
                raise InputError(
                    f"CollaborativeImagic: condition of {one.name!r} is for {len(one.condition)} "
                    "images, and there is one; give [1, tokens, channels]"
                )
            model = uncompiled(own if one.model is None else one.model)
            if any(model is other for other in seen):
                raise InputError(
                    f"CollaborativeImagic: model {one.name!r} is that of another modality, and "
                    "each is fitted for itself; give it a copy"
                )
            seen.append(model)

    @checked()
    def run(self, progress: Progress | None = None) -> Any:
        """All three stages: an image for each alpha."""
        return self.fit(progress).draw()

    @checked()
    def fit(self, progress: Progress | None = None) -> CollaborativeImagic:
        """Stages A and B of each modality; returns itself.

        progress: called with (modality and stage, steps done, steps).
        """
        for name, one in self.fitted.items():
            one.fit(None if progress is None else _naming(progress, name))
        return self

    @checked()
    def draw(
        self,
        alphas: Sequence[float] | None = None,
        *,
        guidance: float | None = None,
        steps: int | None = None,
        seed: int | None = None,
        eta: float | None = None,
        changed: bool = True,
        output_type: str = "pil",
    ) -> Any:
        """Stage C: an image for each alpha, all from one noise.

        alphas, guidance, steps, seed, eta: by default the recipe's. changed: with the fitted
        models, or with the models as they are. The maps are those of `influence`.
        """
        alphas = self.alphas if alphas is None else alphas
        if not alphas:
            raise InputError("alphas: give a number for each image, such as (0.5, 1.0)")
        seed = self.seed if seed is None else seed
        program = Trajectory(
            self.pipe,
            [self.prompt] * len(alphas),
            steps=self.steps if steps is None else steps,
            guidance=self.guidance if guidance is None else guidance,
            generator=[torch.Generator().manual_seed(seed) for _ in alphas],
            eta=self.eta if eta is None else eta,
            **self.size,
        )
        contexts, models = {}, []
        for one in self.models:
            texts = torch.cat([self.fitted[one.name].text(float(alpha)) for alpha in alphas])
            if one.model is None and one.condition is None:
                contexts[COND] = texts
                models.append(one)
                continue
            negative = one.negative
            if one.condition is None and UNCOND in program.template.branches:
                negative = program.template.text(UNCOND)[:1]  # what it saw with the prompt
            models.append(replace(one, condition=texts, negative=negative))
        e = self._editor
        self.editor = CollaborativeDiffusion(
            models, strength=e.strength, paper=e.paper, leader=e.leader, start=e.start, stop=e.stop
        )
        with ExitStack() as stack:
            for fitted in self.fitted.values() if changed else ():
                stack.enter_context(fitted.change.applied())
            stack.enter_context(control(self.pipe, self.editor))
            program.run(contexts=contexts)
        return program.decode(output_type)

    @property
    def influence(self) -> Any:
        """The maps of the last `draw`, an image for each alpha."""
        return self.editor.influence


def _at_hand(one: Collaborator, like: torch.Tensor) -> Collaborator:
    """A modality with its model where the pipeline's own is, as a module to be fitted."""
    model = one.model.like(like) if isinstance(one.model, Weights) else one.model
    condition = None if one.condition is None else one.condition.to(like)
    return replace(one, model=model, condition=condition)


def _beside(checkpoint: Path, name: str) -> Path:
    return checkpoint.with_name(f"{checkpoint.stem}-{name}{checkpoint.suffix}")


def _naming(progress: Progress, name: str) -> Progress:
    return lambda stage, done, steps: progress(f"{name} {stage}", done, steps)
