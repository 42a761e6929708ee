"""Checks of images, of what comes with them, and of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from hookctl.address.pixels import readable
from hookctl.arguments.values import is_list, is_text, is_whole, refusal, shown
from hookctl.errors import InputError

Colour = tuple[int, int, int]


def images_and_prompts(
    image: Any, prompt: Any, name: str, *, videos: bool = False
) -> tuple[list[Any], list[str]]:
    """Images and as many prompts, of one prompt and its image or of a list of each.

    videos: an image may be a list of frames.
    """
    single = is_text(prompt)
    check_order(image, prompt, name)
    if not single and not is_list(prompt):
        raise refusal(f"{name}: prompt", prompt, "a text, or a list of texts")
    if not single and not is_list(image):
        raise refusal(f"{name}: image", image, "a list of images, one for each prompt")
    prompts, images = ([prompt], [image]) if single else (list(prompt), list(image))
    for i, one in enumerate(prompts):
        if not is_text(one):
            raise refusal(f"{name}: prompt[{i}]", one, "a text")
    if len(images) != len(prompts) or not prompts:
        raise InputError(
            f"{name}: {len(images)} images and {len(prompts)} prompts; give as many of both"
        )
    for i, one in enumerate(images):
        said = f"{name}: image" if single else f"{name}: image[{i}]"
        for frame in one if videos and is_list(one) and len(one) else [one]:
            check_image(frame, said)
    return images, prompts


def check_order(image: Any, prompt: Any, name: str) -> None:
    """Raise InputError for an image and a prompt that were exchanged."""
    if isinstance(prompt, Image.Image) and is_text(image):
        raise InputError(
            f"{name}: image={shown(image)}, prompt={shown(prompt)}; give the image before its "
            "prompt"
        )


def check_image(value: Any, name: str) -> Image.Image:
    """A PIL image."""
    if not isinstance(value, Image.Image):
        raise refusal(name, value, "a PIL image in mode RGB")
    return value


def opened(image: Any, name: str) -> Any:
    """An image as it is, or the one in the file at a path, in mode RGB."""
    if not isinstance(image, str | Path):
        return check_image(image, name)
    return readable(image, name)


def writable(value: str | Path, name: str) -> Path:
    """The path of a file to be written, in a folder that is there."""
    path = Path(value)
    try:
        if value and path.parent.is_dir() and not path.is_dir():
            return path
    except (OSError, ValueError):  # too long, or with a zero in it
        pass
    raise refusal(name, str(value), "the path of a file, in a folder that exists")


def colours(value: Any, name: str) -> list[Colour]:
    """One colour or several, each (red, green, blue) from 0 to 255, as a list."""
    wanted = "(red, green, blue), each from 0 to 255"
    if not is_list(value) or not value:
        raise refusal(name, value, wanted)
    several = list(value) if is_list(value[0]) else [value]
    for colour in several:
        parts = list(colour) if is_list(colour) else []
        if len(parts) != 3 or any(not is_whole(c) or not 0 <= c <= 255 for c in parts):
            raise refusal(name, value, wanted)
    return [(int(r), int(g), int(b)) for r, g, b in several]
