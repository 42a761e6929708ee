"""Facts per family of pipelines, with a generic fallback: what they make of a batch and of a text.

How a pipeline lays out its batch, and which tokenizer fills which stretch of the text sequence
that its attention sees.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from hookctl.address.latent import registers
from hookctl.address.rows import COND, PERTURBED, UNCOND, Layout
from hookctl.errors import UnsupportedError

BATCHED = Layout({1: (COND,), 2: (UNCOND, COND)})
POSITIVE_FIRST = Layout({1: (COND,), 2: (COND, UNCOND)})
SEQUENTIAL = Layout({1: (COND,), 2: (UNCOND, COND)}, sequential=(COND, UNCOND))
# A second call of the positive rows alone is skip-layer guidance.
BATCHED_THEN_SKIP = Layout({1: (PERTURBED,), 2: (UNCOND, COND)}, unguided={1: (COND,)})
PAG = Layout(
    {1: (COND,), 2: (UNCOND, COND), 3: (UNCOND, COND, PERTURBED)}, unguided={2: (COND, PERTURBED)}
)
PIX2PIX = Layout({1: (COND,), 3: (COND, "image", UNCOND)})

_LAYOUTS: tuple[tuple[str, Layout], ...] = (
    (r"PAG", PAG),
    (r"InstructPix2Pix", PIX2PIX),
    (r"StableDiffusion3", BATCHED_THEN_SKIP),
    (r"ZImage|StableCascade|Lumina(?!2)", POSITIVE_FIRST),
    (
        r"Flux|QwenImage|Wan|CogView4|HunyuanVideo|HunyuanImage|SkyReels|Chroma|Cosmos"
        r"|Kandinsky[56]|Krea2|Ovis|LongCat|Bria",
        SEQUENTIAL,
    ),
)


@dataclass(frozen=True)
class TextStream:
    """A stretch of the text sequence: which tokenizer fills it, from which position on.

    length: tokens that the pipeline pads to by default (None: the tokenizer's maximum); prompts:
    the arguments whose texts are in it. Where there are two, two encoders share the positions.
    wrap: what the pipeline makes of a prompt before it is tokenized; dropped: how many tokens of
    that are cut off in front.
    """

    tokenizer: Any
    start: int = 0
    length: int | None = None
    prompts: tuple[str, ...] = ("prompt",)
    wrap: Callable[[str], str] | None = None
    dropped: int = 0


def layout_of(pipe: Any) -> Layout:
    name = type(pipe).__name__
    return next((layout for pattern, layout in _LAYOUTS if re.search(pattern, name)), BATCHED)


def is_guided(pipe: Any) -> bool | None:
    """Whether classifier-free guidance is on, or None where the pipeline does not say."""
    try:
        value = pipe.do_classifier_free_guidance
    except Exception:  # a property over state that exists only during a call
        return None
    single = isinstance(value, Tensor) and value.numel() == 1
    return bool(value) if single or isinstance(value, bool | int) else None


def _sd3(pipe: Any) -> tuple[TextStream, ...]:
    """CLIP, whose two encoders share positions, then T5."""
    clip, t5 = pipe.tokenizer, getattr(pipe, "tokenizer_3", None)
    first = TextStream(clip, prompts=("prompt", "prompt_2"))
    if t5 is None:
        return (first,)
    return first, TextStream(t5, clip.model_max_length, 256, ("prompt_3",))


def _qwen_image(pipe: Any) -> tuple[TextStream, ...]:
    return (
        TextStream(
            pipe.tokenizer,
            length=pipe.tokenizer_max_length,
            wrap=pipe.prompt_template_encode.format,
            dropped=pipe.prompt_template_encode_start_idx,
        ),
    )


def _chatting(pipe: Any, thinking: bool) -> tuple[TextStream, ...]:
    wrap = partial(_chat, pipe.tokenizer, thinking=thinking)
    return (TextStream(pipe.tokenizer, 0, 512, wrap=wrap),)


_STREAMS: tuple[tuple[str, Callable[[Any], tuple[TextStream, ...]]], ...] = (
    (r"StableDiffusion3", _sd3),
    (r"^Flux(?!2)", lambda pipe: (TextStream(pipe.tokenizer_2, 0, 512, ("prompt_2",)),)),
    (r"^PixArtSigma", lambda pipe: (TextStream(pipe.tokenizer, 0, 300),)),
    (r"^PixArt", lambda pipe: (TextStream(pipe.tokenizer, 0, 120),)),
    (r"^Wan", lambda pipe: (TextStream(pipe.tokenizer, 0, 512),)),
    (r"^AuraFlow", lambda pipe: (TextStream(pipe.tokenizer, registers(pipe.transformer), 256),)),
    (r"^ZImage", partial(_chatting, thinking=True)),
    (r"^Flux2Klein", partial(_chatting, thinking=False)),
    (r"^QwenImage(?!Edit|Layered|21)", _qwen_image),
)


def text_streams(pipe: Any) -> tuple[TextStream, ...]:
    """How the text sequence that the attention sees is made up of tokenizers.

    Raises UnsupportedError if the pipeline has no text, or puts it in a template unknown here.
    """
    name = type(pipe).__name__
    second = getattr(pipe, "tokenizer_2", None)
    first: Any = getattr(pipe, "tokenizer", None) or second
    if first is None:
        raise UnsupportedError(
            f"{name} has no tokenizer, so words can't be addressed; use token positions on a "
            "pipeline with a text encoder"
        )
    known = next((streams for pattern, streams in _STREAMS if re.search(pattern, name)), None)
    if known is not None:
        return known(pipe)
    if _wraps_prompts(type(pipe)):  # type: ignore[arg-type]  # classes can be hashed
        raise UnsupportedError(
            f"{name} wraps its prompts in a template that is not known here, so words can't be "
            "addressed; use token positions of the wrapped prompt"
        )
    if "XL" in name and second is not None:
        return (TextStream(first, prompts=("prompt", "prompt_2")),)
    return (TextStream(first),)


def _chat(tokenizer: Any, text: str, thinking: bool) -> str:
    """A prompt as the one message of a chat."""
    said: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
    )
    return said


_TEMPLATES = re.compile(
    r"apply_chat_template|prompt_template|complex_human_instruction|system_(prompt|message)"
)


@functools.cache
def _wraps_prompts(kind: Any) -> bool:
    """Whether a pipeline's code speaks of templates for prompts."""
    try:
        return bool(_TEMPLATES.search(inspect.getsource(kind)))
    except (OSError, TypeError):
        return False


# What `encode_prompt` gives beside the sequence, which comes first, and where.
_ENCODED: tuple[tuple[str, dict[str, int]], ...] = (
    (r"StableDiffusionXL|StableDiffusion3", {"pooled": 2}),
    (r"^Flux(?!2)", {"pooled": 1}),
    (r"^PixArt", {"mask": 1}),
)


def encoded_places(pipe: Any) -> dict[str, int]:
    """Where a pipeline's `encode_prompt` returns the pooled text and the mask of the tokens."""
    name = type(pipe).__name__
    return next((places for pattern, places in _ENCODED if re.search(pattern, name)), {})
