"""How the text sequence that a pipeline's attention sees is made up of tokenizers.

Functions of a pipeline, for the records; a text in their place says why words can't be addressed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

from torch import Tensor

from hookctl.address.families.record import TextStream
from hookctl.address.families.said import all_said, image_lengths, said
from hookctl.address.tokenizers import own_copy, padded_length

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
            side="right",  # whatever the tokenizer's: padding is taken out and put behind again
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


def templated_by_call(pipe: Any) -> tuple[TextStream, ...]:
    """HunyuanVideo: the template is an argument of the call; where that doesn't say how much of its
    beginning is cut off, all but the prompt's place and the token of the end is.

    Before a call the usual template stands for that which is not known yet, and cuts nothing.
    """
    template, tokenizer = said(pipe, "prompt_template"), pipe.tokenizer
    dropped = template.get("crop_start")
    if dropped is None:
        dropped = padded_length(tokenizer, template["template"]) - 2
    wrap, early = template["template"].format, not all_said(pipe)
    length = None if early else 256
    return (TextStream(tokenizer, length=length, wrap=wrap, dropped=dropped, longest=early),)


def instructed(pipe: Any) -> tuple[TextStream, ...]:
    """Sana: an argument of the call has lines of instruction, which stand before the prompt alone;
    of the whole, its first token is kept and what is not the instruction's."""
    tokenizer, lines = pipe.tokenizer, said(pipe, "complex_human_instruction")
    if not lines:
        return (TextStream(tokenizer, length=300, side="right"),)
    instruction = "\n".join(lines)
    return (
        TextStream(
            tokenizer,
            length=300,
            wrap=partial(operator.add, instruction),
            dropped=len(own_copy(tokenizer)(instruction).input_ids) - 2,
            wraps_negative=False,
            side="right",
        ),
    )


def lumina2(pipe: Any) -> tuple[TextStream, ...]:
    """A sentence of the call or of the pipeline stands before the prompt alone."""
    before = said(pipe, "system_prompt") or pipe.system_prompt
    wrap = partial(operator.add, f"{before} <Prompt Start> ")
    return (TextStream(pipe.tokenizer, length=256, wrap=wrap, wraps_negative=False, side="right"),)


def krea2(pipe: Any) -> tuple[TextStream, ...]:
    """As Qwen-Image's template, whose end stands behind the padding."""
    return (
        TextStream(
            pipe.tokenizer,
            length=512,
            wrap=partial(operator.add, pipe.prompt_template_encode_prefix),
            dropped=pipe.prompt_template_encode_start_idx,
            behind=pipe.prompt_template_encode_num_suffix_tokens,
        ),
    )


def kandinsky5(pipe: Any) -> tuple[TextStream, ...]:
    """A template round the prompt, whose beginning is cut off."""
    return (
        TextStream(
            pipe.tokenizer.tokenizer,
            wrap=pipe.prompt_template.format,
            dropped=pipe.prompt_template_encode_start_idx,
            longest=True,
        ),
    )


def with_images(picture: str | None = None) -> Streams:
    """Qwen-Image-Edit: the images to edit and then the prompt in a template, whose beginning is cut
    off. picture: of an image, by its number; None where the template has its place itself."""

    def streams(pipe: Any) -> tuple[TextStream, ...]:
        counts = image_lengths(pipe)

        def wrap(text: str) -> str:
            before = (picture or "").format
            pictures = "".join(before(i + 1) for i in range(len(counts or (1,))))
            first, *rest = pipe.prompt_template_encode.format(pictures + text).split(_PLACE)
            places = [*(counts or ()), *[1] * len(rest)]
            return first + "".join(_PLACE * n + part for n, part in zip(places, rest, strict=False))

        # Of images that are not known the tokens are missing, all of them before the prompt.
        side: Literal["left", "right"] = "left" if counts is None else "right"
        dropped = pipe.prompt_template_encode_start_idx
        tokenizer = pipe.processor.tokenizer
        return (TextStream(tokenizer, wrap=wrap, dropped=dropped, side=side, longest=True),)

    return streams


_PLACE = "<|image_pad|>"  # in a template; the processor writes it once for every token of an image
PICTURE = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"


def chat(thinking: bool, length: int | None = 512, *, longest: bool = False) -> Streams:
    """The prompt as the one message of a chat."""

    def streams(pipe: Any) -> tuple[TextStream, ...]:
        wrap = partial(_chat, pipe.tokenizer, add_generation_prompt=True, enable_thinking=thinking)
        return (TextStream(pipe.tokenizer, 0, length, wrap=wrap, longest=longest),)

    return streams


def ovis(pipe: Any) -> tuple[TextStream, ...]:
    """A sentence and the prompt in the one message of a chat, whose beginning is cut off."""

    def wrap(text: str) -> str:
        given = {"add_generation_prompt": True, "enable_thinking": False}
        return _chat(pipe.tokenizer, pipe.system_prompt + text, **given)

    dropped = pipe.user_prompt_begin_id
    return (TextStream(pipe.tokenizer, length=256, wrap=wrap, dropped=dropped),)


def easy_animate(pipe: Any) -> tuple[TextStream, ...]:
    """The one message of a chat, in parts."""

    def wrap(text: str) -> str:
        return _chat(pipe.tokenizer, _parts(text), add_generation_prompt=True)

    return (TextStream(pipe.tokenizer, length=256, wrap=wrap, side="right"),)


def cosmos(pipe: Any) -> tuple[TextStream, ...]:
    """A chat that begins with what the model is to be."""
    system = _parts("You are a helpful assistant who will provide prompts to an image generator.")

    def wrap(text: str) -> str:
        given = {"add_generation_prompt": False, "add_vision_id": False}
        return _chat(pipe.tokenizer, _parts(text), system, **given)

    return (TextStream(pipe.tokenizer, length=512, wrap=wrap),)


def flux2(pipe: Any) -> tuple[TextStream, ...]:
    """A chat that begins with what the model is to be; its processor adds the token of a beginning
    where the template has none."""
    processor = pipe.tokenizer
    tokenizer = processor.tokenizer

    def wrap(text: str) -> str:
        system = _parts(pipe.system_message)
        whole = _chat(processor, _parts(text), system, add_generation_prompt=False)
        first = own_copy(tokenizer)("").input_ids[:1]
        begins = tokenizer.bos_token is not None and first == [tokenizer.bos_token_id]
        return whole.removeprefix(tokenizer.bos_token) if begins else whole

    return (TextStream(tokenizer, length=512, wrap=wrap),)


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _chat(tokenizer: Any, content: Any, system: Any = None, **given: Any) -> str:
    before = [] if system is None else [{"role": "system", "content": system}]
    whole: str = tokenizer.apply_chat_template(
        [*before, {"role": "user", "content": content}], tokenize=False, **given
    )
    return whole


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
