from __future__ import annotations

import math

import pytest
import torch

from hookctl.learned.modules.gated_attention import GatedSelfAttention
from tests.hookctl.learned import literal_grounding as literal

PRECISION = [(torch.float32, 1e-5), (torch.float64, 1e-10)]


def layer(dtype=torch.float32, seed=0):
    return literal.randomise(GatedSelfAttention(8, 6, heads=2), seed, dtype)


def tokens(dtype=torch.float32, rows=3):
    generator = torch.Generator().manual_seed(1)
    shapes = (rows, 9, 8), (rows, 5, 6)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize("dtype,tolerance", PRECISION)
@pytest.mark.parametrize("gamma", [1.0, 0.3])
def test_agrees_with_the_formula(dtype, tolerance, gamma):
    fuser, (x, o) = layer(dtype), tokens(dtype)
    got = fuser(x, o, gamma)
    for row in range(len(x)):
        want = literal.gated_attention(fuser.state_dict(), x[row], o[row], 2, gamma)
        torch.testing.assert_close(got[row], want, rtol=0, atol=tolerance)


def test_a_mask_hides_tokens():
    fuser, (x, o) = layer(torch.float64), tokens(torch.float64)
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(len(x), 1, 9, 14, generator=generator) < 0.5
    mask[..., 0] = True
    got = fuser(x, o, mask=mask)
    for row in range(len(x)):
        want = literal.gated_attention(fuser.state_dict(), x[row], o[row], 2, 1.0, mask[row, 0])
        torch.testing.assert_close(got[row], want, rtol=0, atol=1e-10)


def test_each_row_has_its_own_strength():
    fuser, (x, o) = layer(), tokens()
    strengths = torch.tensor([1.0, 0.0, 0.4])
    got = fuser(x, o, strengths)
    for row, gamma in enumerate(strengths):
        torch.testing.assert_close(got[row], fuser(x[row][None], o[row][None], float(gamma))[0])
    assert torch.equal(got[1], x[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_closed_gates_and_no_strength_change_nothing(dtype):
    fuser, (x, o) = layer(dtype), tokens(dtype)
    assert torch.equal(fuser(x, o, 0.0), x)
    assert not fuser.closed
    fresh = GatedSelfAttention(8, 6, heads=2).to(dtype)
    assert fresh.closed and torch.equal(fresh(x, o), x)


def test_a_small_gate_is_not_lost_in_half_precision():
    """3e-8 is no float16; the gate is taken in float32."""
    fuser, (x, o) = layer(torch.float16), tokens(torch.float16)
    fuser.alpha_attn.data, fuser.alpha_dense.data = torch.tensor(3e-8), torch.tensor(0.0)
    fuser.attn.to_out[0].weight.data *= 0
    fuser.attn.to_out[0].bias.data[:] = 60000.0
    added = fuser(torch.zeros_like(x), o).double()
    want = torch.full_like(added, 60000 * math.tanh(3e-8))
    torch.testing.assert_close(added, want, rtol=1e-3, atol=0)


@pytest.mark.parametrize("width", [320, 640, 1280])
def test_official_names_and_shapes(width):
    with torch.device("meta"):
        fuser = GatedSelfAttention(width, 768, heads=8)
    shapes = {name: tuple(value.shape) for name, value in fuser.state_dict().items()}
    c = width
    assert shapes == {
        "alpha_attn": (),
        "alpha_dense": (),
        "linear.weight": (c, 768),
        "linear.bias": (c,),
        "attn.to_q.weight": (c, c),
        "attn.to_k.weight": (c, c),
        "attn.to_v.weight": (c, c),
        "attn.to_out.0.weight": (c, c),
        "attn.to_out.0.bias": (c,),
        "ff.net.0.proj.weight": (8 * c, c),
        "ff.net.0.proj.bias": (8 * c,),
        "ff.net.2.weight": (c, 4 * c),
        "ff.net.2.bias": (c,),
        "norm1.weight": (c,),
        "norm1.bias": (c,),
        "norm2.weight": (c,),
        "norm2.bias": (c,),
    }


def test_the_sixteen_of_stable_diffusion_have_208_million_weights():
    with torch.device("meta"):
        widths = 5 * [320] + 5 * [640] + 6 * [1280]
        fusers = [GatedSelfAttention(width, 768, heads=8) for width in widths]
    count = sum(p.numel() for fuser in fusers for p in fuser.parameters())
    assert round(count / 1e6, 2) == 208.02
