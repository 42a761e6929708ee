"""An attention call without its verbs: tensors, their addresses, and what is to be done to them.

Rows and tensors that editors give are checked here against what the call holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Never

import torch
from torch import Tensor

from hookctl.address.clock import Clock
from hookctl.address.rows import Row, Rows
from hookctl.address.sites import Grid, ImageTokens, Site, grid_of
from hookctl.attention.arguments import cast, stacked, version_of
from hookctl.attention.query_lists import TextPlace
from hookctl.attention.rewriting import (
    Operation,
    OutputRead,
    ReadOut,
    Rewriting,
    Stage,
    folded,
)
from hookctl.attention.spans import Reference, Spans, spans_of
from hookctl.attention.term import Ref, Sum, Terms
from hookctl.attention.text_rows import Apart
from hookctl.errors import InputError, UnsupportedError, check_returned, naming

RowLike = Row | int


class CallData:
    """An attention call without its verbs; `AttentionCall` says what its attributes are."""

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
        part: bool = False,
        text_tokens: int | None = None,
        joint_order: str | None = None,
        images: ImageTokens | None = None,
        index: int = 0,
        context: Mapping[str, TextPlace | tuple[int, int]] | None = None,
        prompts: Sequence[str] = (),
    ) -> None:
        self.site, self.rows, self.clock, self.index = site, rows, clock, index
        self._q, self._k, self._v = q, k, v
        self.prompts = tuple(prompts)
        self.mask, self.scale, self.latent = mask, scale, tuple(latent)
        self.part = part
        self.sequence = text_tokens, joint_order, images
        self._context = {name: TextPlace(*place) for name, place in (context or {}).items()}
        self.operations: list[Operation] = []
        self.read_outs: list[ReadOut] = []
        # Of further texts that do not see all images: by name and row, which of their keys they do.
        self.apart: Apart | None = None  # further texts that stand in rows of their own
        self.seen_by_texts: dict[str, dict[int, Tensor]] = {}
        self.output_reads: list[OutputRead] = []
        self.editor: Any = None

    @property
    def q(self) -> Tensor:
        """Queries, [rows, sub-batch, heads, N, channels]."""
        return self._q

    @q.setter
    def q(self, value: Never) -> None:
        self._refuse("q")

    @property
    def k(self) -> Tensor:
        """Keys, [rows, sub-batch, heads, M, channels]."""
        return self._k

    @k.setter
    def k(self, value: Never) -> None:
        self._refuse("k")

    @property
    def v(self) -> Tensor:
        """Values, [rows, sub-batch, heads, M, channels]."""
        return self._v

    @v.setter
    def v(self, value: Never) -> None:
        self._refuse("v")

    def _refuse(self, name: str) -> None:
        who = getattr(self.editor, "name", "editor")
        raise InputError(
            f"{who}: call.{name} = ... at {self.site.path}: {name} can't be assigned; use "
            f"call.replace(rows, {name}=...), or call.borrow(rows, {name}=row)"
        )

    @cached_property
    def spans(self) -> Spans:
        """Where the text and the image stand among queries and keys."""
        return spans_of(
            self.site,
            self.q.shape[-2],
            self.k.shape[-2],
            *self.sequence,
        )

    @cached_property
    def grid(self) -> Grid | None:
        """The grid of the image queries, or None if they form none over the latent."""
        start, stop = self.spans.image_queries
        images = self.sequence[2]
        if images is not None and images.grids[images.target].tokens == stop - start:
            return images.grids[images.target]
        if self.site.kind in ("text", "temporal"):
            return None
        return grid_of(stop - start, self.latent, self.q.shape[1])

    @cached_property
    def references(self) -> tuple[Reference, ...]:
        """The reference images of an edit model, in the order of the sequence; () for others."""
        images, spans = self.sequence[2], self.spans.references
        grids = () if images is None else images.references
        return tuple(map(Reference, spans, grids))

    def _reference(self, index: int, who: str) -> Reference:
        """A reference image by its number, for an editor or verb named `who`.

        Raises InputError for one that is not in this call.
        """
        if not 0 <= index < len(self.references):
            raise InputError(
                f"{who}: references[{index}] is not in the sequence of {self.site.path}, which "
                f"holds {len(self.references)}"
            )
        return self.references[index]

    def require_grid(self, who: str) -> Grid:
        """The grid, for an editor (named `who`) to which places mean something.

        Raises UnsupportedError if there is none.
        """
        if self.grid is None:
            raise UnsupportedError(
                f"{who}: the queries of {self.site.path} form no grid over the latent, so they "
                "have no places in the image; leave it out with sites="
            )
        return self.grid

    def context(self, name: str) -> tuple[Tensor, Tensor]:
        """k and v of an extra text that an editor's `context` gave, stacks like `k` and `v`."""
        if self.apart is not None and name in self.apart.rows.rows:
            _, segment = self.apart.beside(name, self.q)
            k, v = (x.base[..., self.apart.images :, :] for x in (segment.k, segment.v))
            return k, v
        start, stop, row = self._text_place(name)
        k, v = (x[..., start:stop, :] for x in (self._full_k, self._full_v))
        if row is not None:
            k, v = (x[row : row + 1].expand(x.shape) for x in (k, v))
        return k, v

    def _text_place(self, name: str) -> TextPlace:
        """Where an extra text stands in k and v."""
        if self.apart is not None:
            raise UnsupportedError(
                f"text {name!r}: the further texts of {self.site.path} stand in rows of their own, "
                "with the image at positions of their own; of all verbs, divide and outputs take "
                "them"
            )
        if name not in self._context:
            raise InputError(
                f"context {name!r} is not in this call; there is: {sorted(self._context) or 'none'}"
            )
        return self._context[name]

    def set_context_source(self, k: Tensor, v: Tensor) -> None:
        """Keep k and v with the extra texts, which `context` slices."""
        self._full_k, self._full_v = k, v
        self._with_image: dict[str, tuple[Tensor, Tensor]] = {}

    def _with_image_keys(self, name: str) -> tuple[Tensor, Tensor]:
        """k and v of an extra text, on a joint site with the images' (those of references too)
        before them; made once, so that rows which use them are evaluated in one call."""
        if name not in self._with_image:
            self._text_place(name)
            k, v = self.context(name)
            if self.site.kind == "joint":
                if self.spans.image_keys is None:
                    raise UnsupportedError(
                        f"text {name!r}: it is not known which keys of {self.site.path} are the "
                        "image's, which must stand beside it; leave the site out with sites="
                    )
                start, stop = self._images
                k = torch.cat([self.k[..., start:stop, :], k], -2)
                v = torch.cat([self.v[..., start:stop, :], v], -2)
            self._with_image[name] = k, v
        return self._with_image[name]

    def show_to(self, editor: Any) -> None:
        """Let an editor rewrite this call."""
        self.editor = editor
        given = {"q": self.q, "k": self.k, "v": self.v, "mask": self.mask}
        versions = {name: version_of(x) for name, x in given.items()}
        with naming(editor.name, "attention", self.site.path):
            returned = editor.attention(self)
        for name, x in given.items():
            if version_of(x) != versions[name]:
                cure = "call.bias or call.restrict" if name == "mask" else "call.replace"
                raise InputError(
                    f"{editor.name}.attention changed call.{name} in place at {self.site.path}, "
                    "which belongs to the model and to the other editors; leave it as it is and "
                    f"use {cure}(rows, ...)"
                )
        if returned is not None:
            check_returned(
                editor.name,
                "attention",
                returned,
                "rewrite the call by its verbs, such as call.replace(rows, v=...)",
            )

    @property
    def _images(self) -> tuple[int, int]:
        """Where the keys of a joint site are those of images: all but the text's."""
        text, keys = self.spans.text_keys, self.k.shape[-2]
        if text is None:
            return 0, keys
        return (text[1], keys) if text[0] == 0 else (0, text[0])

    # -- folding -------------------------------------------------------------------------------

    def fold(self) -> Sum:
        """The finished sum: every operation applied, stage by stage, in order inside a stage."""
        terms = Terms(self._q, self._k, self._v, self.scale)
        return folded(terms, self.operations, len(self._q), self.mask)

    def _note(self, stage: Stage, verb: str, rows: tuple[int, ...], rewriting: Rewriting) -> None:
        if rows:
            self.operations.append(Operation(stage, self.editor, verb, rows, rewriting))

    # -- arguments -----------------------------------------------------------------------------

    def _index(self, row: RowLike, name: str) -> int:
        index = row.index if isinstance(row, Row) else int(row)
        if not 0 <= index < len(self._q):
            raise InputError(f"{name}: row {index} is not in this call of {len(self._q)} rows")
        return index

    def _indices(self, rows: RowLike | Iterable[RowLike], name: str) -> tuple[int, ...]:
        if isinstance(rows, Row | int):
            return (self._index(rows, name),)
        return tuple(dict.fromkeys([self._index(row, name) for row in rows]))

    def _ref(self, value: Tensor | RowLike, own: Tensor, name: str) -> tuple[Ref, int | None]:
        if not isinstance(value, Tensor):
            index = self._index(value, name)
            return Ref(own, index), index
        return Ref(stacked(value, own, f"{name} of {self.site.path}"), 0), None

    def _refs(self, value: Tensor, own: Tensor, rows: tuple[int, ...], name: str) -> dict[int, Ref]:
        """A tensor that stands for the own one of each row, or one for all of them."""
        if value.dim() == 5:
            wanted = (len(rows), *own.shape[1:])
            if tuple(value.shape) != wanted:
                raise InputError(
                    f"replace: {name} is {tuple(value.shape)}; these {len(rows)} rows of "
                    f"{self.site.path} have {wanted}"
                )
            stack = cast(value, own)
            return {row: Ref(stack, place) for place, row in enumerate(rows)}
        ref, _ = self._ref(value, own, f"replace: {name}")
        if value.shape[-2] != own.shape[-2]:
            raise InputError(
                f"replace: {name} has {value.shape[-2]} tokens; the own one of {self.site.path} "
                f"has {own.shape[-2]}"
            )
        return dict.fromkeys(rows, ref)

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
