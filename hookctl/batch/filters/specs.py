"""Which draws are kept: measures with bounds, in the order of the file, the first to fail says why.

    [[filter]]
    measure = "background"          # a name, or a function: "my_package.module:function"
    min = 25.0                      # at least; max: at most; without both it is only noted

    [[filter]]
    measure = "clip_direction"
    model = "clip-vit-large-patch14"    # further keys go to the measure: a folder beside the job
    min = 0.2

A measure that answers yes or no needs no bound: no fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookctl.errors import InputError
from hookctl.preset.check import near, shown, typed
from hookctl.preset.installed import function_of

if TYPE_CHECKING:
    from hookctl.batch.filters.drawn import Drawn

# By name the module of a measure, and what else it can be given.
KNOWN: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "background": ("hookctl.batch.filters.measures", {}),
    "overlap": ("hookctl.batch.filters.measures", {}),
    "change": ("hookctl.batch.filters.measures", {}),
    "clip_text": ("hookctl.batch.filters.clip", {"model": str}),
    "clip_image": ("hookctl.batch.filters.clip", {"model": str}),
    "clip_direction": ("hookctl.batch.filters.clip", {"model": str}),
}

Measure = Callable[["Drawn"], float | bool]


class Unmeasured(Exception):
    """There is nothing to measure in a draw; the message says what is missing."""


@dataclass(frozen=True)
class FilterSpec:
    """What a file says of a filter; options: of the measure."""

    measure: str
    least: float | None = None
    most: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    def data(self) -> dict[str, Any]:
        return {"measure": self.measure, "min": self.least, "max": self.most, **self.options}

    def fault(self, value: float | bool) -> str | None:
        """Why a value fails, None if it passes."""
        if isinstance(value, bool):
            return None if value else f"{self.measure}: no"
        if self.least is not None and not value >= self.least:  # NaN fails
            return f"{self.measure} < {self.least:g}"
        if self.most is not None and not value <= self.most:
            return f"{self.measure} > {self.most:g}"
        return None


def read_filters(tables: Any, path: str, further: Iterable[str] = ()) -> tuple[FilterSpec, ...]:
    """The filters of a file; further: names of measures that are known besides KNOWN."""
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise InputError(f"{path}: filter = {shown(tables)}; write a table for each: [[filter]]")
    known = [*KNOWN, *further]
    found: list[FilterSpec] = []
    for number, table in enumerate(tables, 1):
        where = f"{path}: [[filter]] {number}"
        given = dict(table)
        if "measure" not in given:
            raise InputError(f"{where}: needs measure, one of: {', '.join(known)}")
        name = typed(given.pop("measure"), str, f"{where} measure")
        if ":" not in name and name not in known:
            raise InputError(
                f"{where} measure = {shown(name)} is not known{near(name, known)}; there are: "
                f"{', '.join(known)}, or write package.module:function"
            )
        if name in [one.measure for one in found]:
            raise InputError(
                f"{where} measure = {name!r} stands there twice; give min and max at once"
            )
        least, most = (
            typed(given.pop(key), float, f"{where} {key}") if key in given else None
            for key in ("min", "max")
        )
        if least is not None and most is not None and least > most:
            raise InputError(
                f"{where}: min = {least:g} is above max = {most:g}; nothing would pass"
            )
        found.append(FilterSpec(name, least, most, _options(name, given, where), where))
    return tuple(found)


def _options(name: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    if name not in KNOWN:  # the function itself says what it takes
        return dict(given)
    hints = KNOWN[name][1]
    for key in given:
        if key not in hints:
            raise InputError(
                f"{where}: {shown(key)} is not a key of {name}{near(key, hints)}; there are: "
                f"{', '.join(('min', 'max', *hints))}"
            )
    for key in hints:
        if key not in given:
            raise InputError(f"{where}: {name} needs {key}, a folder")
    folder = Path(where.partition(": [[filter]]")[0]).parent
    said = {key: typed(value, hints[key], f"{where} {key}") for key, value in given.items()}
    for key, value in said.items():
        said[key] = str((folder / value).resolve())
        if not (folder / value / "config.json").is_file():
            raise FileNotFoundError(
                f"{where} {key} = {value!r}: there is no such folder of a model"
            )
    return said


def measure_of(spec: FilterSpec, further: Mapping[str, Measure]) -> Measure:
    """What a filter measures by; InputError for a function that is not there."""
    if spec.measure in KNOWN:
        found = getattr(import_module(KNOWN[spec.measure][0]), spec.measure)
    elif ":" in spec.measure:
        found = function_of(spec.measure, f"{spec.where} measure={spec.measure!r}")
    else:
        found = further[spec.measure]
    return partial(found, **spec.options) if spec.options else found


def judged(
    drawn: Drawn, filters: Iterable[tuple[FilterSpec, Measure]]
) -> tuple[dict[str, float], str | None]:
    """What was measured of a draw, and why it fails: None if it passes all filters."""
    scores: dict[str, float] = {}
    for spec, measure in filters:
        try:
            value = measure(drawn)
        except Unmeasured as error:
            return scores, f"{spec.measure}: {error}"
        value = bool(value) if type(value).__name__ in ("bool", "bool_") else float(value)
        scores[spec.measure] = round(float(value), 6)
        if (fault := spec.fault(value)) is not None:
            return scores, fault
    return scores, None
