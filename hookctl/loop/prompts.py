"""Further prompts through a pipeline's own encoder, as it encoded the prompts that it draws."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookctl.address import families, pipelines
from hookctl.address.text import TextLayout
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.branches import Branch
from hookctl.loop.state import State
from hookctl.loop.text_lengths import RowText, check_lengths, put_texts

# What says which text is meant, or how often; the rest (clip_skip, max_sequence_length, device ...)
# says how to encode it.
_WHICH = re.compile(r"prompt(?!_template)|negative|embeds|^num_|guidance|image|self")


@dataclass(frozen=True)
class Encoded:
    """Prompts as a denoiser takes them.

    sequence: [prompts, tokens, channels]; pooled: [prompts, channels] where the family has such
    (SDXL, SD3, Flux); mask: which tokens count, bool [prompts, tokens], where the family says.
    """

    sequence: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    def row(self, prompt: int) -> RowText:
        """One of the prompts."""
        pooled, mask = (None if part is None else part[prompt] for part in (self.pooled, self.mask))
        return RowText(self.sequence[prompt], pooled, mask)


@torch.no_grad()
def encode(
    pipe: Any,
    texts: Sequence[str],
    like: Mapping[str, Any] | None = None,
) -> Encoded:
    """Encode prompts by the pipeline's own `encode_prompt`, every text encoder included.

    like: the arguments of the pipeline's own call (`State.encoding`), so that clip_skip,
    max_sequence_length and their kin are the run's, and so are the images that it read with its
    prompts (Qwen-Image-Edit). Raises UnsupportedError if the pipeline has no encoder of prompts.
    """
    check_encoder(pipe)
    # Of the class: the hook on the instance would take these texts for the run's prompts.
    method = type(pipe).encode_prompt
    known = inspect.signature(method).parameters
    given = {k: v for k, v in (like or {}).items() if k in known and not _WHICH.search(k)}
    if like is not None and "image" in known and "image" in like:
        given["image"] = like["image"]
    given["prompt"] = list(texts)
    for name, parameter in known.items():
        if name.startswith("num_"):
            given[name] = 1
        elif name == "do_classifier_free_guidance":
            given[name] = False
        elif name == "device":
            given.setdefault(name, pipe._execution_device)
        elif parameter.default is parameter.empty and parameter.kind is (
            parameter.POSITIONAL_OR_KEYWORD
        ):
            given.setdefault(name, None)
    del given["self"]
    try:
        found = method(pipe, **given)
    except (TypeError, ValueError) as error:  # an edit pipeline reads its images with the prompt
        raise UnsupportedError(
            f"{type(pipe).__name__} can't encode a text by itself: {error}"
        ) from error
    found = found if isinstance(found, tuple) else (found,)
    places = pipelines.encoded_places(pipe)
    pooled, mask = (found[places[n]] if n in places else None for n in ("pooled", "mask"))
    return Encoded(_one_tensor(found[0]), pooled, None if mask is None else mask.bool())


def _one_tensor(texts: Tensor | list[Tensor]) -> Tensor:
    """[prompts, tokens, channels], also where the encoder gives a list of texts."""
    if isinstance(texts, Tensor):
        return texts
    if len({text.shape for text in texts}) > 1:
        raise UnsupportedError(
            f"texts of {', '.join(str(len(text)) for text in texts)} tokens stand in no one "
            "tensor; encode them one by one"
        )
    return torch.stack(texts)


Text = str | Tensor


class EncodedTexts:
    """Texts, or their embeddings [tokens, channels], encoded once for a run."""

    def __init__(self, state: State, given: Iterable[Text]) -> None:
        every = list(given)
        written = list(dict.fromkeys(text for text in every if isinstance(text, str)))
        self._found: dict[Text, RowText] = {
            text: RowText(text) for text in every if isinstance(text, Tensor)
        }
        # One by one where texts may be padded to the longest: beside an image in one sequence a
        # text's own tokens would see the padding.
        alone = families.joint_order(state.denoiser) is not None
        for some in ([text] for text in written) if alone else ([written] if written else []):
            encoded = encode(state.pipe, some, state.encoding)
            self._found |= {text: encoded.row(i) for i, text in enumerate(some)}
        self._shifts: dict[Text, Tensor] = {}

    def __len__(self) -> int:
        return len(self._found)

    @property
    def of_one_length(self) -> bool:
        """Whether all have as many tokens."""
        return len({len(one.sequence) for one in self._found.values()}) < 2

    @property
    def any(self) -> Text:
        """One of the texts."""
        return next(iter(self._found))

    def sequence(self, text: Text) -> Tensor:
        """[tokens, channels]"""
        return self._found[text].sequence

    def shift(self, text: Text) -> Tensor | None:
        """What hides the padding from attention, [tokens]; None where nothing is hidden."""
        mask = self._found[text].mask
        if mask is not None and text not in self._shifts:
            hidden = ~mask.cpu()
            self._shifts[text] = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))
        return self._shifts.get(text)

    def branch(self, text: Text) -> Branch:
        """A copy of the conditional rows with one of the texts."""
        one = self._found[text]
        return Branch(text=one.sequence[None], mask=None if one.mask is None else one.mask[None])

    def check_fit(self, state: State, who: str) -> None:
        """Raise UnsupportedError unless the texts can stand in rows of the run's calls."""
        check_lengths(state, [one.sequence for one in self._found.values()], who)

    def put(self, kwargs: dict[str, Any], state: State, rows: Mapping[int, Text]) -> None:
        """Make these the texts of some rows of a call, pooled forms and masks included."""
        put_texts(state, kwargs, {row: self._found[text] for row, text in rows.items()})


def check_texts(target: Any, texts: Iterable[Text], who: str) -> None:
    """Raise InputError or UnsupportedError unless a target can encode these texts."""
    written = [text for text in texts if isinstance(text, str)]
    if not written:
        return
    if target is families.denoiser_of(target):
        raise InputError(
            f"{who}: a bare denoiser encodes no texts; give embeddings [tokens, channels], or "
            "control the pipeline"
        )
    check_encoder(target)
    record = families.pipeline_of(target)
    if record is not None and record.text == families.EDIT_TEMPLATE:
        return  # it reads its images with its prompt, and these texts without them
    layout = TextLayout(target)
    for text in written:
        layout.read(text)


def check_encoder(pipe: Any) -> None:
    """Raise UnsupportedError unless the pipeline can encode prompts."""
    if not hasattr(type(pipe), "encode_prompt"):
        raise UnsupportedError(
            f"{type(pipe).__name__} has no encode_prompt, so further prompts can't be encoded; "
            "give embeddings [tokens, channels] instead of texts"
        )
