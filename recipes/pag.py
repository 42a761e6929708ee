"""PAG: guidance away from a prediction whose self-attention is the identity.

Ahn et al., "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance", arXiv
2403.17377 (ECCV 2024). In the perturbed rows, at the chosen sites, the self-attention map becomes
the identity, so that its output is v:

    eps = eps_u + g (eps_c - eps_u) + s (eps_c - eps_p)          eps_c + s (eps_c - eps_p) without g

On a joint site the image's tokens see themselves and the text.
"""

from __future__ import annotations

from typing import Any

from hookctl.address.clock import Clock
from hookctl.arguments import checked, number
from hookctl.attention.call import AttentionCall
from hookctl.recipes.common.perturbed_guidance import PerturbedGuidance
from hookctl.recipes.common.sites import IMAGE_KINDS

TRAINED = 1000  # timesteps that the published rule counts from


class PAG(PerturbedGuidance):
    """Perturbed-attention guidance, after the pipeline's own.

    scale: strength s; the paper takes 3 beside a guidance of 4, and 5 without any. 0 costs nothing.
    adaptive: a of s_t = max(0, s - a (1000 - t)): the guidance fades as the image gets clean
        (diffusers' `pag_adaptive_scale`); no rows are added once it is 0.
    branch: name of the perturbed branch.
    sites: the paper's is the middle block; start, stop: a window, outside of which it is free.

    Costs one further row beside each conditional one.
    """

    kinds = (*IMAGE_KINDS, "temporal")

    @checked()
    def __init__(
        self,
        scale: float = 3.0,
        *,
        adaptive: float = 0.0,
        branch: str = "perturbed",
        **options: Any,
    ) -> None:
        super().__init__(scale, branch=branch, **options)
        self.adaptive = number(adaptive, "PAG: adaptive", low=0)

    def neutral(self) -> bool | None:
        return None if self.adaptive else super().neutral()

    def scale_at(self, clock: Clock) -> float:
        return max(0.0, self.scale - self.adaptive * (TRAINED - clock.timestep))

    def attention(self, call: AttentionCall) -> None:
        call.isolate(call.rows.where(branch=self.branch))
