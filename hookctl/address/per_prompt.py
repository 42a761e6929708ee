"""Lists of regions, texts or whatever else: one for every prompt of a run, or one for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from hookctl.address.regions import Region, RegionLike, region_of
from hookctl.address.rows import Rows
from hookctl.arguments.values import is_list, is_number, number, refusal, text_or_embeddings
from hookctl.errors import InputError

T = TypeVar("T")

Regions = Sequence[RegionLike] | Sequence[Sequence[RegionLike]]
Texts = Sequence[str | Tensor] | Sequence[Sequence[str | Tensor]]
Numbers = Sequence[float] | Sequence[Sequence[float]]


def _is_no_list(item: Any) -> bool:
    return not is_list(item)


class PerPrompt(Sequence[tuple[T, ...]]):
    """A list for every prompt, or a list for each: item p is that of prompt p.

    name: of the argument, for errors. one: reads an item, given the name of its place, or raises
    InputError. is_item: tells an item from a prompt's list. shared: one list is for every prompt.
    """

    def __init__(
        self,
        given: Any,
        name: str,
        one: Callable[[Any, str], T],
        is_item: Callable[[Any], bool] = _is_no_list,
    ) -> None:
        if not is_list(given):
            raise refusal(name, given, "a list, or a list for each prompt")
        self.name = name
        self.shared = not given or any(is_item(item) for item in given)
        at = "[{i}]" if self.shared else "[{p}][{i}]"
        self.lists = [
            tuple(one(item, name + at.format(p=p, i=i)) for i, item in enumerate(items))
            for p, items in enumerate([given] if self.shared else given)
        ]

    def __len__(self) -> int:
        return len(self.lists)

    def __getitem__(self, prompt: Any) -> Any:
        return self.lists[0 if self.shared else prompt]

    @property
    def items(self) -> list[T]:
        """All items of all prompts."""
        return [item for items in self.lists for item in items]

    @property
    def longest(self) -> int:
        """How many items the prompt with the most has."""
        return max(map(len, self.lists), default=0)

    def check_prompts(self, rows: Rows) -> None:
        """Raise InputError unless there is a list for each prompt of a run."""
        drawn = len({row.prompt for row in rows})
        if not self.shared and len(self) != drawn:
            raise InputError(
                f"{self.name} is for {len(self)} prompts, but the pipeline draws {drawn}; give "
                "one list for all, or one for each"
            )

    def check_lengths(self, other: PerPrompt[Any]) -> None:
        """Raise InputError unless both have as many items for each prompt."""
        own, others = ([len(items) for items in lists.lists] for lists in (self, other))
        if own != others:
            raise InputError(
                f"{self.name} has {_shown(own)} items and {other.name} has {_shown(others)}; give "
                "as many of both for each prompt"
            )


def regions(given: Regions, name: str) -> PerPrompt[Region]:
    """Regions, boxes, texts of `parse_region` or masks; or a list of such for each prompt."""
    return PerPrompt(given, name, region_of, is_box)


def texts(given: Texts, name: str) -> PerPrompt[str | Tensor]:
    """Texts, or their embeddings [tokens, channels]; or a list of such for each prompt."""
    return PerPrompt(given, name, text_or_embeddings)


def numbers(given: Numbers, name: str) -> PerPrompt[float]:
    """Numbers of 0 or more; or a list of such for each prompt."""
    return PerPrompt(given, name, partial(number, low=0))


def is_box(item: Any) -> bool:
    """Whether a value is no list, or one of numbers, as a box is; a list of anything else is a
    prompt's."""
    return not is_list(item) or bool(len(item) and is_number(item[0]))


def _shown(lengths: list[int]) -> str:
    return str(lengths[0]) if len(lengths) == 1 else str(lengths)
