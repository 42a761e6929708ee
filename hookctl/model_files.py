"""Models read from their folders whole: weights that a file lacks are never drawn at random.

diffusers and transformers warn of them and go on, and what such a model draws looks like a result.
A version that names weights otherwise than the one that saved them is the usual cause: CLIP's begin
with `text_model.` up to transformers 4, and without it in 5.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hookctl.errors import InputError


def read_whole(cls: Any, folder: Path, dtype: Any = None) -> Any:
    """A model of a class of diffusers or transformers, from its folder.

    Raises InputError if its files leave any of its parameters undefined, and what the class does.
    """
    library = cls.__module__.partition(".")[0]
    name = "torch_dtype"
    if library == "transformers" and _version(library) >= (4, 56):
        name = "dtype"
    model, info = cls.from_pretrained(
        str(folder), output_loading_info=True, local_files_only=True, **{name: dtype}
    )
    missing = sorted(info["missing_keys"])
    if missing:
        every = len(list(model.state_dict()))
        raise InputError(
            f"{folder}: {len(missing)} of {every} weights of this {cls.__name__} are missing, such "
            f"as {missing[0]!r}, and would be random; {_cause(library, missing, info)}"
        )
    return model


def _cause(library: str, missing: list[str], info: Any) -> str:
    found: Iterable[str] = sorted(info["unexpected_keys"])
    ending = missing[0].split(".")[1:] or [missing[0]]
    like = [key for key in found if key.split(".")[-len(ending) :] == ending]
    other = like[0] if like else next(iter(found), None)
    if other is None:
        return "the file is not complete; save the model anew with save_pretrained"
    here = ".".join(str(part) for part in _version(library))
    return (
        f"the file has {other!r} instead, so it was saved by another version of {library} (here it "
        f"is {here}) or is of another model; load it with that version, or rename its weights"
    )


def _version(library: str) -> tuple[int, ...]:
    numbers = getattr(sys.modules.get(library), "__version__", "0").split(".")[:2]
    return tuple(int(number) for number in numbers if number.isdigit())
