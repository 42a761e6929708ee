"""What was measured, as rows of a table, as JSON, and as an image with the device's limit."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from hookctl.bench.limits import Limits
from hookctl.bench.measure import OURS, Measured
from hookctl.inspect import table

HEADERS = ("case", "shape", "form", "ms", "quartiles", "host ms", "MiB", "times ours", "limit ms")
_COLOURS = {OURS: "#c8102e", "eager": "#1f4e99", "plain": "#888888"}
_OTHERS = ("#2a9d4a", "#b07000", "#7b3fa0", "#008a8a", "#d05090")
_GREY = "#666666"
# In pixels: a panel's height, what stands on its left, between and on its right; a row of panels; a
# line of text and its letters; the least and the most of a marker.
_HEIGHT, _LEFT, _INNER, _LEGEND, _WIDEST = 400, 76, 334, 150, 1680
_LINE, _TEXT, _MARKERS = 17, 13, (4, 8)
_LEAST = 1e-9  # seconds: a clock may have seen nothing pass


def rows(measured: Iterable[Measured]) -> list[tuple[object, ...]]:
    """One row for each form of each case."""
    found: list[tuple[object, ...]] = []
    for one in measured:
        shape = " ".join(f"{name}={value:g}" for name, value in one.shape.items())
        for name, figure in one.figures.items():
            low, high = 1e3 * figure.low, 1e3 * figure.high
            spread = f"{low:.3g} - {high:.3g}"
            per_ours = None if figure.per_ours is None else round(figure.per_ours, 2)
            host = None if figure.host is None else round(1e3 * figure.host, 3)
            first = name == OURS
            found.append(
                (
                    f"{one.group}: {one.name}" if first else "",
                    shape if first else "",
                    name,
                    round(1e3 * figure.seconds, 3),
                    spread,
                    host,
                    None if figure.peak is None else round(figure.peak / 2**20, 1),
                    per_ours,
                    round(1e3 * one.limit, 3) if first else None,
                )
            )
    return found


def text(measured: Sequence[Measured]) -> str:
    """The rows as a table, without columns that are empty here."""
    every = rows(measured)
    kept = [i for i in range(len(HEADERS)) if any(row[i] is not None for row in every)]
    return table([[row[i] for i in kept] for row in every], [HEADERS[i] for i in kept])


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


def plot(measured: Sequence[Measured], heading: str = "") -> Image.Image:
    """Seconds of every form on a logarithmic axis, a panel for each group and name.

    Cases stand from left to right in the order measured, the forms of one beside each other; the
    black steps are the limit. heading: a line above all, the device say.
    """
    panels: dict[tuple[str, str], list[Measured]] = {}
    for one in measured:
        panels.setdefault((one.group, one.name), []).append(one)
    head = 2 * _LINE if heading else 0
    corners: list[tuple[int, int]] = []
    x, y = 0, head
    for cases in panels.values():
        if x and x + _width(cases) > _WIDEST:
            x, y = 0, y + _HEIGHT
        corners.append((x, y))
        x += _width(cases)
    right = max(x + _width(cases) for (x, _), cases in zip(corners, panels.values(), strict=True))
    image = Image.new("RGB", (right, y + _HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    draw.font = ImageFont.load_default(size=_TEXT)
    draw.text((_LEFT, _LINE // 2), heading, "black")
    for corner, ((group, name), cases) in zip(corners, panels.items(), strict=True):
        _panel(draw, corner, f"{group}: {name}", cases)
    return image


def _width(cases: Sequence[Measured]) -> int:
    """Of a panel in which the forms of every case have room beside each other."""
    needed = sum((_MARKERS[0] + 1) * (len(case.figures) + 1) for case in cases)
    return _LEFT + max(_INNER, min(needed, _WIDEST - _LEFT - _LEGEND)) + _LEGEND


def _panel(
    draw: ImageDraw.ImageDraw, corner: tuple[int, int], title: str, cases: Sequence[Measured]
) -> None:
    left, top = corner[0] + _LEFT, corner[1] + 3 * _LINE
    right, bottom = corner[0] + _width(cases) - _LEGEND, corner[1] + _HEIGHT - 6 * _LINE
    same = {n: v for n, v in cases[0].shape.items() if all(c.shape.get(n) == v for c in cases)}
    draw.text((left, corner[1] + 6), title, "black")
    fixed = ", ".join(f"{name} {value:g}" for name, value in same.items())
    draw.text((left, corner[1] + 6 + _LINE), fixed, _GREY)
    y = _axis(draw, cases, left, right, top, bottom)
    step = (right - left) / len(cases)
    colours: dict[str, str] = {}
    for i, case in enumerate(cases):
        _case(draw, case, left + (i + 0.5) * step, step, y, colours)
    varying = list(dict.fromkeys(n for case in cases for n in case.shape if n not in same))
    labels = ["/".join(f"{c.shape[n]:g}" for n in varying if n in c.shape) for c in cases]
    _labels(draw, labels, left, step, bottom + 6)
    draw.text(((left + right) / 2, bottom + 6 + 3 * _LINE), " / ".join(varying), _GREY, anchor="ma")
    for i, (name, colour) in enumerate([*colours.items(), ("limit", "black")]):
        at = top + _LINE * (i + 0.5)
        thick = 4 if name in colours else 1
        draw.rectangle((right + 10, at - thick, right + 18, at + thick), colour)
        draw.text((right + 24, at), name, "black", anchor="lm")


def _case(
    draw: ImageDraw.ImageDraw,
    case: Measured,
    x: float,
    step: float,
    y: Callable[[float], float],
    colours: dict[str, str],
) -> None:
    """The limit, and of each form the median as a disc and the quartiles as a line through it."""
    if case.limit > 0:
        draw.line((x - step / 2, y(case.limit), x + step / 2, y(case.limit)), "black", 2)
    count = len(case.figures)
    apart = min(_MARKERS[1] + 1, 0.9 * step / count)
    half = max(_MARKERS[0], apart - 1) / 2
    for i, (name, figure) in enumerate(case.figures.items()):
        colour = colours.setdefault(name, _colour(name, colours))
        at, height = x + (i - (count - 1) / 2) * apart, y(figure.seconds)
        draw.line((at, y(figure.low), at, y(figure.high)), colour, 2)
        draw.ellipse((at - half, height - half, at + half, height + half), colour)


def _axis(
    draw: ImageDraw.ImageDraw,
    cases: Sequence[Measured],
    left: float,
    right: float,
    top: float,
    bottom: float,
) -> Callable[[float], float]:
    """Draw the logarithmic axis of seconds; where a number of seconds stands."""
    figures = [figure for case in cases for figure in case.figures.values()]
    limits = [case.limit for case in cases if case.limit > 0]
    low = math.floor(math.log10(max(min([f.low for f in figures] + limits), _LEAST)))
    high = max(low + 1, math.ceil(math.log10(max([f.high for f in figures] + limits))))

    def y(seconds: float) -> float:
        share = (math.log10(max(seconds, _LEAST)) - low) / (high - low)
        return bottom - share * (bottom - top)

    for power in range(low, high + 1):
        for digit in (1, 2, 5) if power < high else (1,):
            seconds = digit * 10.0**power
            draw.line((left, y(seconds), right, y(seconds)), "#cccccc" if digit == 1 else "#eeeeee")
            if digit == 1 or high - low < 3:
                draw.text((left - 6, y(seconds)), f"{1e3 * seconds:g} ms", "black", anchor="rm")
    return y


def _labels(
    draw: ImageDraw.ImageDraw, labels: Sequence[str], left: float, step: float, top: float
) -> None:
    """One under each case, in as many lines as wide ones need; beyond three some are left out."""
    widest = max(draw.textlength(label) for label in labels) + 8
    lines = min(3, math.ceil(widest / step))
    every = math.ceil(widest / (lines * step))
    for i, label in enumerate(labels[::every]):
        x, at = left + (i * every + 0.5) * step, top + _LINE * (i % lines)
        draw.line((x, top - 6, x, at - 1), "#cccccc")
        draw.text((x, at), label, "black", anchor="ma")


def _colour(name: str, taken: Mapping[str, str]) -> str:
    own = _COLOURS.get(name)
    used = sum(other not in _COLOURS for other in taken)
    return own or _OTHERS[used % len(_OTHERS)]
