"""What the commands share: options and their types, files, progress."""

from __future__ import annotations

import argparse
import errno
import math
import os
import platform
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hookctl
from hookctl.errors import InputError, WordError
from hookctl.inspect.files import save_image, write_json, write_text, writing
from hookctl.preset import SETTINGS
from hookctl.preset.check import near, shown

if TYPE_CHECKING:
    import torch

__all__ = ["save_image", "write_json", "write_text", "writing"]  # of others, for every command


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples as they are written, and the columns of options narrow."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)


def add_command(
    commands: Any, name: str, main: Callable[[Any], None], summary: str, text: str, examples: str
) -> argparse.ArgumentParser:
    """A command with its help: a summary for the list, a text, and examples."""
    epilog = "examples:\n" + "\n".join(f"  {line}" for line in examples.strip().splitlines())
    added: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=text,
        epilog=epilog,
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    added.set_defaults(main=main)
    return added


# -- types of options ------------------------------------------------------------------------------


def whole(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number from `least` on."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(
                f"{shown(text)} given; a whole number >= {least} expected"
            )
        return value

    return read


def number(text: str) -> float:
    """The type of an option that is a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{shown(text)} given; a number expected")
    return value


def positive(text: str) -> float:
    """The type of an option that is a finite number above 0."""
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} given; a number above 0 expected")
    return value


def words(text: str) -> list[str]:
    """The type of an option that lists words or phrases, split by commas."""
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} given; words expected, split by commas")
    return found


def text(given: str) -> str:
    """The type of an option that is a text; bytes of the shell that are none are refused."""
    try:
        given.encode("utf-8")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{given!r} given; a text in UTF-8 expected") from None
    if "\0" in given:
        raise argparse.ArgumentTypeError(f"{given!r} given; a text without null bytes expected")
    return given


def check_words(words: Sequence[str] | None, prompts: Sequence[str]) -> None:
    """WordError for a word that can be in no prompt, whatever the model's own words are."""
    letters = [_letters(prompt) for prompt in prompts]
    for word in words or ():
        if not any(_letters(word) in one for one in letters):
            known = list(dict.fromkeys(part for prompt in prompts for part in prompt.split()))
            where = f"the prompt {prompts[0]!r}" if len(prompts) == 1 else "any of the prompts"
            hint = near(word, known)
            raise WordError(f"{word!r} is not in {where}, whose words are {known}{hint}")


def _letters(text: str) -> str:
    """What of a text has to agree, without case, spaces and punctuation."""
    folded = unicodedata.normalize("NFKD", text).casefold()
    return "".join(c for c in folded if c.isalnum())


# -- groups of options -----------------------------------------------------------------------------

MODEL_HELP = (
    "a folder in the diffusers layout, a model id such as owner/name, or an embedded pipeline: "
    "'shapes', or 'shapes-flow' (flow matching, joint attention)"
)


def add_machine(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("machine")
    group.add_argument("--device", help="where to run (default: cuda if there is one, else cpu)")
    group.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the weights (default: float32 on a CPU; on a GPU what the family is used with)",
    )


def usable_device(given: str | None) -> torch.device:
    """The device that was asked for, else cuda if there is one; InputError if it can't be used."""
    import torch

    if given is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(given)
        torch.empty(1, device=device).tolist()  # of "meta" there is nothing to read
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--device {given}: can't be used here ({reason}); give cpu, or a device that torch "
            "finds here, such as cuda:0"
        ) from None
    return device


def add_progress(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="show progress bars on standard error (default: if it is a terminal)",
    )


def add_setting(command: Any, name: str, **options: Any) -> None:
    """The option of one setting of a run."""
    setting = SETTINGS[name]
    read = number if setting.hint is float else text
    command.add_argument(
        f"--{name}",
        metavar=setting.metavar,
        help=setting.help,
        type=read if setting.least is None else whole(setting.least),
        **options,
    )


def add_drawing(command: argparse.ArgumentParser, *, images: bool) -> None:
    group = command.add_argument_group("drawing")
    for name, setting in SETTINGS.items():
        if setting.draws and (images or name != "images"):
            add_setting(group, name)


def add_out(command: argparse.ArgumentParser, default: str) -> None:
    """default: the folder in words, as `out_folder` makes it of the name of what is run."""
    command.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"folder for what is made; files of the same names are replaced (default: {default})",
    )


# -- progress and files ----------------------------------------------------------------------------


def wants_progress(options: Any) -> bool:
    return bool(sys.stderr.isatty() if options.progress is None else options.progress)


@contextmanager
def bar(title: str, shown: bool, unit: str = "step") -> Iterator[Callable[..., None]]:
    """A function of (done, total), or (stage, done, total), that draws a bar."""
    from tqdm import tqdm

    with tqdm(desc=title, disable=not shown, leave=False, unit=unit, file=sys.stderr) as drawn:

        def progress(*said: Any) -> None:
            *stage, done, drawn.total = said
            drawn.set_description(" ".join((title, *stage)), refresh=False)
            drawn.n = done
            drawn.refresh()

        yield progress


@contextmanager
def out_folder(given: Path | None, command: str, name: str = "") -> Iterator[Path]:
    """The folder for results; made if need be, and taken away again if nothing comes into it.

    given: as --out says it, else it is out/COMMAND-NAME. InputError if it can't be made.
    """
    out = given or Path("out", f"{command}-{file_name(name)}" if name else command)
    try:
        new = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:  # ValueError: of a null byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"--out {str(out)!r}: can't be made a folder ({reason})") from None
    try:
        yield out
    finally:
        with suppress(OSError):  # the first that is not empty
            for folder in new:
                folder.rmdir()


def file_name(text: str) -> str:
    """A word or phrase as a part of a file name, in any script."""
    return re.sub(r"[^\w-]+", "_", text).strip("_")[:60] or "word"


def versions() -> dict[str, str]:
    """What ran: the versions of the libraries that decide about an image."""
    import diffusers
    import torch
    import transformers

    return {
        "hookctl": hookctl.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
