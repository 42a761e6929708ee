"""Tiny random models of every family, built offline: pipelines to run and bare modules.

    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    latents = case.run(pipe, ["a red cat", "a blue dog"], n=2)

    case = zoo.MODULES["compvis"]
    output = case.make()(**case.inputs())

Nothing is shared between two calls of `make`, so a test may spoil what it gets.
"""

import diffusers
import torch
import transformers as of_text

from . import modules, transformers, unets, video
from .case import NEGATIVE, PROMPTS, Case, attends, attention_modules
from .modules import ModuleCase

CHATS: tuple[Case, ...] = ()
# diffusers 0.36 knows two of these pipelines, and transformers 4.49 no model of their text.
if hasattr(diffusers, "Flux2KleinPipeline") and hasattr(of_text, "Qwen3Config"):
    from .chats import CASES as CHATS

PIPELINES = {case.name: case for case in (*unets.CASES, *transformers.CASES, *CHATS, *video.CASES)}
MODULES = {case.name: case for case in modules.CASES}

# On tensors this small threads only wait for each other, for seconds on a busy machine.
torch.set_num_threads(1)

__all__ = [
    "CHATS",
    "MODULES",
    "NEGATIVE",
    "PIPELINES",
    "PROMPTS",
    "Case",
    "ModuleCase",
    "attends",
    "attention_modules",
]
