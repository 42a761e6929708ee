"""GLIGEN's and InstanceDiffusion's networks, written out from their formulas over a state dict.

`w` holds the weights by their official names. Loops stand where the formulas have indices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Weights = Mapping[str, Tensor]


def randomise(module: nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Random weights of ordinary sizes, gates, nulls and embeddings included."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        size = 1.0 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = (noise * size).to(dtype)
    return module.eval().requires_grad_(False)


def of(w: Weights, prefix: str) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in w.items() if k.startswith(prefix)}


def layer_norm(x: Tensor, w: Weights, name: str, eps: float = 1e-5) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def mlp(x: Tensor, w: Weights, name: str) -> Tensor:
    x = silu(linear(x, w, f"{name}.0"))
    x = silu(linear(x, w, f"{name}.2"))
    return linear(x, w, f"{name}.4")


def fourier(numbers: Tensor, k: int) -> Tensor:
    """One vector of coordinates [m] -> [2 k m]: per frequency, the sines and then the cosines."""
    out = []
    for i in range(k):
        f = 100 ** (i / k)
        out += [math.sin(f * float(c)) for c in numbers]
        out += [math.cos(f * float(c)) for c in numbers]
    return torch.tensor(out, dtype=numbers.dtype)


def box_text(w: Weights, box: Tensor, phrase: Tensor, m: int, k: int) -> Tensor:
    """One token."""
    e = phrase if m else w["null_positive_feature"]
    b = fourier(box, k) if m else w["null_position_feature"]
    return mlp(torch.cat([e, b]), w, "linears")


def keypoint(w: Weights, person: int, joint: int, point: Tensor, m: int, k: int) -> Tensor:
    e = w["person_embeddings"][person] + w["keypoint_embeddings"][joint]
    e = e if m else w["null_person_feature"]
    p = fourier(point, k) if m else w["null_xy_feature"]
    return mlp(torch.cat([e, p]), w, "linears")


def convnext(x: Tensor, w: Weights) -> Tensor:
    """[rows, 3, H, W] -> [rows, channels, H / 32, W / 32] (or less, with fewer stages)."""

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x.permute(0, 2, 3, 1), w, name, 1e-6).permute(0, 3, 1, 2)

    stage = 0
    while f"downsample_layers.{stage}.0.weight" in w:
        down = f"downsample_layers.{stage}"
        if stage == 0:
            x = F.conv2d(x, w[f"{down}.0.weight"], w[f"{down}.0.bias"], stride=4)
            x = norm(x, f"{down}.1")
        else:
            x = norm(x, f"{down}.0")
            x = F.conv2d(x, w[f"{down}.1.weight"], w[f"{down}.1.bias"], stride=2)
        block = 0
        while f"stages.{stage}.{block}.gamma" in w:
            b = f"stages.{stage}.{block}"
            y = F.conv2d(
                x, w[f"{b}.dwconv.weight"], w[f"{b}.dwconv.bias"], padding=3, groups=x.shape[1]
            )
            y = layer_norm(y.permute(0, 2, 3, 1), w, f"{b}.norm", 1e-6)
            y = linear(gelu(linear(y, w, f"{b}.pwconv1")), w, f"{b}.pwconv2")
            x = x + (y * w[f"{b}.gamma"]).permute(0, 3, 1, 2)
            block += 1
        stage += 1
    return x


def nearest(x: Tensor, side: int) -> Tensor:
    height, width = x.shape[-2:]
    rows = [i * height // side for i in range(side)]
    columns = [i * width // side for i in range(side)]
    return x[..., rows, :][..., columns]


def spatial(w: Weights, maps: Tensor, m: int, side: int) -> Tensor:
    """Tokens [tokens, width] of one map [channels, height, width]."""
    x = nearest(maps, side)[None]
    if "in_conv.weight" in w:
        x = F.conv2d(x, w["in_conv.weight"], w["in_conv.bias"], padding=1)
    f = convnext(x, of(w, "convnext_tiny_backbone."))[0]
    channels, rows, columns = f.shape
    tokens = []
    for r in range(rows):
        for c in range(columns):
            e = f[:, r, c] if m else w["null_feature"]
            tokens.append(e + w["pos_embedding"][0, r * columns + c])
    return mlp(torch.stack(tokens), w, "linears")


def unifusion(
    w: Weights, slots: list[dict[str, Tensor | None]], shown: set[str], rasters: Tensor, k: int
) -> Tensor:
    """Tokens of one row. slots: of each {"phrase", "box", "point", "scribble", "mask"}, or {} for
    an empty one; scribble and mask None for an instance without."""
    names = {"box": "position", "point": "point", "scribble": "scribble", "mask": "polygon"}
    groups = []
    for i, (name, null) in enumerate(names.items()):
        for slot in slots:
            e = slot["phrase"] if slot else w["null_positive_feature"]
            if slot and name in shown:
                numbers = slot[name]
                if numbers is None:  # of an instance without: the features of zeros
                    width = w[f"null_{null}_feature"].numel() // (2 * k)
                    numbers = torch.zeros(width, dtype=e.dtype)
                p = fourier(numbers.flatten(), k)
            else:
                p = w[f"null_{null}_feature"]
            groups.append(mlp(torch.cat([e, p]), w, f"linears_list.{i}"))
    count = w["pos_embedding"].shape[1]
    x = F.conv2d(rasters[None], w["in_conv.weight"], w["in_conv.bias"], padding=1)
    f = convnext(x, of(w, "convnext_tiny_backbone."))[0]
    channels, rows, columns = f.shape
    merged = rows * columns // count
    for n in range(count):
        e = torch.empty(merged * channels, dtype=f.dtype)
        for c in range(channels):
            for r in range(merged):
                place = count * r + n  # in the raster of features
                e[merged * c + r] = f[c, place // columns, place % columns]
        if not ("mask" in shown and bool((rasters > 0).any())):
            e = w["null_seg_feature"]
        groups.append(mlp(e + w["pos_embedding"][0, n], w, "linears_list.4"))
    return torch.stack(groups)


def gated_attention(
    w: Weights, x: Tensor, o: Tensor, heads: int, gamma: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """One row: x [N, C], o [M, D], mask [N, N + M] of what is seen -> [N, C]."""
    n, width = x.shape
    u = layer_norm(torch.cat([x, linear(o, w, "linear")]), w, "norm1")
    q, k, v = (linear(u, w, f"attn.to_{name}") for name in "qkv")
    d = width // heads
    out = torch.empty_like(x)
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        for i in range(n):
            scores = k[:, part] @ q[i, part] / math.sqrt(d)
            if mask is not None:
                scores = torch.where(mask[i], scores, torch.full_like(scores, -math.inf))
            weights = (scores - scores.max()).exp()
            out[i, part] = (weights / weights.sum()) @ v[:, part]
    x = x + gamma * math.tanh(float(w["alpha_attn"])) * linear(out, w, "attn.to_out.0")
    values, gates = linear(layer_norm(x, w, "norm2"), w, "ff.net.0.proj").chunk(2, -1)
    ff = linear(values * gelu(gates), w, "ff.net.2")
    return x + gamma * math.tanh(float(w["alpha_dense"])) * ff
