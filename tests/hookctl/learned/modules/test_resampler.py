"""Perceiver resampler: the official keys and shapes, and the formulas written out one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hookctl.learned.modules.resampler import GatedCrossAttention, PerceiverResampler, Resampler

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def with_random_values(module: nn.Module, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.3
    return module.to(dtype).eval()


def close(a: Tensor, b: Tensor) -> None:
    a, b = a.detach(), b.detach()
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= TOLERANCE[a.dtype] * max(1.0, float(b.abs().max()))


# -- the formulas, written out ---------------------------------------------------------------------


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def asked(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Head by head, q and k each scaled by d^(-1/4)."""
    d = q.shape[-1] // heads
    parts = []
    for h in range(heads):
        at = slice(h * d, (h + 1) * d)
        scores = (q[..., at] * d**-0.25) @ (k[..., at] * d**-0.25).mT
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        parts.append(weights @ v[..., at])
    return torch.cat(parts, -1)


def literal_layer(p: dict[str, Tensor], start: str, x: Tensor, latents: Tensor, heads: int):
    x1 = layer_norm(x, p[f"{start}.0.norm1.weight"], p[f"{start}.0.norm1.bias"])
    l1 = layer_norm(latents, p[f"{start}.0.norm2.weight"], p[f"{start}.0.norm2.bias"])
    kv = torch.cat([x1, l1], 1) @ p[f"{start}.0.to_kv.weight"].T
    half = kv.shape[-1] // 2
    found = asked(l1 @ p[f"{start}.0.to_q.weight"].T, kv[..., :half], kv[..., half:], heads)
    latents = latents + found @ p[f"{start}.0.to_out.weight"].T
    return latents + literal_feed_forward(p, f"{start}.1", latents)


def literal_feed_forward(p: dict[str, Tensor], start: str, x: Tensor) -> Tensor:
    normed = layer_norm(x, p[f"{start}.0.weight"], p[f"{start}.0.bias"])
    return gelu(normed @ p[f"{start}.1.weight"].T) @ p[f"{start}.3.weight"].T


def literal_resampler(p: dict[str, Tensor], x: Tensor, heads: int, depth: int) -> Tensor:
    x = x @ p["proj_in.weight"].T + p["proj_in.bias"]
    latents = p["latents"].repeat(len(x), 1, 1)
    for b in range(depth):
        latents = literal_layer(p, f"layers.{b}", x, latents, heads)
    out = latents @ p["proj_out.weight"].T + p["proj_out.bias"]
    return layer_norm(out, p["norm_out.weight"], p["norm_out.bias"])


# -- shapes ----------------------------------------------------------------------------------------


def official_shapes(width: int, features: int, output: int, tokens: int = 16) -> dict[str, tuple]:
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (1, tokens, width),
        "proj_in.weight": (width, features),
        "proj_in.bias": (width,),
        "proj_out.weight": (output, width),
        "proj_out.bias": (output,),
        "norm_out.weight": (output,),
        "norm_out.bias": (output,),
    }
    for b in range(4):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes[f"layers.{b}.{norm}.weight"] = shapes[f"layers.{b}.{norm}.bias"] = (width,)
        shapes[f"layers.{b}.0.to_q.weight"] = (width, width)
        shapes[f"layers.{b}.0.to_kv.weight"] = (2 * width, width)
        shapes[f"layers.{b}.0.to_out.weight"] = (width, width)
        shapes[f"layers.{b}.1.1.weight"] = (4 * width, width)
        shapes[f"layers.{b}.1.3.weight"] = (width, 4 * width)
    return shapes


@pytest.mark.parametrize(
    ("width", "heads", "features", "output", "millions"),
    [
        pytest.param(768, 12, 1280, 768, 29.9, id="plus SD1.5"),
        pytest.param(1280, 20, 1280, 2048, 83.0, id="plus SDXL"),
        pytest.param(1280, 20, 512, 2048, 81.98, id="InstantID"),
    ],
)
def test_official_keys_and_shapes(
    width: int, heads: int, features: int, output: int, millions: float
) -> None:
    with torch.device("meta"):
        module = Resampler(width, output, features, heads=heads)
    found = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert found == official_shapes(width, features, output)
    count = sum(p.numel() for p in module.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.06 if millions != 81.98 else 0.006)


# -- values ----------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("inputs", [1, 7])
def test_resampler_is_the_formula(dtype: torch.dtype, inputs: int) -> None:
    module = Resampler(24, 20, 10, heads=3, depth=2, tokens=5, head_width=8)
    with_random_values(module, dtype)
    x = torch.randn(2, inputs, 10, dtype=dtype)
    wanted = literal_resampler(module.state_dict(), x, heads=3, depth=2)
    close(module(x), wanted)


@DTYPES
def test_flamingo_is_the_formula(dtype: torch.dtype) -> None:
    module = PerceiverResampler(24, heads=3, depth=2, tokens=5, frames=4, head_width=8)
    with_random_values(module, dtype)
    p = module.state_dict()
    x = torch.randn(2, 3, 7, 24, dtype=dtype)
    timed = torch.cat([x[:, t] + p["time_embeddings"][t] for t in range(3)], 1)
    latents = p["latents"].repeat(2, 1, 1)
    for b in range(2):
        latents = literal_layer(p, f"layers.{b}", timed, latents, 3)
    close(module(x), layer_norm(latents, p["norm.weight"], p["norm.bias"]))


def test_flamingo_knows_the_order_of_frames() -> None:
    module = PerceiverResampler(16, heads=2, depth=1, tokens=3, head_width=8)
    with_random_values(module, torch.float64)
    x = torch.randn(1, 2, 4, 16, dtype=torch.float64)
    assert not torch.allclose(module(x), module(x.flip(1)))
    within = x[:, :, torch.tensor([3, 2, 1, 0])]
    close(module(within), module(x))  # tokens of one frame are a set


@DTYPES
def test_gated_cross_attention_is_the_formula(dtype: torch.dtype) -> None:
    module = GatedCrossAttention(12, 20, heads=3, head_width=8)
    with_random_values(module, dtype)
    p = module.state_dict()
    y, x = torch.randn(2, 6, 12, dtype=dtype), torch.randn(2, 5, 20, dtype=dtype)
    q = layer_norm(y, p["norm.weight"], p["norm.bias"]) @ p["to_q.weight"].T
    k, v = (x @ p["to_kv.weight"].T).chunk(2, -1)
    wanted = y + p["alpha_attn"].tanh() * (asked(q, k, v, 3) @ p["to_out.weight"].T)
    wanted = wanted + p["alpha_ff"].tanh() * literal_feed_forward(p, "ff", wanted)
    close(module(y, x), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_closed_gates_change_nothing(dtype: torch.dtype) -> None:
    module = GatedCrossAttention(12, 20, heads=3, head_width=8).to(dtype)
    y, x = torch.randn(2, 6, 12, dtype=dtype), torch.randn(2, 5, 20, dtype=dtype)
    assert torch.equal(module(y, x), y)
    module(y, x).float().sum().backward()
    assert float(module.alpha_attn.grad.abs()) > 0  # they can open
