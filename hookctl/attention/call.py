"""`AttentionCall`: what an editor sees of one attention call, and the verbs that rewrite it.

Verbs do not compute: they note an operation with its stage, and the stack folds the operations
into terms when every editor has spoken (substitution, extension, restriction, token map,
addition, override, read-out; the order of the editors inside a stage). Editors therefore compose
whatever order they were written in, and nothing is evaluated twice. A verb that would change
nothing (scale 0, a bias of zeros, a row that borrows from itself) notes nothing, and the call
stays the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hookctl.address.clock import Clock
from hookctl.address.rows import Row, Rows
from hookctl.address.sites import Grid, Site, grid_of
from hookctl.attention import operations as does
from hookctl.attention.operations import Operation, Probabilities, ReadOut, Sink, Stage
from hookctl.attention.prepared import cast, is_all, is_finite, regions_of, stacked
from hookctl.attention.spans import Spans, spans_of
from hookctl.attention.term import Ref, Segment, Sum, Term
from hookctl.attention.token_map import Routing
from hookctl.errors import InputError, UnsupportedError

RowLike = Row | int


class AttentionCall:
    """One attention call of one site, as its editors see it.

    q, k, v: [rows, sub-batch, heads, tokens, channels], after projection, norm and rotary
    embedding. `sub-batch` is 1 but for video models, where a row has several frames or positions.
    rows, clock: who and when. index: which call of this module's forward it is (an adapter's
    branches come after the text's, so 0 is the model's own).
    """

    def __init__(
        self,
        site: Site,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        rows: Rows,
        clock: Clock,
        scale: float,
        mask: Tensor | None = None,
        latent: Sequence[int] = (),
        text_tokens: int | None = None,
        joint_order: str | None = None,
        index: int = 0,
        context: Mapping[str, tuple[int, int]] | None = None,
        prompts: Sequence[str] = (),
    ) -> None:
        self.site, self.rows, self.clock, self.index = site, rows, clock, index
        self.q, self.k, self.v = q, k, v
        self.prompts = tuple(prompts)
        self.mask, self.scale, self.latent = mask, scale, tuple(latent)
        self._text_tokens, self._joint_order = text_tokens, joint_order
        self._context = dict(context or {})
        self.operations: list[Operation] = []
        self.read_outs: list[ReadOut] = []
        self.editor: Any = None

    # -- where ---------------------------------------------------------------------------------

    @cached_property
    def spans(self) -> Spans:
        """Where the text and the image stand among queries and keys."""
        return spans_of(
            self.site,
            self.q.shape[-2],
            self.k.shape[-2],
            self._text_tokens,
            self._joint_order,
        )

    @cached_property
    def grid(self) -> Grid | None:
        """The grid of the image queries, or None if they form none over the latent."""
        start, stop = self.spans.image_queries
        return grid_of(stop - start, self.latent) if self.latent else None

    def context(self, name: str) -> tuple[Tensor, Tensor]:
        """k and v of an extra text that an editor's `context` gave, stacks like `k` and `v`."""
        if name not in self._context:
            raise InputError(
                f"context {name!r} is not in this call; there is: {sorted(self._context) or 'none'}"
            )
        start, stop = self._context[name]
        return self._full_k[..., start:stop, :], self._full_v[..., start:stop, :]

    def set_context_source(self, k: Tensor, v: Tensor) -> None:
        """Keep the widened k and v that `context` slices."""
        self._full_k, self._full_v = k, v

    # -- verbs ---------------------------------------------------------------------------------

    def borrow(
        self,
        rows: RowLike | Iterable[RowLike],
        *,
        q: RowLike | None = None,
        k: RowLike | None = None,
        v: RowLike | None = None,
        where: Tensor | None = None,
    ) -> None:
        """Take q, k or v of `rows` from another row (P2P self-replacement, MasaCtrl).

        where: per-query weight [N] of the borrowed form; the own form keeps 1 - where.
        """
        targets = self._indices(rows, "rows")
        given = {n: row for n, row in {"q": q, "k": k, "v": v}.items() if row is not None}
        if not given:
            raise InputError("borrow: give at least one of q=, k=, v=, the row to take it from")
        sources = {name: self._index(row, f"borrow: {name}") for name, row in given.items()}
        weight = None if where is None else self._per_query(where, "borrow: where")
        targets = tuple(t for t in targets if any(s != t for s in sources.values()))
        if where is not None and is_all(where, 0):
            return
        if where is not None and is_all(where, 1):
            weight = None
        stacks = {"q": self.q, "k": self.k, "v": self.v}
        refs = {name: Ref(stacks[name], row) for name, row in sources.items()}
        self._note(
            Stage.SUBSTITUTION, "borrow", targets, does.borrow(refs, sources.get("k"), weight)
        )

    def extend(
        self,
        rows: RowLike | Iterable[RowLike],
        k: Tensor | RowLike,
        v: Tensor | RowLike,
        *,
        shift: Tensor | float | None = None,
    ) -> None:
        """Let `rows` attend to further keys in the same softmax (StyleAligned, reference).

        k, v: a row of this call, or tensors [heads, tokens, channels] (or with a leading
        sub-batch); shift: added to the scores of the new keys, a number or [tokens].
        """
        targets = self._indices(rows, "rows")
        new_k, mask_row = self._ref(k, self.k, "extend: k")
        new_v, _ = self._ref(v, self.v, "extend: v")
        tokens = new_k.base.shape[-2]
        if tokens != new_v.base.shape[-2]:
            raise InputError(
                f"extend: k has {tokens} tokens and v has {new_v.base.shape[-2]}; they must be "
                "as many"
            )
        if isinstance(shift, Tensor):
            if tuple(shift.shape) not in ((), (tokens,)):
                raise InputError(
                    f"extend: shift is {tuple(shift.shape)}; the new keys are {tokens}, so give "
                    f"a number or [{tokens}]"
                )
            shift = cast(shift, self.q)
        if tokens:
            segment = Segment(new_k, new_v, shift, mask_row)
            self._note(Stage.EXTENSION, "extend", targets, does.extend(segment))

    def restrict(
        self, rows: RowLike | Iterable[RowLike], query_regions: Tensor, key_regions: Tensor
    ) -> None:
        """Let a query see only keys with which it shares a region.

        query_regions, key_regions: int64 bit sets, [N] and [M]; a query without any allowed key
        gives 0.
        """
        targets = self._indices(rows, "rows")
        for name, value, length in (
            ("query_regions", query_regions, self.q.shape[-2]),
            ("key_regions", key_regions, self.k.shape[-2]),
        ):
            if value.dtype != torch.int64 or tuple(value.shape) != (length,):
                raise InputError(
                    f"restrict: {name} is {value.dtype} {tuple(value.shape)}; give int64 [{length}]"
                )
        regions = regions_of(query_regions, key_regions, self.q.device)
        if not regions.allow_all:
            self._note(Stage.RESTRICTION, "restrict", targets, does.restrict(regions))

    def bias(
        self,
        rows: RowLike | Iterable[RowLike],
        *,
        query_factors: Tensor | None = None,
        key_factors: Tensor,
    ) -> None:
        """Add sum_r query_factors[n, r] * key_factors[m, r] to the scores.

        query_factors: [N, r], or None for a bias of the keys alone; key_factors: [M, r] or [M].
        """
        targets = self._indices(rows, "rows")
        n, m = self.q.shape[-2], self.k.shape[-2]
        r = key_factors.shape[1] if key_factors.dim() == 2 else 1
        if tuple(key_factors.shape) not in ((m,), (m, r)):
            raise InputError(
                f"bias: key_factors is {tuple(key_factors.shape)}; {self.site.path} has {m} keys, "
                f"so give [{m}] or [{m}, r]"
            )
        if query_factors is not None and tuple(query_factors.shape) != (n, r):
            raise InputError(
                f"bias: query_factors is {tuple(query_factors.shape)}; {self.site.path} has {n} "
                f"queries and key_factors has r = {r}, so give [{n}, {r}]"
            )
        factors = [key_factors] if query_factors is None else [key_factors, query_factors]
        if not all(is_finite(factor) for factor in factors):
            raise InputError("bias: the factors are not all finite; to forbid keys use restrict")
        if any(is_all(factor, 0) for factor in factors):
            return
        keys = cast(key_factors, self.k).reshape(m, r)
        queries = None if query_factors is None else cast(query_factors, self.q)
        if queries is None and r > 1:
            keys = keys.sum(1, keepdim=True)
        self._note(Stage.RESTRICTION, "bias", targets, does.bias(queries, keys))

    def route(
        self,
        rows: RowLike | Iterable[RowLike],
        source: RowLike | None,
        *,
        token_map: Tensor | None = None,
        blend: Tensor | float = 1.0,
        gain: Tensor | float = 1.0,
        image_from_source: bool = False,
    ) -> None:
        """Mix another row's map over the text tokens into the own one and rescale tokens.

            A' = [(A_source T) * blend + A_own * (1 - blend)] * gain

        evaluated without the maps as two terms, since A V is linear in A (Hertz et al., arXiv
        2208.01626, in the form of equation 1). token_map: T, [text, text], None for the identity;
        blend, gain: per token [text] or numbers. source=None: the row is its own source. On a joint
        site only the image's queries are edited; image_from_source takes the map over the image's
        keys from the source too.
        """
        start, stop = self.spans.text_keys or (0, self.k.shape[-2])
        routing = Routing.of(stop - start, token_map, blend, gain)
        self.route_by(rows, source, routing, image_from_source=image_from_source)

    def route_by(
        self,
        rows: RowLike | Iterable[RowLike],
        source: RowLike | None,
        routing: Routing,
        *,
        image_from_source: bool = False,
    ) -> None:
        """`route` with the token map and gains prepared once for many calls."""
        targets = self._indices(rows, "rows")
        start, stop = self.spans.text_keys or (0, self.k.shape[-2])
        if routing.tokens != stop - start:
            raise InputError(
                f"route: the token map is for {routing.tokens} tokens; the text of this call "
                f"({self.site.path}) has {stop - start}"
            )
        joint = self.site.kind == "joint"
        origin = None if source is None else self._index(source, "route: source")
        # What is not moved from the source, over the image's keys of a joint site, stays.
        stays = not (joint and image_from_source)
        moves = routing.moves or not stays
        if routing.keeps_alone if origin is None else routing.keeps_own and not moves:
            return
        if origin is None:
            maps = {"from_own": routing.alone(self.v, start)}
        else:
            maps = {}
            if moves:
                maps["from_source"] = routing.source(self.v, start, float(not stays))
            maps["from_own"] = routing.own(self.v, start, float(stays))
        operation = does.route(
            origin,
            **maps,
            vanishes="from_source" in maps and routing.drops_own and not (joint and stays),
            stays=stays,
            queries=self._image_queries() if joint else None,
        )
        self._note(Stage.TOKEN_MAP, "route", targets, operation)

    def add(
        self,
        rows: RowLike | Iterable[RowLike],
        k: Tensor,
        v: Tensor,
        *,
        scale: float = 1.0,
        mask: Tensor | None = None,
    ) -> None:
        """Add scale * mask(query) * softmax(q k^T) v, in its own softmax (IP-Adapter).

        k, v: [heads, tokens, channels] or with a leading sub-batch; mask: [N].
        """
        targets = self._indices(rows, "rows")
        new_k, _ = self._ref(k, self.k, "add: k")
        new_v, _ = self._ref(v, self.v, "add: v")
        if new_k.base.shape[-2] != new_v.base.shape[-2]:
            raise InputError(
                f"add: k has {new_k.base.shape[-2]} tokens and v has {new_v.base.shape[-2]}; they "
                "must be as many"
            )
        weight: Tensor | float = scale
        if mask is not None:
            weight = self._per_query(mask, "add: mask") * scale
        if scale == 0.0 or new_k.base.shape[-2] == 0 or (mask is not None and is_all(mask, 0)):
            return
        segments = (Segment(new_k, new_v),)

        def term(row: int) -> Term:
            return Term(Ref(self.q, row), segments, self.scale, weight=weight, extra=True)

        self._note(Stage.ADDITION, "add", targets, does.add(term))

    def skip(self, rows: RowLike | Iterable[RowLike]) -> None:
        """Replace the probabilities of `rows` by the identity: the output is v (PAG)."""
        targets = self._indices(rows, "rows")
        if self.q.shape[-2] != self.k.shape[-2]:
            raise UnsupportedError(
                f"skip: {self.site.path} has {self.q.shape[-2]} queries and {self.k.shape[-2]} "
                "keys; identity attention needs a self-attention site"
            )
        self._note(Stage.OVERRIDE, "skip", targets, does.skip)

    def probabilities(self, rows: RowLike | Iterable[RowLike], fn: Probabilities) -> None:
        """The escape hatch: `fn` gets [sub-batch, heads, N, M] and returns it edited.

        It costs the matrix, for these rows at this site, and the report says so. Prefer a verb.
        """
        targets = self._indices(rows, "rows")
        self._note(Stage.OVERRIDE, "probabilities", targets, does.probabilities(fn))

    def read(self, rows: RowLike | Iterable[RowLike], tokens: Sequence[int], into: Sink) -> None:
        """Hand the edited probabilities of some keys, averaged over heads, to `into(row, map)`.

        tokens: positions among the text's keys (all keys where there is no text); the map is
        [sub-batch, N, len(tokens)], of image queries only on a joint site, differentiable.
        """
        start, stop = self.spans.text_keys or (0, self.k.shape[-2])
        positions = tuple(start + int(t) for t in tokens)
        if not positions or min(positions) < start or max(positions) >= stop:
            raise InputError(
                f"read: tokens={tuple(tokens)} are not among the {stop - start} keys of "
                f"{self.site.path}"
            )
        for index in self._indices(rows, "rows"):
            self.read_outs.append(ReadOut(self.rows[index], positions, into))

    # -- folding -------------------------------------------------------------------------------

    def plain(self, row: int) -> Term:
        """The term of a row that nothing rewrote."""
        own = Segment(Ref(self.k, row), Ref(self.v, row), mask_row=row)
        return Term(Ref(self.q, row), (own,), self.scale)

    def fold(self) -> Sum:
        """The finished sum: every operation applied, stage by stage, in order inside a stage."""
        return does.folded(self.plain, self.operations, self.q.shape[0], self.mask)

    def _note(
        self, stage: Stage, verb: str, rows: tuple[int, ...], apply: Callable[..., None]
    ) -> None:
        if rows:
            self.operations.append(Operation(stage, self.editor, verb, rows, apply))

    # -- arguments -----------------------------------------------------------------------------

    def _index(self, row: RowLike, name: str) -> int:
        index = row.index if isinstance(row, Row) else int(row)
        if not 0 <= index < self.q.shape[0]:
            raise InputError(f"{name}: row {index} is not in this call of {self.q.shape[0]} rows")
        return index

    def _indices(self, rows: RowLike | Iterable[RowLike], name: str) -> tuple[int, ...]:
        many = (rows,) if isinstance(rows, Row | int) else rows
        return tuple(dict.fromkeys(self._index(row, name) for row in many))

    def _ref(self, value: Tensor | RowLike, own: Tensor, name: str) -> tuple[Ref, int | None]:
        if not isinstance(value, Tensor):
            index = self._index(value, name)
            return Ref(own, index), index
        return Ref(stacked(value, own, f"{name} of {self.site.path}"), 0), None

    def _per_query(self, value: Tensor, name: str) -> Tensor:
        if tuple(value.shape) != (self.q.shape[-2],):
            raise InputError(
                f"{name} is {tuple(value.shape)}; {self.site.path} has {self.q.shape[-2]} queries"
            )
        return cast(value, self.q)

    def _image_queries(self) -> Tensor:
        start, stop = self.spans.image_queries
        weight = self.q.new_zeros(self.q.shape[-2])
        weight[start:stop] = 1
        return weight
