"""Pipelines that draw videos and sounds."""

from __future__ import annotations

from hookctl.address.families import handing, text
from hookctl.address.families.record import Pipeline, declare_pipelines
from hookctl.address.rows import ALONE, BATCHED, PAG, POSITIVE_FIRST, SEQUENTIAL

UNET, TRANSFORMER = "unet", "transformer"

# -- one call --------------------------------------------------------------------------------------

declare_pipelines(
    Pipeline({UNET: BATCHED}, text.clip),
    """
    AnimateDiffPipeline AnimateDiffControlNetPipeline AnimateDiffSparseControlNetPipeline
    AnimateDiffVideoToVideoPipeline AnimateDiffVideoToVideoControlNetPipeline PIAPipeline
    TextToVideoSDPipeline VideoToVideoSDPipeline I2VGenXLPipeline
    """,
)
declare_pipelines(Pipeline({UNET: BATCHED}, text.clip, {"pooled": 2}), "AnimateDiffSDXLPipeline")
declare_pipelines(Pipeline({UNET: PAG}, text.clip), "AnimateDiffPAGPipeline")
declare_pipelines(Pipeline({UNET: BATCHED}, text.NO_TEXT), "StableVideoDiffusionPipeline")
declare_pipelines(Pipeline({TRANSFORMER: BATCHED}, text.padded(120)), "LattePipeline")
declare_pipelines(
    Pipeline({TRANSFORMER: BATCHED}, text.padded(512), {"mask": 1}), "AllegroPipeline"
)
declare_pipelines(
    Pipeline({TRANSFORMER: BATCHED}, text.padded(226)),
    """
    CogVideoXPipeline CogVideoXImageToVideoPipeline CogVideoXVideoToVideoPipeline
    CogVideoXFunControlPipeline ConsisIDPipeline
    """,
)
declare_pipelines(
    Pipeline({TRANSFORMER: BATCHED}, text.padded(128), {"mask": 1}, handing=handing.in_float32),
    "LTXPipeline",
)
declare_pipelines(
    Pipeline(
        {TRANSFORMER: BATCHED},
        text.padded(128),
        {"mask": 1},
        handing=handing.later_frames_of_tokens,
    ),
    "LTXImageToVideoPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: BATCHED}, text.padded(128), handing=handing.negated),
    "LTXConditionPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: BATCHED}, text.padded(128)), "LTXI2VLongMultiPromptPipeline"
)
declare_pipelines(
    Pipeline({TRANSFORMER: BATCHED}, text.TEMPLATE),
    "LTX2Pipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: BATCHED}, text.easy_animate),
    "EasyAnimatePipeline EasyAnimateControlPipeline EasyAnimateInpaintPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: BATCHED}, text.instructed, {"mask": 1}), "SanaVideoPipeline"
)
declare_pipelines(
    Pipeline({TRANSFORMER: BATCHED}, text.TEMPLATE, handing=handing.of_its_own),
    "LTX2ConditionPipeline LTX2HDRPipeline LTX2InContextPipeline",
)
# Distilled: without guidance. The refining rounds go through the schedule once for each tile.
declare_pipelines(
    Pipeline({TRANSFORMER: ALONE}, text.TEMPLATE, handing=handing.of_its_own),
    "LTX2DFRPipeline LTX2DFRTemporalRefinePipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: BATCHED}, text.TEMPLATE, handing=handing.later_frames_of_tokens),
    "LTX2ImageToVideoPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: BATCHED}, text.instructed, {"mask": 1}, handing=handing.later_frames),
    "SanaImageToVideoPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: BATCHED}, text.TEMPLATE, handing=handing.negated_tokens),
    "SanaWMPipeline",
)
declare_pipelines(Pipeline({TRANSFORMER: BATCHED}, text.padded(256)), "MochiPipeline")
declare_pipelines(Pipeline({TRANSFORMER: BATCHED}, text.padded(512)), "AnyFlowPipeline")

declare_pipelines(Pipeline({TRANSFORMER: ALONE}, text.NO_TEXT), "Kandinsky6SRPipeline")

# -- two calls, or one branch ----------------------------------------------------------------------

_WAN = text.padded(512)
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL, "transformer_2": SEQUENTIAL}, _WAN),
    "WanPipeline WanVACEPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL, "transformer_2": SEQUENTIAL}, _WAN, joins_channels=True),
    "WanImageToVideoPipeline LucyEditPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, _WAN),
    """
    WanVideoToVideoPipeline SkyReelsV2Pipeline SkyReelsV2DiffusionForcingPipeline
    SkyReelsV2DiffusionForcingImageToVideoPipeline SkyReelsV2DiffusionForcingVideoToVideoPipeline
    HeliosPipeline HeliosPyramidPipeline
    """,
)
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, _WAN, joins_channels=True),
    "WanAnimatePipeline SkyReelsV2ImageToVideoPipeline ChronoEditPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.templated_by_call, {"pooled": 1, "mask": 2}),
    "HunyuanVideoPipeline HunyuanVideoFramepackPipeline",
)
declare_pipelines(
    Pipeline(
        {TRANSFORMER: SEQUENTIAL},
        text.templated_by_call,
        {"pooled": 1, "mask": 2},
        joins_channels=True,
    ),
    "HunyuanSkyreelsImageToVideoPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.TEMPLATE),
    "Cosmos3OmniPipeline",
)
declare_pipelines(Pipeline({TRANSFORMER: SEQUENTIAL}, text.kandinsky5), "Kandinsky5T2VPipeline")
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.cosmos),
    "Cosmos2_5_PredictBasePipeline Cosmos2_5_TransferPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.SEVERAL, joins_channels=True),
    "HunyuanVideo15Pipeline HunyuanVideo15ImageToVideoPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.padded(512), {"mask": 2}, joins_channels=True),
    "MotifVideoPipeline MotifVideoImage2VideoPipeline",
)
declare_pipelines(Pipeline({TRANSFORMER: SEQUENTIAL}, text.kandinsky6), "Kandinsky6TI2VAPipeline")
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.TEMPLATE, handing=handing.later_frames),
    "HunyuanVideoImageToVideoPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.kandinsky5, handing=handing.later_frames_first),
    "Kandinsky5I2VPipeline",
)
declare_pipelines(
    Pipeline(
        {TRANSFORMER: SEQUENTIAL},
        text.padded(512),
        handing=handing.of_its_own,
        estimate="pred_original_sample",
    ),
    "CosmosTextToWorldPipeline CosmosVideoToWorldPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.padded(512), handing=handing.of_its_own),
    "Cosmos2VideoToWorldPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.padded(512), handing=handing.preconditioned_flow),
    "Cosmos2TextToImagePipeline",
)

declare_pipelines(Pipeline({TRANSFORMER: BATCHED}, text.padded(512)), "AnyFlowFARPipeline")

# -- sounds ----------------------------------------------------------------------------------------

declare_pipelines(Pipeline({UNET: BATCHED}, text.GENERATED), "AudioLDM2Pipeline")
declare_pipelines(Pipeline({UNET: BATCHED}, text.NO_TEXT), "AudioLDMPipeline MusicLDMPipeline")
declare_pipelines(Pipeline({TRANSFORMER: BATCHED}, text.SEVERAL), "StableAudioPipeline")
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.padded(longest=True)), "LongCatAudioDiTPipeline"
)
declare_pipelines(
    Pipeline({TRANSFORMER: BATCHED}, text.SEVERAL),
    "StableAudio3Pipeline StableAudio3AudioToAudioPipeline StableAudio3InpaintPipeline",
)
declare_pipelines(Pipeline({TRANSFORMER: POSITIVE_FIRST}, text.SEVERAL), "AceStepPipeline")
