"""SAG: guidance away from a prediction whose salient regions were blurred.

Hong et al., "Improving Sample Quality of Diffusion Models Using Self-Attention Guidance", arXiv
2210.00939 (ICCV 2023). Where self-attention looks, the predicted image is blurred, diffused back
with the predicted noise, and predicted from once more:

    M = [sum_n A_nm > psi]      x0' = M blur(x0) + (1 - M) x0      x' = sqrt(a) x0' + sqrt(1-a) eps
    eps = eps_guided + s (eps(x) - eps(x'))

A, x0 and eps are those of the unconditional rows, without classifier-free guidance of the
conditional ones. The column sums of A are taken without A. Noise levels come from the scheduler,
so it may work in sigma space, and for v-prediction or flow matching the difference is the one of
the noises (diffusers takes that of the predictions as they are, which for v-prediction would
sharpen the image too).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.rows import COND, UNCOND, Row
from hookctl.address.sites import Grid, Selector
from hookctl.arguments import checked, number, refusal, whole
from hookctl.attention.call import AttentionCall
from hookctl.editor import WHOLE_IMAGE, Claim, Editor
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.calls import predict
from hookctl.loop.noise import Noise, level_of
from hookctl.loop.state import Predictions, State
from hookctl.maps import MapSums
from hookctl.recipes.common.added_guidance import with_added
from hookctl.recipes.common.features.smoothing import blur, cut_blur_matrix
from hookctl.recipes.common.sites import grid_of, image_sites, middle_sites
from hookctl.run_state import RunState


class SAG(Editor):
    """Self-attention guidance, after the pipeline's own.

    scale: s, 0.75 in diffusers (0.5 to 1); 0 costs nothing. threshold: psi, of the attention that a
        token receives, 1 being its fair share. sigma, kernel: of the blur, in cells of the latent
        (the kernel no longer than the latent's side).
    sites: whose attention is looked at, averaged; None: the first self-attention of a UNet's middle
        block, or of a transformer's. start, stop: a window, outside of which it costs nothing.

    Costs one further call of the denoiser in a step, for the unconditional rows. After a run,
    `masks` holds the last step's M, [images, height, width].
    """

    sites: RunState[Selector] = RunState(None)
    masks: RunState[Tensor | None] = RunState(None)
    _noise: RunState[Noise] = RunState()
    _size: RunState[torch.Size] = RunState()
    # By branch and image: how many sites have a cell in M.
    _votes: RunState[dict[str, MapSums[tuple[int, int]]]] = RunState(factory=dict)

    @checked()
    def __init__(
        self,
        scale: float = 0.75,
        *,
        threshold: float = 1.0,
        sigma: float = 1.0,
        kernel: int = 9,
        sites: Selector = None,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        self.scale = number(scale, "SAG: scale", low=0)
        self.threshold = number(threshold, "SAG: threshold", low=0)
        self.sigma = number(sigma, "SAG: sigma", low=0)
        self.kernel = whole(kernel, "SAG: kernel", 1)
        if self.kernel % 2 == 0:
            raise refusal("SAG: kernel", kernel, "an odd number of cells, such as 9")
        self.given_sites = self.sites = sites
        self.start, self.stop = start, stop

    def neutral(self) -> bool:
        return self.scale == 0

    def claims(self) -> Sequence[Claim]:
        return [Claim(WHOLE_IMAGE, window=self.window(), shared=True)] if self.scale else []

    def attach(self, target: Any) -> None:
        scheduler = getattr(target, "scheduler", None)
        if scheduler is None:
            raise InputError("SAG needs the pipeline's scheduler; control the pipeline itself")
        self._noise = Noise(scheduler)
        given = self.given_sites
        self.sites = middle_sites(self.name, target)[:1] if given is None else given
        image_sites(self.name, target, self.sites)

    def begin(self, state: State) -> None:
        if self.scale and state.latents.dim() != 4:
            raise UnsupportedError(
                f"SAG blurs images, and the latents of {type(state.pipe).__name__} are "
                f"{tuple(state.latents.shape)}; it needs [images, channels, height, width]"
            )
        self._size = state.latents.shape[-2:] if self.scale else torch.Size()
        self._votes = {}

    # -- what attention looks at ---------------------------------------------------------------

    def attention(self, call: AttentionCall) -> None:
        if not self.scale:
            return
        branch = _branch({row.branch for row in call.rows})
        votes, grid = self._votes.setdefault(branch, MapSums()), grid_of(call, self.name)
        call.marginals(call.rows.where(branch=branch), partial(self._vote, votes, grid))

    def _vote(
        self, votes: MapSums[tuple[int, int]], grid: Grid, row: Row, received: Tensor
    ) -> None:
        """received: the column sums of A, 1 on average."""
        image = received.reshape(1, 1, grid.height, grid.width)
        votes.add(
            (row.prompt, row.image), F.interpolate((image > self.threshold).float(), self._size)
        )

    # -- guidance ------------------------------------------------------------------------------

    def combine(self, predictions: Predictions) -> Tensor:
        guided, state = predictions.guided, predictions.state
        votes, self._votes = self._votes, {}
        level = level_of(state)
        if not self.scale or level.signal < 1e-6:  # pure noise: there is no image to blur
            return guided
        branch = _branch(set(predictions.branches))
        x = state.latents
        # Further channels hold a variance, which no guidance changes.
        own = partial(torch.narrow, dim=1, start=0, length=x.shape[1])
        x0, eps = self._noise.split(x, own(predictions[branch]).to(x), level)
        shares = [share for share, _ in votes[branch].means().values()]
        mask = (torch.cat(shares) > 0.5).to(x)  # most of several sites decide
        self.masks = mask[:, 0].cpu()
        degraded = level.mix(torch.lerp(x0, self._blurred(x0), mask), eps)
        rows = state.rows.where(branch=branch)
        again = predictions.handed(predict(state, rows, latents=degraded), degraded)
        away = eps - self._noise.split(degraded, own(again).to(x), level)[1]
        if self._noise.kind == "epsilon":
            return with_added(predictions, self.scale * away)
        _, guided_eps = self._noise.split(x, own(guided).to(x), level)
        new = guided_eps + self.scale * away
        joined = self._noise.join((x - level.noise * new) / level.signal, new, level)
        return with_added(predictions, joined - own(guided).to(x))

    def _blurred(self, x0: Tensor) -> Tensor:
        rows, columns = (
            cut_blur_matrix(n, self.sigma, min(self.kernel, n - (n % 2 == 0)))
            for n in x0.shape[-2:]
        )
        return blur(x0, rows, columns)


def _branch(present: set[str]) -> str:
    """Whose attention and prediction are taken."""
    return UNCOND if UNCOND in present else COND
