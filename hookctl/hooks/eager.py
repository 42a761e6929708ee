"""Attention that a model spells out: product, softmax, product.

Old code bases form the matrix with einsum or bmm. Followed through the torch calls of one module,
such a chain gives away its q, k, v just as a fused call does. The model has made its matrix by
then, so only the values of the edit are ours, not the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.attention.sdpa_call import SDPACall

_PRODUCTS = {torch.einsum, torch.bmm, torch.matmul, Tensor.matmul, Tensor.bmm, Tensor.__matmul__}
_SCALES = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.mul_}
_SOFTMAX = {torch.softmax, Tensor.softmax, F.softmax}
_SAME = {Tensor.to, Tensor.float, Tensor.half, Tensor.type, Tensor.contiguous, Tensor.clone}
_BIASES = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__}

# (call, the model's own way) -> output, [batch, heads, tokens, channels].
Attend = Callable[[SDPACall, Callable[[], Tensor]], Tensor]


@dataclass(eq=False)
class _Scores:
    """A product that may turn out to be attention scores, and how it came about."""

    tensor: Tensor
    q: Tensor
    k: Tensor
    scale: float = 1.0
    bias: Tensor | None = None
    normalised: bool = False


class EagerFollower:
    """Follows the torch calls of one module's forward until a softmax meets its values."""

    def __init__(self, heads: int | None, rows: int, attend: Attend) -> None:
        self.heads, self.rows, self.attend = heads, rows, attend
        self._seen: dict[int, _Scores] = {}
        self.caught = 0

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do the torch call, or the edited attention in its place when the chain is complete."""
        if func in _PRODUCTS or func is torch.baddbmm:
            done = self._finish(func, args, kwargs)
            if done is not None:
                return done
        out = func(*args, **kwargs)
        if func is Tensor.__setitem__:
            self._seen.pop(id(args[0]), None)  # no longer the product that it was
        if not isinstance(out, Tensor):
            return out
        if func in _PRODUCTS:
            self._begin(func, args, out)
        elif func is torch.baddbmm:
            # scores = beta * bias + alpha * q k^T
            beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
            self._note(out, args[1], args[2].mT, alpha, args[0] * beta if beta else None)
        else:
            self._carry(func, args, kwargs, out)
        return out

    def _operands(self, func: Any, args: tuple[Any, ...]) -> tuple[Tensor, Tensor, str] | None:
        equation = args[0] if func is torch.einsum and isinstance(args[0], str) else ""
        operands = [a for a in (args[1:] if equation else args) if isinstance(a, Tensor)]
        if len(operands) != 2 or any(o.dim() < 3 for o in operands):
            return None
        return operands[0], operands[1], equation.replace(" ", "")

    def _begin(self, func: Any, args: tuple[Any, ...], out: Tensor) -> None:
        operands = self._operands(func, args)
        if operands is None:
            return
        q, k, equation = operands
        if equation:
            left, right = equation.split("->")[0].split(",")
            if left[-1] != right[-1]:  # scores contract the channels, which stand last in both
                return
        else:
            k = k.mT
        if out.shape[-2:] == (q.shape[-2], k.shape[-2]):
            self._note(out, q, k)

    def _note(
        self, out: Tensor, q: Tensor, k: Tensor, scale: float = 1.0, bias: Tensor | None = None
    ) -> None:
        self._seen[id(out)] = _Scores(out, q, k, float(scale), bias)

    def _carry(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        source = next((self._seen[id(a)] for a in args if id(a) in self._seen), None)
        if source is None:
            return
        carried = _carried(source, func, args, kwargs, out)
        if carried is None:
            # In-place calls return the tensor they changed, under the same id.
            self._seen.pop(id(out), None)
        else:
            self._seen[id(out)] = replace(carried, tensor=out)

    def _finish(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        operands = self._operands(func, args)
        if operands is None:
            return None
        p, v, equation = operands
        if equation:
            of_p, of_v = equation.split("->")[0].split(",")
            if of_p[-1] != of_v[-2]:  # probabilities weigh values over the keys, last in them
                return None
        scores = self._seen.get(id(p))
        if scores is None or not scores.normalised or scores.tensor is not p:
            return None
        if v.shape[-2] != p.shape[-1]:
            return None
        self.caught += 1
        split = self._split
        mask = None if scores.bias is None else split(scores.bias.expand(p.shape))
        # A model may compute its scores in a wider dtype than its values.
        q, k, wide = split(scores.q), split(scores.k), split(v).to(scores.q.dtype)
        call = SDPACall(q, k, wide, mask, scale=scores.scale)
        out = self.attend(call, lambda: split(func(*args, **kwargs)))
        return (out.flatten(0, 1) if p.dim() == 3 else out).to(v.dtype)

    def _split(self, x: Tensor) -> Tensor:
        """[batch * heads, ...] -> [batch, heads, ...]; heads stand inside the batch."""
        if x.dim() == 4:
            return x
        heads = self.heads or max(1, x.shape[0] // self.rows)
        return x.unflatten(0, (-1, heads))


def _carried(
    source: _Scores, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
) -> _Scores | None:
    """What becomes of scores by a call; None for what attention as one term does not do."""
    if func in _SAME or (func is F.dropout and not kwargs.get("training", True)):
        return source
    if source.normalised:
        return None
    if func in _SCALES:
        factor = next((a for a in args if isinstance(a, int | float)), None)
        if factor is None:
            return None
        bias = None if source.bias is None else source.bias * factor
        return replace(source, scale=source.scale * factor, bias=bias)
    if func in _BIASES:
        other = next((a for a in args if isinstance(a, Tensor) and a is not source.tensor), None)
        return None if other is None or kwargs.get("alpha", 1) != 1 else _biased(source, other)
    if func in _SOFTMAX:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        return replace(source, normalised=True) if dim in (-1, out.dim() - 1) else None
    if func is Tensor.masked_fill_ or func is Tensor.masked_fill:
        return _biased(source, torch.zeros_like(out).masked_fill(*args[1:], **kwargs))
    return None


def _biased(source: _Scores, bias: Tensor) -> _Scores:
    return replace(source, bias=bias if source.bias is None else source.bias + bias)
