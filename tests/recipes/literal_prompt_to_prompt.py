"""Prompt-to-Prompt as the paper and its code write it: with the matrices, in the official order.

Hertz et al., arXiv 2208.01626. Nothing here is shared with the recipe: words are found by counting
decoded pieces, prompts are aligned by the official rules (their misalignment included), the
controller edits explicit probabilities of the conditional half, and the blend works on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS = 77
Bounds = float | tuple[float, float]


# -- words -------------------------------------------------------------------------------------


def word_tokens(text: str, word: str | int, tokenizer: Any) -> list[int]:
    """Positions of a word, by filling up each word's letters with decoded pieces."""
    words = text.split(" ")
    places = [i for i, w in enumerate(words) if w == word] if isinstance(word, str) else [word]
    out, filled, at = [], 0, 0
    for position, token in enumerate(tokenizer.encode(text)[1:-1], start=1):
        filled += len(tokenizer.decode([token]).strip("#").strip())
        if at in places:
            out.append(position)
        if filled >= len(words[at]):
            at, filled = at + 1, 0
    return out


def replacement(x: str, y: str, tokenizer: Any) -> Tensor:
    """T of a word swap: [source, target]."""
    xs, ys = x.split(" "), y.split(" ")
    assert len(xs) == len(ys)
    swapped = [i for i in range(len(ys)) if xs[i] != ys[i]]
    sources = [word_tokens(x, i, tokenizer) for i in swapped]
    targets = [word_tokens(y, i, tokenizer) for i in swapped]
    mapper = torch.zeros(TOKENS, TOKENS, dtype=torch.float64)
    i = j = done = 0
    while i < TOKENS and j < TOKENS:
        if done < len(swapped) and sources[done][0] == i:
            s, t = sources[done], targets[done]
            for n, target in enumerate(t):
                if len(s) == len(t):
                    mapper[s[n], target] = 1
                else:
                    mapper[s, target] = 1 / len(t)
            done, i, j = done + 1, i + len(s), j + len(t)
        elif done < len(swapped):
            mapper[i, j] = 1
            i, j = i + 1, j + 1
        else:
            mapper[j, j] = 1  # the target's index on both axes
            i, j = i + 1, j + 1
    return mapper


def refinement(x: str, y: str, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Source index of each target token (-1: none) and the flags, [TOKENS] each."""
    xs, ys = tokenizer.encode(x), tokenizer.encode(y)
    score = [[0] * (len(ys) + 1) for _ in range(len(xs) + 1)]
    trace = [["left"] * (len(ys) + 1)] + [["up"] + [""] * len(ys) for _ in xs]
    trace[0][0] = "stop"
    for i in range(1, len(xs) + 1):
        for j in range(1, len(ys) + 1):
            options = {
                "left": score[i][j - 1],
                "up": score[i - 1][j],
                "diagonal": score[i - 1][j - 1] + (1 if xs[i - 1] == ys[j - 1] else -1),
            }
            score[i][j] = max(options.values())
            trace[i][j] = next(name for name, value in options.items() if value == score[i][j])
    sources: list[int] = []
    i, j = len(xs), len(ys)
    while trace[i][j] != "stop":
        if trace[i][j] == "diagonal":
            i, j = i - 1, j - 1
            sources.insert(0, i)
        elif trace[i][j] == "left":
            j -= 1
            sources.insert(0, -1)
        else:
            i -= 1
    mapper = torch.tensor([*sources, *range(len(ys), TOKENS)])
    return mapper, (mapper != -1).double()


def as_matrix(mapper: Tensor) -> Tensor:
    """A gather as a matrix [source, target], for the cases without the official aligner."""
    matrix = torch.zeros(TOKENS, TOKENS, dtype=torch.float64)
    matrix[mapper, torch.arange(TOKENS)] = 1
    return matrix


def shifted(source: int, target: int, at: int, length: int = TOKENS) -> Tensor:
    """T where the word at `at` has `source` tokens in one prompt and `target` in the other."""
    matrix = torch.zeros(length, length, dtype=torch.float64)
    for i in range(at):
        matrix[i, i] = 1
    matrix[at : at + source, at : at + target] = 1 / target
    for i in range(at + source, length):
        matrix[i, min(i + target - source, length - 1)] += 1
    if target < source:  # the last padding of the source is shared out
        last = length - 1
        matrix[last, last - 1 :] = 0.5
    return matrix


# -- the controller ----------------------------------------------------------------------------


@dataclass
class Controller:
    """The attention edits and the local blend of one run.

    kind: "replace", "refine" or None (reweighting alone); equalizers: word -> value for each edit;
    maps: T and flags for each edit, in place of the official aligner's.
    """

    prompts: Sequence[str]
    tokenizer: Any
    steps: int
    kind: str | None = "replace"
    cross: Bounds | Mapping[str, Bounds] = 0.8
    self_steps: Bounds = 0.4
    equalizers: Sequence[Mapping[str, float]] | None = None
    blend: Sequence[Sequence[str]] | None = None
    subtract: Sequence[Sequence[str]] | None = None
    start: float = 0.2
    thresholds: tuple[float, float] = (0.3, 0.3)
    cap: int = 16**2
    maps: Sequence[tuple[Tensor, Tensor]] | None = None
    step: int = 0
    step_maps: list[Tensor] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.alpha = self._alpha()
        self.eq = torch.ones(len(self.prompts) - 1, TOKENS, dtype=torch.float64)
        for i, values in enumerate(self.equalizers or []):
            for word, value in values.items():
                self.eq[i, word_tokens(self.prompts[i + 1], word, self.tokenizer)] = value
        if self.kind is not None and self.maps is None:
            align = replacement if self.kind == "replace" else refinement
            edits = self.prompts[1:]
            self.aligned: list[Any] = [align(self.prompts[0], e, self.tokenizer) for e in edits]
        bounds = self.self_steps if isinstance(self.self_steps, tuple) else (0.0, self.self_steps)
        self.self_range = [int(self.steps * b) for b in bounds]

    def _alpha(self) -> Tensor:
        """[steps + 1, edits, TOKENS]"""
        table = torch.zeros(self.steps + 1, len(self.prompts) - 1, TOKENS, dtype=torch.float64)
        cross = dict(self.cross) if isinstance(self.cross, Mapping) else {"default": self.cross}
        windows = {"default": cross.pop("default", (0.0, 1.0)), **cross}
        for word, bounds in windows.items():
            low, high = bounds if isinstance(bounds, tuple) else (0.0, bounds)
            rows = [int(b * table.shape[0]) for b in (low, high)]
            for edit, prompt in enumerate(self.prompts[1:]):
                default = word == "default"
                found = range(TOKENS) if default else word_tokens(prompt, word, self.tokenizer)
                table[:, edit, list(found)] = 0
                table[rows[0] : rows[1], edit, list(found)] = 1
        return table

    def __call__(self, p: Tensor, cross: bool) -> Tensor:
        """p: [rows, heads, N, M] of one call; the last rows see the prompts."""
        half = len(self.prompts)
        p = p.clone()
        conditional = p[-half:]
        if cross:
            for edit in range(1, half):
                alpha = self.alpha[self.step, edit - 1]
                new = self._replaced(edit, conditional[0], conditional[edit])
                if self.equalizers is not None:
                    new = new * self.eq[edit - 1]
                conditional[edit] = new * alpha + conditional[edit] * (1 - alpha)
            if p.shape[2] <= self.cap:
                self.step_maps.append(conditional)
        elif self.self_range[0] <= self.step < self.self_range[1] and p.shape[2] <= self.cap:
            conditional[1:] = conditional[:1]
        return p

    def _replaced(self, edit: int, base: Tensor, own: Tensor) -> Tensor:
        if self.maps is not None:
            token_map, flags = self.maps[edit - 1]
            return (base @ token_map) * flags + own * (1 - flags)
        if self.kind == "replace":
            return torch.einsum("hpw,wn->hpn", base, self.aligned[edit - 1])
        if self.kind == "refine":
            mapper, flags = self.aligned[edit - 1]
            return base[:, :, mapper] * flags + own * (1 - flags)
        return base

    def after_step(self, pipe: Any, i: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        """A callback at the end of a step: sum the maps and blend the latents."""
        most = max(m.shape[2] for m in self.step_maps)
        chosen = [m for m in self.step_maps if m.shape[2] == most]
        before = self.sums or [torch.zeros_like(m) for m in chosen]
        self.sums = [a + b for a, b in zip(before, chosen, strict=True)]
        self.step_maps, self.step = [], self.step + 1
        x = values["latents"]
        if self.blend is not None and self.step > int(self.start * self.steps):
            mask = self._mask(self.blend, x, True)
            if self.subtract is not None:
                mask = mask & ~self._mask(self.subtract, x, False)
            self.masks.append(mask)
            x = x[:1] + mask.to(x) * (x - x[:1])
        return {"latents": x}

    def _mask(self, words: Sequence[Sequence[str]], x: Tensor, pool: bool) -> Tensor:
        flags = torch.zeros(len(self.prompts), TOKENS, dtype=torch.float64)
        for i, (prompt, chosen) in enumerate(zip(self.prompts, words, strict=True)):
            for word in chosen:
                flags[i, word_tokens(prompt, word, self.tokenizer)] = 1
        side = int(self.sums[0].shape[2] ** 0.5)
        maps = torch.cat([m.unflatten(2, (side, side)) for m in self.sums], 1)
        maps = (maps * flags[:, None, None, None]).sum(-1).mean(1)[:, None]
        if pool:
            maps = F.max_pool2d(maps, 3, 1, 1)
        mask = F.interpolate(maps, size=x.shape[2:])
        mask = mask / mask.amax((2, 3), keepdim=True)
        mask = mask > self.thresholds[0 if pool else 1]
        return mask[:1] | mask


class Processor:
    """A diffusers attention processor that forms the matrix and lets the controller edit it."""

    def __init__(self, controller: Controller | None) -> None:
        self.controller = controller

    def __call__(
        self, attn: Any, x: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        context = x if encoder_hidden_states is None else encoder_hidden_states
        projected = (attn.to_q(x), attn.to_k(context), attn.to_v(context))
        q, k, v = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in projected)
        p = (q @ k.mT * attn.scale).softmax(-1)
        if self.controller is not None:
            p = self.controller(p, encoder_hidden_states is not None)
        out = (p @ v).transpose(1, 2).flatten(2)
        for layer in attn.to_out:
            out = layer(out)
        return out


# -- other families ----------------------------------------------------------------------------


@dataclass
class Everywhere:
    """The same edits on any family, by taking the place of scaled_dot_product_attention.

    token_map, flags, equalizer: of the one edit, over the whole text; cross, self_steps: until
    which step; joint: where the text stands among the tokens of a joint sequence, None where the
    text has attention of its own; sequential: guidance is a second call of the denoiser.
    """

    token_map: Tensor
    flags: Tensor
    equalizer: Tensor
    cross: int
    self_steps: int
    joint: slice | None = None
    sequential: bool = False
    guided: bool = True
    frames: int = 1
    step: int = -1
    calls: int = 0

    @contextmanager
    def instead(self, denoiser: torch.nn.Module) -> Iterator[None]:
        """Act inside the denoiser, and only there."""
        sdpa = F.scaled_dot_product_attention

        def enter(*_: Any) -> None:
            per_step = 2 if self.sequential and self.guided else 1
            self.step, self.calls = self.calls // per_step, self.calls + 1
            conditional = per_step == 1 or self.calls % 2 == 1
            if conditional:
                F.scaled_dot_product_attention = self.attend  # type: ignore[assignment]

        def leave(*_: Any) -> None:
            F.scaled_dot_product_attention = sdpa

        handles = [
            denoiser.register_forward_pre_hook(enter),
            denoiser.register_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **_: Any
    ) -> Tensor:
        scores = query @ key.mT * query.shape[-1] ** -0.5
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        p = scores.softmax(-1)
        rows = 2 if self.sequential or not self.guided else 4
        if p.shape[-1] == p.shape[-2] == self.frames:
            return p @ value  # between frames
        p = p.unflatten(0, (rows, -1))
        source, edit = p[-2], p[-1]  # [frames, heads, N, M]
        text = len(self.flags)
        replaces_self = self.step < self.self_steps
        if self.joint is not None and p.shape[-1] > text and p.shape[-2] == p.shape[-1]:
            image = torch.ones(p.shape[-1], dtype=torch.bool)
            image[self.joint] = False
            new = edit.clone()
            new[..., self.joint] = self._tokens(source[..., self.joint], edit[..., self.joint])
            if replaces_self:
                new[..., image] = source[..., image]
            # Only what the image attends to is edited.
            edit[..., image, :] = new[..., image, :]
        elif p.shape[-1] == text:
            edit[:] = self._tokens(source, edit)
        elif replaces_self:
            edit[:] = source
        return p.flatten(0, 1) @ value

    def _tokens(self, source: Tensor, edit: Tensor) -> Tensor:
        if self.step >= self.cross:
            return edit.clone()
        a = self.flags
        return ((source @ self.token_map) * a + edit * (1 - a)) * self.equalizer
