"""A text embedding and a low-rank change of a denoiser, fitted to one image.

Kawar et al., "Imagic", arXiv 2210.09276 (CVPR 2023), stages A and B: with L the denoising loss of
the image, e the embedding and theta the model,

    A   e_opt  = argmin_e L(e, theta)
    B   theta' = argmin_theta L(e_opt, theta)

both by Adam. theta' = theta + a low-rank change, so the model's own weights are never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from hookctl.address.rows import COND
from hookctl.errors import InputError
from hookctl.loop.energy import frozen, gradients
from hookctl.loop.noise import noise_like
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes.common.real_images.low_rank import LowRank

Progress = Callable[[str, int, int], None]
STAGES = ("text", "model")  # A and B


class Fitting:
    """Stages A and B of Imagic.

    program: of the wanted text, with as many images as there are noises at each level; clean: the
    image's latents, [1, channels, height, width]; change: of the model.
    plan: stage -> (steps, learning rate); window: the levels that are trained, in shares of the
    run; samples: levels in every step, spread evenly over the window; seed: of the noise.
    checkpoint: a safetensors file to write after every `save_every` steps and at the end, and to go
    on from if it is there.

    `wanted` is the text's own embedding and `embedding` the fitted one, [1, tokens, channels].
    """

    def __init__(
        self,
        program: Trajectory,
        clean: Tensor,
        change: LowRank,
        *,
        plan: dict[str, tuple[int, float]],
        window: tuple[float, float],
        samples: int,
        seed: int,
        checkpoint: str | Path | None,
        save_every: int,
    ) -> None:
        self.program, self.clean, self.change = program, clean, change
        self.wanted = program.template.text(COND)[:1].float()  # one for all noises
        self.embedding = self.wanted.clone()
        self.plan, self.window, self.samples, self.seed = plan, window, samples, seed
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.save_every = save_every
        self.steps_done = dict.fromkeys(STAGES, 0)

    def run(self, progress: Progress | None) -> None:
        """Both stages, from where the checkpoint stands; progress: (stage, steps done, steps).

        Raises InputError for a checkpoint of another text.
        """
        if self.checkpoint is not None and self.checkpoint.is_file():
            self._load(self.checkpoint)
        with frozen(self.program.denoiser):
            self._fit("text", [self.embedding], progress)
            with self.change.applied():
                self._fit("model", self.change.tensors, progress)
        if self.checkpoint is not None:
            self._save(self.checkpoint)

    @torch.enable_grad()
    def _fit(self, stage: str, leaves: list[Tensor], progress: Progress | None) -> None:
        steps, rate = self.plan[stage]
        for leaf in leaves:
            leaf.requires_grad_(True)
        adam = torch.optim.Adam(leaves, lr=rate)
        try:
            for step in range(self.steps_done[stage], steps):
                # A generator for each step, so that a resumed run sees the same noise.
                generator = torch.Generator().manual_seed(self.seed + 2 * step + (stage == "model"))
                adam.zero_grad()
                for loss in self._losses(generator):
                    found = gradients(loss, leaves, self.program.latents.dtype)
                    for leaf, gradient in zip(leaves, found, strict=True):
                        leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
                adam.step()
                self.steps_done[stage] = step + 1
                if self.checkpoint is not None and (step + 1) % self.save_every == 0:
                    self._save(self.checkpoint)
                if progress is not None:
                    progress(stage, step + 1, steps)
        finally:
            for leaf in leaves:
                leaf.requires_grad_(False)
                leaf.grad = None

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
            prediction = program.predict(level.mix(clean, eps), i, 1.0, {COND: self.embedding})
            target = program.noise.join(clean, eps, level)
            yield (prediction - target).float().square().mean() / self.samples

    # -- checkpoints ---------------------------------------------------------------------------

    def _save(self, path: Path) -> None:
        from safetensors.torch import save_file

        done = torch.tensor([self.steps_done[stage] for stage in STAGES])
        tensors = {"text": self.embedding.detach().cpu().contiguous(), "done": done}
        save_file(tensors | self.change.state(), path, {"prompt": self.program.prompts[0]})

    def _load(self, path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            fitted_to = (file.metadata() or {}).get("prompt")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if fitted_to != self.program.prompts[0]:
            raise InputError(
                f"{path} was fitted to {fitted_to!r}, not to {self.program.prompts[0]!r}; give "
                "another checkpoint="
            )
        self.embedding.copy_(tensors["text"])
        self.steps_done = dict(zip(STAGES, map(int, tensors["done"]), strict=True))
        self.change.load(tensors)
