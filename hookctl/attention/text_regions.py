"""Texts in one softmax, each seen from its region alone: regional prompting of joint models.

Chen et al., "Training-free Regional Prompting for Diffusion Transformers", arXiv 2411.02395. With
bits(n) the regions of an image token, and b what the own text keeps,

    out(n) = b own(n) + (1 - b) softmax(q_n [k_images; k_1; ...; k_R]) [v_images; v_1; ...; v_R]

where image token m is seen if bits(n) & bits(m), and text r if bits(n) has its bit; text r sees
itself and the image tokens of its region. No mask of N x M is formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.regions import bit
from hookctl.attention.arguments import cast
from hookctl.attention.division import of_span
from hookctl.attention.key_regions import KeyRegions
from hookctl.attention.rewriting import Fold, Rewriting
from hookctl.attention.term import Ref, Segment, Term


@dataclass(frozen=True, eq=False)
class TextRegions:
    """Which text each image token sees; made once and used at every site of a grid.

    texts: names of contexts, the one at r of bit r; bits: int64 [image tokens], those in no region
    have one of their own (`address.regions.bit_sets`); base: share of the own text, 0 to 1.
    """

    texts: Sequence[str]
    bits: Tensor
    base: float = 0.0
    _made: dict[Any, _Made] = field(default_factory=dict, repr=False)

    def seen(self, text: str, before: int, after: int) -> Tensor:
        """Which image keys a text sees, bool: of `before` and `after` the image's (those of
        references) all."""
        mine = sum(bit(r) for r, name in enumerate(self.texts) if name == text)
        return F.pad((self.bits & mine) != 0, (before, after), value=True)

    @torch.inference_mode(False)  # kept for later calls, which may be learned through
    def over(self, where: tuple[int, ...], tokens: Sequence[int], like: Tensor) -> _Made:
        """where: queries before and after the image's, and keys of references before and after it;
        tokens: of each text."""
        key = (where, tuple(tokens), like.dtype, like.device)
        if key not in self._made:
            self._made[key] = _Made(self, where, tokens, like)
        return self._made[key]


class _Made:
    """Weights of all queries of a call, and the bits of queries and keys."""

    def __init__(
        self, given: TextRegions, where: tuple[int, ...], tokens: Sequence[int], like: Tensor
    ) -> None:
        before, after, first, last = where
        share = torch.full((len(given.bits),), 1 - given.base)
        self.further = cast(F.pad(share, (before, after)), like)
        self.own = cast(1 - F.pad(share, (before, after)), like)
        of_texts = [torch.full((n,), bit(r)) for r, n in enumerate(tokens)]
        keys = torch.cat([F.pad(given.bits, (first, last), value=-1), *of_texts])
        self.regions = KeyRegions(F.pad(given.bits, (before, after)), keys, like.device)


def divided_by_regions(
    made: _Made, segment: Segment, q: Tensor, scale: float, images: tuple[int, int]
) -> Rewriting:
    """segment: the keys and values of the images and of all texts, as stacks of every row; images:
    where the images' stand among the row's own, of whom biases and restrictions hold here too."""
    start, stop = images

    def apply(state: Fold, row: int) -> None:
        before = state.terms[row]
        kept = [term if term.extra else term.weighted(made.own) for term in before]
        here = segment._replace(k=segment.k._replace(row=row), v=segment.v._replace(row=row))
        own = next(term for term in before if not term.extra)
        regions = made.regions
        if own.regions is not None:
            further = segment.tokens - (stop - start)
            regions = own.regions.of_span(start, stop, further).both(regions)
        added = Term(
            Ref(q, row),
            (here,),
            scale,
            weight=made.further,
            factors=of_span(own.factors, start, stop),
            regions=regions,
            extra=True,
        )
        state.terms[row] = (*kept, added)

    return apply
