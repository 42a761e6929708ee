"""Published methods as editors: one file each, named as its paper."""

from hookctl.recipes.attend_and_excite import AttendAndExcite
from hookctl.recipes.box_diff import BoxDiff
from hookctl.recipes.cyclic_one_way import CyclicOneWay
from hookctl.recipes.ddim_inversion import DDIMInversion
from hookctl.recipes.direct_inversion import DirectInversion
from hookctl.recipes.edit_friendly_ddpm import EditFriendlyDDPM
from hookctl.recipes.freeu import FreeU
from hookctl.recipes.imagic import Imagic
from hookctl.recipes.layout_guidance import LayoutGuidance
from hookctl.recipes.masactrl import MasaCtrl
from hookctl.recipes.masked_self_attention import MaskedSelfAttention
from hookctl.recipes.multi_diffusion import MultiDiffusion
from hookctl.recipes.multi_instance_sampler import MultiInstanceSampler
from hookctl.recipes.negative_prompt_inversion import NegativePromptInversion
from hookctl.recipes.null_text import NullTextInversion
from hookctl.recipes.one_way_flow import OneWayFlow
from hookctl.recipes.pag import PAG
from hookctl.recipes.prompt_to_prompt import PromptToPrompt
from hookctl.recipes.proximal_guidance import ProximalGuidance
from hookctl.recipes.real_compo import RealCompo
from hookctl.recipes.reference_only import ReferenceOnly
from hookctl.recipes.regional_prompts import RegionalPrompts
from hookctl.recipes.sag import SAG
from hookctl.recipes.scale_u import ScaleU
from hookctl.recipes.seg import SEG
from hookctl.recipes.selective_one_way import SelectiveOneWay
from hookctl.recipes.style_aligned import StyleAligned

__all__ = [
    "PAG",
    "SAG",
    "SEG",
    "AttendAndExcite",
    "BoxDiff",
    "CyclicOneWay",
    "DDIMInversion",
    "DirectInversion",
    "EditFriendlyDDPM",
    "FreeU",
    "Imagic",
    "LayoutGuidance",
    "MasaCtrl",
    "MaskedSelfAttention",
    "MultiDiffusion",
    "MultiInstanceSampler",
    "NegativePromptInversion",
    "NullTextInversion",
    "OneWayFlow",
    "PromptToPrompt",
    "ProximalGuidance",
    "RealCompo",
    "ReferenceOnly",
    "RegionalPrompts",
    "ScaleU",
    "SelectiveOneWay",
    "StyleAligned",
]
