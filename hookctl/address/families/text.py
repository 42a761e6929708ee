"""How the text sequence that a pipeline's attention sees is made up of tokenizers.

Functions of a pipeline, for the records; a text in their place says why words can't be addressed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

from torch import Tensor

from hookctl.address.families.record import TextStream
from hookctl.run_state import memory_here

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


def note_images(pipe: Any, encoding: Mapping[str, Any]) -> None:
    """Note the images that a run reads with its prompts; encoding: arguments of `encode_prompt`."""
    memory = memory_here()
    if memory is not None and pipe is not None:
        known = memory.of(pipe)
        known.pop(_LENGTHS, None)
        known[_IMAGES] = encoding.get("image")


def image_lengths(pipe: Any) -> tuple[int, ...] | None:
    """How many tokens each image takes that the run reads with its prompts; None outside of runs,
    and where it reads none."""
    memory = memory_here()
    known = {} if memory is None else memory.of(pipe)
    if known.get(_IMAGES) is None or getattr(pipe, "processor", None) is None:
        return None
    if _LENGTHS not in known:
        process = pipe.processor.image_processor
        grids = process(images=known[_IMAGES], return_tensors="pt")["image_grid_thw"]
        patches = process.merge_size**2  # of a token
        known[_LENGTHS] = tuple(int(grid.prod()) // patches for grid in grids)
    return known[_LENGTHS]


_IMAGES, _LENGTHS = "images", "image lengths"


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
