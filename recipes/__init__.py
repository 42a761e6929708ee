"""Published methods as editors and programs, one file each, named as its paper.

Editing a prompt, the image stays alike
    PromptToPrompt            Hertz et al. 2022, arXiv 2208.01626
    MasaCtrl                  Cao et al. 2023, arXiv 2304.08465
    Imagic                    Kawar et al. 2022, arXiv 2210.09276
    FlowEdit                  Kulikov et al. 2024, arXiv 2412.08629
    RFInversion               Rout et al. 2024, arXiv 2410.10792
    DifferentialDiffusion     Levin and Fried 2023, arXiv 2306.00950
Guidance
    PAG                       perturbed attention, Ahn et al. 2024, arXiv 2403.17377
    SEG                       smoothed energy, Hong 2024, arXiv 2408.00760
    SAG                       self-attention, Hong et al. 2022, arXiv 2210.00939
    ProximalGuidance          Han et al. 2023, arXiv 2306.05414
    APG                       adaptive projection, Sadat et al. 2024, arXiv 2410.02416
    CFGZeroStar               CFG-Zero*, Fan et al. 2025, arXiv 2503.18886
    TCFG                      tangential damping, Kwon et al. 2025, arXiv 2503.18137
    FDG                       by frequency, Sadat et al. 2025, arXiv 2506.19713
    FreeU                     Si et al. 2023, arXiv 2309.11497
    ScaleU                    of InstanceDiffusion, Wang et al. 2024, arXiv 2402.03290
Layout: what stands where
    AttendAndExcite           Chefer et al. 2023, arXiv 2301.13826
    BoxDiff                   Xie et al. 2023, arXiv 2307.10816
    LayoutGuidance            Chen et al. 2023, arXiv 2304.03373
    RealCompo                 Zhang et al. 2024, arXiv 2402.12908
    RegionalPrompts           attention couple, after arXiv 2302.08113
    MaskedSelfAttention       of InstanceDiffusion, arXiv 2402.03290
    MultiInstanceSampler      of InstanceDiffusion, arXiv 2402.03290
Prompts that change on the way
    PromptSchedule            prompt editing of A1111's web UI, 2022
Appearance of a reference
    StyleAligned              Hertz et al. 2023, arXiv 2312.02133
    ReferenceOnly             Zhang 2023, discussion 1236 of sd-webui-controlnet
Inversion of a real image, to be edited
    DDIMInversion             Song et al. 2020, arXiv 2010.02502
    DirectInversion           Ju et al. 2023, arXiv 2310.01506
    EditFriendlyDDPM          Huberman-Spiegelglas et al. 2023, arXiv 2304.06140
    NegativePromptInversion   Miyake et al. 2023, arXiv 2305.16807
    NullTextInversion         Mokady et al. 2022, arXiv 2211.09794
Canvas: larger images, scenes round an image
    MultiDiffusion            Bar-Tal et al. 2023, arXiv 2302.08113
    CyclicOneWay              Wang et al. 2023, arXiv 2306.08247
    SelectiveOneWay           Pei et al. 2024, arXiv 2411.19182
    OneWayFlow                its flow between regions, arXiv 2411.19182
    DyPE                      larger than trained for, Issachar et al. 2025, arXiv 2510.20766
    RIFLEx                    longer than trained for, Zhao et al. 2025, arXiv 2502.15894
"""

import sys

from hookctl.recipes.apg import APG
from hookctl.recipes.attend_and_excite import AttendAndExcite
from hookctl.recipes.box_diff import BoxDiff
from hookctl.recipes.cfg_zero_star import CFGZeroStar
from hookctl.recipes.cyclic_one_way import CyclicOneWay
from hookctl.recipes.ddim_inversion import DDIMInversion
from hookctl.recipes.differential_diffusion import DifferentialDiffusion
from hookctl.recipes.direct_inversion import DirectInversion
from hookctl.recipes.dype import DyPE
from hookctl.recipes.edit_friendly_ddpm import EditFriendlyDDPM
from hookctl.recipes.fdg import FDG
from hookctl.recipes.flow_edit import FlowEdit
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
from hookctl.recipes.prompt_schedule import PromptSchedule
from hookctl.recipes.prompt_to_prompt import PromptToPrompt
from hookctl.recipes.proximal_guidance import ProximalGuidance
from hookctl.recipes.real_compo import RealCompo
from hookctl.recipes.reference_only import ReferenceOnly
from hookctl.recipes.regional_prompts import RegionalPrompts
from hookctl.recipes.rf_inversion import RFInversion
from hookctl.recipes.riflex import RIFLEx
from hookctl.recipes.sag import SAG
from hookctl.recipes.scale_u import ScaleU
from hookctl.recipes.seg import SEG
from hookctl.recipes.selective_one_way import SelectiveOneWay
from hookctl.recipes.style_aligned import StyleAligned
from hookctl.recipes.tcfg import TCFG

__all__ = [
    "APG",
    "FDG",
    "PAG",
    "SAG",
    "SEG",
    "TCFG",
    "AttendAndExcite",
    "BoxDiff",
    "CFGZeroStar",
    "CyclicOneWay",
    "DDIMInversion",
    "DifferentialDiffusion",
    "DirectInversion",
    "DyPE",
    "EditFriendlyDDPM",
    "FlowEdit",
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
    "PromptSchedule",
    "PromptToPrompt",
    "ProximalGuidance",
    "RFInversion",
    "RIFLEx",
    "RealCompo",
    "ReferenceOnly",
    "RegionalPrompts",
    "ScaleU",
    "SelectiveOneWay",
    "StyleAligned",
]


def __dir__() -> list[str]:
    if sys._getframe(1).f_globals.get("__name__") == "inspect":
        return ["__all__"]  # help() would print every class in full; the docstring lists them
    return sorted({*globals(), *__all__})
