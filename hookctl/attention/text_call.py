"""The verbs over text: how much the image looks at each of its tokens, and at which texts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hookctl.attention import verbs
from hookctl.attention.arguments import remembered
from hookctl.attention.call_data import RowLike
from hookctl.attention.division import Division, check_shift, divided, divided_alone
from hookctl.attention.reading import ReadableCall
from hookctl.attention.rewriting import Stage
from hookctl.attention.term import Ref, Segment
from hookctl.attention.text_regions import TextRegions, divided_by_regions
from hookctl.attention.token_map import Routing
from hookctl.errors import InputError, UnsupportedError


class TextCall(ReadableCall):
    """An attention call whose map over the text can be rewritten."""

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
        given = (stop - start, token_map, blend, gain)
        tensors = [x for x in given if isinstance(x, Tensor)]
        numbers = tuple(None if isinstance(x, Tensor) else x for x in given)
        routing = remembered(lambda: Routing.of(*given), ("route", *numbers), *tensors)
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
        operation = verbs.route(
            origin,
            **maps,
            vanishes="from_source" in maps and routing.drops_own and not (joint and stays),
            stays=stays,
            queries=self._image_queries() if joint else None,
        )
        self._note(Stage.TOKEN_MAP, "route", targets, operation)

    def divide(self, rows: RowLike | Iterable[RowLike], division: Division) -> None:
        """Let the image's queries divide their attention between the own text and further ones.

            out = (1 - sum_r w_r) own + sum_r w_r softmax(q k_r^T) v_r

        division: the weights, by the name of each text (`Editor.context`). On a joint site a
        further text takes the place of the own one beside the image.
        """
        targets = self._indices(rows, "rows")
        start, stop = self.spans.image_queries
        if self.site.kind not in ("cross", "joint"):
            raise UnsupportedError(f"divide: {self.site.path} attends to no text")
        for name, share in division.shares.items():
            if tuple(share.shape) != (stop - start,):
                raise InputError(
                    f"divide: the share of {name!r} is {tuple(share.shape)}; {self.site.path} has "
                    f"{stop - start} image queries"
                )
        if division.nothing:
            return
        weights = division.over_queries(start, self.q.shape[-2] - stop, self.q)
        if self.apart is not None:
            apart = {name: self.apart.beside(name, self.q) for name in weights.shares}
            rewriting = divided(weights, apart, self.scale, self._images)
            self._note(Stage.ADDITION, "divide", targets, rewriting)
            return
        texts = tuple([self._text_place(name) for name in weights.shares])
        for (name, shift), text in zip(weights.shifts.items(), texts, strict=True):
            check_shift(shift, text.stop - text.start, name)
        if self.site.kind == "cross":
            stacks = self.q, self._full_k, self._full_v, self.scale
            rewriting = divided_alone(weights, texts, stacks)
        else:
            parts = {}
            for name, shift in weights.shifts.items():
                k, v = self._with_image_keys(name)
                parts[name] = self.q, Segment(Ref(k, 0), Ref(v, 0), shift)
            rewriting = divided(weights, parts, self.scale, self._images)
        self._note(Stage.ADDITION, "divide", targets, rewriting)

    def _beside_image(self, name: str) -> tuple[Tensor | None, Tensor, Tensor]:
        """k and v of the image and an extra text in the place of the own one, and the queries that
        ask them, None for the own ones: a text in a row of its own has the image there."""
        if self.apart is not None and name in self.apart.rows.rows:
            q, segment = self.apart.beside(name, self.q)
            return q, segment.k.base, segment.v.base
        self._text_place(name)  # known by this name
        return (None, *self._with_image_keys(name))

    def divide_by_regions(self, rows: RowLike | Iterable[RowLike], regions: TextRegions) -> None:
        """Let image tokens see the texts and image tokens of their regions, beside the own text.

            out = b own + (1 - b) softmax(q [k_images; k_1; ...; k_R]) [v_images; v_1; ...; v_R]

        On joint sites alone (Chen et al., arXiv 2411.02395): one softmax over all texts that a
        token may see, and each text sees the image tokens of its region alone. regions: the texts
        by the names of `Editor.context`, the bits of the image's tokens, and b.
        """
        targets = self._indices(rows, "rows")
        (start, stop), n, m = self.spans.image_queries, self.q.shape[-2], self.k.shape[-2]
        if self.site.kind != "joint" or self.spans.image_keys is None or n != m:
            raise UnsupportedError(
                f"divide_by_regions: {self.site.path} is no joint site where text and image ask; "
                "use divide"
            )
        if self.apart is not None:
            raise UnsupportedError(
                f"divide_by_regions: further texts of {self.site.path} stand in rows of their own, "
                "so they share no softmax; use divide (paper=False)"
            )
        if tuple(regions.bits.shape) != (stop - start,):
            raise InputError(
                f"divide_by_regions: bits are {tuple(regions.bits.shape)}; {self.site.path} has "
                f"{stop - start} image queries"
            )
        if regions.base >= 1 or not regions.texts:
            return
        (first, last), drawn = self._images, self.spans.image_keys
        others = drawn[0] - first, last - drawn[1]
        texts = [self.context(name) for name in regions.texts]
        k, v = (
            torch.cat([own[..., first:last, :], *(text[i] for text in texts)], -2)
            for i, own in enumerate((self.k, self.v))
        )
        made = regions.over((start, n - stop, *others), [k.shape[-2] for k, _ in texts], self.q)
        for name in dict.fromkeys(regions.texts):
            seen = regions.seen(name, *others)
            self.seen_by_texts.setdefault(name, {}).update(dict.fromkeys(targets, seen))
        segment = Segment(Ref(k, 0), Ref(v, 0))
        rewriting = divided_by_regions(made, segment, self.q, self.scale, self._images)
        self._note(Stage.ADDITION, "divide by regions", targets, rewriting)
