"""Published methods as editors: one file each, named as its paper."""

from hookctl.recipes.freeu import FreeU
from hookctl.recipes.masactrl import MasaCtrl
from hookctl.recipes.multi_diffusion import MultiDiffusion
from hookctl.recipes.pag import PAG
from hookctl.recipes.prompt_to_prompt import PromptToPrompt
from hookctl.recipes.sag import SAG
from hookctl.recipes.seg import SEG

__all__ = ["PAG", "SAG", "SEG", "FreeU", "MasaCtrl", "MultiDiffusion", "PromptToPrompt"]
