"""Pipelines put together from blocks, whose guider asks for one branch after the other.

What a guider asks for it also names (`pipelines.asked_by_guider`).
"""

from __future__ import annotations

from hookctl.address.families import handing, text
from hookctl.address.families.record import Pipeline, declare_pipelines
from hookctl.address.rows import SEQUENTIAL

UNET, TRANSFORMER = "unet", "transformer"

declare_pipelines(Pipeline({UNET: SEQUENTIAL}, text.clip), "StableDiffusionXLModularPipeline")
declare_pipelines(Pipeline({TRANSFORMER: SEQUENTIAL}, text.sd3), "StableDiffusion3ModularPipeline")
declare_pipelines(Pipeline({TRANSFORMER: SEQUENTIAL}, text.flux), "FluxModularPipeline")
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.chat(True), handing=handing.negated_image),
    "ZImageModularPipeline",
)
declare_pipelines(Pipeline({TRANSFORMER: SEQUENTIAL}, text.templated), "QwenImageModularPipeline")
declare_pipelines(Pipeline({TRANSFORMER: SEQUENTIAL}, text.TEMPLATE), "Flux2ModularPipeline")
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.chat(False)),
    "Flux2KleinModularPipeline Flux2KleinBaseModularPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL, "transformer_2": SEQUENTIAL}, text.padded(512)),
    "WanModularPipeline",
)
declare_pipelines(
    Pipeline({TRANSFORMER: SEQUENTIAL}, text.padded(128), handing=handing.in_float32),
    "LTXModularPipeline",
)
