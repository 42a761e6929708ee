"""A demo's report, as it is read: single figures, and a table of each group of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Figures(NamedTuple):
    """A group of figures; the first column names them, each other one is a kind or a method."""

    title: str
    headers: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def singles(report: Mapping[str, Any]) -> dict[str, Any]:
    """What stands alone in a report, by title."""
    return {
        title_of(key): _cell(value)
        for key, value in report.items()
        if not isinstance(value, Mapping)
    }


def groups(report: Mapping[str, Any]) -> Iterator[Figures]:
    """Every mapping of a report, nested ones spelled out; what a kind lacks is None."""
    for key, value in report.items():
        if not isinstance(value, Mapping):
            continue
        columns = {title_of(kind): dict(_flat(one)) for kind, one in value.items()}
        names = dict.fromkeys(name for column in columns.values() for name in column)
        rows = [(name, *(column.get(name) for column in columns.values())) for name in names]
        yield Figures(title_of(key), (title_of(key), *columns), rows)


def title_of(key: object) -> str:
    return str(key).replace("_", " ")


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        yield name, _cell(value)
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{name}: {title_of(key)}" if name else title_of(key))


def _cell(value: Any) -> Any:
    many = isinstance(value, Sequence) and not isinstance(value, str)
    return ", ".join(map(str, value)) if many else value
