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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.families import denoiser_of, describe_sites
from hookctl.address.rows import COND, UNCOND, Row
from hookctl.address.sites import Selector
from hookctl.attention.call import AttentionCall
from hookctl.editor import WHOLE_IMAGE, Claim, Editor
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.calls import predict
from hookctl.loop.noise import Noise
from hookctl.loop.state import Predictions, State
from hookctl.recipes.common.perturbed_guidance import middle, number
from hookctl.recipes.common.smoothing import blur, cut_blur_matrix


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
        self.scale = number(scale, "SAG: scale")
        self.threshold, self.sigma = (
            number(threshold, "SAG: threshold"),
            number(sigma, "SAG: sigma"),
        )
        if not isinstance(kernel, int) or kernel < 1 or kernel % 2 == 0:
            raise InputError(f"SAG: kernel={kernel!r}; give an odd number of cells, such as 9")
        self.kernel, self._sites = kernel, sites
        self.sites, self.start, self.stop = sites, start, stop
        self.masks: Tensor | None = None

    def claims(self) -> Sequence[Claim]:
        return [Claim(WHOLE_IMAGE, window=self.window(), shared=True)] if self.scale else []

    def attach(self, target: Any) -> None:
        scheduler = getattr(target, "scheduler", None)
        if scheduler is None:
            raise InputError("SAG: needs the pipeline's scheduler; control the pipeline itself")
        self._noise = Noise(scheduler)
        every = [site for site, _ in describe_sites(denoiser_of(target))]
        self.sites = middle(every, self.name)[:1] if self._sites is None else self._sites

    def begin(self, state: State) -> None:
        if self.scale and state.latents.dim() != 4:
            raise UnsupportedError(
                f"SAG blurs images, and the latents of {type(state.pipe).__name__} are "
                f"{tuple(state.latents.shape)}; it needs [images, channels, height, width]"
            )
        self._received: dict[str, dict[int, list[Tensor]]] = {}

    # -- what attention looks at ---------------------------------------------------------------

    def attention(self, call: AttentionCall) -> None:
        if not self.scale:
            return
        branch, grid = _branch({row.branch for row in call.rows}), call.grid
        rows = call.rows.where(branch=branch)
        if grid is None:
            raise UnsupportedError(
                f"SAG: the tokens of {call.site.path} form no grid over the latent; give sites="
            )

        def keep(row: Row, sums: Tensor) -> None:
            received = self._received.setdefault(branch, {})
            image = sums.reshape(1, 1, grid.height, grid.width)
            received.setdefault(row.index - rows[0].index, []).append(image)

        call.marginals(rows, keep)

    def _mask(self, branch: str, size: torch.Size) -> Tensor:
        """M for each image, [images, 1, height, width]; most of several sites decide."""
        masks = []
        for _, received in sorted(self._received[branch].items()):
            votes = [F.interpolate((sums > self.threshold).float(), size) for sums in received]
            masks.append((torch.stack(votes).mean(0) > 0.5).float())
        return torch.cat(masks)

    # -- guidance ------------------------------------------------------------------------------

    def combine(self, predictions: Predictions) -> Tensor:
        guided, state = predictions.guided, predictions.state
        level = self._noise.level(state.clock.timestep)
        if not self.scale or level.signal < 1e-6:  # pure noise: there is no image to blur
            return guided
        branch = _branch(set(predictions.branches))
        x = state.latents
        x0, eps = self._noise.split(x, predictions[branch].to(x), level)
        mask = self._mask(branch, x.shape[-2:]).to(x)
        self._received, self.masks = {}, mask[:, 0].cpu()
        degraded = level.mix(torch.lerp(x0, self._blurred(x0), mask), eps)
        rows = state.rows.where(branch=branch)
        again = predict(state, rows, latents=degraded)[:, : guided.shape[1]].to(x)
        away = eps - self._noise.split(degraded, again, level)[1]
        if self._noise.kind == "epsilon":
            return guided + self.scale * away.to(guided)
        _, guided_eps = self._noise.split(x, guided.to(x), level)
        new = guided_eps + self.scale * away
        return self._noise.join((x - level.noise * new) / level.signal, new, level).to(guided)

    def _blurred(self, x0: Tensor) -> Tensor:
        rows, columns = (
            cut_blur_matrix(n, self.sigma, min(self.kernel, n - (n % 2 == 0)))
            for n in x0.shape[-2:]
        )
        return blur(x0, rows, columns)


def _branch(present: set[str]) -> str:
    """Whose attention and prediction are taken."""
    return UNCOND if UNCOND in present else COND
