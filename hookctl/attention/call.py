"""`AttentionCall`: what an editor sees of one attention call, and the verbs that rewrite it.

Verbs do not compute: they note an operation with its stage, and the stack folds the operations
into terms when every editor has spoken (substitution, extension, restriction, token map,
addition, override, read-out; the order of the editors inside a stage). Editors therefore compose
whatever order they were written in, and nothing is evaluated twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hookctl.address.clock import Clock
from hookctl.address.rows import Row, Rows
from hookctl.address.sites import Grid, Site, grid_of
from hookctl.attention.term import Ref, Regions, Segment, Sum, Term, ValueMap
from hookctl.errors import InputError, UnsupportedError


class Stage(IntEnum):
    """The order in which operations are folded into terms."""

    SUBSTITUTION = 0
    EXTENSION = 1
    RESTRICTION = 2
    TOKEN_MAP = 3
    ADDITION = 4
    OVERRIDE = 5
    READ_OUT = 6


Terms = dict[int, tuple[Term, ...]]
RowLike = Row | int
Probabilities = Callable[[Tensor], Tensor]
Sink = Callable[[Row, Tensor], None]


@dataclass(frozen=True, eq=False)
class Operation:
    stage: Stage
    editor: Any
    verb: str
    rows: tuple[int, ...]
    fold: Callable[[Terms, Terms], None]


@dataclass(frozen=True, eq=False)
class ReadOut:
    """A request for the probabilities of some key tokens, averaged over heads."""

    row: Row
    tokens: tuple[int, ...]
    into: Sink


@dataclass(frozen=True)
class Spans:
    """Where text and image tokens stand: (start, stop) among queries and among keys."""

    image_queries: tuple[int, int]
    image_keys: tuple[int, int] | None
    text_keys: tuple[int, int] | None


class Routing:
    """A token map with its gains, prepared once and used at every site and turn.

    source_map: T diag(blend * gain), [text, text] or a diagonal [text]; own_gain: [text].
    """

    def __init__(self, source_map: Tensor, own_gain: Tensor) -> None:
        self.tokens = own_gain.shape[0]
        self.moves = bool(source_map.any())
        self.keeps_own = bool((own_gain == 1).all())
        self.drops_own = not bool(own_gain.any())
        self._maps = {"source": source_map, "own": own_gain}
        self._cast: dict[Any, Tensor] = {}

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
                    f"route: {name} is {tuple(value.shape)}; the text has {tokens} tokens"
                )
        if token_map is not None and tuple(token_map.shape) != (tokens, tokens):
            raise InputError(
                f"route: token_map is {tuple(token_map.shape)}; the text has {tokens} tokens, "
                f"so give [{tokens}, {tokens}]"
            )
        b, g = (torch.as_tensor(given[name]).double() for name in ("blend", "gain"))
        moved = b * g if token_map is None else token_map.to(b) * (b * g)
        return cls(moved, (1 - b) * g)

    def source(self, like: Tensor) -> Tensor:
        return self._as(like, "source")

    def own(self, like: Tensor) -> Tensor:
        return self._as(like, "own")

    def _as(self, like: Tensor, which: str) -> Tensor:
        key = (which, like.dtype, like.device)
        if key not in self._cast:
            self._cast[key] = self._maps[which].to(like)
        return self._cast[key]


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
        self.overrides: dict[int, list[Probabilities]] = {}
        self.editor: Any = None

    # -- where ---------------------------------------------------------------------------------

    @cached_property
    def spans(self) -> Spans:
        """Where the text and the image stand among queries and keys."""
        n, m = self.q.shape[-2], self.k.shape[-2]
        if self.site.kind == "cross":
            return Spans((0, n), None, (0, m))
        if self.site.kind != "joint":
            return Spans((0, n), (0, m), None)
        text = self._text_tokens
        if text is None or text >= m:
            raise UnsupportedError(
                f"{self.site.path}: the length of the text in this joint sequence of {m} tokens "
                "is unknown"
            )
        if self._joint_order == "image_text":
            return Spans((0, n if n < m - text else m - text), (0, m - text), (m - text, m))
        return Spans((n - (m - text), n), (text, m), (0, text))

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
        sources = {n: None if r is None else self._index(r, n) for n, r in zip("qkv", (q, k, v))}
        if all(source is None for source in sources.values()):
            raise InputError("borrow: give at least one of q=, k=, v=, the row to take it from")
        weight = None if where is None else self._per_query(where, "where")

        def one(term: Term, row: int) -> Term:
            changes: dict[str, Any] = {}
            if sources["k"] is not None:
                changes |= {"k": Ref(self.k, sources["k"]), "mask_row": sources["k"]}
            if sources["v"] is not None:
                changes["v"] = Ref(self.v, sources["v"])
            moved = term.with_own(**changes)
            return moved if sources["q"] is None else replace(moved, q=Ref(self.q, sources["q"]))

        def fold(terms: Terms, before: Terms) -> None:
            for row in targets:
                if all(source in (None, row) for source in sources.values()):
                    continue
                if weight is None:
                    terms[row] = tuple(one(t, row) for t in terms[row])
                else:
                    terms[row] = tuple(
                        part
                        for t in terms[row]
                        for part in (one(t, row).weighted(weight), t.weighted(1 - weight))
                    )

        self._note(Stage.SUBSTITUTION, "borrow", targets, fold)

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
        new_k, mask_row = self._ref(k, self.k, "k")
        new_v, _ = self._ref(v, self.v, "v")
        if new_k.base.shape[-2] != new_v.base.shape[-2]:
            raise InputError(
                f"extend: k has {new_k.base.shape[-2]} tokens and v has {new_v.base.shape[-2]}; "
                "they must be as many"
            )
        segment = Segment(new_k, new_v, shift, mask_row)

        def fold(terms: Terms, before: Terms) -> None:
            for row in targets:
                terms[row] = tuple(replace(t, segments=(*t.segments, segment)) for t in terms[row])

        self._note(Stage.EXTENSION, "extend", targets, fold)

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
        regions = Regions(query_regions.to(self.q.device), key_regions.to(self.q.device))

        def fold(terms: Terms, before: Terms) -> None:
            for row in targets:
                terms[row] = tuple(self._restricted(t, regions) for t in terms[row])

        self._note(Stage.RESTRICTION, "restrict", targets, fold)

    @staticmethod
    def _restricted(term: Term, regions: Regions) -> Term:
        if term.regions is not None:
            raise UnsupportedError("restrict: this row's attention is already restricted")
        extra = sum(s.tokens for s in term.segments[1:])
        # Keys that an extension added belong to every region.
        keys = torch.nn.functional.pad(regions.keys, (0, extra), value=-1)
        return replace(term, regions=Regions(regions.queries, keys) if extra else regions)

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
        keys = key_factors if key_factors.dim() == 2 else key_factors[:, None]
        if query_factors is None:
            query_factors = keys.new_ones(self.q.shape[-2], keys.shape[1])
        wanted = ((self.q.shape[-2], keys.shape[1]), (self.k.shape[-2], keys.shape[1]))
        if (tuple(query_factors.shape), tuple(keys.shape)) != wanted:
            raise InputError(
                f"bias: query_factors {tuple(query_factors.shape)} and key_factors "
                f"{tuple(keys.shape)}; this site needs {wanted[0]} and {wanted[1]}"
            )
        if not bool(keys.any()):
            return
        pair = (query_factors.to(self.q), keys.to(self.q))

        def fold(terms: Terms, before: Terms) -> None:
            for row in targets:
                terms[row] = tuple(replace(t, factors=(*t.factors, pair)) for t in terms[row])

        self._note(Stage.RESTRICTION, "bias", targets, fold)

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
        blend, gain: per token [text] or numbers. source=None rescales the own map. On a joint
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
        origin = None if source is None else self._index(source, "source")
        moves = origin is not None and (routing.moves or (joint and image_from_source))
        if not moves and routing.keeps_own:
            return
        from_source = ValueMap(routing.source(self.v), start, float(image_from_source))
        from_own = ValueMap(routing.own(self.v), start, float(not image_from_source))
        own_vanishes = routing.drops_own and (not joint or image_from_source)
        edited = self._image_queries() if joint else None

        def fold(terms: Terms, before: Terms) -> None:
            for row in targets:
                own = terms[row]
                new: list[Term] = []
                if moves and origin is not None:
                    new += [
                        replace(t.with_own(v=own[0].own.v), maps=(*own[0].maps, from_source))
                        for t in before[origin]
                    ]
                if not own_vanishes:
                    new += [
                        t if routing.keeps_own else replace(t, maps=(*t.maps, from_own))
                        for t in own
                    ]
                if edited is not None:
                    new = [t.weighted(edited) for t in new]
                    new += [t.weighted(1 - edited) for t in own]
                terms[row] = tuple(new)

        self._note(Stage.TOKEN_MAP, "route", targets, fold)

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
        if scale == 0.0:
            return
        new_k, _ = self._ref(k, self.k, "k")
        new_v, _ = self._ref(v, self.v, "v")
        weight: Tensor | float = scale if mask is None else self._per_query(mask, "mask") * scale

        def fold(terms: Terms, before: Terms) -> None:
            for row in targets:
                extra = Term(Ref(self.q, row), (Segment(new_k, new_v),), self.scale, weight=weight)
                terms[row] = (*terms[row], extra)

        self._note(Stage.ADDITION, "add", targets, fold)

    def skip(self, rows: RowLike | Iterable[RowLike]) -> None:
        """Replace the probabilities of `rows` by the identity: the output is v (PAG)."""
        targets = self._indices(rows, "rows")
        if self.q.shape[-2] != self.k.shape[-2]:
            raise UnsupportedError(
                f"skip: {self.site.path} has {self.q.shape[-2]} queries and {self.k.shape[-2]} "
                "keys; identity attention needs a self-attention site"
            )

        def fold(terms: Terms, before: Terms) -> None:
            for row in targets:
                terms[row] = (replace(terms[row][0], maps=(), weight=1.0, value_only=True),)

        self._note(Stage.OVERRIDE, "skip", targets, fold)

    def probabilities(self, rows: RowLike | Iterable[RowLike], fn: Probabilities) -> None:
        """The escape hatch: `fn` gets [sub-batch, heads, N, M] and returns it edited.

        It costs the matrix, for these rows at this site, and the report says so. Prefer a verb.
        """
        targets = self._indices(rows, "rows")
        for row in targets:
            self.overrides.setdefault(row, []).append(fn)
        self._note(Stage.OVERRIDE, "probabilities", targets, lambda terms, before: None)

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

    def plain_terms(self) -> Terms:
        return {
            row: (
                Term(
                    Ref(self.q, row),
                    (Segment(Ref(self.k, row), Ref(self.v, row), mask_row=row),),
                    self.scale,
                ),
            )
            for row in range(self.q.shape[0])
        }

    def fold(self) -> Sum:
        """The finished sum: every operation applied, stage by stage, in order inside a stage."""
        terms = self.plain_terms()
        plain = dict(terms)
        for stage in Stage:
            before = dict(terms)
            for operation in self.operations:
                if operation.stage is stage:
                    operation.fold(terms, before)
        touched = {row for row in terms if terms[row] is not plain[row]} | set(self.overrides)
        return Sum(terms, touched, self.mask)

    def _note(
        self,
        stage: Stage,
        verb: str,
        rows: tuple[int, ...],
        fold: Callable[[Terms, Terms], None],
    ) -> None:
        if rows:
            self.operations.append(Operation(stage, self.editor, verb, rows, fold))

    # -- arguments -----------------------------------------------------------------------------

    def _index(self, row: RowLike, name: str) -> int:
        index = row.index if isinstance(row, Row) else int(row)
        if not 0 <= index < self.q.shape[0]:
            raise InputError(f"{name}: row {index} is not in this call of {self.q.shape[0]} rows")
        return index

    def _indices(self, rows: RowLike | Iterable[RowLike], name: str) -> tuple[int, ...]:
        many = (rows,) if isinstance(rows, Row | int) else tuple(rows)
        return tuple(self._index(row, name) for row in many)

    def _ref(self, value: Tensor | RowLike, own: Tensor, name: str) -> tuple[Ref, int | None]:
        if not isinstance(value, Tensor):
            index = self._index(value, name)
            return Ref(own, index), index
        stack = value if value.dim() == 4 else value[None]
        if stack.dim() != 4 or stack.shape[1] != own.shape[2] or stack.shape[-1] != own.shape[-1]:
            raise InputError(
                f"{name} is {tuple(value.shape)}; {self.site.path} needs "
                f"[heads={own.shape[2]}, tokens, channels={own.shape[-1]}]"
            )
        sub = own.shape[1]
        if stack.shape[0] not in (1, sub):
            raise InputError(f"{name} has a sub-batch of {stack.shape[0]}; give 1 or {sub}")
        return Ref(stack.to(own).expand(sub, *stack.shape[1:])[None], 0), None

    def _per_query(self, value: Tensor, name: str) -> Tensor:
        if tuple(value.shape) != (self.q.shape[-2],):
            raise InputError(
                f"{name} is {tuple(value.shape)}; {self.site.path} has {self.q.shape[-2]} queries"
            )
        return value.to(self.q)

    def _image_queries(self) -> Tensor:
        start, stop = self.spans.image_queries
        weight = self.q.new_zeros(self.q.shape[-2])
        weight[start:stop] = 1
        return weight
