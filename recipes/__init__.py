"""Published methods as editors: one file each, named as its paper."""

from hookctl.recipes.freeu import FreeU
from hookctl.recipes.masactrl import MasaCtrl
from hookctl.recipes.prompt_to_prompt import PromptToPrompt

__all__ = ["FreeU", "MasaCtrl", "PromptToPrompt"]
