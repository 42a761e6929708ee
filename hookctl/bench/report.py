"""What was measured, as rows of a table, as JSON, and as a picture with the device's limit."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw

from hookctl.bench.limits import Limits
from hookctl.bench.measure import OURS, Measured

HEADERS = ("case", "shape", "form", "ms", "quartiles", "MiB", "times ours", "limit ms")
_COLOURS = {OURS: "#c8102e", "eager": "#1f4e99", "plain": "#888888"}
_OTHERS = ("#2a9d4a", "#b07000", "#7b3fa0", "#008a8a", "#d05090")
_SIZE, _PANEL = 8, (460, 320)  # of a marker; of a panel


def rows(measured: Iterable[Measured]) -> list[tuple[object, ...]]:
    """One row for each form of each case."""
    found: list[tuple[object, ...]] = []
    for one in measured:
        shape = " ".join(f"{name}={value:g}" for name, value in one.shape.items())
        for name, figure in one.figures.items():
            low, high = 1e3 * figure.low, 1e3 * figure.high
            spread = f"{low:.3g} - {high:.3g}"
            per_ours = None if figure.per_ours is None else round(figure.per_ours, 2)
            first = name == OURS
            found.append(
                (
                    f"{one.group}: {one.name}" if first else "",
                    shape if first else "",
                    name,
                    round(1e3 * figure.seconds, 3),
                    spread,
                    round(figure.peak / 2**20, 1),
                    per_ours,
                    round(1e3 * one.limit, 3) if first else None,
                )
            )
    return found


def data(
    measured: Sequence[Measured], limits: Limits, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Everything that a figure needs to be read later: machine, versions, limits, cases."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "device": str(device),
        "name": name or platform.machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "limits": vars(limits),
        "cases": [one.data() for one in measured],
    }


def plot(measured: Sequence[Measured]) -> Image.Image:
    """Seconds of every form on a logarithmic axis, a panel for each group and name.

    Cases stand from left to right in the order measured; the black steps are the limit.
    """
    panels: dict[tuple[str, str], list[Measured]] = {}
    for one in measured:
        panels.setdefault((one.group, one.name), []).append(one)
    columns = min(3, len(panels))
    width, height = _PANEL
    size = (columns * width, -(-len(panels) // columns) * height)
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for i, ((group, name), cases) in enumerate(panels.items()):
        corner = (i % columns * width, i // columns * height)
        _panel(draw, corner, f"{group}: {name}", cases)
    return image


def _panel(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], title: str, cases: Sequence[Measured]
) -> None:
    left, top = corner[0] + 60, corner[1] + 34
    right, bottom = corner[0] + _PANEL[0] - 130, corner[1] + _PANEL[1] - 44
    draw.text((left, corner[1] + 10), title, "black")
    times = [f.seconds for case in cases for f in case.figures.values()]
    limits = [case.limit for case in cases if case.limit > 0]
    low = math.floor(math.log10(min(times + limits)))
    high = max(low + 1, math.ceil(math.log10(max(times))))

    def y(seconds: float) -> float:
        share = (math.log10(seconds) - low) / (high - low)
        return bottom - share * (bottom - top)

    for power in range(low, high + 1):
        at = y(10.0**power)
        draw.line((left, at, right, at), "#dddddd")
        draw.text((corner[0] + 6, at - 6), f"{1e3 * 10.0**power:g} ms", "black")
    step = (right - left) / len(cases)
    legend: dict[str, str] = {}
    for i, case in enumerate(cases):
        x = left + (i + 0.5) * step
        if case.limit > 0:
            draw.line((x - step / 2, y(case.limit), x + step / 2, y(case.limit)), "black", 2)
        for name, figure in case.figures.items():
            colour = legend.setdefault(name, _colour(name, legend))
            at = y(figure.seconds)
            draw.line((x, y(figure.low), x, y(figure.high)), colour)
            half = _SIZE / 2
            draw.ellipse((x - half, at - half, x + half, at + half), colour)
        label = "/".join(f"{value:g}" for value in case.shape.values())
        draw.text((x - 3 * len(label), bottom + 6 + 13 * (i % 2)), label, "black")
    for i, (name, colour) in enumerate([*legend.items(), ("limit", "black")]):
        at = top + 14 * i
        draw.rectangle((right + 10, at + 2, right + 18, at + 10), colour)
        draw.text((right + 24, at), name, "black")


def _colour(name: str, taken: dict[str, str]) -> str:
    own = _COLOURS.get(name)
    used = sum(other not in _COLOURS for other in taken)
    return own or _OTHERS[used % len(_OTHERS)]
