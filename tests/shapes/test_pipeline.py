"""The shipped weights: layout, tokens, the autoencoder, and a few images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

import hookctl
from hookctl.demos.shapes.detect import detect, matches
from hookctl.demos.shapes.evaluate import generate, measure_vae
from hookctl.demos.shapes.load import WEIGHTS, load_shapes
from hookctl.demos.shapes.text import Words
from hookctl.demos.shapes.train import as_every_version_reads
from hookctl.demos.shapes.world import COLOURS, SHAPES, WORDS


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return hookctl.load_shapes(device="cpu")


def test_layout(pipe: StableDiffusionPipeline) -> None:
    assert isinstance(pipe, StableDiffusionPipeline)
    assert isinstance(pipe.text_encoder, CLIPTextModel)
    assert isinstance(pipe.vae, AutoencoderKL)
    assert isinstance(pipe.unet, UNet2DConditionModel)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    assert pipe.safety_checker is None and not pipe.config.requires_safety_checker
    assert pipe.vae.config.scaling_factor == 1.0 and pipe.vae_scale_factor == 8
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    files = [p for p in WEIGHTS.rglob("*") if p.is_file()]
    modules = [p for p in files if "hooks" in p.relative_to(WEIGHTS).parts]
    assert sum(p.stat().st_size for p in files if p not in modules) <= 40e6
    assert all(p.stat().st_size <= 10e6 for p in modules)
    assert all(p.dtype == torch.float32 for p in pipe.unet.parameters())


def test_plain_from_pretrained() -> None:
    loaded = StableDiffusionPipeline.from_pretrained(WEIGHTS).to(torch.float16)
    assert loaded.unet.dtype == loaded.vae.dtype == torch.float16


def test_every_transformers_finds_the_text_weights(tmp_path: Path) -> None:
    """Version 4 looks for full names and takes random weights for what it does not find."""
    path = WEIGHTS / "text_encoder/model.safetensors"
    held = load_file(path)
    assert all(name.startswith("text_model.") for name in held)
    save_file({name.removeprefix("text_model."): v for name, v in held.items()}, tmp_path / "short")
    as_every_version_reads(tmp_path / "short")
    again = load_file(tmp_path / "short")
    assert again.keys() == held.keys() and all(again[n].equal(held[n]) for n in held)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no pipeline"):
        load_shapes(weights=tmp_path)


def test_every_word_is_one_token_with_offsets(pipe: StableDiffusionPipeline) -> None:
    tokenizer = pipe.tokenizer
    assert tokenizer.model_max_length == 32
    for word in WORDS:
        ids = tokenizer(word)["input_ids"]
        assert len(ids) == 3, word
        assert (ids[0], ids[2]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    text = "a large striped red circle, an orange square and a zebra"
    coded = tokenizer(text, return_offsets_mapping=True)
    said = [text[a:b] for a, b in coded["offset_mapping"] if b > a]
    assert "".join(said) == text.replace(" ", "")
    assert said[:9] == ["a", "large", "striped", "red", "circle", ",", "an", "orange", "square"]
    padded = tokenizer(text, padding="max_length", truncation=True)["input_ids"]
    assert len(padded) == 32 and padded[-1] == tokenizer.eos_token_id
    plain = "a red circle left of a striped blue star on a gray background"
    quick = Words(tokenizer)([plain])[0].tolist()
    assert quick == tokenizer(plain, padding="max_length")["input_ids"]


@pytest.mark.slow  # a hundred images through the autoencoder
def test_autoencoder_keeps_what_the_detector_reads(pipe: StableDiffusionPipeline) -> None:
    figures = measure_vae(pipe, 48, seed=0)
    assert figures["psnr"] >= 30.0 and figures["colour and shape"] >= 0.97


@pytest.mark.slow  # draws by the trained pipeline
def test_one_object_prompts_come_true(pipe: StableDiffusionPipeline) -> None:
    prompts = [
        f"a{'n' * (colour == 'orange')} {colour} {shape}"
        for colour, shape in zip([*COLOURS, "red", "blue"], [*SHAPES, *SHAPES[:3]], strict=True)
    ]
    images, _ = generate(pipe, prompts, steps=25, guidance=2.5, seed=0)
    right = [matches(detect(p), text) for p, text in zip(images, prompts, strict=True)]
    assert np.sum(right) >= 6, dict(zip(prompts, right, strict=True))
