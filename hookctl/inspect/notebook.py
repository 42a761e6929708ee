"""Tables and pictures as HTML, for a notebook."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def html_table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    """A table in HTML; None is blank."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in headers)
    body = "".join(
        f"<tr>{''.join(f'<td>{_cell(value)}</td>' for value in row)}</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def html_lines(lines: Sequence[str]) -> str:
    """Lines of text, a paragraph each."""
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def html_image(image: Image, alt: str) -> str:
    """An image that is held in the HTML itself, as PNG."""
    held = io.BytesIO()
    image.save(held, "PNG")
    data = base64.b64encode(held.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}"/>'


def _cell(value: object) -> str:
    return "" if value is None else html.escape(str(value))
