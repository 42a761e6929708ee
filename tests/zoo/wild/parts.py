"""Parts of pipelines from their entries in the tables."""

from __future__ import annotations

import json
import string
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordPiece
from torch import Tensor

from .. import text
from ..chats import chat_tokenizer

_MARKS = [
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    *("<bos>", "<start_of_turn>", "<end_of_turn>"),
]


def made(entry: Any) -> Any:
    """A part: [class, arguments], ["tokenizer", kind], ["list", parts ...], or a plain value.

    ["processor", kind] prepares images, ["allows"] checks nothing.
    """
    if not isinstance(entry, list):
        return entry
    kind, *rest = entry
    if kind == "list":
        return [made(one) for one in rest]
    if kind == "tokenizer":
        return _TOKENIZERS[rest[0]]()
    if kind == "allows":
        return Allows()
    if kind == "processor":
        return _seeing_chat() if rest[0].startswith("Qwen") else _processor(rest[0])
    arguments = rest[0]
    if hasattr(transformers, kind):
        return _of_transformers(getattr(transformers, kind), arguments)
    found: Any = getattr(diffusers, kind, None) or _elsewhere(kind)
    if issubclass(found, transformers.PreTrainedModel):
        return _of_transformers(found, arguments)
    try:
        return found(**{name: _dtype(given) for name, given in arguments.items()})
    except TypeError:  # some want lists
        return found(**arguments)


class Allows:
    """Stands where Cosmos wants a checker of its texts and videos."""

    def to(self, device: Any) -> Allows:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def _of_transformers(kind: Any, arguments: dict[str, Any]) -> Any:
    config = getattr(kind, "config_class", None)
    return kind(**arguments) if config is None else kind(config(**arguments))


def _elsewhere(kind: str) -> Any:
    """Classes that diffusers keeps in its pipelines' folders."""
    import importlib

    return getattr(importlib.import_module(_HOMES[kind]), kind)


_HOMES = {
    "CLIPImageProjection": "diffusers.pipelines.stable_diffusion",
    "IFWatermarker": "diffusers.pipelines.deepfloyd_if.watermark",
    "LDMBertModel": "diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion",
    "LTXLatentUpsamplerModel": "diffusers.pipelines.ltx.modeling_latent_upsampler",
    "LTX2HDRReferenceCondition": "diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora",
    "LTX2ReferenceCondition": "diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora",
    "LTX2VideoCondition": "diffusers.pipelines.ltx2.pipeline_ltx2_condition",
    "LTX2LatentUpsamplerModel": "diffusers.pipelines.ltx2.latent_upsampler",
    "LTX2TextConnectors": "diffusers.pipelines.ltx2.connectors",
    "LTX2Vocoder": "diffusers.pipelines.ltx2.vocoder",
    "LTX2VocoderWithBWE": "diffusers.pipelines.ltx2.vocoder",
    "MultilingualCLIP": "diffusers.pipelines.kandinsky",
    "PaellaVQModel": "diffusers.pipelines.deprecated.wuerstchen",
    "ReduxImageEncoder": "diffusers.pipelines.flux.modeling_flux",
    "ShapERenderer": "diffusers.pipelines.shap_e",
    "StableUnCLIPImageNormalizer": (
        "diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer"
    ),
    "AceStepConditionEncoder": "diffusers.pipelines.ace_step",
    "StableAudioProjectionModel": "diffusers.pipelines.stable_audio",
}


def _dtype(given: Any) -> Any:
    if isinstance(given, str) and given.startswith("torch."):
        return getattr(torch, given.removeprefix("torch."))
    return tuple(map(_dtype, given)) if isinstance(given, list) else given


def _bert() -> Any:
    letters = string.printable[:94]
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *text.WORDS, *letters]
    words = dict.fromkeys([*known, *(f"##{letter}" for letter in letters)])
    tokenizer = Tokenizer(WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=77,
    )


def _roberta() -> Any:
    """The chat's tokens in a class that AudioLDM 2 knows."""
    model = json.loads(chat_tokenizer().backend_tokenizer.to_str())["model"]
    marks = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    vocab = model["vocab"] | {mark: len(model["vocab"]) + i for i, mark in enumerate(marks)}
    merges = [tuple(pair) for pair in model["merges"]]
    return transformers.RobertaTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def _chat() -> Any:
    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": _MARKS})
    return tokenizer


def _gemma() -> Any:
    tokenizer = _chat()
    tokenizer.padding_side = "left"  # LTX-2 asks for the side before it sets it
    return tokenizer


def _processor(kind: str) -> Any:
    return getattr(transformers, kind)(crop_size=32, size=32)


def _seeing_chat() -> Any:
    """A processor of prompts with images; its constructor asks for more than is needed."""
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as images

    made = transformers.Qwen2VLProcessor.__new__(transformers.Qwen2VLProcessor)
    made.tokenizer = _chat()
    made.image_processor = images.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)
    made.image_token, made.video_token = "<|image_pad|>", "<|video_pad|>"
    for name in ("image", "video"):
        token = getattr(made, f"{name}_token")
        setattr(made, f"{name}_token_id", made.tokenizer.convert_tokens_to_ids(token))
    made.chat_template = made.tokenizer.chat_template
    return made


_TOKENIZERS = {
    "clip": text.clip_tokenizer,
    "t5": text.t5_tokenizer,
    "bert": _bert,
    "chat": _chat,
    "gemma": _gemma,
    "roberta": _roberta,
}


def value(given: Any) -> Any:
    """An argument of a call: an image, array or tensor of a size, or the value itself."""
    if isinstance(given, list):
        return [value(one) for one in given]
    if not isinstance(given, dict):
        return given
    [(kind, size)] = given.items()
    if kind == "dict":
        return {name: value(one) for name, one in size.items()}
    if kind in _HOMES:
        return _elsewhere(kind)(**{name: value(one) for name, one in size.items()})
    noise = torch.Generator().manual_seed(0)
    if kind == "image":
        pixels = torch.rand(size[1], size[0], 3, generator=noise)
        return Image.fromarray((255 * pixels).byte().numpy())
    numbers: Tensor = torch.rand(*size, generator=noise)
    return np.asarray(numbers) if kind == "array" else numbers
