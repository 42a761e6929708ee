"""Regions prompt by prompt: what recipes that put things in places share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from hookctl.address.regions import Region, RegionLike, region_of
from hookctl.address.rows import Rows
from hookctl.address.sites import Grid
from hookctl.attention.call import AttentionCall
from hookctl.errors import InputError, UnsupportedError

T = TypeVar("T")

Places = Sequence[RegionLike] | Sequence[Sequence[RegionLike]]
Texts = Sequence[str | Tensor] | Sequence[Sequence[str | Tensor]]
Numbers = Sequence[float] | Sequence[Sequence[float]]


class PerPrompt(Sequence[tuple[T, ...]]):
    """A list of things for every prompt, or a list for each: item p is prompt p's.

    Made by `regions`, `texts` or `numbers`; `who` names the argument in errors.
    """

    def __init__(self, lists: Sequence[Sequence[T]], shared: bool, who: str) -> None:
        self._lists = [tuple(one) for one in lists]
        self.shared, self.who = shared, who

    @classmethod
    def read(
        cls, given: Any, who: str, *, one: Callable[[Any, str], T], is_list: Callable[[Any], bool]
    ) -> PerPrompt[T]:
        """one: reads an item and raises InputError; is_list: tells a prompt's list from an item."""
        if isinstance(given, str | Tensor) or not isinstance(given, Sequence):
            raise InputError(f"{who}={given!r}; give a list, or a list for each prompt")
        nested = bool(given) and all(is_list(item) for item in given)
        lists = given if nested else [given]
        return cls(
            [[one(item, f"{who}[{i}]") for i, item in enumerate(items)] for items in lists],
            not nested,
            who,
        )

    def __len__(self) -> int:
        return len(self._lists)

    def __getitem__(self, prompt: Any) -> Any:
        return self._lists[0 if self.shared else prompt]

    @property
    def every(self) -> list[T]:
        """All items of all prompts."""
        return [item for items in self._lists for item in items]

    @property
    def most(self) -> int:
        """The most items that a prompt has."""
        return max(map(len, self._lists), default=0)

    def check_rows(self, rows: Rows) -> None:
        """Raise InputError unless there is a list for each prompt of a run."""
        drawn = len({row.prompt for row in rows})
        if not self.shared and len(self) != drawn:
            raise InputError(
                f"{self.who} is for {len(self)} prompts, but the pipeline draws {drawn}; give "
                "one list for all, or one for each"
            )

    def check_like(self, other: PerPrompt[Any]) -> None:
        """Raise InputError unless both have as many items for each prompt."""
        mine, theirs = ([len(items) for items in x._lists] for x in (self, other))
        if mine != theirs:
            raise InputError(
                f"{self.who} has {_count(mine)} items and {other.who} has {_count(theirs)}; they "
                "must be as many for each prompt"
            )


def regions(given: Places, who: str) -> PerPrompt[Region]:
    """Regions, boxes, texts of `parse_region` or masks; or a list of such for each prompt."""
    return PerPrompt.read(given, who, one=region_of, is_list=_holds_regions)


def texts(given: Texts, who: str) -> PerPrompt[str | Tensor]:
    """Texts, or their embeddings [tokens, channels]; or a list of such for each prompt."""
    return PerPrompt.read(given, who, one=_text, is_list=_is_sequence)


def numbers(given: Numbers, who: str) -> PerPrompt[float]:
    """Numbers of 0 or more; or a list of such for each prompt."""
    return PerPrompt.read(given, who, one=_number, is_list=_is_sequence)


def shares(
    places: Sequence[Region],
    height: int,
    width: int,
    *,
    edge: float = 0.0,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """How a grid is divided among regions: float32 [regions, height, width], at most 1 together.

        m_r = a_r c_r / max(1, sum_s a_s c_s)

    c_r: how far a token lies in region r, with a soft border of width `edge` (0: in or out); a_r:
    the weights, 1 unless given.
    """
    if not places:
        return torch.zeros(0, height, width)
    covered = torch.stack(
        [
            place.feathered(height, width, edge)
            if edge
            else place.tokens(height, width).float().reshape(height, width)
            for place in places
        ]
    )
    if weights is not None:
        covered = covered * torch.tensor(weights)[:, None, None]
    return covered / covered.sum(0).clamp_min(1)


def check_share(value: Any, who: str) -> float:
    """A number from 0 to 1, or InputError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"{who}={value!r}; give a number from 0 to 1")
    return float(value)


def grid_in(call: AttentionCall, who: str) -> Grid:
    """The grid of a call's image queries, or UnsupportedError."""
    if call.grid is None:
        raise UnsupportedError(
            f"{who}: the queries of {call.site.path} form no grid over the latent, so no region "
            "can be found among them; leave it out with sites="
        )
    return call.grid


def _is_sequence(item: Any) -> bool:
    return isinstance(item, Sequence) and not isinstance(item, str)


def _holds_regions(item: Any) -> bool:
    """A box is a list of numbers; a list of anything else is a prompt's."""
    return _is_sequence(item) and not (item and isinstance(item[0], int | float))


def _text(value: Any, who: str) -> str | Tensor:
    if isinstance(value, str) or (isinstance(value, Tensor) and value.dim() == 2):
        return value
    shown = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise InputError(f"{who}: {shown} given; a text, or embeddings [tokens, channels]")


def _number(value: Any, who: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise InputError(f"{who}={value!r}; give a number of 0 or more")
    return float(value)


def _count(counts: list[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else str(counts)
