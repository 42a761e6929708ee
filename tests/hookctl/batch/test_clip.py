"""The measures of CLIP against its own halves, on a small model with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from hookctl.batch.filters import clip
from hookctl.batch.filters.drawn import Drawn
from hookctl.demos.shapes.load import WEIGHTS
from hookctl.errors import InputError

PROMPTS = ("a red circle above a blue square", "a green circle above a blue square")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    tokenizer = CLIPTokenizer.from_pretrained(str(WEIGHTS / "tokenizer"))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text = small | {"num_attention_heads": 2, "vocab_size": len(tokenizer)}
    text |= {"max_position_embeddings": 32, "eos_token_id": tokenizer.eos_token_id}
    vision = small | {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    path = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(path)
    clip._loaded.cache_clear()
    yield str(path)
    clip._loaded.cache_clear()


@pytest.fixture
def drawn() -> Drawn:
    noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    return Drawn(PROMPTS, (Image.fromarray(noise[0]), Image.fromarray(noise[1])))


def halves(folder: str, drawn: Drawn) -> tuple[Any, Any]:
    """The projected features of images and prompts, by the two halves of the model."""
    model = CLIPModel.from_pretrained(folder)
    ids = CLIPTokenizer.from_pretrained(folder)(list(drawn.prompts), return_tensors="pt").input_ids
    prepare = CLIPImageProcessor.from_pretrained(folder)
    pixels = prepare(list(drawn.images), return_tensors="pt").pixel_values
    with torch.no_grad():
        images = model.visual_projection(model.vision_model(pixels).pooler_output)
        texts = model.text_projection(model.text_model(ids).pooler_output)
    return images, texts


def test_cosines(folder: str, drawn: Drawn) -> None:
    images, texts = halves(folder, drawn)
    both = cosine_similarity(images, texts)
    near = {"abs": 1e-5}
    assert clip.clip_text(drawn, folder) == pytest.approx(float(both.min()), **near)
    same = cosine_similarity(images[0], images[1], dim=0)
    assert clip.clip_image(drawn, folder) == pytest.approx(float(same), **near)
    unit = [one / one.norm(dim=-1, keepdim=True) for one in (images, texts)]
    way = cosine_similarity(unit[0][1] - unit[0][0], unit[1][1] - unit[1][0], dim=0)
    assert clip.clip_direction(drawn, folder) == pytest.approx(float(way), **near)


def test_a_folder_that_holds_no_clip(tmp_path: Path, drawn: Drawn) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="can't be loaded as a CLIP"):
        clip.clip_text(drawn, str(tmp_path))
