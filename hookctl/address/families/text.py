"""How the text sequence that a pipeline's attention sees is made up of tokenizers.

Functions of a pipeline, for the records; a text in their place says why words can't be addressed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

from torch import Tensor

from hookctl.address.families.record import TextStream

Streams = Callable[[Any], tuple[TextStream, ...]]


def padded(
    length: int | None = None,
    *,
    tokenizer: str = "tokenizer",
    prompts: tuple[str, ...] = ("prompt",),
    side: Literal["left", "right"] | None = None,
    longest: bool = False,
) -> Streams:
    """One tokenizer, whose texts are padded to a length of the pipeline's own."""

    def streams(pipe: Any) -> tuple[TextStream, ...]:
        found = getattr(pipe, tokenizer)
        return (TextStream(found, 0, length, prompts, side=side, longest=longest),)

    return streams


def clip(pipe: Any) -> tuple[TextStream, ...]:
    """SD and SDXL: one CLIP, or two that share their positions."""
    second = getattr(pipe, "tokenizer_2", None)
    first = getattr(pipe, "tokenizer", None) or second
    return (TextStream(first, prompts=("prompt", "prompt_2") if second else ("prompt",)),)


# The attention sees T5 alone; CLIP's text is pooled.
flux = padded(512, tokenizer="tokenizer_2", prompts=("prompt_2",))


def sd3(pipe: Any) -> tuple[TextStream, ...]:
    """CLIP, whose two encoders share positions, then T5."""
    tokenizer, t5 = pipe.tokenizer, getattr(pipe, "tokenizer_3", None)
    first = TextStream(tokenizer, prompts=("prompt", "prompt_2"))
    if t5 is None:
        return (first,)
    return first, TextStream(t5, tokenizer.model_max_length, 256, ("prompt_3",))


def aura_flow(pipe: Any) -> tuple[TextStream, ...]:
    """Learned tokens stand before the text."""
    learned = getattr(pipe.transformer, "register_tokens", None)
    start = learned.shape[1] if isinstance(learned, Tensor) and learned.dim() == 3 else 0
    return (TextStream(pipe.tokenizer, start, 256),)


def templated(pipe: Any) -> tuple[TextStream, ...]:
    """Qwen-Image: a template round the prompt, whose beginning is cut off."""
    holder = next(one for one in (pipe, *_blocks(pipe)) if hasattr(one, "prompt_template_encode"))
    return (
        TextStream(
            pipe.tokenizer,
            length=holder.tokenizer_max_length,
            wrap=holder.prompt_template_encode.format,
            dropped=holder.prompt_template_encode_start_idx,
            longest=True,
        ),
    )


def kandinsky6(pipe: Any) -> tuple[TextStream, ...]:
    """Kandinsky 6: likewise, the template in the pipeline's module."""
    from diffusers.pipelines.kandinsky6 import pipeline_kandinsky6_ti2va as home

    template, dropped = home._PROMPT_TEMPLATE, home._QWEN_CROP_START
    return (TextStream(pipe.tokenizer.tokenizer, 0, 1024, wrap=template.format, dropped=dropped),)


def _blocks(pipe: Any) -> Iterator[Any]:
    """The blocks that a modular pipeline is put together from, and those inside them."""
    waiting = [pipe.blocks] if hasattr(pipe, "blocks") else []
    while waiting:
        block = waiting.pop()
        yield block
        waiting += list(getattr(block, "sub_blocks", {}).values())


def chat(thinking: bool, length: int | None = 512, *, longest: bool = False) -> Streams:
    """The prompt as the one message of a chat."""

    def streams(pipe: Any) -> tuple[TextStream, ...]:
        wrap = partial(_chat, pipe.tokenizer, thinking=thinking)
        return (TextStream(pipe.tokenizer, 0, length, wrap=wrap, longest=longest),)

    return streams


def _chat(tokenizer: Any, text: str, thinking: bool) -> str:
    said: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
    )
    return said


def kandinsky(pipe: Any) -> tuple[TextStream, ...]:
    """Kandinsky 2.1: an image's embedding, in several tokens, stands before the text."""
    before = getattr(pipe.unet.encoder_hid_proj, "num_image_text_embeds", 0)
    return (TextStream(pipe.tokenizer, before, 77),)


NO_TEXT = "it has no text"
TEMPLATE = "it puts its prompts into a template that is not declared"
SEVERAL = "several texts stand in one sequence, whose order is not declared"
GENERATED = "its attention sees tokens that a language model made of the prompt, not its words"
EDIT_TEMPLATE = "the images to edit stand in one sequence with the prompt before it is encoded"
EDITS = "its prompts are edits, which share one image"
COMBINED = "its words are those of the pipelines inside it; control those one by one"
