"""One call of a pipeline from options, and the images that come back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hookctl.errors import UnsupportedError
from hookctl.preset.drawing import STEPS, Drawing

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["STEPS", "Drawing", "images"]


def images(
    pipe: Any, drawing: Drawing, prompts: Sequence[str], title: str, progress: bool
) -> list[Image]:
    """The images of one call, prompt by prompt."""
    pipe.set_progress_bar_config(desc=title, disable=not progress, leave=False, file=sys.stderr)
    drawn = getattr(pipe(**drawing.arguments(pipe, prompts)), "images", None)
    if drawn is None:
        raise UnsupportedError(
            f"{type(pipe).__name__} makes no images; use hookctl.control() from Python on it"
        )
    return list(drawn)
