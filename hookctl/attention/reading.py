"""The verbs by which an editor looks: maps of the finished terms, edits included, and no matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hookctl.attention.call_data import CallData, RowLike
from hookctl.attention.rewriting import OutputRead, ReadOut, Sink
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
        span = self.spans.text_keys or (0, self.k.shape[-2])
        positions = self._within(span, "read: tokens", tokens, "keys")
        self._look(rows, positions, into, heads=heads)

    def read_queries(
        self,
        rows: RowLike | Iterable[RowLike],
        queries: Sequence[int],
        into: Sink,
        *,
        of_text: bool = False,
        reference: int | None = None,
    ) -> None:
        """Hand what some queries attend to, averaged over heads, to `into(row, lines)`.

        queries: positions among the image's queries, or of_text: among the text's, which ask on
        joint sites; lines: their edited probabilities of the image's keys, or of a reference's,
        [sub-batch, len(queries), keys], float32 or finer, differentiable. Costs len(queries) x M
        scores of each head, and no matrix.
        """
        keys = self._keys_of_image("read_queries", reference)
        span = self._text_queries() if of_text else self.spans.image_queries
        what = "text queries" if of_text else "image queries"
        places = self._within(span, "read_queries: queries", queries, what)
        self._look(rows, keys, into, queries=places)

    def read_reference(self, rows: RowLike | Iterable[RowLike], reference: int, into: Sink) -> None:
        """Hand how much each place looks at a whole reference image to `into(row, map)`.

        map: the edited probabilities of the reference's keys, summed over them and averaged over
        heads, [sub-batch, N, 1], of the image's queries; one further channel of values, no matrix.
        """
        self._look(rows, self._keys_of_image("read_reference", reference), into, joined=True)

    def marginals(
        self,
        rows: RowLike | Iterable[RowLike],
        into: Sink,
        *,
        reference: int | None = None,
    ) -> None:
        """Hand the attention that each image key receives to `into(row, sums)` (SAG).

        sums: the edited probabilities, averaged over heads and summed over the image's queries,
        [sub-batch, image keys], or of the keys of a reference; no matrix is formed.
        """
        self._look(rows, self._keys_of_image("marginals", reference), into, summed=True)

    def read_outputs(
        self, rows: RowLike | Iterable[RowLike], into: Sink, *, text: str | None = None
    ) -> None:
        """Hand the output of the image's queries to `into(row, outputs)` (ConceptAttention).

        outputs: what the call gives, edits included, heads side by side as the model's `to_out`
        takes them: [sub-batch, image queries, heads x channels]; no matrix is formed. text: of a
        further text (`Editor.context`) instead, [sub-batch, its tokens, heads x channels]: on a
        joint site its tokens ask the image and each other. Raises UnsupportedError on other sites,
        where texts ask nothing.
        """
        if text is not None:
            self._text_place(text)  # known by this name
            if self.site.kind != "joint":
                raise UnsupportedError(
                    f"read_outputs: text {text!r} has no queries at {self.site.path}, which is "
                    f"no joint site but a {self.site.kind} one; leave text out, or leave the site "
                    "out with sites="
                )
        for index in self._indices(rows, "rows"):
            self.output_reads.append(OutputRead(self.rows[index], into, text, self.editor))

    def _look(
        self,
        rows: RowLike | Iterable[RowLike],
        positions: tuple[int, ...],
        into: Sink,
        **how: Any,
    ) -> None:
        for index in self._indices(rows, "rows"):
            read_out = ReadOut(self.rows[index], positions, into, editor=self.editor, **how)
            self.read_outs.append(read_out)

    def _within(
        self, span: tuple[int, int], name: str, given: Sequence[int], what: str
    ) -> tuple[int, ...]:
        """Positions in the call of some that count from the start of a span."""
        start, stop = span
        found = tuple(start + int(i) for i in given)
        if not found or min(found) < start or max(found) >= stop:
            raise InputError(
                f"{name}={tuple(given)} are not among the {stop - start} {what} of {self.site.path}"
            )
        return found

    def _keys_of_image(self, verb: str, reference: int | None = None) -> tuple[int, ...]:
        if self.spans.image_keys is None:
            raise UnsupportedError(
                f"{verb}: {self.site.path} attends to a text; give a self-attention site"
            )
        if reference is None:
            return tuple(range(*self.spans.image_keys))
        return tuple(range(*self._reference(reference, verb).keys))

    def _text_queries(self) -> tuple[int, int]:
        """Where the text stands among the queries."""
        text, n, m = self.spans.text_keys, self.q.shape[-2], self.k.shape[-2]
        if self.site.kind != "joint" or text is None or n != m:
            raise UnsupportedError(
                f"read_queries: no text asks at {self.site.path}, a {self.site.kind} site; give "
                "joint sites, where text and image are one sequence"
            )
        return text
