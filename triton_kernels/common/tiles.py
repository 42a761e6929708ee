"""Pieces that the kernels share: programs, where rows lie, tiles in two parts, products, softmax.

A head of 80 channels is held as 64 + 16, of 160 as 128 + 32: tiles are powers of two, and 256
would spill. D0 and D1 are the widths of the two parts; D1 is 0 where one is enough, and the second
part is then a stand-in that nothing reads.
"""

# mypy: disallow-incomplete-defs=False

from __future__ import annotations

from hookctl.kernels.common.guard import constexpr, jit, tl

LOG2E = constexpr(1.4426950408889634)
LOWEST = constexpr(-3.4028234663852886e38)  # of fp32


@jit
def program(heads, SIZE: tl.constexpr):
    """The sequence and the head of this program, the pair of both, and the tokens of its tile."""
    pair = tl.program_id(1)
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    return (pair // heads).to(tl.int64), (pair % heads).to(tl.int64), pair.to(tl.int64), i


@jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    """acc + a b in fp32.

    UPCAST: for the interpreter, which reads bf16 operands as integers and raises nothing. fp32
    operands are multiplied as they are, not as tf32.
    """
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def row_pointer(cells, p0, p1, p2, sub, head, ALIGN: tl.constexpr):
    """(pointer, stride of tokens, stride of channels) of one head of the row that six cells name.

    The first cell picks one of three stacks. ALIGN: how many elements every token is known to
    be aligned on, 1 if that is not known.
    """
    stack = tl.load(cells)
    offset = tl.load(cells + 1) + sub * tl.load(cells + 2) + head * tl.load(cells + 3)
    tokens = tl.load(cells + 4)
    channels = tl.load(cells + 5)
    if ALIGN > 1:
        offset = tl.multiple_of(offset, ALIGN)
        tokens = tl.multiple_of(tokens, ALIGN)
    pointer = tl.where(stack == 0, p0, tl.where(stack == 1, p1, p2))
    return pointer + offset, tokens, channels


@jit
def load_tile(
    pointer, tokens, channels, i, length,
    FROM: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """[tokens i, WIDTH channels from FROM on]; 0 outside the length and the D channels."""
    c = FROM + tl.arange(0, WIDTH)
    mask = i[:, None] < length
    if FROM + WIDTH > D:
        mask = mask & (c[None, :] < D)
    at = i[:, None].to(tl.int64) * tokens
    if ALIGN > 1:
        return tl.load(pointer + at + c[None, :], mask=mask, other=0.0)
    return tl.load(pointer + at + c[None, :] * channels, mask=mask, other=0.0)


@jit
def load_parts(
    pointer, tokens, channels, i, length,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The tokens i of a head, in two parts."""
    first = load_tile(pointer, tokens, channels, i, length, 0, D0, D, ALIGN)
    if D1:
        return first, load_tile(pointer, tokens, channels, i, length, D0, D1, D, ALIGN)
    else:
        return first, first


@jit
def zero_parts(BM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Zeros to add to, in two parts."""
    return tl.zeros([BM, D0], tl.float32), tl.zeros([BM, D1 if D1 else 1], tl.float32)


@jit
def products(
    a_0, a_1, pointer, tokens, channels, i, length,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """a x^T, [tokens of a, tokens i of x]."""
    acc = tl.zeros([a_0.shape[0], i.shape[0]], tl.float32)
    x = load_tile(pointer, tokens, channels, i, length, 0, D0, D, ALIGN)
    acc = dot(a_0, tl.trans(x), acc, UPCAST)
    if D1:
        x_1 = load_tile(pointer, tokens, channels, i, length, D0, D1, D, ALIGN)
        acc = dot(a_1, tl.trans(x_1), acc, UPCAST)
    return acc


@jit
def add_products(
    acc_0, acc_1, p, pointer, tokens, channels, i, length,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, ALIGN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc + p x for the tokens i of x, in two parts; p in the dtype of x."""
    x = load_tile(pointer, tokens, channels, i, length, 0, D0, D, ALIGN)
    p = p.to(x.dtype)
    acc_0 = dot(p, x, acc_0, UPCAST)
    if D1:
        x_1 = load_tile(pointer, tokens, channels, i, length, D0, D1, D, ALIGN)
        acc_1 = dot(p, x_1, acc_1, UPCAST)
    return acc_0, acc_1


@jit
def row_dot(a_0, a_1, b_0, b_1, D1: tl.constexpr):
    """rowsum(a * b) in fp32."""
    total = tl.sum(a_0.to(tl.float32) * b_0.to(tl.float32), 1)
    if D1:
        total += tl.sum(a_1.to(tl.float32) * b_1.to(tl.float32), 1)
    return total


@jit
def empty_softmax(BM: tl.constexpr):
    """The maximum and the sum of a softmax that has seen no scores.

    The maximum is finite, so that nothing becomes NaN for a query without any key.
    """
    return tl.full([BM], LOWEST, tl.float32), tl.zeros([BM], tl.float32)


@jit
def online_softmax(scores, top, norm):
    """One more tile of base-2 scores of an online softmax: its exponentials, what sums so far fade
    by, and the new maximum and sum."""
    new = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores - new[:, None])
    fade = tl.exp2(top - new)
    return p, fade, new, norm * fade + tl.sum(p, 1)


@jit
def load_pivots(lse, i, length):
    """Log-sum-exps of the queries i in base 2, to recompute probabilities: +inf beyond the end and
    where there was no key, so that those are 0."""
    found = tl.load(lse + i, mask=i < length, other=float("inf"))
    return tl.where(found == float("-inf"), float("inf"), found * LOG2E)


@jit
def load_regions(pointer, i, length):
    """Bit sets of the tokens i; those past the end are in no region."""
    return tl.load(pointer + i, mask=i < length, other=0)


@jit
def store_parts(
    pointer, tokens, i, length, x_0, x_1,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Write two parts to the tokens i, whose channels lie side by side."""
    c = tl.arange(0, D0)
    at = pointer + i[:, None].to(tl.int64) * tokens
    mask = i[:, None] < length
    tl.store(at + c[None, :], x_0.to(pointer.dtype.element_ty), mask=mask & (c[None, :] < D))
    if D1:
        c_1 = D0 + tl.arange(0, D1)
        mask_1 = mask & (c_1[None, :] < D)
        tl.store(at + c_1[None, :], x_1.to(pointer.dtype.element_ty), mask=mask_1)


@jit
def add_biases(
    scores, cells, shift, bias, query_factors, key_factors, sub, head, m, n, tokens, keys,
    TRANSPOSED: tl.constexpr, BIASED: tl.constexpr, RANK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Scores in base 2 with the stretch's shift, key bias and rank-r bias; -inf beyond the keys.

    scores: [m, n], or [n, m] where TRANSPOSED, already in base 2, as the query factors are. cells:
    offset and strides of the key bias, then offsets of the factors, -1 where there is none; RANK:
    their columns, 0 without.
    """
    key_bias = tl.full([n.shape[0]], 0.0, tl.float32) + shift
    if BIASED:
        at = tl.load(cells)
        row = bias + at + sub * tl.load(cells + 1) + head * tl.load(cells + 2)
        key_bias += tl.load(row + n, mask=n < tl.where(at >= 0, keys, 0), other=0.0)
    key_bias = tl.where(n < keys, key_bias * LOG2E, float("-inf"))
    if RANK:
        of_queries, of_keys = tl.load(cells + 3), tl.load(cells + 4)
        qf_tokens = tl.where(of_keys >= 0, tokens, 0)
        qf = load_tile(query_factors + of_queries, RANK, 1, m, qf_tokens, 0, RANK, RANK, 1)
        kf_keys = tl.where(of_keys >= 0, keys, 0)
        kf = load_tile(key_factors + of_keys, RANK, 1, n, kf_keys, 0, RANK, RANK, 1)
        if TRANSPOSED:
            scores = dot(kf, tl.trans(qf), scores, UPCAST)
        else:
            scores = dot(qf, tl.trans(kf), scores, UPCAST)
    if TRANSPOSED:
        return scores + key_bias[:, None]
    else:
        return scores + key_bias[None, :]


@jit
def load_weights(weights, row, m, tokens):
    """The weights of the queries m, ones where the row is -1."""
    given = tl.where(row >= 0, tokens, 0)
    return tl.load(weights + row * tokens + m, mask=m < given, other=1.0)
