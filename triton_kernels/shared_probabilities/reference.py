"""Outputs of equal probabilities by explicit matrices, in the dtype of their arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hookctl.kernels.shared_probabilities.groups import Group


def shared_probabilities(
    q: Tensor, k: Tensor, v: Tensor, groups: Sequence[Group], scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = [], []
    for group in groups:
        scores = q[group.q] @ k[group.k].mT * scale
        p = scores.softmax(-1)
        out += [p @ v[row] for row in group.values]
        lse.append(scores.logsumexp(-1))
    return torch.stack(out), torch.stack(lse)
