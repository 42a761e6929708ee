"""Measures by a CLIP of the user's own, as InstructPix2Pix-like sets are filtered by.

Brooks et al., "InstructPix2Pix", arXiv 2211.09800, 3.1.2, with the directional similarity of Gal et
al., arXiv 2108.00946. A folder with the model, its tokenizer and its image processor, as
`save_pretrained` writes them; nothing is downloaded.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookctl.batch.filters.drawn import Drawn
from hookctl.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def clip_text(drawn: Drawn, model: str) -> float:
    """Cosine of image and prompt, -1 to 1, of that of the two images which fits its own less."""
    images, texts = _features(drawn, model)
    return float((images * texts).sum(-1).min())


def clip_image(drawn: Drawn, model: str) -> float:
    """Cosine of source and edited image, -1 to 1."""
    images, _ = _features(drawn, model)
    return float((images[0] * images[1]).sum())


def clip_direction(drawn: Drawn, model: str) -> float:
    """Cosine of the change from image to image and that from prompt to prompt, -1 to 1."""
    from torch.nn.functional import cosine_similarity

    images, texts = _features(drawn, model)
    return float(cosine_similarity(images[1] - images[0], texts[1] - texts[0], dim=0))


def _features(drawn: Drawn, model: str) -> tuple[Tensor, Tensor]:
    """Unit vectors of both images and of both prompts, each [2, width]."""
    import torch

    clip, tokenizer, processor = _loaded(model)
    texts = tokenizer(list(drawn.prompts), padding=True, truncation=True, return_tensors="pt")
    pixels = processor([one.convert("RGB") for one in drawn.images], return_tensors="pt")
    with torch.no_grad():
        found = clip(
            input_ids=texts["input_ids"],
            attention_mask=texts["attention_mask"],
            pixel_values=pixels["pixel_values"],
        )
    return found.image_embeds, found.text_embeds


@lru_cache(maxsize=1)
def _loaded(model: str) -> tuple[Any, Any, Any]:
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    from hookctl.model_files import read_whole

    folder = Path(model)
    try:
        return (
            read_whole(CLIPModel, folder).eval(),
            CLIPTokenizer.from_pretrained(str(folder), local_files_only=True),
            CLIPImageProcessor.from_pretrained(str(folder), local_files_only=True),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{model}: can't be loaded as a CLIP ({reason})") from error
