"""Loads the embedded pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from diffusers.utils import logging
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

from hookctl.arguments import checked, refusal
from hookctl.model_files import read_whole

WEIGHTS = Path(__file__).resolve().parent / "weights"
FLOW_WEIGHTS = Path(__file__).resolve().parent / "flow" / "weights"
AnyPipeline = TypeVar("AnyPipeline", bound=DiffusionPipeline)


@checked()
def load_shapes(
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    weights: Path | str | None = None,
) -> StableDiffusionPipeline:
    """Load the embedded pipeline, an ordinary `StableDiffusionPipeline` without progress bars.

    Receives: a device (None: CUDA when there is one, else CPU), the dtype of all parts, and another
    folder in the diffusers layout than the embedded one. Returns: the pipeline, whose images are
    128 x 128 px and whose latents are [batch, 12, 16, 16].
    """
    folder = Path(weights) if weights is not None else WEIGHTS
    hint = (
        "reinstall hookctl, or train one with `python -m hookctl.demos.shapes.train --out "
        "out/shapes` and pass weights='out/shapes/weights'"
    )
    check_folder("load_shapes", folder, dtype, hint)
    with _quiet():
        # Weights of one's own may have been saved by another version.
        encoder = {} if weights is None else {"text_encoder": _text_encoder(folder)}
        pipe: StableDiffusionPipeline = StableDiffusionPipeline.from_pretrained(
            str(folder), local_files_only=True, **encoder
        )
    return placed(pipe, device, dtype)


@checked()
def load_shapes_flow(
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    weights: Path | str | None = None,
) -> StableDiffusion3Pipeline:
    """Load the flow-matching sibling, a `StableDiffusion3Pipeline` without a T5.

    Receives: a device (None: CUDA when there is one, else CPU), the dtype of all parts, and another
    folder that `train_flow` wrote than the embedded one. Returns: the pipeline, without progress
    bars; images are 128 x 128 px and latents [batch, 12, 16, 16].
    """
    folder = Path(weights) if weights is not None else FLOW_WEIGHTS
    hint = (
        "reinstall hookctl, or train one with `python -m hookctl.demos.shapes.train_flow --out "
        "out/flow` and pass weights='out/flow/weights'"
    )
    check_folder("load_shapes_flow", folder, dtype, hint)
    with _quiet():
        pipe: StableDiffusion3Pipeline = StableDiffusion3Pipeline.from_pretrained(
            str(folder), local_files_only=True, text_encoder_3=None, tokenizer_3=None
        )
    return placed(pipe, device, dtype)


def check_folder(who: str, folder: Path, dtype: torch.dtype, hint: str) -> None:
    """Raises InputError for another dtype than a float's, FileNotFoundError for no pipeline."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise refusal(f"{who}: dtype", dtype, "torch.float32, torch.float16 or torch.bfloat16")
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{who}: weights={folder} holds no pipeline (model_index.json is missing); {hint}"
        )


def placed(pipe: AnyPipeline, device: torch.device | str | None, dtype: torch.dtype) -> AnyPipeline:
    """The pipeline without progress bars, its parts on the device (None: CUDA if there is one)."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, device, dtype)  # diffusers' own `to` warns without need
    return pipe


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars of loading meanwhile."""
    noisy = [log for log in (logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in noisy:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in noisy:
            log.enable_progress_bar()


def _text_encoder(folder: Path) -> CLIPTextModel:
    encoder: CLIPTextModel = read_whole(CLIPTextModel, folder / "text_encoder")
    return encoder
