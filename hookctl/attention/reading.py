"""The verbs by which an editor looks: maps of the finished terms, edits included, and no matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hookctl.attention.call_data import CallData, RowLike
from hookctl.attention.rewriting import ReadOut, Sink
from hookctl.errors import InputError, UnsupportedError


class ReadableCall(CallData):
    """An attention call that can be looked at."""

    def read(
        self,
        rows: RowLike | Iterable[RowLike],
        tokens: Sequence[int],
        into: Sink,
        *,
        heads: bool = False,
    ) -> None:
        """Hand the edited probabilities of some keys, averaged over heads, to `into(row, map)`.

        tokens: positions among the text's keys (all keys where there is no text); the map is
        [sub-batch, N, len(tokens)], of image queries only on a joint site, differentiable.
        heads: a map for each head instead, [sub-batch, heads, N, len(tokens)].
        """
        start, stop = self.spans.text_keys or (0, self.k.shape[-2])
        positions = tuple(start + int(t) for t in tokens)
        if not positions or min(positions) < start or max(positions) >= stop:
            raise InputError(
                f"read: tokens={tuple(tokens)} are not among the {stop - start} keys of "
                f"{self.site.path}"
            )
        for index in self._indices(rows, "rows"):
            self.read_outs.append(
                ReadOut(self.rows[index], positions, into, heads=heads, editor=self.editor)
            )

    def read_queries(
        self, rows: RowLike | Iterable[RowLike], queries: Sequence[int], into: Sink
    ) -> None:
        """Hand what some queries attend to, averaged over heads, to `into(row, lines)`.

        queries: positions among the image's queries; lines: their edited probabilities of the
        image's keys, [sub-batch, len(queries), image keys], float32 or finer, differentiable. Costs
        len(queries) x M scores of each head, and no matrix.
        """
        keys = self._keys_of_image("read_queries")
        start, stop = self.spans.image_queries
        places = tuple(start + int(n) for n in queries)
        if not places or min(places) < start or max(places) >= stop:
            raise InputError(
                f"read_queries: queries={tuple(queries)} are not among the {stop - start} image "
                f"queries of {self.site.path}"
            )
        for index in self._indices(rows, "rows"):
            self.read_outs.append(
                ReadOut(self.rows[index], keys, into, queries=places, editor=self.editor)
            )

    def marginals(self, rows: RowLike | Iterable[RowLike], into: Sink) -> None:
        """Hand the attention that each image key receives to `into(row, sums)` (SAG).

        sums: the edited probabilities, averaged over heads and summed over the image's queries,
        [sub-batch, image keys]; no matrix is formed.
        """
        keys = self._keys_of_image("marginals")
        for index in self._indices(rows, "rows"):
            self.read_outs.append(
                ReadOut(self.rows[index], keys, into, summed=True, editor=self.editor)
            )

    def _keys_of_image(self, verb: str) -> tuple[int, ...]:
        if self.spans.image_keys is None:
            raise UnsupportedError(
                f"{verb}: {self.site.path} attends to a text; give a self-attention site"
            )
        return tuple(range(*self.spans.image_keys))
