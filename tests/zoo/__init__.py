"""Tiny random models of every family, built offline: pipelines to run and bare modules.

    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    latents = case.run(pipe, ["a red cat", "a blue dog"], n=2)

    case = zoo.MODULES["compvis"]
    output = case.make()(**case.inputs())

Nothing is shared between two calls of `make`, so a test may spoil what it gets.
"""

import torch

from . import chats, modules, transformers, unets, video
from .case import NEGATIVE, PROMPTS, Case, attends, attention_modules
from .modules import ModuleCase

PIPELINES = {
    case.name: case for case in (*unets.CASES, *transformers.CASES, *chats.CASES, *video.CASES)
}
MODULES = {case.name: case for case in modules.CASES}

# On tensors this small threads only wait for each other, for seconds on a busy machine.
torch.set_num_threads(1)

__all__ = [
    "MODULES",
    "NEGATIVE",
    "PIPELINES",
    "PROMPTS",
    "Case",
    "ModuleCase",
    "attends",
    "attention_modules",
]
