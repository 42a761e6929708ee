"""Pieces of the kernels: the inner products of a map with the seven waves, and the filter."""

# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from hookctl.kernels.common.guard import jit, tl


@jit
def _tile(ptr, o_c, o_p, stride_c, stride_h, stride_w, channels, height, width):
    """A tile of a feature map in float32, its offsets and what of it exists."""
    o_x = o_c.to(tl.int64)[:, None] * stride_c
    o_x += (o_p // width * stride_h + o_p % width * stride_w)[None, :]
    mask = (o_c < channels)[:, None] & (o_p < height * width)[None, :]
    return tl.load(ptr + o_x, mask=mask, other=0.0).to(tl.float32), o_x, mask


@jit
def _angles(o_p, height, width):
    """cos and sin of the waves (1,0) and (0,1)."""
    a = 6.283185307179586 * (o_p // width).to(tl.float32) / height
    b = 6.283185307179586 * (o_p % width).to(tl.float32) / width
    return tl.cos(a), tl.sin(a), tl.cos(b), tl.sin(b)


@jit
def amounts(
    ptr, o_c, stride_c, stride_h, stride_w, channels, height, width,
    C: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """The seven inner products of each channel, [C] each."""
    m0 = tl.zeros([C], tl.float32)
    m1 = tl.zeros([C], tl.float32)
    m2 = tl.zeros([C], tl.float32)
    m3 = tl.zeros([C], tl.float32)
    m4 = tl.zeros([C], tl.float32)
    m5 = tl.zeros([C], tl.float32)
    m6 = tl.zeros([C], tl.float32)
    for start in range(0, height * width, P):
        o_p = start + tl.arange(0, P)
        x, _, _ = _tile(ptr, o_c, o_p, stride_c, stride_h, stride_w, channels, height, width)
        ca, sa, cb, sb = _angles(o_p, height, width)
        m0 += tl.sum(x, 1)
        m1 += tl.sum(x * ca[None, :], 1)
        m2 += tl.sum(x * sa[None, :], 1)
        m3 += tl.sum(x * cb[None, :], 1)
        m4 += tl.sum(x * sb[None, :], 1)
        m5 += tl.sum(x * (ca * cb - sa * sb)[None, :], 1)
        m6 += tl.sum(x * (sa * cb + ca * sb)[None, :], 1)
    return m0, m1, m2, m3, m4, m5, m6


@jit
def subtract_waves(
    ptr, out_ptr, o_c, share, stride_c, stride_h, stride_w, out_stride_c, out_stride_h,
    out_stride_w, channels, height, width, m0, m1, m2, m3, m4, m5, m6, P: tl.constexpr,
):  # fmt: skip
    """out = x - share * (the waves in their amounts)."""
    for start in range(0, height * width, P):
        o_p = start + tl.arange(0, P)
        x, _, mask = _tile(ptr, o_c, o_p, stride_c, stride_h, stride_w, channels, height, width)
        ca, sa, cb, sb = _angles(o_p, height, width)
        low = m0[:, None] + m1[:, None] * ca[None, :] + m2[:, None] * sa[None, :]
        low += m3[:, None] * cb[None, :] + m4[:, None] * sb[None, :]
        low += m5[:, None] * (ca * cb - sa * sb)[None, :]
        low += m6[:, None] * (sa * cb + ca * sb)[None, :]
        o_out = o_c.to(tl.int64)[:, None] * out_stride_c
        o_out += (o_p // width * out_stride_h + o_p % width * out_stride_w)[None, :]
        y = x - share[:, None] * low
        tl.store(out_ptr + o_out, y.to(out_ptr.dtype.element_ty), mask=mask)
