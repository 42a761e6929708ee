"""Pipelines of several stages: a prior and a decoder, or pipelines that are made of pipelines.

A combined pipeline hands its call on to those inside it, whose denoisers are its own. Each stage is
a run of its own: it encodes its texts, has its scheduler and counts its steps from 0.
"""

from __future__ import annotations

from hookctl.address.families import text
from hookctl.address.families.record import Pipeline, declare_pipelines
from hookctl.address.rows import ALONE, BATCHED, POSITIVE_FIRST

UNET, TRANSFORMER, PRIOR = "unet", "transformer", "prior_prior"
_PIPES = ("prior_pipe", "decoder_pipe")

declare_pipelines(
    Pipeline({UNET: BATCHED, "prior": BATCHED}, text.clip, schedulers={"prior": "prior_scheduler"}),
    "StableUnCLIPPipeline",
)
declare_pipelines(
    Pipeline(
        {UNET: BATCHED, PRIOR: BATCHED},
        text.COMBINED,
        schedulers={PRIOR: "prior_scheduler"},
        inner=_PIPES,
    ),
    """
    KandinskyCombinedPipeline KandinskyImg2ImgCombinedPipeline KandinskyInpaintCombinedPipeline
    KandinskyV22CombinedPipeline KandinskyV22Img2ImgCombinedPipeline
    KandinskyV22InpaintCombinedPipeline
    """,
)
declare_pipelines(
    Pipeline(
        {"decoder": POSITIVE_FIRST, PRIOR: POSITIVE_FIRST},
        text.COMBINED,
        schedulers={PRIOR: "prior_scheduler"},
        inner=_PIPES,
    ),
    "StableCascadeCombinedPipeline WuerstchenCombinedPipeline",
)
declare_pipelines(
    Pipeline(
        {TRANSFORMER: ALONE},
        text.COMBINED,
        inner=("generation_pipe", "upsampling_pipe"),
        joins_channels=True,
    ),
    "VisualClozePipeline",
)
