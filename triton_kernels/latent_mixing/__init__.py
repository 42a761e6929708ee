"""What methods do to latents between two denoiser calls, each in one launch.

    local_blend        x <- x_source + M (x - x_source)         (Hertz et al., arXiv 2208.01626)
    merge_instances    mean of the latents of all instances, or each pasted into its place
                       (Wang et al., arXiv 2402.03290, multi-instance sampler)
    mix_predictions    sigma(d) eps_a + (1 - sigma(d)) eps_b    (Zhang et al., arXiv 2402.12908)
    update_difference  d - rate 2 sigma'(d) <G, a - b>, the gradient step of the same method, or one
                       whose largest change is the rate

RealCompo's two influence maps go through a softmax and get opposite gradients, so one map d, their
difference, is enough. Latents are [rows, channels, *places]; a mask or d has one value a place.
A kernel serves GPUs, plain torch everything else and what is to be differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hookctl.kernels.common import proof
from hookctl.kernels.common.guard import fused
from hookctl.kernels.latent_mixing import forward, reference

__all__ = ["local_blend", "merge_instances", "mix_predictions", "update_difference"]


def local_blend(x: Tensor, sources: Tensor, mask: Tensor) -> Tensor:
    """Each row of x inside its mask, and the row that it comes from outside.

    x: [rows, channels, *places]; sources: int64 [rows], on its device; mask: [rows | 1, *places],
    bool, or shares from 0 to 1.
    """
    return _served("local_blend", (x, sources, mask))


def merge_instances(x: Tensor, masks: Tensor | None = None) -> Tensor:
    """One latent from that of the whole image and those of its instances.

    x: [1 + instances, channels, *places], the whole image first; masks: [instances, *places], 0
    to 1: each instance is pasted into its own, in order; None: the mean of all.
    """
    return _served("merge_instances", (x, masks))


def mix_predictions(a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """sigma(d) a + (1 - sigma(d)) b, the softmax of two maps whose difference is d.

    a, b: [rows, channels, *places]; d: [rows | 1, *places].
    """
    return _served("mix_predictions", (a, b, d))


def update_difference(
    d: Tensor, grad: Tensor, a: Tensor, b: Tensor, rate: float, *, largest: bool = False
) -> Tensor:
    """d after one gradient step of both maps whose difference it is.

    d: [rows, *places]; grad: of the loss with respect to the trial latent sigma(d) a + (1 - sigma)
    b, [rows, channels, *places] like a and b; rate: length of the step, or with `largest` the size
    of the largest change of each row.
    """
    return _served("update_difference", (d, grad, a, b), rate, largest)


def _served(name: str, given: Sequence[Tensor | None], *more: Any) -> Tensor:
    """By the kernel of a name, or by its reference."""
    tensors = [x for x in given if x is not None]
    learned = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    exact, kernel = (partial(getattr(by, name), *given, *more) for by in (reference, forward))
    if learned or not fused(*tensors):
        return exact()
    form = f"{name}, {', '.join('none' if x is None else str(x.dtype) for x in given)}"
    found: Tensor = proof.served(form, tensors[0], kernel, exact, lambda out: out)
    return found
