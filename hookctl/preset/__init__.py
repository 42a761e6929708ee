"""A stack of editors, and the run that it is for, as a TOML file.

    model = "shapes"                # optional

    [[lora]]                        # optional: adapters of the model, which stay on throughout
    path = "striped.safetensors"    # relative to the folder of this file
    weight = 0.8                    # default: 1

    [[hook]]                        # optional: learned weights (GLIGEN, IP-Adapter, ...)
    path = "ip-adapter_sd15.bin"    # relative too, or owner/name/FILE in the hub's cache
    strength = 0.6                  # default: the kind's own; further keys are options of the kind

    [run]                           # optional: what the command line does not say
    prompt = "a red circle above a blue square"
    edit = "a green circle above a blue square"
    steps = 30

    [[editor]]                      # one table for each editor, in the order of the stack
    recipe = "PromptToPrompt"
    cross_replace = 0.8
    blend = ["circle", "circle"]

    [[editor]]                      # an editor of your own, from a package that is installed
    recipe = "my_package.editors:Sharpen"
    strength = 0.3

    [inversion]                     # optional: the run edits an image that it is given
    recipe = "DirectInversion"
    guidance = 3.0

    [program]                       # or: draws after it, by a loop of its own; may stand alone
    recipe = "CyclicOneWay"
    at = [32, 0]

The keys of an editor and their types are those of its `__init__`; those of a hook are its kind's
options, and a text that names a file beside the stack is that file. A parameter `prompts` gets the
prompts of the run, `image` its image; an inversion gets the run's steps too, and a program all of
its settings (`SETTINGS`).

No file can bring code of its own: a recipe is known by name, or a class of a package that was
installed before, and never one that lies beside the file.
"""

from hookctl.preset.drawing import Drawing
from hookctl.preset.outline import Outline, check_early, outline
from hookctl.preset.read import (
    RawStack,
    existing,
    load_preset,
    parsed,
    preset_of,
    read_stack,
    stack_of,
)
from hookctl.preset.settings import SETTINGS, Setting
from hookctl.preset.signature import parameters
from hookctl.preset.stack import FILLED, EditorSpec, HookSpec, ImageSpec, LoraSpec, Preset
from hookctl.preset.write import dump_preset

__all__ = [
    "FILLED",
    "SETTINGS",
    "Drawing",
    "EditorSpec",
    "HookSpec",
    "ImageSpec",
    "LoraSpec",
    "Outline",
    "Preset",
    "RawStack",
    "Setting",
    "check_early",
    "dump_preset",
    "existing",
    "load_preset",
    "outline",
    "parameters",
    "parsed",
    "preset_of",
    "read_stack",
    "stack_of",
]
