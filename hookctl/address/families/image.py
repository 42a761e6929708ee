"""Pipelines that draw images: Stable Diffusion and its kin, and the transformers after it."""

from __future__ import annotations

from hookctl.address.families import handing, text
from hookctl.address.families.record import Pipeline, declare_pipelines
from hookctl.address.rows import (
    ALONE,
    BATCHED,
    BATCHED_THEN_SKIP,
    COND,
    IMAGE,
    PAG,
    PIX2PIX,
    POSITIVE_FIRST,
    SEQUENTIAL,
    UNCOND,
    Layout,
)

UNET, TRANSFORMER = "unet", "transformer"
_POOLED = {"pooled": 2}

# -- Stable Diffusion ------------------------------------------------------------------------------

declare_pipelines(
    Pipeline({UNET: BATCHED}, text.clip),
    """
    StableDiffusionPipeline StableDiffusionImg2ImgPipeline StableDiffusionInpaintPipeline
    StableDiffusionDepth2ImgPipeline StableDiffusionUpscalePipeline
    StableDiffusionControlNetPipeline StableDiffusionControlNetImg2ImgPipeline
    StableDiffusionControlNetInpaintPipeline StableDiffusionControlNetXSPipeline
    StableDiffusionAdapterPipeline StableDiffusionGLIGENPipeline
    StableDiffusionGLIGENTextImagePipeline StableDiffusionLDM3DPipeline
    StableDiffusionDiffEditPipeline StableDiffusionModelEditingPipeline
    StableDiffusionInpaintPipelineLegacy AltDiffusionPipeline AltDiffusionImg2ImgPipeline
    """,
)
declare_pipelines(
    Pipeline({UNET: BATCHED}, text.clip, handing=handing.preconditioned),
    "StableDiffusionLatentUpscalePipeline",
)
declare_pipelines(
    Pipeline({UNET: BATCHED}, text.clip, _POOLED),
    """
    StableDiffusionXLPipeline StableDiffusionXLImg2ImgPipeline StableDiffusionXLInpaintPipeline
    StableDiffusionXLControlNetPipeline StableDiffusionXLControlNetImg2ImgPipeline
    StableDiffusionXLControlNetInpaintPipeline StableDiffusionXLControlNetUnionPipeline
    StableDiffusionXLControlNetUnionImg2ImgPipeline StableDiffusionXLControlNetUnionInpaintPipeline
    StableDiffusionXLControlNetXSPipeline StableDiffusionXLAdapterPipeline
    """,
)
declare_pipelines(
    Pipeline({UNET: PAG}, text.clip),
    """
    StableDiffusionPAGPipeline StableDiffusionPAGImg2ImgPipeline StableDiffusionPAGInpaintPipeline
    StableDiffusionControlNetPAGPipeline StableDiffusionControlNetPAGInpaintPipeline
    """,
)
declare_pipelines(
    Pipeline({UNET: PAG}, text.clip, _POOLED),
    """
    StableDiffusionXLPAGPipeline StableDiffusionXLPAGImg2ImgPipeline
    StableDiffusionXLPAGInpaintPipeline StableDiffusionXLControlNetPAGPipeline
    StableDiffusionXLControlNetPAGImg2ImgPipeline
    """,
)
declare_pipelines(Pipeline({UNET: PIX2PIX}, text.clip), "StableDiffusionInstructPix2PixPipeline")
declare_pipelines(
    Pipeline({UNET: PIX2PIX}, text.clip, _POOLED), "StableDiffusionXLInstructPix2PixPipeline"
)
declare_pipelines(
    Pipeline({UNET: ALONE}, text.clip),
    "LatentConsistencyModelPipeline LatentConsistencyModelImg2ImgPipeline",
)
declare_pipelines(
    Pipeline({UNET: BATCHED}, text.NO_TEXT),
    "StableDiffusionImageVariationPipeline PaintByExamplePipeline",
)
declare_pipelines(
    Pipeline({UNET: BATCHED}, text.clip), "StableUnCLIPImg2ImgPipeline LDMTextToImagePipeline"
)
declare_pipelines(
    Pipeline({UNET: ALONE}, text.NO_TEXT),
    """
    DDIMPipeline DDPMPipeline PNDMPipeline LDMPipeline LDMSuperResolutionPipeline
    ConsistencyModelPipeline ScoreSdeVePipeline RePaintPipeline MarigoldDepthPipeline
    MarigoldNormalsPipeline MarigoldIntrinsicsPipeline DanceDiffusionPipeline
    """,
)

# Every edit is a row of its own beside the one without a text; all belong to one image.
_EDITS = (COND, *(f"edit {n}" for n in range(2, 9)))
_LEDITS = Layout({n + 1: (UNCOND, *_EDITS[:n]) for n in range(1, 9)}, whole=True)
declare_pipelines(
    Pipeline({UNET: _LEDITS}, text.EDITS),
    "LEditsPPPipelineStableDiffusion LEditsPPPipelineStableDiffusionXL",
)

# -- Kandinsky, DeepFloyd IF -----------------------------------------------------------------------

declare_pipelines(
    Pipeline({UNET: BATCHED}, text.kandinsky, {"mask": 2}),
    "KandinskyPipeline KandinskyImg2ImgPipeline KandinskyInpaintPipeline",
)
declare_pipelines(
    Pipeline({UNET: BATCHED}, text.NO_TEXT),
    """
    KandinskyV22Pipeline KandinskyV22Img2ImgPipeline KandinskyV22InpaintPipeline
    KandinskyV22ControlnetPipeline KandinskyV22ControlnetImg2ImgPipeline
    """,
)
declare_pipelines(
    Pipeline({"prior": BATCHED}, text.clip),
    "KandinskyPriorPipeline KandinskyV22PriorPipeline KandinskyV22PriorEmb2EmbPipeline",
)
declare_pipelines(
    Pipeline({UNET: BATCHED}, text.padded(128)),
    "Kandinsky3Pipeline Kandinsky3Img2ImgPipeline",
)
declare_pipelines(
    Pipeline({UNET: BATCHED}, text.padded(77)),
    """
    IFPipeline IFImg2ImgPipeline IFInpaintingPipeline IFSuperResolutionPipeline
    IFImg2ImgSuperResolutionPipeline IFInpaintingSuperResolutionPipeline
    """,
)

# -- transformers that guide in one call -----------------------------------------------------------

declare_pipelines(
    Pipeline({TRANSFORMER: BATCHED_THEN_SKIP}, text.sd3, _POOLED), "StableDiffusion3Pipeline"
)
declare_pipelines(
    Pipeline({TRANSFORMER: BATCHED}, text.sd3, _POOLED),
    """
    StableDiffusion3Img2ImgPipeline StableDiffusion3InpaintPipeline
    StableDiffusion3ControlNetPipeline StableDiffusion3ControlNetInpaintingPipeline
    """,
)
declare_pipelines(
    Pipeline({TRANSFORMER: PAG}, text.sd3, _POOLED),
    "StableDiffusion3PAGPipeline StableDiffusion3PAGImg2ImgPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: BATCHED}, text.padded(120), {"mask": 1}),
    "PixArtAlphaPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: BATCHED}, text.padded(300), {"mask": 1}),
    "PixArtSigmaPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: PAG}, text.padded(300), {"mask": 1}), "PixArtSigmaPAGPipeline"
)
declare_pipelines(
    Pipeline({TRANSFORMER: BATCHED}, text.SEVERAL),
    "HunyuanDiTPipeline HunyuanDiTControlNetPipeline",
)
declare_pipelines(Pipeline({TRANSFORMER: PAG}, text.SEVERAL), "HunyuanDiTPAGPipeline")
declare_pipelines(Pipeline({TRANSFORMER: BATCHED}, text.aura_flow), "AuraFlowPipeline")
declare_pipelines(
    Pipeline({TRANSFORMER: BATCHED}, text.TEMPLATE, {"mask": 1}),
    "SanaPipeline SanaControlNetPipeline",
)
declare_pipelines(Pipeline({TRANSFORMER: PAG}, text.TEMPLATE, {"mask": 1}), "SanaPAGPipeline")
declare_pipelines(
    Pipeline({TRANSFORMER: ALONE}, text.TEMPLATE), "SanaSprintPipeline SanaSprintImg2ImgPipeline"
)
declare_pipelines(Pipeline({TRANSFORMER: BATCHED}, text.padded(128)), "BriaPipeline")
declare_pipelines(Pipeline({TRANSFORMER: BATCHED}, text.padded(224)), "CogView3PlusPipeline")
declare_pipelines(Pipeline({TRANSFORMER: BATCHED}, text.padded(256)), "PRXPipeline")
declare_pipelines(
    Pipeline({TRANSFORMER: BATCHED}, text.padded(256), handing=handing.velocity_of_image),
    "PRXPixelPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: BATCHED}, text.SEVERAL, handing=handing.negated), "HiDreamImagePipeline"
)
declare_pipelines(
    Pipeline({TRANSFORMER: BATCHED}, text.padded(longest=True)),
    "BriaFiboPipeline BriaFiboEditPipeline ErnieImagePipeline",
)
declare_pipelines(Pipeline({TRANSFORMER: POSITIVE_FIRST}, text.NO_TEXT), "DiTPipeline")
declare_pipelines(
    Pipeline({TRANSFORMER: POSITIVE_FIRST}, text.TEMPLATE, {"mask": 1}, handing=handing.negated),
    "LuminaPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: POSITIVE_FIRST}, text.chat(True), handing=handing.negated_image),
    """
    ZImagePipeline ZImageImg2ImgPipeline ZImageInpaintPipeline ZImageControlNetPipeline
    ZImageControlNetInpaintPipeline
    """,
)
declare_pipelines(
    Pipeline({TRANSFORMER: POSITIVE_FIRST}, text.EDIT_TEMPLATE, handing=handing.negated),
    "ZImageOmniPipeline",
)
# Without its images a row is unconditional; with them and no text it is the image's.
_OMNIGEN = Layout({1: (COND,), 2: (COND, UNCOND), 3: (COND, UNCOND, IMAGE)}, whole=True)
declare_pipelines(Pipeline({TRANSFORMER: _OMNIGEN}, text.EDIT_TEMPLATE), "OmniGenPipeline")
declare_pipelines(Pipeline({"prior": BATCHED}, text.NO_TEXT), "ShapEPipeline ShapEImg2ImgPipeline")
_DREAMLITE = Layout({2: (UNCOND, COND), 3: (UNCOND, IMAGE, COND)}, whole=True)
declare_pipelines(
    Pipeline({UNET: _DREAMLITE}, text.TEMPLATE, handing=handing.left_half), "DreamLitePipeline"
)
declare_pipelines(
    Pipeline({UNET: ALONE}, text.TEMPLATE, handing=handing.left_half), "DreamLiteMobilePipeline"
)
_CASCADE = Pipeline({"prior": POSITIVE_FIRST}, text.clip)
declare_pipelines(_CASCADE, "StableCascadePriorPipeline WuerstchenPriorPipeline")
declare_pipelines(
    Pipeline({"decoder": POSITIVE_FIRST}, text.clip),
    "StableCascadeDecoderPipeline WuerstchenDecoderPipeline",
)

# -- transformers that guide by two calls, or not at all -------------------------------------------

declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.flux, {"pooled": 1}),
    """
    FluxPipeline FluxImg2ImgPipeline FluxInpaintPipeline FluxControlNetPipeline
    FluxKontextPipeline FluxKontextInpaintPipeline
    """,
)
declare_pipelines(
    Pipeline({TRANSFORMER: ALONE}, text.flux, {"pooled": 1}),
    """
    FluxControlPipeline FluxControlImg2ImgPipeline FluxControlInpaintPipeline FluxFillPipeline
    FluxControlNetImg2ImgPipeline FluxControlNetInpaintPipeline VisualClozeGenerationPipeline
    """,
)
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.chat(False)),
    "Flux2KleinPipeline Flux2KleinInpaintPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: ALONE}, text.chat(False)),
    "Flux2KleinKVPipeline",
)
declare_pipelines(Pipeline({TRANSFORMER: ALONE}, text.TEMPLATE), "Flux2Pipeline")
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.templated, {"mask": 1}),
    """
    QwenImagePipeline QwenImageImg2ImgPipeline QwenImageInpaintPipeline QwenImageControlNetPipeline
    QwenImageControlNetInpaintPipeline QwenImageLayeredPipeline
    """,
)
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.with_images(), {"mask": 1}),
    "QwenImageEditPipeline QwenImageEditInpaintPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.with_images(text.PICTURE), {"mask": 1}),
    "QwenImageEditPlusPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.EDIT_TEMPLATE),
    "LongCatImageEditPipeline JoyImageEditPipeline BriaFibo2Pipeline",
)
declare_pipelines(Pipeline({TRANSFORMER: BATCHED}, text.EDIT_TEMPLATE), "JoyImageEditPlusPipeline")
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.TEMPLATE),
    """
    QwenImage21Pipeline LongCatImagePipeline OvisImagePipeline Krea2Pipeline HunyuanImagePipeline
    HunyuanImageRefinerPipeline Kandinsky5T2IPipeline Kandinsky5I2IPipeline
    """,
)
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.TEMPLATE, handing=handing.negated),
    "Lumina2Pipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.TEMPLATE, {"mask": 1}, handing=handing.negated),
    "NucleusMoEImagePipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.padded(512)),
    "ChromaPipeline ChromaImg2ImgPipeline ChromaInpaintPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.padded(side="left", longest=True)),
    "CogView4Pipeline CogView4ControlPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.padded(longest=True)), "GlmImagePipeline"
)
declare_pipelines(
    Pipeline(
        {
            TRANSFORMER: Layout({1: (COND,)}, whole=True),
            "unconditional_transformer": Layout({1: (UNCOND,)}, whole=True),
        },
        text.TEMPLATE,
        handing=handing.negated,
    ),
    "Ideogram4Pipeline",
)
