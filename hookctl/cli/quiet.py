"""Silence from other libraries while a command works: their logs are not about the user's work."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LIBRARIES = ("diffusers", "transformers", "huggingface_hub", "accelerate", "torch")


def _bars() -> tuple[Any, ...]:
    """The switches of the loading bars of the model libraries.

    Imports them first: on import they set the levels of their logs anew.
    """
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    return of_diffusers, of_transformers


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings, no logs below errors, no loading bars; everything as it was afterwards."""
    switches = _bars()
    shown = [switch.is_progress_bar_enabled() for switch in switches]
    levels = {name: logging.getLogger(name).level for name in LIBRARIES}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in LIBRARIES:
            logging.getLogger(name).setLevel(logging.ERROR)
        for switch in switches:
            switch.disable_progress_bar()
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            for switch, on in zip(switches, shown, strict=True):
                if on:
                    switch.enable_progress_bar()
