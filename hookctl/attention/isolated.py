"""Image tokens that see none of each other: identity attention beside a text.

On a self-attention site the identity in place of the probabilities is the values themselves. On a
joint site only the image's own block becomes the identity (Ahn et al., arXiv 2403.17377, in the
form of diffusers' joint processors): an image token attends to itself and to the text,

    o_n = [exp(s_nn) v_n + sum_t exp(s_nt) v_t] / [exp(s_nn) + sum_t exp(s_nt)]

and the text's own queries attend to everything as before. Scores of the text's keys alone are
formed, [image tokens, text tokens].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.attention.assemble import additive
from hookctl.attention.operations import Fold, Rewriting
from hookctl.attention.spans import Spans
from hookctl.attention.term import Ref, Term

_CHUNK = 1024  # image queries at a time


def isolate(spans: Spans, mask: Tensor | None) -> Rewriting:
    """The image's tokens of a joint site see themselves and the text; what was added stays.

    mask: the model's own, as a stack [rows | 1, sub-batch | 1, heads | 1, N | 1, M].
    """

    def one(term: Term) -> Term:
        row = term.own.mask_row
        own = None if mask is None or row is None else mask[row if mask.shape[0] > 1 else 0]
        v = _isolated(term, spans, own)
        segment = term.own._replace(v=Ref(v[None], 0))
        return term._replace(
            segments=(segment,), maps=(), factors=(), regions=None, value_only=True
        )

    def apply(state: Fold, row: int) -> None:
        before = [one(term) for term in state.values[row]]
        state.terms[row] = (*before, *(t for t in state.terms[row] if t.extra))
        state.functions.pop(row, None)

    return Rewriting(apply, (), () if mask is None else (mask,))


def _isolated(term: Term, spans: Spans, mask: Tensor | None) -> Tensor:
    """[sub-batch, heads, N, channels]"""
    q, k, v = term.q.tensor, term.own.k.tensor, term.own.v.tensor
    assert spans.image_keys is not None and spans.text_keys is not None  # a joint site
    image, text = slice(*spans.image_keys), slice(*spans.text_keys)
    bias = None if mask is None else additive(mask, q)
    out = F.scaled_dot_product_attention(
        q[..., text, :], k, v, None if bias is None else _rows(bias, text), scale=term.scale
    )
    parts = []
    for start in range(image.start, image.stop, _CHUNK):
        at = slice(start, min(start + _CHUNK, image.stop))
        scores = q[..., at, :] @ k[..., text, :].mT * term.scale
        if bias is not None:
            scores = scores + _rows(bias, at)[..., text]
        alone = (q[..., at, :] * k[..., at, :]).sum(-1, keepdim=True) * term.scale
        p = torch.cat([alone, scores], -1).softmax(-1)
        parts.append(p[..., :1] * v[..., at, :] + p[..., 1:] @ v[..., text, :])
    whole = [out, *parts] if text.start < image.start else [*parts, out]
    return torch.cat(whole, -2)


def _rows(bias: Tensor, queries: slice) -> Tensor:
    """The part of a bias [..., N | 1, M] for some queries."""
    return bias if bias.shape[-2] == 1 else bias[..., queries, :]
