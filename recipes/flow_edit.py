"""FlowEdit: a real image edited by its prompt on a flow-matching model, without an inversion.

Kulikov et al., "FlowEdit: Inversion-Free Text-Based Editing Using Pre-Trained Flow Models",
arXiv 2412.08629 (ICCV 2025). With x the image's latents and z = x at first, at the levels s_i of
the schedule (1 is noise) from the `n_max`-th before the end on,

    x~ = (1 - s_i) x + s_i xi              fresh noise xi, `n_avg` times
    z~ = z + x~ - x
    V  = mean of v(z~, s_i; target) - v(x~, s_i; source)
    z' = z + (s_(i+1) - s_i) V

so that noise which both share cancels, and only what the two texts want differently moves z. The
last `n_min` steps are plain ones from x~ and z~, as in SDEdit: more freedom, less kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.address.regions import RegionLike
from hookctl.arguments import checked, is_list, is_text, refusal, whole
from hookctl.editor import Editor
from hookctl.loop.noise import noise_like
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes.common.real_images import flow
from hookctl.session import control

# Of the official code: steps, n_max, scales of source and target.
TAUGHT = (28, 24, (1.5, 5.5))  # FLUX.1 dev
GUIDED = (50, 33, (3.5, 13.5))  # Stable Diffusion 3


class FlowEdit(flow.FlowProgram):
    """Edit a real image by the difference of two prompts.

        again, edited = FlowEdit(pipe, image, ["a photo of a cat", "a photo of a dog"]).run()

    image: PIL, mode RGB, or for pipelines of videos a list of frames; prompts: the image's, then
        those of its edits, which share the noise; negative: of the unconditional rows.
    steps: of the schedule; n_max: how many of them, counted from the clean end, are taken (all:
        the edit owes little to the image); n_min: how many of these are plain; n_avg: noises in
        each of the others.
    guidance: scales of source and target (a number is the target's): of classifier-free guidance,
        or those that a model was taught. All by default as published: 28 steps, n_max 24, (1.5,
        5.5) for a model that was taught a scale (FLUX.1 dev), 50, 33, (3.5, 13.5) for others; (1,
        1) for distilled ones.
    mask: where the image may change, a region or a mask of the image's shape; elsewhere the latents
        stay the image's bit for bit. seed: of the noise. arguments: further ones of the pipeline's
        call. paper: round as the official code does, to the model's precision after every step.

    Raises InputError for arguments out of bounds, UnsupportedError for other models than those of
    flow matching, and in `run` for schedulers that are not of first order.
    """

    @checked(own=("prompts", "arguments"))
    def __init__(
        self,
        pipe: Any,
        image: Any,
        prompts: Sequence[str],
        *,
        steps: int | None = None,
        n_max: int | None = None,
        n_min: int = 0,
        n_avg: int = 1,
        guidance: float | tuple[float, float] | None = None,
        negative: str | None = None,
        mask: RegionLike | None = None,
        seed: int = 0,
        arguments: Mapping[str, Any] | None = None,
        paper: bool = False,
    ) -> None:
        texts = list(prompts) if is_list(prompts) else []
        if len(texts) < 2 or not all(map(is_text, texts)):
            wanted = "the image's prompt and at least one edit, as a list of texts"
            raise refusal("FlowEdit: prompts", prompts, wanted)
        flow.require_flow(pipe, "FlowEdit")
        published = TAUGHT if flow.is_taught_scale(pipe) else GUIDED
        steps = published[0] if steps is None else steps
        most = max(1, round(published[1] / published[0] * steps)) if n_max is None else n_max
        self.n_max = whole(most, "FlowEdit: n_max", 0, steps)
        self.n_min = whole(n_min, "FlowEdit: n_min", 0, self.n_max)
        self.n_avg = whole(n_avg, "FlowEdit: n_avg", 1)
        super().__init__(pipe, image, texts[0], steps=steps, negative=negative, arguments=arguments)
        of_source, target = published[2]
        if isinstance(guidance, int | float):
            guidance = min(of_source, guidance), float(guidance)
        source, target = guidance or (of_source, target)
        self.prompts, self.scales = texts, [source, *[target] * (len(texts) - 1)]
        self.mask = None
        if mask is not None:
            self.mask = flow.region_of_image(mask, self.size, "FlowEdit: mask")
        self.seed, self.paper = seed, paper

    @checked()
    def run(self, *editors: Editor, output_type: str = "pil") -> Any:
        """The image as its autoencoder has it, then its edits: a list, or as output_type= has it.

        editors: that act inside the denoiser, on the rows of the source (prompt 0) and its edits.
        """
        flow.check_editors(editors, self)
        with control(self.pipe, *editors) as self.session:
            program = self._program(self.prompts, self.scales)
            program.start = min(self.steps - self.n_max, self.steps - 1)
            program.write(self._edited(program), level=self.steps)
            return program.decode(output_type)

    @torch.no_grad()
    def _edited(self, program: Trajectory) -> Tensor:
        """The latents of the image and of its edits, [prompts, ...]."""
        x, generator = self.clean.to(program.latents), torch.Generator().manual_seed(self.seed)
        z = (x if self.paper else flow.wide(x)).repeat(len(self.prompts), *[1] * (x.dim() - 1))
        inside = None if self.mask is None else flow.share_of_latents(self.mask, program).to(z)
        levels, last = [level.noise for level in program.levels], self.steps - self.n_min
        if self.paper and x.dim() == 4:  # SD3's, there
            levels = [*(t / 1000 for t in program.noise.timesteps), 0.0]
        for i in range(self.steps - self.n_max, self.steps):
            if i <= last:
                xi = [noise_like(x, generator) for _ in range(self.n_avg if i < last else 1)]
            if i == last:
                z = self._noisy(x, z, levels[i], xi[0])
            if i < last:
                vs = [self._ask(program, self._noisy(x, z, levels[i], one), i) for one in xi]
                v = sum(one - one[:1] for one in vs) / len(vs)
            else:
                v = self._ask(program, z, i)
            z = (flow.wide(z) + (levels[i + 1] - levels[i]) * v).to(z.dtype)
            if inside is not None:
                own = x if i < last else (1 - levels[i + 1]) * x + levels[i + 1] * xi[0]
                z = own + inside * (z - own)
        return torch.cat([x.to(z), z[1:]])

    def _noisy(self, x: Tensor, z: Tensor, level: float, xi: Tensor) -> Tensor:
        """x~ and z~ of each edit, [prompts, ...]."""
        noisy = (1 - level) * x + level * xi
        # The other order would round what is to cancel.
        moved = z[1:] + noisy - x if self.paper else noisy + (z[1:] - x)
        return torch.cat([noisy.to(z), moved])

    def _ask(self, program: Trajectory, z: Tensor, i: int) -> Tensor:
        """The velocities, [prompts, ...]."""
        v = program.predict(z.to(program.latents), i, **self._scales(self.scales))
        return v if self.paper else flow.wide(v)
