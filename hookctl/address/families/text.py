"""How the text sequence that a pipeline's attention sees is made up of tokenizers.

Functions of a pipeline, for the records; a text in their place says why words can't be addressed.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from torch import Tensor

from hookctl.address.families.record import TextStream
from hookctl.address.tokenizers import padded_length

Streams = Callable[[Any], tuple[TextStream, ...]]

# Arguments that change what a pipeline makes of a text, as its last call gave them.
_CHANGING = ("clean_caption", "prompt_template")
_given: weakref.WeakKeyDictionary[Any, tuple[dict[str, Any], str]] = weakref.WeakKeyDictionary()
_NOTHING = dict[str, Any](), ""


def note_call(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Keep what a call of a pipeline said of how its texts are made up; arguments: of
    `encode_prompt`, by name."""
    said = {name: arguments[name] for name in _CHANGING if name in arguments}
    if said:
        _given[pipe] = said, repr(said)


def said(pipe: Any, name: str) -> Any:
    """An argument as a pipeline's last call had it, else as its calls have it by default."""
    usual = inspect.signature(type(pipe).__call__).parameters.get(name)
    default = None if usual is None or usual.default is usual.empty else usual.default
    return _given.get(pipe, _NOTHING)[0].get(name, default)


def all_said(pipe: Any) -> str:
    """What a pipeline's last call said of its texts, to be compared with that of another."""
    return _given.get(pipe, _NOTHING)[1]


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
    return (
        TextStream(
            pipe.tokenizer,
            length=pipe.tokenizer_max_length,
            wrap=pipe.prompt_template_encode.format,
            dropped=pipe.prompt_template_encode_start_idx,
            longest=True,
        ),
    )


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
    return (
        TextStream(tokenizer, length=length, wrap=wrap, dropped=dropped, longest=early),
    )


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
