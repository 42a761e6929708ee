"""Text tables: plain for the terminal, Markdown for documents."""

from __future__ import annotations

from collections.abc import Sequence

from hookctl.errors import InputError


def table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    """A plain-text table: columns two spaces apart, numbers to the right; None is blank."""
    cells, right = _cells(rows, headers)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = (
        "  ".join(
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)
        )
        for line in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    """The same as a Markdown table; bars inside cells are escaped."""
    cells, right = _cells(rows, headers)
    lines = [[c.replace("|", "\\|").replace("\n", " ") for c in line] for line in cells]
    lines.insert(1, ["---:" if r else "---" for r in right])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(
    rows: Sequence[Sequence[object]], headers: Sequence[str]
) -> tuple[list[list[str]], list[bool]]:
    """Texts of the headers and rows, and which columns hold only numbers."""
    if not headers:
        raise InputError("headers: none given; one per column expected")
    for i, row in enumerate(rows):
        if len(row) != len(headers):
            raise InputError(f"rows[{i}]: {len(row)} cells given; {len(headers)} expected")
    right = [
        any(row[c] is not None for row in rows)
        and all(_is_number(row[c]) for row in rows if row[c] is not None)
        for c in range(len(headers))
    ]
    return [[str(h) for h in headers], *([_text(v) for v in row] for row in rows)], right


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
