"""Reference-only: images in the manner of a given one, without training and without inversion.

Zhang, "Reference-only Control" (Mikubill/sd-webui-controlnet, discussion 1236, 2023), as the
community pipelines of diffusers have it. At every step the reference is noised to the run's level,

    x_r = signal * x0_r + noise * xi          xi drawn anew at each step

and runs beside the others; in self-attention they look at its tokens too: Attn(q, [k; k_r],
[v; v_r]). Unconditional rows mix that with their own attention, by the fidelity f:
f Attn(q, k, v) + (1 - f) Attn(q, [k; k_r], [v; v_r]).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.address.rows import UNCOND
from hookctl.address.sites import Selector
from hookctl.arguments import checked, opened, share
from hookctl.editor import WHOLE_IMAGE, Claim
from hookctl.errors import InputError
from hookctl.loop.images import encode
from hookctl.loop.noise import level_of, noise_like
from hookctl.loop.state import State
from hookctl.recipes.style_aligned import StyleAligned
from hookctl.run_state import RunState


class ReferenceOnly(StyleAligned):
    """Draw prompts in the manner of an image.

        edit = ReferenceOnly(["a striped red star", "a striped red circle"], image)
        again, drawn = edit.run(pipe, seed=0)

    prompts: the first describes the image, the others are drawn.
    image: the reference, PIL in mode RGB or the path of a file, of the size that is drawn.
    fidelity: f, from 0 to 1: how little the unconditional rows see of the reference; the more, the
        stronger guidance pulls towards it.
    seed: of the noise on the reference, the same in all calls of a step and for all its images.
    sites: self-attention to act in (the community form drops sites as its weight falls).

    The first image that comes out is the reference, drawn from its last noised form. Raises
    InputError for an image that can't be opened, or is of another size than what is drawn.
    """

    _clean: RunState[Tensor] = RunState()
    _generator: RunState[torch.Generator] = RunState()
    _noise: RunState[tuple[int, Tensor] | None] = RunState(None)  # of which step

    @checked(own=("prompts",))
    def __init__(
        self,
        prompts: Sequence[str],
        image: Any,
        *,
        fidelity: float = 0.5,
        seed: int = 0,
        sites: Selector = "self, joint",
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        super().__init__(prompts, adain=False, sites=sites, start=start, stop=stop)
        self.image, self.seed = opened(image, "ReferenceOnly: image"), seed
        self.shares = {UNCOND: 1.0 - share(fidelity, "ReferenceOnly: fidelity")}

    def claims(self) -> Sequence[Claim]:
        # The reference's tokens are laid out as those of the images that are drawn.
        return [*super().claims(), Claim(WHOLE_IMAGE, window=self.window(), shared=True)]

    def attach(self, target: Any) -> None:
        super().attach(target)
        self._clean = encode(target, self.image)

    def begin(self, state: State) -> None:
        super().begin(state)
        size, wanted = tuple(self._clean.shape[1:]), tuple(state.latents.shape[1:])
        if size != wanted:
            raise InputError(
                f"ReferenceOnly: the image's latents are {size}, and this run draws {wanted}; "
                "resize the image"
            )
        self._generator, self._noise = torch.Generator().manual_seed(self.seed), None

    def before(self, state: State) -> None:
        if self.acts.start >= self.acts.stop:
            return
        latents, step = state.latents.clone(), state.clock.step
        clean = self._clean[0].to(latents)
        if self._noise is None or self._noise[0] != step:
            # Once a step: guidance by two calls would amplify what two noises differ by.
            self._noise = step, noise_like(clean, self._generator)
        reference = level_of(state).mix(clean, self._noise[1])
        for row in state.images.where(prompt=0):
            latents[row.index] = reference
        state.latents = latents
