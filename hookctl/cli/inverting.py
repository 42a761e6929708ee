"""An image that is given, and what a stack does with it: `hookctl run --image`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookctl.cli.common import bar
from hookctl.cli.draw import Drawing
from hookctl.errors import InputError
from hookctl.preset import FILLED, Preset, parameters

if TYPE_CHECKING:
    from PIL.Image import Image

    from hookctl.editor import Editor

# Of those that Pillow reads; for others, such as EPS, it starts programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# The settings of a run that have no use where one image is inverted, or a program's.
_UNUSED = {"inverted": ("negative", "images"), "a program's": ("images",)}


def check_image(
    taken: bool, file: Path | None, stack: Path | None, *, allowed: bool = False
) -> None:
    """InputError unless --image is given where a stack takes one; FileNotFoundError without it.

    allowed: it may be given, since learned weights may take it.
    """
    if not (taken or allowed) and file is not None:
        raise InputError(
            f"--image {file}: {stack} draws from noise; give a stack with an [inversion] or a "
            "[program] table or an editor that takes an image, or leave --image out"
        )
    if taken and file is None:
        raise InputError(f"{stack} takes an image; give --image FILE, and its --prompt")
    if file is not None and not file.is_file():
        raise FileNotFoundError(f"--image {file}: there is no such file; give an image")


def read_image(
    preset: Preset, file: Path | None, drawing: Drawing, *, allowed: bool = False
) -> Image | None:
    """The image of --image, None for a stack that draws from noise; allowed: as of `check_image`.

    Raises InputError where the stack and the options disagree, and for a file that is no image;
    FileNotFoundError if there is none.
    """
    check_image(preset.takes_image, file, preset.path, allowed=allowed)
    if file is None:
        return None
    use = "inverted" if preset.inversion else "a program's" if preset.program else ""
    for name in _UNUSED.get(use, ()):
        value = getattr(drawing, name)
        if value is not None and value != getattr(Drawing(), name):
            raise InputError(
                f"{name} = {value}; an image that is {use} takes none, so leave it out"
            )
    from PIL import Image, UnidentifiedImageError

    from hookctl.address.pixels import rgb

    try:
        with Image.open(file, formats=_FORMATS) as opened:
            opened.load()
            return rgb(opened, f"--image {file}")
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(f"--image {file}: is too large ({error})") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        raise InputError(
            f"--image {file}: can't be read as an image; give a whole PNG or JPEG file"
        ) from None


def from_image(
    pipe: Any,
    preset: Preset,
    image: Image,
    drawing: Drawing,
    prompts: Sequence[str],
    progress: bool,
) -> Callable[[str], list[Image]]:
    """Invert the image; what comes back draws it again and its edits, as often as asked.

    progress: whether to show a bar.
    """
    check_fits(pipe, image, drawing)
    assert preset.inversion is not None
    inversion = preset.inversion.make(pipe, image, prompts[0], steps=drawing.steps)
    with bar("inversion", progress) as shown:
        inverted = inversion.run(shown)

    def draw(title: str) -> list[Image]:
        return list(inverted.edit(pipe, prompts=prompts, guidance=drawing.guidance))

    return draw


def program_for(
    pipe: Any, preset: Preset, image: Image, drawing: Drawing, prompts: Sequence[str]
) -> Any:
    """The program that draws a prompt from the image, once it is run."""
    assert preset.program is not None
    name, taken = preset.program.recipe, parameters(preset.program.cls)
    given = {key: value for key, value in drawing.data().items() if key in FILLED["program"]}
    prompt: str | list[str] = list(prompts) if preset.program.takes_prompts else prompts[-1]
    if "source_prompt" in taken and len(prompts) == 2:
        given["source_prompt"] = prompts[0]
    elif len(prompts) > 1 and not preset.program.takes_prompts:
        few = "one edit" if "source_prompt" in taken else "one prompt"
        raise InputError(f"edit = {prompts[-1]!r}; {name} takes {few}")
    if "size" not in taken:
        check_fits(pipe, image, drawing)
    elif drawing.width is not None or drawing.height is not None:
        given["size"] = _drawn_size(pipe, image, drawing)
    said = {key: value for key, value in given.items() if value is not None}
    for key in [key for key in said if key not in taken]:
        if said.pop(key) != getattr(Drawing(), key):
            raise InputError(f"{key} = {given[key]!r}; {name} takes none, so leave it out")
    return preset.program.make(pipe, image, prompt, **said)


def takes_inside(program: Any) -> bool:
    """Whether a program, or one of a class, has passes of several texts, and knows in which its
    editors act."""
    from hookctl.recipes.common.real_images.flow import FlowProgram

    cls = program if isinstance(program, type) else type(program)
    return issubclass(cls, FlowProgram)


def drawn_prompts(preset: Preset, prompts: Sequence[str]) -> Sequence[str]:
    """Those of the prompts whose images a program gives: all, or the last."""
    program = preset.program
    return prompts if program is None or program.takes_prompts else prompts[-1:]


def images_of(
    program: Any, progress: bool, editors: Sequence[Editor] = ()
) -> Callable[[str], list[Image]]:
    """A program as what draws images.

    progress: whether to show a bar, if the program says how far it is; editors: of `takes_inside`.
    """

    def draw(title: str) -> list[Image]:
        if "progress" not in inspect.signature(program.run).parameters:
            return list(program.run(*editors))
        with bar(title, progress) as shown:
            return list(program.run(progress=shown))

    return draw


def check_fits(pipe: Any, image: Image, drawing: Drawing) -> None:
    """InputError unless the image has the size that was asked for, else the model's own."""
    wanted = _drawn_size(pipe, image, drawing)
    if image.size != wanted:
        raise InputError(
            f"--image is {image.width} x {image.height} px, and {wanted[0]} x {wanted[1]} are "
            "drawn; resize it, or give its own --width and --height"
        )


def _drawn_size(pipe: Any, image: Image, drawing: Drawing) -> tuple[int, int]:
    """(width, height) that a run draws: as asked, else the model's own, else the image's."""
    own = getattr(getattr(pipe, "unet", None), "config", {}).get("sample_size")
    sides = own if isinstance(own, list | tuple) else (own, own)
    factor = int(getattr(pipe, "vae_scale_factor", 8))
    height, width = (
        side and side * factor if asked is None else asked
        for side, asked in zip(sides, (drawing.height, drawing.width), strict=True)
    )
    return width or image.width, height or image.height
