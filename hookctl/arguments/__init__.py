"""Checks of what users give: the arguments of editors, programs, `control` and runs.

values      one argument at a time, with its bounds
images      of them, images and files
signature   all arguments of a call at once, by their type hints and names: the decorator `checked`
"""

from hookctl.arguments.images import (
    Colour,
    check_image,
    colours,
    images_and_prompts,
    opened,
    writable,
)  # fmt: skip
from hookctl.arguments.signature import checked
from hookctl.arguments.values import (
    flag,
    for_each,
    gains_for_each,
    is_list,
    is_text,
    number,
    one_of,
    pair,
    refusal,
    seed,
    share,
    shown,
    text,
    text_or_embeddings,
    whole,
    words_for_each,
)  # fmt: skip

__all__ = [
    "Colour",
    "checked",
    "colours",
    "flag",
    "for_each",
    "gains_for_each",
    "images_and_prompts",
    "is_list",
    "is_text",
    "number",
    "one_of",
    "opened",
    "pair",
    "check_image",
    "refusal",
    "seed",
    "share",
    "shown",
    "text",
    "text_or_embeddings",
    "whole",
    "words_for_each",
    "writable",
]
