"""What CLIP says of phrases and images, in the form in which grounding modules were trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hookctl.address.tokenizers import own_copy
from hookctl.arguments import refusal, shown
from hookctl.errors import InputError, UnsupportedError
from hookctl.learned.image_encoder import pixels

NORM = 28.7  # of a phrase's features; images' are brought to it


@torch.no_grad()
def phrase_features(pipe: Any, phrases: Iterable[str], who: str) -> dict[str, Tensor]:
    """The features of phrases by the pipeline's own first text encoder, float32 [width] each.

    They are those of the end token after the final norm, before any projection (`pooler_output`).
    Raises UnsupportedError without such an encoder, InputError for a phrase that is too long.
    """
    texts = list(dict.fromkeys(phrases))
    encoder, tokenizer = (getattr(pipe, name, None) for name in ("text_encoder", "tokenizer"))
    if not texts:
        return {}
    if encoder is None or tokenizer is None:
        name = "a bare denoiser" if pipe is None else type(pipe).__name__
        raise UnsupportedError(
            f"{who}: {name} has no text encoder, so phrases can't be encoded; give "
            "their features [width]"
        )
    longest, pad = tokenizer.model_max_length, tokenizer.pad_token_id
    ids = [own_copy(tokenizer)(text).input_ids for text in texts]
    for text, tokens in zip(texts, map(len, ids), strict=True):
        if tokens > longest:
            raise InputError(
                f"{who}: the phrase {shown(text)} has {tokens} tokens; give one of {longest} at "
                "most"
            )
    padded = torch.tensor([[*one, *[pad] * (longest - len(one))] for one in ids])
    out = encoder(padded.to(getattr(pipe, "_execution_device", encoder.device)))
    pooled = getattr(out, "pooler_output", None)
    if pooled is None:
        raise UnsupportedError(
            f"{who}: {type(encoder).__name__} gives no feature of a whole phrase (pooler_output); "
            "give features [width] of your own"
        )
    return {text: feature.float() for text, feature in zip(texts, pooled, strict=True)}


@torch.no_grad()
def image_feature(image: Image.Image | Tensor, clip: Any, name: str) -> Tensor:
    """The feature of an image in the space of phrases, float32 [width].

    image: a crop, resized to CLIP's square as it is, or its CLIP embedding [width] after
    projection. clip: a transformers CLIPModel, or its text projection [joint, text] for embeddings.
    v = P^T e, at the length of a phrase's feature. Raises InputError.
    """
    if clip is None:
        raise InputError(
            f"{name}: images need clip=, a transformers CLIPModel (openai/clip-vit-large-patch14 "
            "for the official checkpoints), or its text projection for embeddings"
        )
    projection = clip if isinstance(clip, Tensor) else getattr(clip, "text_projection", None)
    projection = getattr(projection, "weight", projection)
    if not isinstance(projection, Tensor) or projection.dim() != 2:
        raise refusal(f"{name}: clip", clip, "a transformers CLIPModel, or a matrix [joint, text]")
    if isinstance(image, Image.Image):
        if isinstance(clip, Tensor):
            raise InputError(f"{name}: an image is given, and clip= is a matrix; give a CLIPModel")
        side = clip.config.vision_config.image_size
        x = pixels(image, side, crop=False).to(projection)
        embedding = clip.visual_projection(clip.vision_model(pixel_values=x).pooler_output)[0]
    elif isinstance(image, Tensor) and image.shape == projection.shape[:1]:
        embedding = image
    else:
        raise refusal(name, image, f"a PIL image or its CLIP embedding [{projection.shape[0]}]")
    if not bool(embedding.isfinite().all() and embedding.any()):
        raise InputError(f"{name}: zeros, NaN or infinity in the CLIP embedding; give another")
    feature = projection.detach().float().T @ embedding.to(projection.device).float()
    return NORM * feature / feature.norm()


def phrase_of(given: Any, name: str) -> str | Tensor:
    """A text that is not empty, or features [width]. Raises InputError."""
    if isinstance(given, Tensor) and given.dim() == 1:
        return finite(given, name)
    if isinstance(given, str) and given.strip():
        return given
    raise refusal(name, given, "a phrase, or its features [width]")


def finite(given: Tensor, name: str) -> Tensor:
    """Real numbers, none of them NaN or infinite. Raises InputError."""
    if given.dtype == torch.bool or given.is_complex() or not given.numel():
        raise refusal(name, given, f"real numbers, not {given.dtype}" if given.numel() else "some")
    if not bool(given.isfinite().all()):
        raise InputError(f"{name}={shown(given)} holds NaN or infinity; give finite numbers")
    return given


def features_of(
    phrase: str | Tensor, encoded: Mapping[str, Tensor], width: int, name: str
) -> Tensor:
    """Features of a phrase, [width]; InputError if they are of another encoder."""
    found = encoded[phrase] if isinstance(phrase, str) else phrase
    if found.shape != (width,):
        raise InputError(
            f"{name}: the phrase {shown(phrase)} has {found.numel()} features and the checkpoint "
            f"was trained with {width}; use a pipeline of the model that it was trained for"
        )
    return found
