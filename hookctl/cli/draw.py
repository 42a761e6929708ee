"""One call of a pipeline from options, and the images that come back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

from hookctl.errors import InputError, UnsupportedError
from hookctl.preset.drawing import STEPS, Drawing

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["STEPS", "Drawing", "images", "pictures"]


def pictures(
    pipe: Any,
    drawing: Drawing,
    prompts: Sequence[str],
    title: str,
    progress: bool,
    references: Sequence[Image] = (),
) -> list[list[Image]]:
    """What one call draws, prompt by prompt: the frames of a video, or an image alone.

    references: what an edit model is given. InputError for a pipeline that takes none.
    """
    pipe.set_progress_bar_config(desc=title, disable=not progress, leave=False, file=sys.stderr)
    arguments = drawing.arguments(pipe, prompts)
    if references:
        if "image" not in signature(type(pipe).__call__).parameters:
            raise InputError(
                f"{type(pipe).__name__} takes no reference images; leave --reference out, or use "
                "an edit pipeline (FLUX Kontext, FLUX.2 klein, Qwen-Image-Edit)"
            )
        arguments["image"] = list(references) if len(references) > 1 else references[0]
    drawn = pipe(**arguments)
    found = getattr(drawn, "images", None)
    if found is not None:
        return [[one] for one in found]
    videos = getattr(drawn, "frames", None)
    if videos is None:
        raise UnsupportedError(
            f"{type(pipe).__name__} makes no images; use hookctl.control() from Python on it"
        )
    return [[_picture(frame) for frame in video] for video in videos]


def _picture(frame: Any) -> Image:
    """A frame as a picture: it may be an array [height, width, channels] from 0 to 1."""
    from PIL import Image as images_of

    if isinstance(frame, images_of.Image):
        return frame
    return images_of.fromarray((frame.clip(0, 1) * 255).round().astype("uint8"))


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
