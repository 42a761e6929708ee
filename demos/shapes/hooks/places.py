"""Where the networks that read masks begin: they find the mask of a place from the first step.

A mask is told as one token for each class, and where it is stands inside of the token. Each place
must match its own position against every token, which training alone discovers late. Here it
stands at the start, in three parts. Tokens are cosine waves of the masks. Some channels see
nothing but the padding of the convolutions, so that they tell the position without noise. And
cross-attention is fitted: with D the waves, t_c = D m_c the token of a mask, h(p) the features of a
place p,

    W_k t_c = D' m_c,   W_q h(p) ~ D'(p)   =>   q(p) k_c ~ m_c(p), smoothed

where D' are the lowest waves and W_q is a ridge regression of D'(p) on h(p).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

GAIN = 12.0  # about the logit of a token whose mask covers a place
RIDGE = 1e-2  # of the features' mean square
SCALE, EVEN = 2.0, 0.25  # of tokens, and of their first wave: how large a mask is
PLACES = 4  # one of so many channels tells places


def waves(side: int, count: int) -> Tensor:
    """The lowest waves of the cosine transform of a square map, orthonormal, [count, side^2]."""
    at = torch.arange(side) + 0.5
    rows = torch.stack([torch.cos(math.pi * k * at / side) for k in range(side)])
    rows = rows / rows.norm(dim=1, keepdim=True)
    order = sorted((a * a + b * b, a, b) for a in range(side) for b in range(side))
    return torch.stack([torch.outer(rows[a], rows[b]).flatten() for _, a, b in order[:count]])


def set_tokens(linear: nn.Linear) -> None:
    """Let a linear layer over square maps be a cosine transform."""
    with torch.no_grad():
        linear.weight.copy_(SCALE * waves(math.isqrt(linear.in_features), linear.out_features))
        linear.weight[0] *= EVEN
        linear.bias.zero_()


@torch.no_grad()
def reserve_places(unet: nn.Module, run: Callable[[], object]) -> None:
    """Let the first channels of a fresh UNet see nothing but the padding, at every depth.

    run: asks the UNet for a batch; what is the same for all of its samples is no noise.
    """
    hooks = []
    for name, module in unet.named_modules():
        if name == "conv_in" or name.endswith(("time_emb_proj", "proj_out")):
            module.weight[: _first(module)] = 0
            module.bias[: _first(module)] = float(name == "conv_in")
        elif isinstance(module, nn.GroupNorm) and ".attentions." not in name:
            hooks.append(module.register_forward_pre_hook(_shift))
        elif isinstance(module, nn.Conv2d) and name != "conv_out":
            hooks.append(module.register_forward_pre_hook(_separate))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()


def _first(layer: Any) -> int:
    return len(layer.weight) // PLACES


def _noiseless(x: Tensor) -> Tensor:
    return (x - x[:1]).abs().amax((0, 2, 3)) < 1e-3


def _shift(norm: Any, args: tuple[Tensor, ...]) -> None:
    """Let what a norm makes even differ from channel to channel."""
    alike = _noiseless(args[0])
    norm.bias[alike] = torch.randn(int(alike.sum())).to(norm.bias)


def _separate(conv: Any, args: tuple[Tensor, ...]) -> None:
    """Let the first channels read of channels without noise alone."""
    alike, first = _noiseless(args[0]), _first(conv)
    count = int(alike.sum()) * math.prod(conv.kernel_size)
    fresh = torch.randn(first, int(alike.sum()), *conv.kernel_size) / max(1, count) ** 0.5
    conv.weight[:first], conv.bias[:first] = 0, 0
    conv.weight[:first, alike] = fresh.to(conv.weight)


@torch.no_grad()
def fit_places(network: nn.Module, cells: int, run: Callable[[], object]) -> dict[str, float]:
    """Let the cross-attention of a network find the tokens that `set_tokens` makes of masks.

    cells: of a mask; run: asks the network for a batch, as in training. Returns for every site how
    much of the positions its features tell, R^2 from 0 to 1.
    """
    sites = {n: m for n, m in network.named_modules() if n.endswith(".attn2")}
    seen: dict[str, Tensor] = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, n=n: seen.__setitem__(n, args[0]))
        for n, m in sites.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _fit(attn, seen[name], math.isqrt(cells)) for name, attn in sites.items()}


def _fit(attn: Any, h: Tensor, side: int) -> float:
    """h: what the attention is asked with, [batch, places, channels]; side: of a mask, in cells."""
    grid, dim = math.isqrt(h.shape[1]), len(attn.to_q.weight) // attn.heads
    chosen = slice(1, dim + 1)  # not the even one, which is all of the background's
    # A coarser grid's place sees the mean over its cells.
    told = waves(side, dim + 1)[chosen].view(dim, grid, side // grid, grid, side // grid)
    target = told.mean((2, 4)).flatten(1).T.to(h).expand(len(h), -1, -1).flatten(0, 1)
    x = h.flatten(0, 1)
    gram = x.T @ x
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).to(x)
    solved = torch.linalg.solve(gram, x.T @ target)  # [channels, dim]
    for head in range(attn.heads):
        rows = slice(head * dim, (head + 1) * dim)
        attn.to_q.weight[rows] = solved.T * GAIN * math.sqrt(dim) / SCALE
        attn.to_k.weight[rows] = torch.eye(attn.to_k.in_features)[chosen].to(x)
    nn.init.orthogonal_(attn.to_v.weight)
    return float(1 - (target - x @ solved).square().sum() / target.square().sum())
