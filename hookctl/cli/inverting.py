"""A picture that is given, and what a stack does with it: `hookctl run --image`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookctl.cli.draw import Drawing
from hookctl.errors import InputError
from hookctl.preset import Preset

if TYPE_CHECKING:
    from PIL.Image import Image

# What has no use for a run's settings where one picture is inverted, or drawn round.
_UNUSED = {"inverted": ("negative", "images"), "drawn round": ("images",)}


def read_picture(preset: Preset, file: Path | None, drawing: Drawing) -> Image | None:
    """The picture of --image, None for a stack that draws from noise.

    Raises InputError where the stack and the options disagree, and for a file that is no picture;
    FileNotFoundError if there is none.
    """
    if not preset.takes_picture:
        if file is not None:
            raise InputError(
                f"--image {file}: {preset.path} draws from noise; give a stack with an [inversion] "
                "or a [program] table or an editor that takes a picture, or leave --image out"
            )
        return None
    if file is None:
        raise InputError(f"{preset.path} takes a picture; give --image FILE, and its --prompt")
    use = "inverted" if preset.inversion else "drawn round" if preset.program else ""
    for name in _UNUSED.get(use, ()):
        value = getattr(drawing, name)
        if value is not None and value != getattr(Drawing(), name):
            raise InputError(
                f"{name} = {value}; a picture that is {use} takes none, so leave it out"
            )
    if not file.is_file():
        raise FileNotFoundError(f"--image {file}: there is no such file; give a picture")
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError):
        raise InputError(
            f"--image {file}: can't be read as a picture; give a whole PNG or JPEG file"
        ) from None


def from_picture(
    pipe: Any, preset: Preset, picture: Image, drawing: Drawing, prompts: Sequence[str]
) -> Callable[[str], list[Image]]:
    """Invert the picture; what comes back draws it again and its edits, as often as asked."""
    check_fits(pipe, picture, drawing)
    assert preset.inversion is not None
    inverted = preset.inversion.make(pipe, picture, prompts[0], steps=drawing.steps).run()

    def draw(title: str) -> list[Image]:
        return list(inverted.edit(pipe, prompts=prompts, guidance=drawing.guidance))

    return draw


def round_picture(
    pipe: Any, preset: Preset, picture: Image, drawing: Drawing, prompts: Sequence[str]
) -> Any:
    """The program that draws a prompt round the picture, once it is run."""
    if len(prompts) > 1:
        raise InputError(f"edit = {prompts[1]!r}; a picture that is drawn round takes one prompt")
    assert preset.program is not None
    given = {name: getattr(drawing, name) for name in ("steps", "guidance", "negative", "seed")}
    if drawing.width is not None or drawing.height is not None:
        given["size"] = _drawn_size(pipe, picture, drawing)
    return preset.program.make(
        pipe, picture, prompts[0], **{k: v for k, v in given.items() if v is not None}
    )


def check_fits(pipe: Any, picture: Image, drawing: Drawing) -> None:
    """InputError unless the picture has the size that was asked for, else the model's own."""
    wanted = _drawn_size(pipe, picture, drawing)
    if picture.size != wanted:
        raise InputError(
            f"--image is {picture.width} x {picture.height} px, and {wanted[0]} x {wanted[1]} are "
            "drawn; resize it, or give its own --width and --height"
        )


def _drawn_size(pipe: Any, picture: Image, drawing: Drawing) -> tuple[int, int]:
    """(width, height) that a run draws: as asked, else the model's own, else the picture's."""
    own = getattr(getattr(pipe, "unet", None), "config", {}).get("sample_size")
    sides = own if isinstance(own, list | tuple) else (own, own)
    factor = int(getattr(pipe, "vae_scale_factor", 8))
    height, width = (
        side and side * factor if asked is None else asked
        for side, asked in zip(sides, (drawing.height, drawing.width), strict=True)
    )
    return width or picture.width, height or picture.height
