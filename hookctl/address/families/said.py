"""What a pipeline's last call said of how its texts are made up."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from hookctl.run_state import memory_here

# Arguments that change what a pipeline makes of a text.
_CHANGING = ("clean_caption", "prompt_template", "complex_human_instruction", "system_prompt")
# Of each pipeline what the last call made here gave of them, also as a text.
_Said = tuple[Callable[[], Any], dict[str, Any], str]
_given: ContextVar[tuple[_Said, ...]] = ContextVar("given", default=())


def note_call(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Keep what a call of a pipeline said of how its texts are made up; arguments: of
    `encode_prompt`, by name."""
    said = {name: arguments[name] for name in _CHANGING if name in arguments}
    if said:
        others = [one for one in _given.get() if one[0]() is not None and one[0]() is not pipe]
        _given.set((*others, (weakref.ref(pipe), said, repr(said))))


def said(pipe: Any, name: str) -> Any:
    """An argument as a pipeline's last call had it, else as its calls have it by default."""
    usual = inspect.signature(type(pipe).__call__).parameters.get(name)
    default = None if usual is None or usual.default is usual.empty else usual.default
    return _last(pipe)[0].get(name, default)


def all_said(pipe: Any) -> str:
    """What a pipeline's last call said of its texts, to be compared with that of another."""
    return _last(pipe)[1]


def _last(pipe: Any) -> tuple[dict[str, Any], str]:
    return next(((given, text) for ref, given, text in _given.get() if ref() is pipe), ({}, ""))


# -- images that are read with the prompts ---------------------------------------------------------

_IMAGES, _LENGTHS = "images", "image lengths"  # by which a session keeps them


def note_images(pipe: Any, encoding: Mapping[str, Any]) -> None:
    """Note the images that a run reads with its prompts; encoding: arguments of `encode_prompt`."""
    memory = memory_here()
    if memory is not None and pipe is not None:
        known = memory.of(pipe)
        known.pop(_LENGTHS, None)
        known[_IMAGES] = encoding.get("image")


def image_lengths(pipe: Any) -> tuple[int, ...] | None:
    """How many tokens each image takes that the run reads with its prompts; None outside of runs,
    and where it reads none."""
    memory = memory_here()
    known = {} if memory is None else memory.of(pipe)
    if known.get(_IMAGES) is None or getattr(pipe, "processor", None) is None:
        return None
    if _LENGTHS not in known:
        process = pipe.processor.image_processor
        grids = process(images=known[_IMAGES], return_tensors="pt")["image_grid_thw"]
        patches = process.merge_size**2  # of a token
        known[_LENGTHS] = tuple(int(grid.prod()) // patches for grid in grids)
    return known[_LENGTHS]
