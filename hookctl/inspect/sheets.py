"""Pictures side by side: grids with titles and colour bars, and sheets of many."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageColor, ImageDraw
from PIL.Image import Resampling

from hookctl.errors import InputError
from hookctl.inspect.colours import Picture, Scale, colour_bar
from hookctl.inspect.lettering import INK, PAPER, extent, font_of, tag, wrap

SMALL = 256  # px; shorter sides below this are enlarged
WIDEST = 1600  # px; wider grids are broken
ABREAST = 3  # columns; large pictures are made smaller until so many fit


def grid(
    rows: Sequence[Sequence[Picture | None]],
    column_titles: Sequence[str] | None = None,
    row_titles: Sequence[str] | None = None,
    cell: tuple[int, int] | None = None,
    pad: int = 8,
    background: str = "white",
    *,
    scales: Sequence[Scale | None] | None = None,
    scaled_from: int = 0,
    widest: int | None = WIDEST,
) -> Picture:
    """Pictures in rows, with titles above the columns and to the left of the rows.

    Receives: rows of equal length, None for an empty place; titles, wrapped to their place; the
    size of a cell (width, height) in px, or None for the largest image's, at least 256 px on
    the shorter side and small enough for three abreast; the gap between cells in px; for each row
    the scale of its maps, drawn as a colour bar at its end, None for no bar; the column from which
    on there are maps; the width in px from which on columns go on below, None for one piece.
    Pictures keep their proportions.
    """
    columns = len(rows[0]) if rows else 0
    if not columns or any(len(row) != columns for row in rows):
        lengths = [len(row) for row in rows]
        raise InputError(f"rows: lengths {lengths} given; equal lengths above 0 expected")
    for given, want, name in (
        (column_titles, columns, "column_titles"),
        (row_titles, len(rows), "row_titles"),
        (scales, len(rows), "scales"),
    ):
        if given is not None and len(given) != want:
            raise InputError(f"{name}: {len(given)} given; {want} expected")
    width, height = cell or _cell([i for row in rows for i in row if i], columns, widest)
    ink = INK if sum(ImageColor.getrgb(background)[:3]) > 382 else PAPER
    bars = [None if one is None else colour_bar(one, height, ink) for one in scales or ()]
    right = max((bar.width + pad for bar in bars if bar), default=0)
    font = font_of(max(13, min(width, height) // 14))
    beside = [wrap(title, max(width // 2, 90), font) for title in row_titles or []]
    left = pad + (max(extent(t, font)[0] for t in beside) + 2 * pad if beside else 0)
    fit = columns if widest is None else max(1, (widest - left - right) // (width + pad))
    if columns > fit:
        each = math.ceil(columns / math.ceil(columns / fit))
        pieces = []
        for first in range(0, columns, each):
            part = [[*row[first : first + each]] for row in rows]
            short = each - len(part[0])
            titles = None
            if column_titles is not None:
                titles = [*column_titles[first : first + each], *[""] * short]
            part = [[*row, *[None] * short] for row in part]
            more = {"scales": scales if first + each > scaled_from else None, "widest": None}
            pieces.append(
                grid(part, titles, row_titles, (width, height), pad, background, **more)  # type: ignore[arg-type]
            )
        return stacked(pieces, background)

    above = [wrap(title, width, font) for title in column_titles or []]
    top = pad + (max(extent(t, font)[1] for t in above) + pad if above else 0)
    size = (left + columns * (width + pad) + right, top + len(rows) * (height + pad))
    sheet = Image.new("RGB", size, background)
    draw = ImageDraw.Draw(sheet)
    for c, title in enumerate(above):
        x = left + c * (width + pad) + width // 2
        draw.multiline_text((x, top - pad), title, ink, font, "md", align="center")
    for r, row in enumerate(rows):
        y = top + r * (height + pad)
        if beside:
            at = (left - pad, y + height // 2)
            draw.multiline_text(at, beside[r], ink, font, "rm", align="right")
        for c, image in enumerate(row):
            x = left + c * (width + pad)
            if image is not None:
                fitted = _fitted(image, (width, height))
                at = (x + (width - fitted.width) // 2, y + (height - fitted.height) // 2)
                sheet.paste(fitted, at)
        if bars and (bar := bars[r]) is not None:
            last = max(c for c, image in enumerate(row) if image is not None or c == 0)
            sheet.paste(bar, (left + (last + 1) * (width + pad), y), bar)
    return sheet


def contact_sheet(
    images: Sequence[Picture],
    labels: Sequence[str] | None = None,
    columns: int | None = None,
    cell: tuple[int, int] | None = None,
) -> Picture:
    """Pictures in reading order in a nearly square grid, each with its label in the corner."""
    if not images:
        raise InputError("images: none given; at least one expected")
    if labels is not None and len(labels) != len(images):
        raise InputError(f"labels: {len(labels)} given; {len(images)} expected")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    cell = cell or _largest(images)
    places: list[Picture | None] = []
    for i, image in enumerate(images):
        fitted = _fitted(image, cell)
        if labels:
            tag(fitted, labels[i])
        places.append(fitted)
    places += [None] * (-len(images) % columns)
    rows = [places[i : i + columns] for i in range(0, len(places), columns)]
    return grid(rows, cell=cell, widest=None)


def abreast(images: Sequence[Picture], widest: int = WIDEST) -> tuple[int, tuple[int, int]]:
    """How many cells for these images fit beside each other and a colour bar, and their size."""
    width, height = _cell(images, ABREAST, widest)
    return max(1, (widest - 100) // (width + 8)), (width, height)


def stacked(pieces: Sequence[Picture], background: str = "white") -> Picture:
    """Pictures below one another."""
    width, height = max(p.width for p in pieces), sum(p.height for p in pieces)
    sheet = Image.new("RGB", (width, height), background)
    y = 0
    for piece in pieces:
        sheet.paste(piece, (0, y))
        y += piece.height
    return sheet


def _cell(images: Sequence[Picture], columns: int, widest: int | None) -> tuple[int, int]:
    """A cell for the largest image, of which a few fit abreast."""
    width, height = _largest(images)
    most = (widest or math.inf) / min(columns, ABREAST) - 16
    if columns > 1 and width > most:
        return round(most), max(1, round(height * most / width))
    return width, height


def _largest(images: Sequence[Picture]) -> tuple[int, int]:
    """A cell into which the largest image fits, not small."""
    if not images:
        return SMALL, SMALL
    width, height = max(i.width for i in images), max(i.height for i in images)
    factor = max(1, math.ceil(SMALL / min(width, height)))
    return width * factor, height * factor


def _fitted(image: Picture, cell: tuple[int, int]) -> Picture:
    """An RGB copy as large as fits into a cell."""
    scale = min(cell[0] / image.width, cell[1] / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Resampling.LANCZOS)
