"""Facts per family: what is declared of denoisers and pipelines, and what their modules show.

record          the two records, `Model` and `Pipeline`, and where they are looked up
models, image, moving, combined   the tables
text            how a pipeline's text sequence is made up
access, sites, processors   denoisers, attention sites, and how their attention is computed
inside, rotary  their other layers, and rotary positions
loops           what pipelines do between the latents and the scheduler's step
traces, prove   measure on a live pipeline what is declared
"""

from __future__ import annotations

from hookctl.address.families import (  # the tables  # noqa: F401
    combined,
    image,
    models,
    modular,
    moving,
)
from hookctl.address.families.access import (
    DENOISERS,
    denoiser_of,
    denoisers_of,
    named_denoisers,
)
from hookctl.address.families.inside import Block, blocks_of, linears, plain_blocks, stem_of
from hookctl.address.families.loops import (
    Loop,
    declare_loops,
    leaves_unguided,
    loop_of,
    settings_of,
)
from hookctl.address.families.processors import (
    bypasses_sdpa,
    counts_text,
    keeps_perturbed,
    processor_of,
    sdpa_form,
    spells_out,
    text_call,
    uncatchable,
)
from hookctl.address.families.record import (
    Model,
    Pipeline,
    TextStream,
    declare_models,
    declare_pipelines,
    model_of,
    names_of,
    pipeline_of,
    uncompiled,
)
from hookctl.address.families.rotary import rotary_of
from hookctl.address.families.sites import (
    attention_modules,
    describe_sites,
    joint_order,
    sites_of,
    softmax_free,
    widens_joint,
)
from hookctl.address.families.text import EDIT_TEMPLATE, image_lengths, note_images

__all__ = [
    "Block",
    "DENOISERS",
    "EDIT_TEMPLATE",
    "Loop",
    "Model",
    "Pipeline",
    "TextStream",
    "attention_modules",
    "blocks_of",
    "bypasses_sdpa",
    "counts_text",
    "declare_loops",
    "declare_models",
    "declare_pipelines",
    "denoiser_of",
    "denoisers_of",
    "describe_sites",
    "image_lengths",
    "joint_order",
    "keeps_perturbed",
    "leaves_unguided",
    "linears",
    "loop_of",
    "named_denoisers",
    "sites_of",
    "model_of",
    "names_of",
    "note_images",
    "pipeline_of",
    "plain_blocks",
    "processor_of",
    "rotary_of",
    "sdpa_form",
    "settings_of",
    "softmax_free",
    "spells_out",
    "stem_of",
    "text_call",
    "uncatchable",
    "uncompiled",
    "widens_joint",
]
