"""The pattern of a program's denoiser calls: those that the pipeline was about to make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookctl.address.families.loops import Loop, Settings
from hookctl.address.rows import Row, Rows
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.arguments import is_shared

Texts = Mapping[str, Tensor]  # branch -> embeddings [1 | images, tokens, channels]
EMBEDDED = "guidance"  # the scale that a model was taught


@dataclass(frozen=True, eq=False)
class Pattern:
    """One denoiser call of a step: its arguments by name, and whose its rows are."""

    arguments: Mapping[str, Any]
    rows: Rows


@dataclass(frozen=True, eq=False)
class Chosen:
    """Some rows of a pattern: as which they are called, and their indices in it, [rows]."""

    pattern: Pattern
    rows: Rows
    index: Tensor


@dataclass(frozen=True, eq=False)
class Template:
    """What a program's denoiser calls are made after.

    patterns: of the calls of one step, in their order; sample, time, text: names of the model
    input, the timestep and the text embeddings (None without a text); latents: [images, ...], the
    noise that the pipeline starts from; grid: sides of the target, ([frames,] height, width), in
    cells of its own, () if unknown; loop, settings: what the pipeline does beside its calls;
    encoding: arguments of its `encode_prompt`.
    """

    patterns: tuple[Pattern, ...]
    sample: str
    time: str
    text_name: str | None
    latents: Tensor
    grid: tuple[int, ...]
    loop: Loop
    settings: Settings
    encoding: dict[str, Any]

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Of the first call, by name."""
        return self.patterns[0].arguments

    @property
    def branches(self) -> tuple[str, ...]:
        rows = [row for pattern in self.patterns for row in pattern.rows]
        return tuple(dict.fromkeys(row.branch for row in rows))

    def chosen(self, branches: Sequence[str], prompt: int | None = None) -> list[Chosen]:
        """The calls, or parts of them, that have rows of these branches, of one prompt or all."""
        found = []
        for pattern in self.patterns:
            kept = [
                row
                for row in pattern.rows
                if row.branch in branches and prompt in (None, row.prompt)
            ]
            if kept:
                rows = [Row(i, row.branch, row.prompt, row.image) for i, row in enumerate(kept)]
                index = torch.tensor([row.index for row in kept])
                found.append(Chosen(pattern, Rows(rows), index))
        return found

    def text(self, branch: str) -> Tensor:
        """The text embeddings of a branch's rows, [images, tokens, channels]."""
        (call,) = self.chosen([branch])
        return self._text_of(call)

    def _text_of(self, call: Chosen) -> Tensor:
        """[rows, tokens, channels] of a call."""
        own = call.pattern.arguments.get(self.text_name or "")
        if isinstance(own, Tensor):
            return own[call.index.to(own.device) * self._repeats(own, call)]
        if not isinstance(own, list):
            raise UnsupportedError("this denoiser is given no text embeddings")
        texts = [own[int(i)] for i in call.index]
        if len({text.shape for text in texts}) > 1:
            raise UnsupportedError(
                f"these prompts have {', '.join(str(len(text)) for text in texts)} tokens and "
                "stand in no one tensor; give prompts of as many tokens"
            )
        return torch.stack(texts)

    @staticmethod
    def _repeats(texts: Tensor, call: Chosen) -> int:
        """How often each text stands in a call: in those of some videos once for every frame."""
        return max(1, len(texts) // len(call.pattern.rows))

    def call(
        self,
        call: Chosen,
        model_input: Tensor,
        time: Tensor,
        texts: Texts | None = None,
        embedded: Tensor | None = None,
    ) -> dict[str, Any]:
        """The arguments of a call.

        model_input: [rows, ...]; time: 0-d, as the denoiser is told it; texts: in place of the
        prompts'; embedded: [rows], in place of the run's scale that the model was taught.
        """
        rows, index = call.pattern.rows, call.index
        arguments = dict(call.pattern.arguments)
        given, pattern = arguments[self.sample], arguments[self.time]
        if len(index) < len(rows):
            names = [name for name in arguments if not is_shared(name)]
            sizes = {len(rows) * r: r for r in (self.grid[0] if len(self.grid) == 3 else 1, 1)}
            arguments |= {n: _select(arguments[n], index, sizes) for n in names}
        arguments[self.sample] = self._input(model_input, given, index)
        arguments[self.time] = _time(time, pattern, len(index))
        if texts:
            arguments[str(self.text_name)] = self._with_texts(call, texts)
        if embedded is not None:
            arguments[EMBEDDED] = embedded.to(arguments[EMBEDDED])
        return arguments

    def _input(self, model_input: Tensor, given: Any, index: Tensor) -> Any:
        """What the denoiser takes of latents [rows, ...], references behind them."""
        if self.loop.wrap is not None:
            return self.loop.wrap(model_input.to(given[0].dtype))
        own = model_input.shape[1]
        if self.loop.references and given.shape[1] > own:
            references = given[index.to(given.device), own:]
            model_input = torch.cat([model_input, references.to(model_input)], 1)
        return model_input.to(given.dtype)

    def _with_texts(self, call: Chosen, texts: Texts) -> Tensor | list[Tensor]:
        branches = [row.branch for row in call.rows]
        parts = []
        for branch in dict.fromkeys(branches):
            count, first = branches.count(branch), branches.index(branch)
            part = slice(first, first + count)
            own = self._text_of(Chosen(call.pattern, Rows(call.rows[part]), call.index[part]))
            text = texts.get(branch)
            if text is not None:
                if text.shape[1:] != own.shape[1:] or text.shape[0] not in (1, count):
                    raise InputError(
                        f"contexts[{branch!r}] is {tuple(text.shape)}; give "
                        f"[1 or {count}, {own.shape[1]}, {own.shape[2]}]"
                    )
                own = text.to(own).expand_as(own)
            parts.append(own)
        given = call.pattern.arguments[str(self.text_name)]
        if isinstance(given, list):
            return [text for part in parts for text in part]
        text = torch.cat(parts)
        return text.repeat_interleave(self._repeats(given, call), 0)


def _time(time: Tensor, pattern: Any, rows: int) -> Any:
    """The time in the form of the pattern's: 0-d, [rows] or [rows, tokens]."""
    if not isinstance(pattern, Tensor):
        return time
    whole_numbers = time.is_floating_point() and not pattern.is_floating_point()
    told = time.to(pattern.device) if whole_numbers else time.to(pattern)
    return told if not pattern.dim() else told.expand(rows, *pattern.shape[1:])


def _select(value: Any, index: Tensor, sizes: Mapping[int, int]) -> Any:
    """The rows of an argument, wherever it holds one for each row of the full call, or for each of
    a row's frames.

    sizes: entries of an argument -> how many of them are each row's; the last is one of each.
    """
    if isinstance(value, Tensor):
        each = sizes.get(value.shape[0]) if value.dim() > 0 else None
        if each is None:
            return value
        places = index[:, None] * each + torch.arange(each)
        return value.index_select(0, places.flatten().to(value.device))
    if isinstance(value, Mapping):
        return {key: _select(part, index, sizes) for key, part in value.items()}
    if isinstance(value, list) and sizes.get(len(value)) == 1 and _one_each(value):
        return [value[int(i)] for i in index]
    if isinstance(value, list | tuple):
        return type(value)(_select(part, index, sizes) for part in value)
    return value


def _one_each(value: list[Any]) -> bool:
    """Whether a list holds a text of each row, and no conditions of all rows."""
    return all(isinstance(one, Tensor) and one.dim() == 2 for one in value)
