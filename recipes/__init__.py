"""Published methods as editors and programs, one file each, named as its paper.

Editing a prompt, the image stays alike
    PromptToPrompt            Hertz et al. 2022, arXiv 2208.01626
    MasaCtrl                  Cao et al. 2023, arXiv 2304.08465
    Imagic                    Kawar et al. 2022, arXiv 2210.09276
    LEDITSPlusPlus            LEDITS++, Brack et al. 2023, arXiv 2311.16711
    PlugAndPlay               Tumanyan et al. 2022, arXiv 2211.12572
    FlowEdit                  Kulikov et al. 2024, arXiv 2412.08629
    RFInversion               Rout et al. 2024, arXiv 2410.10792
    DifferentialDiffusion     Levin and Fried 2023, arXiv 2306.00950
    FireFlow                  Deng et al. 2024, arXiv 2412.07517
    KVEdit                    Zhu et al. 2025, arXiv 2502.17363
    RFSolver                  Wang et al. 2024, arXiv 2411.04746
    StableFlow                Avrahami et al. 2024, arXiv 2411.14430
    UniEditFlow               Jiao et al. 2025, arXiv 2504.13109
Guidance
    NAG                       normalized attention, Chen et al. 2025, arXiv 2505.21179
    PAG                       perturbed attention, Ahn et al. 2024, arXiv 2403.17377
    SEG                       smoothed energy, Hong 2024, arXiv 2408.00760
    SkipLayerGuidance         SLG of Stable Diffusion 3.5, github.com/Stability-AI/sd3.5
    STG                       spatiotemporal skip, Hyung et al. 2024, arXiv 2411.18664
    TPG                       token perturbation, Rajabi et al. 2025, arXiv 2506.10036
    SAG                       self-attention, Hong et al. 2022, arXiv 2210.00939
    ProximalGuidance          Han et al. 2023, arXiv 2306.05414
    APG                       adaptive projection, Sadat et al. 2024, arXiv 2410.02416
    CFGZeroStar               CFG-Zero*, Fan et al. 2025, arXiv 2503.18886
    TCFG                      tangential damping, Kwon et al. 2025, arXiv 2503.18137
    FDG                       by frequency, Sadat et al. 2025, arXiv 2506.19713
    FreeU                     Si et al. 2023, arXiv 2309.11497
    ScaleU                    of InstanceDiffusion, Wang et al. 2024, arXiv 2402.03290
Layout: what stands where, and when
    AttendAndExcite           Chefer et al. 2023, arXiv 2301.13826
    BoxDiff                   Xie et al. 2023, arXiv 2307.10816
    LayoutGuidance            Chen et al. 2023, arXiv 2304.03373
    RealCompo                 Zhang et al. 2024, arXiv 2402.12908
    PromptRelay               in videos, Chen et al. 2026, arXiv 2604.10030
    RegionalPrompts           attention couple, after arXiv 2302.08113
    MaskedSelfAttention       of InstanceDiffusion, arXiv 2402.03290
    MultiInstanceSampler      of InstanceDiffusion, arXiv 2402.03290
Prompts that change on the way
    PromptSchedule            prompt editing of A1111's web UI, 2022
Maps: where an image shows what
    ConceptAttention          Helbling et al. 2025, arXiv 2502.04320
Appearance of a reference
    StyleAligned              Hertz et al. 2023, arXiv 2312.02133
    ReferenceOnly             Zhang 2023, discussion 1236 of sd-webui-controlnet
    ConsiStory                Tewel et al. 2024, arXiv 2402.03286
    StoryDiffusion            Zhou et al. 2024, arXiv 2405.01434
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
from hookctl.recipes.concept_attention import ConceptAttention
from hookctl.recipes.consistory import ConsiStory
from hookctl.recipes.cyclic_one_way import CyclicOneWay
from hookctl.recipes.ddim_inversion import DDIMInversion
from hookctl.recipes.differential_diffusion import DifferentialDiffusion
from hookctl.recipes.direct_inversion import DirectInversion
from hookctl.recipes.dype import DyPE
from hookctl.recipes.edit_friendly_ddpm import EditFriendlyDDPM
from hookctl.recipes.fdg import FDG
from hookctl.recipes.fire_flow import FireFlow
from hookctl.recipes.flow_edit import FlowEdit
from hookctl.recipes.freeu import FreeU
from hookctl.recipes.imagic import Imagic
from hookctl.recipes.kv_edit import KVEdit
from hookctl.recipes.layout_guidance import LayoutGuidance
from hookctl.recipes.ledits_plus_plus import LEDITSPlusPlus
from hookctl.recipes.masactrl import MasaCtrl
from hookctl.recipes.masked_self_attention import MaskedSelfAttention
from hookctl.recipes.multi_diffusion import MultiDiffusion
from hookctl.recipes.multi_instance_sampler import MultiInstanceSampler
from hookctl.recipes.nag import NAG
from hookctl.recipes.negative_prompt_inversion import NegativePromptInversion
from hookctl.recipes.null_text import NullTextInversion
from hookctl.recipes.one_way_flow import OneWayFlow
from hookctl.recipes.pag import PAG
from hookctl.recipes.plug_and_play import PlugAndPlay
from hookctl.recipes.prompt_relay import PromptRelay
from hookctl.recipes.prompt_schedule import PromptSchedule
from hookctl.recipes.prompt_to_prompt import PromptToPrompt
from hookctl.recipes.proximal_guidance import ProximalGuidance
from hookctl.recipes.real_compo import RealCompo
from hookctl.recipes.reference_only import ReferenceOnly
from hookctl.recipes.regional_prompts import RegionalPrompts
from hookctl.recipes.rf_inversion import RFInversion
from hookctl.recipes.rf_solver import RFSolver
from hookctl.recipes.riflex import RIFLEx
from hookctl.recipes.sag import SAG
from hookctl.recipes.scale_u import ScaleU
from hookctl.recipes.seg import SEG
from hookctl.recipes.selective_one_way import SelectiveOneWay
from hookctl.recipes.skip_layer_guidance import SkipLayerGuidance
from hookctl.recipes.stable_flow import StableFlow
from hookctl.recipes.stg import STG
from hookctl.recipes.story_diffusion import StoryDiffusion
from hookctl.recipes.style_aligned import StyleAligned
from hookctl.recipes.tcfg import TCFG
from hookctl.recipes.tpg import TPG
from hookctl.recipes.uni_edit_flow import UniEditFlow

__all__ = [
    "APG",
    "FDG",
    "NAG",
    "LEDITSPlusPlus",
    "PAG",
    "SAG",
    "SEG",
    "STG",
    "TCFG",
    "TPG",
    "AttendAndExcite",
    "BoxDiff",
    "CFGZeroStar",
    "ConceptAttention",
    "ConsiStory",
    "CyclicOneWay",
    "DDIMInversion",
    "DifferentialDiffusion",
    "DirectInversion",
    "DyPE",
    "EditFriendlyDDPM",
    "FireFlow",
    "FlowEdit",
    "FreeU",
    "Imagic",
    "KVEdit",
    "LayoutGuidance",
    "MasaCtrl",
    "MaskedSelfAttention",
    "MultiDiffusion",
    "MultiInstanceSampler",
    "NegativePromptInversion",
    "NullTextInversion",
    "OneWayFlow",
    "PlugAndPlay",
    "PromptRelay",
    "PromptSchedule",
    "PromptToPrompt",
    "ProximalGuidance",
    "RFInversion",
    "RFSolver",
    "RIFLEx",
    "RealCompo",
    "ReferenceOnly",
    "RegionalPrompts",
    "ScaleU",
    "SelectiveOneWay",
    "StableFlow",
    "SkipLayerGuidance",
    "StoryDiffusion",
    "StyleAligned",
    "UniEditFlow",
]


def __dir__() -> list[str]:
    if sys._getframe(1).f_globals.get("__name__") == "inspect":
        return ["__all__"]  # help() would print every class in full; the docstring lists them
    return sorted({*globals(), *__all__})
