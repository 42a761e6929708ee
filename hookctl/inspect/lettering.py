"""Words on pictures: fonts, sizes, line breaks and plates."""

from __future__ import annotations

import math
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK = (32, 33, 36)
PAPER = (240, 240, 240)


def font_of(size: int) -> Font:
    return ImageFont.load_default(size=size)


def extent(text: str, font: Font) -> tuple[int, int]:
    """The width and height of a text of one or more lines, in px."""
    box = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font, "la")
    return math.ceil(box[2]), math.ceil(box[3])


def wrap(text: str, width: int, font: Font) -> str:
    """The text with line breaks between words, so that lines fit where words do."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def tag(image: Image.Image, text: str, corner: tuple[float, float] | None = None) -> None:
    """Draw a word on a dark plate: into the lower left corner, or with its own at `corner`, px."""
    size = max(12, min(image.size) // 16)
    font, margin = font_of(size), size // 2
    text = wrap(text, image.width - 4 * margin, font)
    width, height = extent(text, font)
    left, top = margin, image.height - height - 3 * margin
    if corner is not None:
        left = round(min(max(corner[0], 0), image.width - width - 2 * margin))
        top = round(min(max(corner[1], 0), image.height - height - 2 * margin))
    bottom = top + height + 2 * margin
    draw = ImageDraw.Draw(image, "RGBA")
    draw.rounded_rectangle((left, top, left + 2 * margin + width, bottom), margin, (0, 0, 0, 170))
    draw.multiline_text((left + margin, (top + bottom) / 2), text, "white", font, "lm")
