"""Imagic: one real image changed by words, through an embedding and a model fitted to it.

Kawar et al., "Imagic: Text-Based Real Image Editing with Diffusion Models", arXiv 2210.09276
(CVPR 2023). With e_tgt the embedding of the wanted text and L the denoising loss of the image,

    A   e_opt  = argmin_e L(e, theta), from e_tgt
    B   theta' = argmin_theta L(e_opt, theta)
    C   draw from theta' with e = alpha e_tgt + (1 - alpha) e_opt

Here theta' = theta + a low-rank change, so that the model's own weights are never touched.

As published, C starts from random noise, so that whatever of the image is to stay must have been
fitted. `draw(inverted=True)`, which is no part of the paper, starts from the image's own DDIM
inversion x* at (e_opt, theta') and guides away from e_opt,

    eps = eps(x, e_opt) + s (eps(x, e) - eps(x, e_opt))

so that alpha = 0 gives the image back whatever the scale s, and only e - e_opt can change it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hookctl import arguments
from hookctl.address.rows import COND, UNCOND
from hookctl.arguments import checked
from hookctl.errors import InputError, UnsupportedError
from hookctl.hooks.patch import Patch
from hookctl.loop.images import encode
from hookctl.loop.inversion import ddim_path, require_first_order
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes.common.real_images.encoded import takes_videos
from hookctl.recipes.common.real_images.fitting import Fitting, Progress
from hookctl.recipes.common.real_images.low_rank import LowRank

LAYERS = "."  # all that are linear or convolutional: the paper tunes all weights


class Imagic:
    """An image and a text, fitted to each other.

        edit = Imagic(pipe, image, "a red circle above a green square").fit()
        images = edit.draw(alphas=(0.0, 0.6, 0.9), seed=0)

    or all of it by `run()`.

    image: PIL, mode RGB; prompt: of the wanted image; embeddings: e_tgt in place of the prompt's,
        [1, tokens, channels], for a model that is told something else.
    alphas: how far it goes from the image, 0, to the wanted text, 1; an image for each.
    inverted: start from the image's inverted noise, not from that of the seed. These, guidance and
        steps are those of `draw`, unless it is given others.
    text_steps, text_rate: how long and by which learning rate stage A fits the text to the image.
    model_steps, model_rate: likewise stage B the model, both by Adam.
    rank, layers: of B's low-rank change, layers as a pattern of paths. The published numbers for
        Stable Diffusion are 1000 steps at 2e-3 and 1500 at 5e-7 over all weights.
    schedule_steps: levels that the image is noised to, spread over the schedule, by default
        those of the steps; window: those of them that are trained, in shares of the run (0 is
        noise, where the layout is decided); samples: levels in every training step, spread evenly
        over the window; noises: of each of these levels, in one batch.
    seed: of the training noise, of the change's start and of the images' noise.
    checkpoint: a safetensors file to write after every `save_every` steps and at the end, and to go
        on from if it is there (the optimiser's moments start anew).

    Raises InputError for arguments out of bounds, and for layers that match none of the model's.
    """

    @checked()
    def __init__(
        self,
        pipe: Any,
        image: Any,
        prompt: str,
        *,
        embeddings: Tensor | None = None,
        alphas: Sequence[float] = (0.6, 0.8, 1.0),
        guidance: float = 7.5,
        steps: int = 50,
        inverted: bool = False,
        text_steps: int = 500,
        text_rate: float = 1e-3,
        model_steps: int = 1000,
        model_rate: float = 1e-4,
        rank: int = 4,
        layers: str = LAYERS,
        schedule_steps: int | None = None,
        window: tuple[float, float] = (0.0, 1.0),
        samples: int = 1,
        noises: int = 1,
        seed: int = 0,
        checkpoint: str | Path | None = None,
        save_every: int = 100,
    ) -> None:
        self.pipe, self.seed = pipe, seed
        self.prompt = arguments.text(prompt, "Imagic: prompt", "the text of the edited image")
        for name, value in (("text_steps", text_steps), ("model_steps", model_steps)):
            arguments.whole(value, f"Imagic: {name}")
        for name, value in (("samples", samples), ("noises", noises), ("save_every", save_every)):
            arguments.whole(value, f"Imagic: {name}", 1)
        for name, rate in (("text_rate", text_rate), ("model_rate", model_rate)):
            arguments.number(rate, f"Imagic: {name}", above=0)
        if not 0 <= window[0] < window[1] <= 1:
            wanted = "a start and a later end between 0 and 1"
            raise arguments.refusal("Imagic: window", window, wanted)
        if not alphas:
            raise arguments.refusal("Imagic: alphas", alphas, "a number for each image")
        arguments.check_image(image, "Imagic: image")
        if embeddings is not None and (embeddings.dim() != 3 or len(embeddings) != 1):
            wanted = "the embeddings of one text, [1, tokens, channels]"
            raise arguments.refusal("Imagic: embeddings", embeddings, wanted)
        self.alphas, self.guidance, self.steps = tuple(alphas), float(guidance), steps
        self.inverted = inverted
        if checkpoint is not None:
            arguments.writable(checkpoint, "Imagic: checkpoint")
        name = type(pipe).__name__
        if any(word in name for word in ("Kontext", "Edit")):
            raise UnsupportedError(
                f"Imagic fits a text to an image, and {name} is given one to edit besides; use the "
                "family's text-to-image pipeline"
            )
        if takes_videos(pipe):
            raise UnsupportedError(
                f"Imagic is of one image, and {type(pipe).__name__} draws videos, which FlowEdit "
                "edits"
            )
        clean = encode(pipe, image)
        height, width = image.size[::-1]
        self.size = {"height": height, "width": width}
        many = clean.repeat(noises, *[1] * (clean.dim() - 1))
        levels = schedule_steps or steps
        told: dict[str, Any] = {} if embeddings is None else {"prompt_embeds": embeddings}
        with _levels_within(pipe, levels):
            program = Trajectory(
                pipe,
                prompt,
                steps=levels,
                images=noises,
                latents=many,
                **told,
                **self.size,
            )
        self.clean = clean.to(program.latents)
        self.change = LowRank(program.denoiser, layers, rank, torch.Generator().manual_seed(seed))
        self.fitting = Fitting(
            program,
            self.clean,
            self.change,
            plan={"text": (text_steps, text_rate), "model": (model_steps, model_rate)},
            window=window,
            samples=samples,
            seed=seed,
            checkpoint=checkpoint,
            save_every=save_every,
        )

    @checked()
    def run(self, progress: Progress | None = None) -> Any:
        """All three stages: an image for each alpha."""
        return self.fit(progress).draw()

    @checked()
    def fit(self, progress: Progress | None = None) -> Imagic:
        """Stages A and B; returns itself.

        progress: called with (stage, steps done, steps). Raises InputError for a checkpoint that
        was fitted to another text.
        """
        self.fitting.run(progress)
        return self

    @property
    def fitted(self) -> Tensor:
        """e_opt, [1, tokens, channels]."""
        return self.fitting.embedding

    def text(self, alpha: float) -> Tensor:
        """alpha e_tgt + (1 - alpha) e_opt, [1, tokens, channels]."""
        return alpha * self.fitting.wanted + (1 - alpha) * self.fitted

    @checked()
    def draw(
        self,
        alphas: Sequence[float] | None = None,
        *,
        guidance: float | None = None,
        steps: int | None = None,
        seed: int | None = None,
        changed: bool = True,
        inverted: bool | None = None,
        refine: int = 2,
        output_type: str = "pil",
    ) -> Any:
        """Stage C: an image for each alpha, all from one noise.

        alphas, guidance, steps, seed: by default the recipe's. changed: with the fitted model, or
        with the model as it is. inverted: from the image's inverted noise instead of that of the
        seed (see above); refine: of that inversion (`DDIMInversion`). output_type: as the
        pipeline's. Raises InputError without alphas, UnsupportedError for an inversion under a
        scheduler that is not of first order.
        """
        alphas = self.alphas if alphas is None else alphas
        if not alphas:
            raise InputError("alphas: give a number for each image, such as (0.6, 0.8)")
        steps = self.steps if steps is None else steps
        seed = self.seed if seed is None else seed
        program = Trajectory(
            self.pipe,
            [self.prompt] * len(alphas),
            steps=steps,
            guidance=self.guidance if guidance is None else guidance,
            generator=[torch.Generator().manual_seed(seed) for _ in alphas],
            **self.size,
        )
        contexts = {COND: torch.cat([self.text(float(alpha)) for alpha in alphas])}
        with self.change.applied() if changed else nullcontext():
            if self.inverted if inverted is None else inverted:
                program.write(self.inverted_noise(steps, refine))
                if UNCOND in program.template.branches:
                    contexts[UNCOND] = self.fitted
            program.run(contexts=contexts)
        return program.decode(output_type)

    def inverted_noise(self, steps: int, refine: int) -> Tensor:
        """The noise that leads to the image under the fitted text, as the model is now."""
        program = Trajectory(self.pipe, self.prompt, steps=steps, latents=self.clean, **self.size)
        require_first_order(program, "Imagic.draw(inverted=True)")
        return ddim_path(program, self.clean, contexts={COND: self.fitted}, refine=refine)[0]


@contextmanager
def _levels_within(pipe: Any, levels: int) -> Iterator[None]:
    """Meanwhile the pipeline's timesteps are those that its model was trained at: an offset of the
    scheduler's would lead beyond the last of them where all are wanted."""
    config = pipe.scheduler.config
    trained, offset = config.get("num_train_timesteps", 1000), config.get("steps_offset", 0)
    if not offset or levels + offset <= trained:
        yield
        return
    scheduler = type(pipe.scheduler).from_config({**config, "steps_offset": 0})
    patch = Patch(pipe, "scheduler", scheduler)
    try:
        patch.install()
        yield
    finally:
        patch.remove()
