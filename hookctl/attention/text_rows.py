"""Further texts in batch rows of their own, for models whose sequence can hold no more text.

Z-Image and HunyuanVideo refine each text by itself. So a further text stands in a row: a copy of an
image's row under that text, which attends at every site as in a run of its own. Its image tokens
then get the output of the row that they are copies of, and the text runs along with the image that
is drawn. Z-Image counts the image's positions from the end of its text, so that a text's row has
queries and keys of its own for the image; where the image's are the same beside every text, the
texts are shown in one sequence with it (`Apart.with_texts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.attention.query_lists import TextPlace
from hookctl.attention.sdpa_call import SDPACall
from hookctl.attention.term import Ref, Segment


@dataclass(frozen=True)
class TextRows:
    """rows: name of a text -> own row -> the batch row in which it stands beside that row's image;
    lengths: tokens of each text; longest: of all in the batch; own: of the longest of the
    pipeline's own; masked: whether some of those are not all of tokens that count; moved: whether
    the image's positions are other ones beside another text.
    """

    rows: Mapping[str, Mapping[int, int]]
    lengths: Mapping[str, int]
    longest: int
    own: int
    masked: bool
    moved: bool = True

    @property
    def sources(self) -> list[int]:
        """The own row of each further one, in batch order."""
        pairs = {row: own for by_own in self.rows.values() for own, row in by_own.items()}
        return [pairs[row] for row in sorted(pairs)]


@dataclass(frozen=True, eq=False)
class Apart:
    """A caught call with such rows, images before texts.

    given: with them; own: how many rows are the pipeline's own; kind: of the site.
    """

    given: SDPACall
    own: int
    rows: TextRows
    kind: str
    _made: dict[str, tuple[Tensor, Segment]] = field(default_factory=dict, repr=False)

    @property
    def kept(self) -> int:
        """Tokens of the own rows."""
        tail = 0 if self.kind == "self" else self.rows.longest - self.rows.own
        return self.given.query.shape[-2] - tail

    @property
    def images(self) -> int:
        """Tokens of images, which come first."""
        of_text = {"self": 0, "text": self.given.query.shape[-2]}
        return self.given.query.shape[-2] - of_text.get(self.kind, self.rows.longest)

    def call(self) -> SDPACall:
        """The call of the own rows alone."""
        q, k, v = (x[: self.own, :, : self.kept] for x in self.given[:3])
        mask = self.given.attn_mask
        if mask is not None:
            mask = mask[: self.own, ..., : self.kept] if self.rows.masked else None
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., : self.kept, :]
        return self.given._replace(query=q, key=k, value=v, attn_mask=mask)

    def with_texts(self) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, TextPlace]]:
        """q, k and v of the own rows with the texts behind them, and where each stands."""
        parts, places, start = [self.call()[:3]], dict[str, TextPlace](), self.kept
        for name, by_own in self.rows.rows.items():
            at, length = self._rows_of(by_own), self.rows.lengths[name]
            text = slice(self.images, self.images + length)
            parts.append(tuple(x[at, :, text] for x in self.given[:3]))  # type: ignore[arg-type]
            places[name] = TextPlace(start, start := start + length)
        q, k, v = (torch.cat(some, -2) for some in zip(*parts, strict=True))
        return (q, k, v), places

    def whole(self, out: Tensor, texts: Mapping[str, Tensor] | None = None) -> Tensor:
        """The output [batch, heads, tokens, channels] of the own rows, with that of the others.

        texts: of each text's own tokens, by name, [own, heads, tokens, channels]; None where they
        attend as in a run of their own.
        """
        rest = out[self.rows.sources]
        if texts is not None:
            behind = [
                F.pad(texts[name][row], (0, 0, 0, self.rows.longest - self.rows.lengths[name]))
                for name, by_own in self.rows.rows.items()
                for row in by_own
            ]
            rest = torch.cat([rest[..., : self.images, :], torch.stack(behind)], -2)
        elif self.kind != "self":
            rest = torch.cat(
                [rest[..., : self.images, :], self._further[..., self.images :, :]], -2
            )
        padded = F.pad(out, (0, 0, 0, self.given.query.shape[-2] - self.kept))
        return torch.cat([padded, rest])

    @cached_property
    def _further(self) -> Tensor:
        """The output of the rows of texts, as in a run of their own."""
        q, k, v = (x[self.own :] for x in self.given[:3])
        mask = self.given.attn_mask
        mask = None if mask is None else mask[self.own :]
        return F.scaled_dot_product_attention(q, k, v, mask, scale=self.given.scale)

    def of_texts(self) -> dict[str, Tensor]:
        """Of each text's own tokens beside every own row, by name, [rows, heads, tokens, channels];
        of a row that it does not stand beside, another's."""
        found = {}
        for name, by_own in self.rows.rows.items() if self.kind == "joint" else ():
            at = [row - self.own for row in self._rows_of(by_own)]
            end = self.images + self.rows.lengths[name]
            found[name] = self._further[at, :, self.images : end]
        return found

    def _rows_of(self, by_own: Mapping[int, int]) -> list[int]:
        """The row of a text for each own row."""
        unused = next(iter(by_own.values()))
        return [by_own.get(row, unused) for row in range(self.own)]

    def beside(self, name: str, q: Tensor) -> tuple[Tensor, Segment]:
        """Queries, keys and values of a text's rows, as stacks of the own rows; what is no image
        among the queries q is their own."""
        if name not in self._made:
            by_own, end = self.rows.rows[name], self.images + self.rows.lengths[name]
            at = self._rows_of(by_own)
            asked, k, v = (x[at].unsqueeze(1) for x in self.given[:3])
            asked = torch.cat([asked[..., : self.images, :], q[..., self.images :, :]], -2)
            segment = Segment(Ref(k[..., :end, :], 0), Ref(v[..., :end, :], 0))
            self._made[name] = asked, segment
        return self._made[name]
