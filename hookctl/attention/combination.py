"""Outputs of several named terms of a row, weighed by what they are.

    out = sum_j  w_j(query; all o) o_j        o_j = softmax(q K_j^T s) V_j, o_own what is there

The weights may depend on the outputs themselves (NAG's clamp does), so they can't be told before
the terms are evaluated. The row keeps its terms; what an editor makes of their outputs comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hookctl.attention.arguments import cast
from hookctl.attention.call_data import RowLike
from hookctl.attention.division import check_shift
from hookctl.attention.rewriting import Fold, Rewriting, Stage
from hookctl.attention.term import Combination, Ref, Segment, Term
from hookctl.attention.text_call import TextCall
from hookctl.errors import InputError

OWN = "own"
Part = str | RowLike | tuple[Tensor, Tensor]
Weights = Mapping[str, Tensor | float]
Weigh = Callable[[dict[str, Tensor]], Weights]


@dataclass(frozen=True, eq=False)
class _Keys:
    """What a part attends to: k and v, stacks of all rows (or of one), and the row there; q: asked
    in place of the row's own queries."""

    k: Tensor
    v: Tensor
    row: int | None  # None: each row's own
    shift: Tensor | None = None
    masked: bool = False
    q: Tensor | None = None

    def term(self, q: Tensor, scale: float, row: int) -> Term:
        at = row if self.row is None else self.row
        own = Segment(Ref(self.k, at), Ref(self.v, at), self.shift, at if self.masked else None)
        return Term(Ref(q if self.q is None else self.q, row), (own,), scale)


class CombiningCall(TextCall):
    """An attention call whose output can be made of the outputs of several terms."""

    def outputs(
        self,
        rows: RowLike | Iterable[RowLike],
        parts: Mapping[str, Part],
        weigh: Weigh,
        *,
        shifts: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Make the image's output of `rows` of the outputs of several terms (NAG).

            out = sum_j w_j(query) o_j

        parts: what each further term attends to, by a name of its choice: the name of a text
        (`Editor.context`), which on a joint site stands beside the image in the place of the own
        one; another row, for its keys and values; or k and v, [heads, tokens, channels], perhaps
        with a leading sub-batch. "own" is what all editors before made of the row.
        weigh: is given every output, name -> [sub-batch, heads, image queries, channels], and
        returns the weights by name: a number, or [N], [sub-batch, N] or [sub-batch, heads, N]; a
        name that is left out weighs nothing. No matrix is formed.
        shifts: added to the scores of a part's tokens, [tokens], where some do not count.
        """
        targets = self._indices(rows, "rows")
        given = shifts or {}
        if not parts or OWN in parts or not given.keys() <= parts.keys():
            raise InputError(
                f"outputs: parts={sorted(parts)}, shifts={sorted(given)}; name at least one part, "
                f"none of them {OWN!r}, and shifts of parts alone"
            )
        keys = {name: self._keys(name, part, given.get(name)) for name, part in parts.items()}
        scale, queries, where = self.scale, self.spans.image_queries, self.site.path
        weigh_checked = _checked(weigh, (OWN, *parts), where)
        rewriting = _combined(keys, self.q, scale, weigh_checked, queries)
        self._note(Stage.COMBINATION, "outputs", targets, rewriting)

    def _keys(self, name: str, part: Part, shift: Tensor | None) -> _Keys:
        if isinstance(part, str):
            q, k, v = self._beside_image(part)
            if shift is not None:
                text = self.context(part)[0].shape[-2]
                check_shift(shift, text, name, "outputs")
                before = shift.new_zeros(k.shape[-2] - text)  # the image's keys
                shift = cast(torch.cat([before, shift]), self.q)
            return _Keys(k, v, None, shift, q=q)
        if isinstance(part, tuple):
            k, v = (self._ref(x, self.k, f"outputs: {name}")[0].base for x in part)
            if k.shape[-2] != v.shape[-2]:
                raise InputError(
                    f"outputs: {name!r}: k has {k.shape[-2]} tokens and v has {v.shape[-2]}; they "
                    "must be as many"
                )
            if shift is not None:
                check_shift(shift, k.shape[-2], name, "outputs")
                shift = cast(shift, self.q)
            return _Keys(k, v, 0, shift)
        if shift is not None:
            raise InputError(f"outputs: a shift of {name!r}, which is a row with a mask of its own")
        return _Keys(self.k, self.v, self._index(part, f"outputs: {name}"), None, True)


def _combined(
    keys: Mapping[str, _Keys], q: Tensor, scale: float, weigh: Weigh, queries: tuple[int, int]
) -> Rewriting:
    def apply(state: Fold, row: int) -> None:
        terms = {name: of_part.term(q, scale, row) for name, of_part in keys.items()}
        state.combined.setdefault(row, []).append(Combination(terms, weigh, queries))

    return apply


def _checked(weigh: Weigh, names: tuple[str, ...], where: str) -> Weigh:
    """`weigh`, whose weights are checked: [..., 1] or numbers, to multiply the outputs by."""

    def checked(outputs: dict[str, Tensor]) -> Weights:
        own = outputs[OWN]
        sub, heads, n, _ = own.shape
        found = weigh(outputs)
        if not isinstance(found, Mapping) or not found.keys() <= set(names):
            raise InputError(
                f"outputs: weigh returned {found if isinstance(found, Mapping) else type(found)} "
                f"at {where}; return weights by the names {', '.join(names)}"
            )
        made: dict[str, Tensor | float] = {}
        for name, w in found.items():
            if not isinstance(w, Tensor):
                made[name] = float(w)
                continue
            if tuple(w.shape) not in ((n,), (sub, n), (1, n), (sub, heads, n), (sub, 1, n)):
                raise InputError(
                    f"outputs: the weight of {name!r} is {tuple(w.shape)} at {where}; give a "
                    f"number, [{n}], [{sub}, {n}] or [{sub}, {heads}, {n}]"
                )
            made[name] = w[:, None, :, None] if w.dim() == 2 else w[..., None]
        return made

    return checked
