"""Pieces that the kernels share: loads of tiles, and products that the interpreter gets right."""

# mypy: disallow-incomplete-defs=False

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    """acc + a b in fp32.

    UPCAST: for the interpreter, which reads bf16 operands as integers and raises nothing. fp32
    operands are multiplied as they are, not as tf32.
    """
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
