"""`AttentionCall`: what an editor sees of one attention call, and the verbs that rewrite it.

Verbs do not compute: each adds an operation with its stage, and when all editors have seen the
call the operations are folded into terms (substitution, extension, restriction, token map,
addition, override, combination, read-out; in the order of the editors inside a stage). Editors
therefore compose whatever order they were written in, and nothing is evaluated twice. A verb that
would change nothing (scale 0, a bias of zeros, a row that borrows from itself) adds nothing, and
the call stays the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hookctl.attention import verbs
from hookctl.attention.arguments import cast, is_all, is_finite, is_same, regions_of
from hookctl.attention.call_data import RowLike
from hookctl.attention.combination import CombiningCall
from hookctl.attention.rewriting import Probabilities, Stage
from hookctl.attention.term import Ref, Segment
from hookctl.errors import InputError, UnsupportedError


class AttentionCall(CombiningCall):
    """One attention call of one site: what an editor sees of it, and the verbs that rewrite it.

    What follows is there to be read. A verb takes the rows to change, a `Row`, its index or several
    of them, and changes those alone.

    site: the attention layer, a `Site`: its path, kind ("self", "cross", "joint", "temporal",
        "text", "gated"), place in the model and resolution relative to the latent.
    q, k, v: queries [rows, sub-batch, heads, N, channels], keys and values [rows, sub-batch,
        heads, M, channels], after projection, norm and rotary embedding. The sub-batch is 1 but
        for video models, where a row has several frames or positions.
    rows: whose the batch rows are, `Rows` in the order of q, k and v.
    clock: when, the `Clock` of the denoiser call: its step, of how many.
    grid: the grid of the image's queries, `height, width = call.grid`, in tokens, with
        `.frames`; None if they form none over the latent (`require_grid` refuses that).
    spans: where the image stands among the queries and text and image among the keys, (start,
        stop) in tokens: `image_queries`, `image_keys` and `text_keys`, the latter two None where
        there are no such keys.
    references: the reference images of an edit model, each with `.keys`, (start, stop) among the
        keys, and `.grid`; () where the image that is drawn is the only one.
    prompts: the texts of the run, `prompts[row.prompt]`; () if the pipeline was given embeddings.
    scale: factor of the scores, softmax(scale q k^T + mask) v; mostly channels ** -0.5.
    mask: the model's own, [rows | 1, sub-batch | 1, heads | 1, N | 1, M], added to the scores, or
        of bools that are True where a key is seen; None if there is none.
    index: which attention call of its module's forward this is; the model's own is 0, those of
        adapters (IP-Adapter) follow.
    latent: sides of the latent, ([frames,] height, width), in latent pixels; () if unknown.
    part: whether the model is shown a part of the image here, or a text for a region of it
        (`MultiDiffusion`).
    """

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
        stacks = ("q", q, self._q), ("k", k, self._k), ("v", v, self._v)
        sources = {
            name: Ref(stack, self._index(row, f"borrow: {name}"))
            for name, row, stack in stacks
            if row is not None
        }
        if not sources:
            raise InputError("borrow: give at least one of q=, k=, v=, the row to take it from")
        weight = None if where is None else self._per_query(where, "borrow: where")
        taken = {ref.row for ref in sources.values()}
        targets = tuple([t for t in targets if taken != {t}])
        if where is not None and is_all(where, 0):
            return
        if where is not None and is_all(where, 1):
            weight = None
        mask_row = sources["k"].row if "k" in sources else None
        self._note(Stage.SUBSTITUTION, "borrow", targets, verbs.borrow(sources, mask_row, weight))

    def replace(
        self,
        rows: RowLike | Iterable[RowLike],
        *,
        q: Tensor | None = None,
        k: Tensor | None = None,
        v: Tensor | None = None,
        where: Tensor | None = None,
    ) -> None:
        """Put tensors in the place of the own q, k or v of `rows` (AdaIN, injected features).

        q, k, v: [heads, tokens, channels], with a leading sub-batch, or of each row,
        [rows, sub-batch, heads, tokens, channels]; as many tokens as the row's own. Other rows
        that borrow from a replaced row, or attend to it, take what the model gave it. where:
        per-query weight [N] of the replaced form; the own form keeps 1 - where.
        """
        targets = self._indices(rows, "rows")
        given = {n: x for n, x in {"q": q, "k": k, "v": v}.items() if x is not None}
        if not given:
            raise InputError("replace: give at least one of q=, k=, v=, the tensor to put there")
        own = {"q": self.q, "k": self.k, "v": self.v}
        refs = {name: self._refs(x, own[name], targets, name) for name, x in given.items()}
        changed = tuple(
            t for t in targets if any(not is_same(refs[n][t].tensor, own[n][t]) for n in refs)
        )
        weight = None if where is None else self._per_query(where, "replace: where")
        if where is not None and is_all(where, 0):
            return
        if where is not None and is_all(where, 1):
            weight = None
        self._note(Stage.SUBSTITUTION, "replace", changed, verbs.replace_own(refs, weight))

    def extend(
        self,
        rows: RowLike | Iterable[RowLike],
        k: Tensor | RowLike,
        v: Tensor | RowLike,
        *,
        shift: Tensor | float | None = None,
        share: float = 1.0,
    ) -> None:
        """Let `rows` attend to further keys in the same softmax (StyleAligned, reference).

        k, v: a row of this call, or tensors [heads, tokens, channels] (or with a leading
        sub-batch); shift: added to the scores of the new keys, a number or [tokens]; share: weight
        of the extended form, the own form keeps 1 - share.
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
        if not 0.0 <= share <= 1.0:
            raise InputError(f"extend: share={share!r}; give a weight from 0 to 1")
        if tokens and share != 0.0:
            segment = Segment(new_k, new_v, shift, mask_row)
            self._note(Stage.EXTENSION, "extend", targets, verbs.extend(segment, float(share)))

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
            self._note(Stage.RESTRICTION, "restrict", targets, verbs.restrict(regions))

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
        keys = cast(key_factors, self.k)
        queries = None if query_factors is None else cast(query_factors, self.q)
        self._note(Stage.RESTRICTION, "bias", targets, verbs.bias(queries, keys))

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
        weight = None if mask is None else self._per_query(mask, "add: mask")
        if scale == 0.0 or new_k.base.shape[-2] == 0 or (mask is not None and is_all(mask, 0)):
            return
        rewriting = verbs.add(self.q, Segment(new_k, new_v), self.scale, scale, weight)
        self._note(Stage.ADDITION, "add", targets, rewriting)

    def skip(self, rows: RowLike | Iterable[RowLike], *, where: Tensor | None = None) -> None:
        """Replace the probabilities of `rows` by the identity: the output is v (PAG).

        where: per-query weight [N] of the identity; the attention keeps 1 - where.
        """
        targets = self._indices(rows, "rows")
        if self.q.shape[-2] != self.k.shape[-2]:
            raise UnsupportedError(
                f"skip: {self.site.path} has {self.q.shape[-2]} queries and {self.k.shape[-2]} "
                "keys; identity attention needs a self-attention site"
            )
        weight = None if where is None else self._per_query(where, "skip: where")
        if where is None or not is_all(where, 0):
            self._note(Stage.OVERRIDE, "skip", targets, verbs.skip(weight))

    def isolate(self, rows: RowLike | Iterable[RowLike]) -> None:
        """Let every image token of `rows` see no other image token (PAG).

        The output of a self-attention site is then v; on a joint site image tokens attend to
        themselves, to the text and to the references of an edit model, whose own queries attend to
        everything.
        """
        queries, keys = self.spans.image_queries, self.spans.image_keys
        if self.site.kind != "joint":
            self.skip(rows)
        elif keys is None or keys[1] - keys[0] != queries[1] - queries[0]:
            raise UnsupportedError(
                f"isolate: {self.site.path} has other queries than keys; leave it out with sites="
            )
        else:
            targets = self._indices(rows, "rows")
            self._note(Stage.OVERRIDE, "isolate", targets, verbs.isolate(self.spans, self.mask))

    def map_queries(
        self, rows: RowLike | Iterable[RowLike], fn: Callable[[Tensor], Tensor]
    ) -> None:
        """Pass the queries of `rows`, own or substituted, through a function (SEG).

        fn: maps a stack [rows, sub-batch, heads, N, channels] to its like.
        """
        targets = self._indices(rows, "rows")
        self._note(Stage.EXTENSION, "map queries", targets, verbs.map_queries(fn))

    def probabilities(self, rows: RowLike | Iterable[RowLike], fn: Probabilities) -> None:
        """The escape hatch: `fn` gets [sub-batch, heads, N, M] and returns it edited.

        It costs the matrix, for these rows at this site, and the report says so. Prefer a verb.
        """
        targets = self._indices(rows, "rows")
        self._note(Stage.OVERRIDE, "probabilities", targets, verbs.probabilities(fn))
