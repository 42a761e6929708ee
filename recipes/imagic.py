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

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hookctl.address.rows import COND, UNCOND
from hookctl.errors import InputError
from hookctl.loop.energy import frozen, gradients
from hookctl.loop.images import encode
from hookctl.loop.inversion import ddim_path, require_first_order
from hookctl.loop.noise import noise_like
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes.common.low_rank import LowRank

Progress = Callable[[str, int, int], None]
LAYERS = "."  # all that are linear or convolutional: the paper tunes all weights


class Imagic:
    """An image and a text, fitted to each other.

        edit = Imagic(pipe, image, "a red circle above a green square").fit()
        images = edit.draw(alphas=(0.0, 0.6, 0.9), seed=0)

    or all of it by `run()`.

    prompt: of the wanted image. alphas, guidance, steps, inverted: of `draw` unless told
        otherwise there.
    text_steps, text_rate: of stage A; model_steps, model_rate: of stage B, both by Adam; rank,
        layers: of the low-rank change, layers as a pattern of paths. The published numbers for
        Stable Diffusion are 1000 steps at 2e-3 and 1500 at 5e-7 over all weights.
    schedule_steps: levels that the image is noised to, spread over the schedule, by default
        those of the steps; window: those of them that are trained, in shares of the run (0 is
        noise, where the layout is decided); samples: levels in every training step, spread evenly
        over the window; noises: of each of these levels, in one batch.
    seed: of the training noise, of the change's start and of the images' noise.
    checkpoint: a safetensors file to write after every `save_every` steps and at the end, and to go
        on from if it is there (the optimiser's moments start anew).
    """

    def __init__(
        self,
        pipe: Any,
        image: Any,
        prompt: str,
        *,
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
        if not isinstance(prompt, str):
            raise InputError(f"Imagic: prompt={prompt!r}; give the text of the edited image")
        if min(text_steps, model_steps) < 0 or min(text_rate, model_rate) <= 0 or save_every < 1:
            raise InputError("Imagic: give steps from 0 on, rates above 0 and save_every from 1 on")
        if not 0 <= window[0] < window[1] <= 1 or min(samples, noises) < 1:
            raise InputError(
                f"Imagic: window={window!r}, samples={samples!r}, noises={noises!r}; give a start "
                "and a later end between 0 and 1, and samples and noises from 1 on"
            )
        self.pipe, self.prompt, self.seed = pipe, prompt, seed
        self.window, self.samples = window, samples
        self.alphas, self.guidance, self.steps = tuple(alphas), float(guidance), int(steps)
        self.inverted = inverted
        clean = encode(pipe, image)
        height, width = image.size[::-1]
        self.size = {"height": height, "width": width}
        many = clean.repeat(noises, 1, 1, 1)
        self.program = Trajectory(
            pipe, prompt, steps=schedule_steps or steps, images=noises, latents=many, **self.size
        )
        self.clean = clean.to(self.program.latents)
        self.wanted = self.program.template.text(COND)[:1].float()  # one for all noises
        self.fitted = self.wanted.clone()
        generator = torch.Generator().manual_seed(seed)
        self.change = LowRank(self.program.denoiser, layers, rank, generator)
        self.plan = {"text": (text_steps, text_rate), "model": (model_steps, model_rate)}
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.save_every = save_every
        self.done = {"text": 0, "model": 0}

    def run(self, progress: Progress | None = None) -> Any:
        """All three stages: an image for each alpha."""
        return self.fit(progress).draw()

    def fit(self, progress: Progress | None = None) -> Imagic:
        """Stages A and B; returns itself. progress: called with (stage, steps done, steps)."""
        if self.checkpoint is not None and self.checkpoint.is_file():
            self._load(self.checkpoint)
        with frozen(self.program.denoiser):
            self._stage("text", [self.fitted], progress)
            with self.change.applied():
                self._stage("model", self.change.tensors, progress)
        if self.checkpoint is not None:
            self._save(self.checkpoint)
        return self

    def text(self, alpha: float) -> Tensor:
        """alpha e_tgt + (1 - alpha) e_opt, [1, tokens, channels]."""
        return alpha * self.wanted + (1 - alpha) * self.fitted

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

        changed: with the fitted model, or with the model as it is. inverted: from the image's
        inverted noise instead of that of the seed (see above); refine: of that inversion
        (`DDIMInversion`).
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
                program.write(self._inverted(steps, refine))
                if UNCOND in program.template.branches:
                    contexts[UNCOND] = self.fitted
            program.run(contexts=contexts)
        return program.decode(output_type)

    def _inverted(self, steps: int, refine: int) -> Tensor:
        """The noise that leads to the image under the fitted text, as the model is now."""
        program = Trajectory(self.pipe, self.prompt, steps=steps, latents=self.clean, **self.size)
        require_first_order(program, "Imagic.draw(inverted=True)")
        return ddim_path(program, self.clean, contexts={COND: self.fitted}, refine=refine)[0]

    # -- fitting -------------------------------------------------------------------------------

    def _losses(self, generator: torch.Generator) -> Iterator[Tensor]:
        """|| prediction - what it should be ||^2 at random levels, by the model's own target.

        One level at a time, so that only one graph is held; their sum is the loss of a step.
        """
        program, (begin, end) = self.program, self.window
        clean = self.clean.expand_as(program.latents)
        for k in range(self.samples):
            share = (k + float(torch.rand((), generator=generator))) / self.samples
            i = min(int((begin + share * (end - begin)) * program.steps), program.steps - 1)
            level, eps = program.levels[i], noise_like(clean, generator)
            prediction = program.predict(level.mix(clean, eps), i, 1.0, {COND: self.fitted})
            wanted = program.noise.join(clean, eps, level)
            yield (prediction - wanted).float().square().mean() / self.samples

    @torch.enable_grad()
    def _stage(self, stage: str, leaves: list[Tensor], progress: Progress | None) -> None:
        steps, rate = self.plan[stage]
        for leaf in leaves:
            leaf.requires_grad_(True)
        adam = torch.optim.Adam(leaves, lr=rate)
        try:
            for step in range(self.done[stage], steps):
                # A generator for each step, so that a resumed run sees the same noise.
                generator = torch.Generator().manual_seed(self.seed + 2 * step + (stage == "model"))
                adam.zero_grad()
                for loss in self._losses(generator):
                    found = gradients(loss, leaves, self.program.latents.dtype)
                    for leaf, one in zip(leaves, found, strict=True):
                        leaf.grad = one if leaf.grad is None else leaf.grad + one
                adam.step()
                self.done[stage] = step + 1
                if self.checkpoint is not None and (step + 1) % self.save_every == 0:
                    self._save(self.checkpoint)
                if progress is not None:
                    progress(stage, step + 1, steps)
        finally:
            for leaf in leaves:
                leaf.requires_grad_(False)
                leaf.grad = None

    def _save(self, path: Path) -> None:
        from safetensors.torch import save_file

        done = torch.tensor([self.done["text"], self.done["model"]])
        tensors = {"text": self.fitted.detach().cpu().contiguous(), "done": done}
        save_file(tensors | self.change.state(), path, {"prompt": self.prompt})

    def _load(self, path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            said = (file.metadata() or {}).get("prompt")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if said != self.prompt:
            raise InputError(f"{path} was fitted to {said!r}, not to {self.prompt!r}")
        self.fitted.copy_(tensors["text"])
        self.done = dict(zip(("text", "model"), map(int, tensors["done"]), strict=True))
        self.change.load(tensors)
