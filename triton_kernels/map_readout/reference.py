"""The read-outs from the explicit matrix, in the dtype of their arguments."""

from __future__ import annotations

from torch import Tensor


def map_readout(q: Tensor, k: Tensor, tokens: Tensor, scale: float | None = None) -> Tensor:
    p = _probabilities(q, k, scale).mean(1)
    chosen = tokens.expand(q.shape[0], -1)[:, None].expand(-1, q.shape[2], -1)
    return p.gather(-1, chosen.clamp_min(0)).masked_fill(chosen < 0, 0.0)


def key_marginals(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    return _probabilities(q, k, scale).mean(1).sum(1)


def _probabilities(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    return (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)
