"""What, on a pipeline: words to positions in the text sequence that its attention sees.

A pipeline may fill the sequence with several tokenizers, one stretch after another (SD3: CLIP,
then T5). A word is then found in each stretch, and two prompts are aligned stretch by stretch.
Where the encoders were given texts of their own (`prompt_2=`, `prompt_3=`), each stretch is read
in its own text.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.util import find_spec
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor

from hookctl.address.alignment import refinement_map, replacement_map
from hookctl.address.pipelines import TextStream, text_streams
from hookctl.address.tokenizers import default_length, own_copy
from hookctl.address.words import PromptTokens
from hookctl.errors import HookctlWarning, InputError, UnsupportedError, WordError


class Prompt(str):
    """A prompt whose encoders were given different texts; it equals no plain text.

    given: argument of the pipeline's call -> text; the first is the prompt itself.
    """

    given: Mapping[str, str]

    def __new__(cls, given: Mapping[str, str]) -> Prompt:
        self = super().__new__(cls, next(iter(given.values())))
        self.given = dict(given)
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prompt) and self.given == other.given

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(tuple(self.given.values()))

    def __repr__(self) -> str:
        return "(" + ", ".join(f"{name}={text!r}" for name, text in self.given.items()) + ")"


@dataclass(frozen=True)
class PromptText:
    """One prompt as the attention sees it: (first position, tokens) for each stretch."""

    text: str
    streams: tuple[tuple[int, PromptTokens], ...]

    @property
    def tokens(self) -> int:
        """Length of the whole sequence."""
        start, last = self.streams[-1]
        return start + last.length

    @property
    def words(self) -> int:
        """How many words the prompt has."""
        return len(self.streams[0][1].words)

    def find(self, phrase: str | int | Sequence[int]) -> tuple[int, ...]:
        """Positions of a word or phrase in the whole sequence; WordError if it is not there."""
        if not isinstance(phrase, str):
            positions = (phrase,) if isinstance(phrase, int) else tuple(phrase)
            if any(not 0 <= p < self.tokens for p in positions):
                raise InputError(
                    f"token positions {positions} are not in the {self.tokens} tokens of the prompt"
                )
            return positions
        found: list[int] = []
        missing: list[WordError] = []
        for start, prompt in self.streams:
            try:
                found += [start + p for p in prompt.find(phrase)]
            except WordError as error:  # another stretch may hold another text
                missing.append(error)
        if not found:
            raise missing[0]
        return tuple(found)

    def positions(self, phrase: str | int | Sequence[int]) -> tuple[int, ...]:
        """As `find`; none if it is not there."""
        try:
            return self.find(phrase)
        except WordError:
            return ()


class TextLayout:
    """How a pipeline steps prompts into the text sequence of its attention."""

    def __init__(self, pipe: Any) -> None:
        text_streams(pipe)  # or it raises
        self._pipe = pipe
        encode = inspect.signature(getattr(type(pipe), "encode_prompt", len)).parameters
        self._takes_lengths = "max_sequence_length" in encode
        self._warned: set[str] = set()

    def read(self, prompt: str, tokens: int | None = None) -> PromptText:
        """One prompt; tokens: the length of the sequence where it is known.

        What is longer than the encoder takes is cut as the pipeline cuts it, with a warning. Raises
        InputError for a prompt that does not fit where it is not known how the pipeline cuts.
        """
        streams, known_now = [], text_streams(self._pipe)
        for i, stream in enumerate(known_now):
            length = known = stream.length
            if length is None and not stream.longest:
                length = known = default_length(stream.tokenizer)
            if tokens is not None and i == len(known_now) - 1:
                length = tokens - stream.start
            text = self._as_encoded(_in_stream(prompt, stream), stream.tokenizer)
            cuts = length == known or self._takes_lengths
            read = _tokens(text, stream, length, cuts=cuts)
            if read.cut is not None:
                self._warn(read)
            streams.append((stream.start, read))
        return PromptText(prompt, tuple(streams))

    def _warn(self, read: PromptTokens) -> None:
        """Say once of each prompt what of it the model does not see."""
        if read.text not in self._warned:
            self._warned.add(read.text)
            warnings.warn(
                f"the text encoder takes {read.length} tokens, so the model does not see "
                f"{read.text[read.cut :]!r}; shorten the prompt",
                HookctlWarning,
                stacklevel=3,
            )

    def _as_encoded(self, prompt: str, tokenizer: Any) -> str:
        """The prompt as the pipeline hands it to a tokenizer."""
        if not isinstance(prompt, str):
            return prompt  # PromptTokens says what is wrong with it
        if hasattr(self._pipe, "_text_preprocessing"):  # PixArt and its kin lower the case
            cleans = _cleans_captions(self._pipe)
            prompt = self._pipe._text_preprocessing(prompt, clean_caption=cleans)[0]
        if hasattr(self._pipe, "maybe_convert_prompt"):  # a textual inversion of several vectors
            prompt = self._pipe.maybe_convert_prompt(prompt, own_copy(tokenizer))
        return prompt


def _tokens(
    text: str, stream: TextStream, length: int | None, *, cuts: bool = False
) -> PromptTokens:
    """The tokens of a text in a stretch of this length."""
    if length is None and stream.longest and isinstance(text, str):
        whole = text if stream.wrap is None else stream.wrap(text)
        length = len(own_copy(stream.tokenizer)(whole).input_ids) - stream.dropped
    if stream.wrap is None or not isinstance(text, str):
        return PromptTokens.encode(
            text, stream.tokenizer, length=length, side=stream.side, cuts=cuts
        )
    whole = stream.wrap(text)
    # Where the template is open, and not where it happens to say the same.
    at = whole.find(text, len(commonprefix([stream.wrap(some) for some in ("", "x", "y")])))
    if at < 0:
        raise InputError(f"the template of this pipeline changes the prompt {text!r}; reword it")
    room = None if length is None else length + stream.dropped
    return PromptTokens.encode(
        whole,
        stream.tokenizer,
        room,
        within=(at, at + len(text)),
        dropped=stream.dropped,
        cuts=cuts,
        side=stream.side,
    )


def _in_stream(prompt: str, stream: TextStream) -> str:
    """The text that fills a stretch."""
    if not isinstance(prompt, Prompt):
        return prompt
    texts = {name: prompt.given[name] for name in stream.prompts if name in prompt.given}
    if len(set(texts.values())) > 1:
        differing = " and ".join(f"{name}={text!r}" for name, text in texts.items())
        raise InputError(
            f"{differing}: this pipeline's encoders share their token positions, so a position "
            f"holds a word of each and none can be addressed; give one text for both "
            f"(leave {stream.prompts[-1]} out)"
        )
    return next(iter(texts.values()), str(prompt))


def prompts_given(pipe: Any, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """The prompts of a pipeline's call, as far as its attention sees them.

    arguments: of `encode_prompt`, by name. A prompt is a `Prompt` where encoders were given
    different texts; on a pipeline that shows its attention one of them only (Flux), it is that one.
    """
    if "clean_caption" in arguments:
        _cleaning.set((weakref.ref(pipe), bool(arguments["clean_caption"])))
    try:
        streams = text_streams(pipe)
    except UnsupportedError:
        streams = ()
    names = dict.fromkeys(name for stream in streams for name in stream.prompts) or {"prompt": None}
    # As the pipelines have it: what is not said again is the prompt.
    texts = [_listed(arguments.get(name) or arguments.get("prompt")) for name in names]
    prompts = []
    for said in zip(*texts, strict=False):
        same = len(set(said)) == 1
        prompts.append(said[0] if same else Prompt(dict(zip(names, said, strict=True))))
    return tuple(prompts)


# Whether the last call made here had its texts cleaned of what is no caption (PixArt and its kin).
_cleaning: ContextVar[tuple[Callable[[], Any], bool] | None] = ContextVar("cleaning", default=None)


def _cleans_captions(pipe: Any) -> bool:
    """Whether a pipeline cleans its texts: as its last call said, else as its calls do by default;
    without two packages it never does."""
    usual = inspect.signature(type(pipe).__call__).parameters.get("clean_caption")
    last = _cleaning.get()
    if last is not None and last[0]() is pipe:
        cleans = last[1]
    else:
        cleans = usual is not None and usual.default is True
    return cleans and all(find_spec(name) is not None for name in ("bs4", "ftfy"))


def _listed(given: Any) -> list[str]:
    if isinstance(given, str):
        return [given]
    return list(map(str, given)) if isinstance(given, list | tuple) else []


def align(
    source: PromptText, target: PromptText, mode: str, *, paper: bool = False
) -> tuple[Tensor, Tensor]:
    """Token map and aligned flags between two prompts, stretch by stretch.

    Where texts are padded to the longest of a call and no call is known yet, the two may differ in
    length, and so may the sides of the map.

    mode: "replace" (word for word) or "refine" (words added or left out). Returns
    T [source, target] and the flags a [target], so that the injected map is (A_source T) * a.
    """
    token_map = torch.zeros(source.tokens, target.tokens, dtype=torch.float64)
    aligned = torch.zeros(target.tokens, dtype=torch.float64)
    for (first, a), (start, b) in zip(source.streams, target.streams, strict=True):
        rows, span = slice(first, first + a.length), slice(start, start + b.length)
        if mode == "replace":
            token_map[rows, span] = replacement_map(a, b, paper=paper, dtype=torch.float64)
            aligned[span] = 1
        else:
            gather, flags = refinement_map(a, b, paper=paper, dtype=torch.float64)
            token_map[rows, span], aligned[span] = gather, flags
    return token_map, aligned
