"""The mixtures of latents in plain torch; `hookctl.kernels.latent_mixing` says what they are."""

from __future__ import annotations

import torch
from torch import Tensor


def local_blend(x: Tensor, sources: Tensor, mask: Tensor) -> Tensor:
    source, share = x.index_select(0, sources), mask[:, None]
    if mask.dtype == torch.bool:
        return torch.where(share, x, source)
    wide = torch.promote_types(x.dtype, mask.dtype)  # a lerp of halves is rounded once, at its end
    return torch.lerp(source.to(wide), x.to(wide), share.to(wide)).to(x.dtype)


def merge_instances(x: Tensor, masks: Tensor | None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    if masks is None:
        return x.mean(0, dtype=wide).to(x.dtype)
    out = x[0].to(wide)
    for one, mask in zip(x[1:], masks, strict=True):
        out = torch.lerp(out, one.to(wide), mask.to(wide))
    return out.to(x.dtype)


def mix_predictions(a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    share = d.to(wide).sigmoid()[:, None]
    return torch.lerp(b.to(wide), a.to(wide), share).to(a.dtype)


def update_difference(
    d: Tensor, grad: Tensor, a: Tensor, b: Tensor, rate: float, largest: bool = False
) -> Tensor:
    wide = torch.promote_types(d.dtype, torch.float32)
    share = d.to(wide).sigmoid()
    along = (grad.to(wide) * (a.to(wide) - b.to(wide))).sum(1)
    change = rate * (2 * share * (1 - share) * along)
    if largest:
        top = change.abs().flatten(1).amax(1).reshape(-1, *[1] * (change.dim() - 1))
        change = abs(rate) * change / top.masked_fill(top == 0, 1)
    return (d.to(wide) - change).to(d.dtype)
