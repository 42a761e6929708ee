"""The page of what `hookctl bench device` found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Data = dict[str, Any]


def page(found: Data) -> str:
    """Markdown, a section for each stage that has results."""
    versions = ", ".join(f"{name} {value}" for name, value in found["versions"].items())
    lines = [f"# {found['place'].split(',')[0]}", "", f"{found['place']}.", "", versions, ""]
    if found["tiny"]:
        lines += ["A dry run at tiny sizes: it shows that every step works, and no speed.", ""]
    for stage, write in _SECTIONS.items():
        of_stage = {
            key.removeprefix(f"{stage}: "): data
            for key, data in found["items"].items()
            if key.startswith(f"{stage}: ")
        }
        if of_stage:
            lines += [f"## {stage.capitalize()}", "", *write(of_stage), ""]
    if found["failed"]:
        lines += ["## Failed", "", *[f"- {key}: {why}" for key, why in found["failed"].items()], ""]
    if left := found.get("left"):
        lines += ["## Not reached", "", "Run the command again to go on.", ""]
        lines += [f"- {key}" for key in left]
    return "\n".join(lines).rstrip() + "\n"


def _table(headers: Sequence[object], rows: Sequence[Sequence[object]]) -> list[str]:
    every: list[Sequence[object]] = [headers, ["---"] * len(headers), *rows]
    return ["| " + " | ".join(str(cell) for cell in row) + " |" for row in every]


def _kernels(items: dict[str, Data]) -> list[str]:
    rows: list[list[object]] = [
        [name, f"{data['error']:.1e}", f"{data['allowed']:g}"] for name, data in items.items()
    ]
    return _table(["form", "error against float64", "allowed"], rows)


def _steps(items: dict[str, Data]) -> list[str]:
    rows: list[list[object]] = []
    for name, data in items.items():
        for form, figure in data["figures"].items():
            host = figure["host"]
            ratio = figure["per_ours"]
            rows.append(
                [
                    name,
                    form,
                    f"{1e3 * figure['seconds']:.2f}",
                    "" if host is None else f"{1e3 * host:.2f}",
                    "" if figure["peak"] is None else f"{figure['peak'] / 2**20:.0f}",
                    "" if ratio is None else f"{ratio:.2f}",
                ]
            )
    return _table(["step", "form", "ms", "host ms", "MiB", "times ours"], rows)


def _compiled(items: dict[str, Data]) -> list[str]:
    rows: list[list[object]] = []
    for name, data in items.items():
        for form, eager in data["eager"].items():
            rows.append([name, form, f"{eager:.2f}", f"{data['compiled'][form]:.2f}"])
    return _table(["step", "form", "eager ms", "compiled ms"], rows)


def _tiles(items: dict[str, Data]) -> list[str]:
    rows: list[list[object]] = [
        [name, data["shipped"], data["tile"], f"{data['ms']:.3f}"] for name, data in items.items()
    ]
    return _table(["entry", "ships", "fastest", "ms of what ships"], rows)


def _wins(items: dict[str, Data]) -> list[str]:
    rows: list[list[object]] = [
        [data["tokens"], f"{one['kernel']}, {one['count']}", "kernel" if one["wins"] else "SDPA"]
        for data in items.values()
        for one in data["won"]
    ]
    return _table(["tokens", "kernel, count", "faster"], rows)


_SECTIONS = {
    "kernels": _kernels,
    "steps": _steps,
    "compiled": _compiled,
    "tiles": _tiles,
    "wins": _wins,
}
