"""Linear maps along the token axis, folded out of the probabilities into the values.

(P L) V = P (L V): an edit that mixes and rescales the columns of an attention map is an edit of the
values that the map weighs.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hookctl.errors import InputError

# From this many values on, moving them costs less than a product with a matrix of tokens.
_WORTH_GATHERING = 16_384


@dataclass(frozen=True, eq=False)
class Gather:
    """A token matrix whose rows mostly have one element.

    Row i is `gain[i]` at column `index[i]`, but for the rows `mixed`, which are `dense`.
    index: [T]; gain: [T, 1] or None for ones; mixed: [m]; dense: [m, T].
    """

    index: Tensor
    gain: Tensor | None
    mixed: Tensor
    dense: Tensor

    def to(self, like: Tensor) -> Gather:
        return Gather(
            self.index.to(like.device),
            None if self.gain is None else self.gain.to(like),
            self.mixed.to(like.device),
            self.dense.to(like),
        )

    def apply(self, v: Tensor) -> Tensor:
        """[..., T, channels] -> the matrix applied along T."""
        out = v.index_select(-2, self.index)
        if self.gain is not None:
            out = out * self.gain
        if self.mixed.shape[0]:
            out = out.index_copy(-2, self.mixed, self.dense @ v)
        return out


@dataclass(frozen=True, eq=False)
class ValueMap:
    """A linear map of the values along the token axis, folded out of the probabilities.

    matrix: [T, T] or its diagonal [T], applied to the tokens start .. start + T; rest: gain of
    the values of every other token of the segment; used: range of the rows of `matrix` outside
    which it is 0, None if that is not known; gather: a cheaper form of `matrix`, if it has one.
    """

    matrix: Tensor
    start: int = 0
    rest: float = 1.0
    used: tuple[int, int] | None = None
    gather: Gather | None = None

    @property
    def diagonal(self) -> bool:
        return self.matrix.dim() == 1

    def covers(self, tokens: int) -> bool:
        """Whether the map speaks of all the tokens of a segment."""
        return self.start == 0 and self.matrix.shape[0] == tokens

    def apply(self, v: Tensor) -> Tensor:
        """v: [..., tokens, channels]."""
        stop = self.start + self.matrix.shape[0]
        covers = self.covers(v.shape[-2])
        part = v if covers else v[..., self.start : stop, :]
        if self.diagonal:
            mapped = part * self.matrix.unsqueeze(-1)
        else:
            gather = self.gather if part.numel() >= _WORTH_GATHERING else None
            mapped = gather.apply(part) if gather else self.matrix @ part
        if covers:
            return mapped
        outside = (v[..., : self.start, :] * self.rest, mapped, v[..., stop:, :] * self.rest)
        return torch.cat(outside, -2)

    def apply_used(self, v: Tensor) -> Tensor:
        """The rows `used` of `apply(v)`, for a map that covers v."""
        if self.used is None or self.used == (0, v.shape[-2]):
            return self.apply(v)
        start, stop = self.used
        if self.diagonal:
            return v[..., start:stop, :] * self.matrix[start:stop].unsqueeze(-1)
        return self.apply(v)[..., start:stop, :]

    def apply_to_probabilities(self, p: Tensor) -> Tensor:
        """P L of probabilities [..., tokens], so that (P L) V = P (L V)."""
        stop = self.start + self.matrix.shape[0]
        part = p[..., self.start : stop]
        mapped = part * self.matrix if self.diagonal else part @ self.matrix
        if self.covers(p.shape[-1]):
            return mapped
        return torch.cat([p[..., : self.start] * self.rest, mapped, p[..., stop:] * self.rest], -1)


class Routing:
    """A token map with its gains, prepared once and used at every site and step.

    source_map: T diag(blend * gain), [text, text] or a diagonal [text]; own_gain: [text].
    """

    def __init__(self, source_map: Tensor, own_gain: Tensor) -> None:
        self.tokens = own_gain.shape[0]
        self.source_map, self.own_gain = source_map.cpu(), own_gain.cpu()
        full = source_map.dim() == 2
        # What is left where the source is the row itself.
        self.alone_map = self.source_map + (self.own_gain.diag() if full else self.own_gain)
        self.learned = self.alone_map.requires_grad
        self.moves = self.learned or bool(source_map.any())
        self.keeps_own = not self.learned and bool((own_gain == 1).all())
        self.drops_own = not self.learned and not bool(own_gain.any())
        self.keeps_alone = not self.learned and bool(
            (self.alone_map == (torch.eye(self.tokens) if full else 1)).all()
        )
        self._maps: dict[Hashable, ValueMap] = {}

    @classmethod
    def of(
        cls,
        tokens: int,
        token_map: Tensor | None = None,
        blend: Tensor | float = 1.0,
        gain: Tensor | float = 1.0,
    ) -> Routing:
        """The routing A' = [(A_source T) * blend + A_own * (1 - blend)] * gain."""
        given = {"blend": blend, "gain": gain}
        for name, value in given.items():
            if not isinstance(value, Tensor):
                given[name] = torch.full((tokens,), float(value), dtype=torch.float64)
            elif tuple(value.shape) != (tokens,):
                raise InputError(
                    f"route: {name} is {tuple(value.shape)}; the text has {tokens} tokens, "
                    f"so give [{tokens}]"
                )
        if token_map is not None and tuple(token_map.shape) != (tokens, tokens):
            raise InputError(
                f"route: token_map is {tuple(token_map.shape)}; the text has {tokens} tokens, "
                f"so give [{tokens}, {tokens}]"
            )
        b, g = (torch.as_tensor(given[name]).double() for name in ("blend", "gain"))
        moved = b * g if token_map is None else token_map.to(b) * (b * g)
        return cls(moved, (1 - b) * g)

    def source(self, like: Tensor, start: int = 0, rest: float = 0.0) -> ValueMap:
        """The map of the values that the source's probabilities weigh."""
        return self._map("source", like, start, rest)

    def own(self, like: Tensor, start: int = 0, rest: float = 1.0) -> ValueMap:
        """The map of the values that the own probabilities weigh."""
        return self._map("own", like, start, rest)

    def alone(self, like: Tensor, start: int = 0) -> ValueMap:
        """The map of the values where the row is its own source."""
        return self._map("alone", like, start, 1.0)

    def _map(self, which: str, like: Tensor, start: int, rest: float) -> ValueMap:
        key = (which, like.dtype, like.device, start, rest)
        if key not in self._maps:
            with torch.inference_mode(False):  # a later call may be learned through
                matrix, gather, used = self._parts[which]
                gather = gather.to(like) if gather else None
                self._maps[key] = ValueMap(matrix.to(like), start, rest, used, gather)
        return self._maps[key]

    @cached_property
    def _parts(self) -> dict[str, tuple[Tensor, Gather | None, tuple[int, int] | None]]:
        given = {"source": self.source_map, "own": self.own_gain, "alone": self.alone_map}
        if self.learned:
            return {name: (matrix, None, None) for name, matrix in given.items()}
        return {name: (m, gather_of(m), _used(m)) for name, m in given.items()}


def gather_of(matrix: Tensor) -> Gather | None:
    """The form of a matrix most of whose rows have one element; None if it has no such form."""
    if matrix.dim() == 1:
        return None
    counts = (matrix != 0).sum(1)
    mixed = (counts > 1).nonzero()[:, 0]
    if len(mixed) > matrix.shape[0] // 4:
        return None
    index = matrix.abs().argmax(1)
    gain = matrix.gather(1, index[:, None])
    return Gather(index, None if bool((gain == 1).all()) else gain, mixed, matrix[mixed])


def _used(matrix: Tensor) -> tuple[int, int]:
    """The smallest range of rows outside which a matrix or a diagonal is 0."""
    rows = (matrix if matrix.dim() == 1 else matrix.abs().sum(1)).nonzero()[:, 0]
    return (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
