"""Lists of regions, texts or numbers: one for every prompt of a run, or one for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from hookctl.address.regions import Region, RegionLike, region_of
from hookctl.address.rows import Rows
from hookctl.arguments import number, refusal, text_or_embeddings
from hookctl.errors import InputError

T = TypeVar("T")

Regions = Sequence[RegionLike] | Sequence[Sequence[RegionLike]]
Texts = Sequence[str | Tensor] | Sequence[Sequence[str | Tensor]]
Numbers = Sequence[float] | Sequence[Sequence[float]]


class PerPrompt(Sequence[tuple[T, ...]]):
    """A list for every prompt, or a list for each: item p is that of prompt p.

    Made by `regions`, `texts` or `numbers`. shared: one list is for every prompt; name: of the
    argument, for errors.
    """

    def __init__(self, lists: Sequence[Sequence[T]], shared: bool, name: str) -> None:
        self._lists = [tuple(items) for items in lists]
        self.shared, self.name = shared, name

    @classmethod
    def read(
        cls, given: Any, name: str, *, one: Callable[[Any, str], T], is_list: Callable[[Any], bool]
    ) -> PerPrompt[T]:
        """one: reads an item or raises InputError; is_list: tells a prompt's list from an item."""
        if isinstance(given, str | Tensor) or not isinstance(given, Sequence):
            raise refusal(name, given, "a list, or a list for each prompt")
        nested = bool(given) and all(is_list(item) for item in given)
        lists = given if nested else [given]
        return cls(
            [[one(item, f"{name}[{i}]") for i, item in enumerate(items)] for items in lists],
            not nested,
            name,
        )

    def __len__(self) -> int:
        return len(self._lists)

    def __getitem__(self, prompt: Any) -> Any:
        return self._lists[0 if self.shared else prompt]

    @property
    def items(self) -> list[T]:
        """All items of all prompts."""
        return [item for items in self._lists for item in items]

    @property
    def longest(self) -> int:
        """How many items the prompt with the most has."""
        return max(map(len, self._lists), default=0)

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
        own, others = ([len(items) for items in lists._lists] for lists in (self, other))
        if own != others:
            raise InputError(
                f"{self.name} has {_shown(own)} items and {other.name} has {_shown(others)}; give "
                "as many of both for each prompt"
            )


def regions(given: Regions, name: str) -> PerPrompt[Region]:
    """Regions, boxes, texts of `parse_region` or masks; or a list of such for each prompt."""
    return PerPrompt.read(given, name, one=region_of, is_list=_is_list_of_regions)


def texts(given: Texts, name: str) -> PerPrompt[str | Tensor]:
    """Texts, or their embeddings [tokens, channels]; or a list of such for each prompt."""
    return PerPrompt.read(given, name, one=text_or_embeddings, is_list=_is_list)


def numbers(given: Numbers, name: str) -> PerPrompt[float]:
    """Numbers of 0 or more; or a list of such for each prompt."""
    return PerPrompt.read(given, name, one=partial(number, low=0), is_list=_is_list)


def _is_list(item: Any) -> bool:
    return isinstance(item, Sequence) and not isinstance(item, str)


def _is_list_of_regions(item: Any) -> bool:
    """A box is a list of numbers; a list of anything else is a prompt's."""
    return _is_list(item) and not (item and isinstance(item[0], int | float))


def _shown(lengths: list[int]) -> str:
    return str(lengths[0]) if len(lengths) == 1 else str(lengths)
