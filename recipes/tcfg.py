"""TCFG: guidance without what the unconditional prediction has across the common direction.

Kwon et al., "TCFG: Tangential Damping Classifier-free Guidance", arXiv 2503.18137 (CVPR 2025). Of
the two predictions of an image as rows of a matrix [c; u], v is the first right singular vector,
and u is replaced by its part along it:

    u' = <u, v> v        u' + g (c - u')

Two vectors need no singular value decomposition. With w the first eigenvector of the Gram matrix
[[cc, cu], [cu, uu]], v = (w_c c + w_u u) / s and <u, v> = s w_u, so that

    u' = w_u (w_c c + w_u u) = (cu / h) c + (1 - (cc - uu) / h) u / 2,   h^2 = (cc - uu)^2 + 4 cu^2
"""

from __future__ import annotations

import torch
from torch import Tensor

from hookctl.recipes.common.guidance_rule import GuidanceRule, Guided, inner


class TCFG(GuidanceRule):
    """Tangential damping of the unconditional prediction, in the place of the pipeline's guidance.

    strength: 1 as published, 0 for the pipeline's own guidance; start, stop: a window, outside of
    which the pipeline's own guidance is left. Costs nothing.

    Where c and u are one direction it changes nothing; where they are as large as each other and
    orthogonal no direction is the first, and u stays. What Qwen-Image and
    Z-Image make of their sum (norms, a cap) they make of the rule's; Z-Image's scale s is read as
    g = s + 1. Raises UnsupportedError for a run without guidance, and for pipelines that guide in
    another way.
    """

    def term(self, step: Guided) -> Tensor:
        cc, cu, uu = inner(step.c, step.c), inner(step.c, step.u), inner(step.u, step.u)
        h = torch.hypot(cc - uu, 2 * cu)
        known = h > torch.finfo(h.dtype).eps * (cc + uu)
        h = torch.where(known, h, torch.ones_like(h))
        damped = cu / h * step.c + (1 - (cc - uu) / h) / 2 * step.u
        return torch.where(known, (1 - step.g) * (damped - step.u), torch.zeros_like(step.u))
