"""Writes the sibling in the diffusers layout."""

from __future__ import annotations

import copy
from pathlib import Path

from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from ..train import write_half
from .network import build_scheduler
from .training import Parts


def export(parts: Parts, network: SD3Transformer2DModel, out: Path) -> Path:
    """Write the pipeline as fp16 safetensors to `out`/weights; replaced file by file.

    There is no T5: load it with `text_encoder_3=None, tokenizer_3=None`.
    """
    encoder = copy.deepcopy(parts.prompts.encoder)
    pipe = StableDiffusion3Pipeline(
        transformer=network, scheduler=build_scheduler(), vae=copy.deepcopy(parts.vae),
        text_encoder=encoder, tokenizer=parts.tokenizer, text_encoder_2=encoder,
        tokenizer_2=parts.tokenizer, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    return write_half(pipe, out)
