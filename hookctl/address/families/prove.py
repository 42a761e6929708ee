"""What a live pipeline shows of itself: change one thing, and see what follows.

A pipeline is run a few times with one prompt, one negative, one seed or one word changed. The rows
of its denoiser calls that follow are that prompt's, that negative's, that image's. With the
attention silenced no token hears of another, so of the keys of a site those that follow the seed
are the image's, and those that follow the prompt alone are the text's. With the attention of the
text encoders silenced, the positions that follow a word are the word's.

Nothing of the declared records is used here; `hookctl inspect MODEL --prove` compares both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hookctl.address.families.access import named_denoisers
from hookctl.address.families.record import uncompiled
from hookctl.address.families.sites import attention_modules
from hookctl.address.families.traces import (
    Drawn,
    Run,
    TracedCall,
    traced,
)
from hookctl.errors import UnsupportedError

OTHER, WORD = "the green bird", ("cat", "bird")  # of as many words
RUNS = 8  # that a proof takes for two prompts
_PROJECTIONS = ("q_proj", "q", "query", "c_attn", "qkv_proj")


@dataclass(frozen=True)
class CallShown:
    """One denoiser call of the first step.

    rows: what each batch row follows: "P1" the first prompt, "N2" the second negative, "-" neither;
    images: the images, counted from 1, whose seed each row's input follows.
    """

    denoiser: str
    rows: tuple[str, ...]
    images: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class SiteShown:
    """What a site's first attention call shows.

    kind: "self", "cross", "joint", "text", or "other" where it follows neither; queries, keys: how
    many; image_queries, image_keys, text_keys: (first, past the last) of those that follow the
    seed, and of the keys that follow the prompt alone; None for none.
    """

    kind: str
    queries: int
    keys: int
    image_queries: tuple[int, int] | None
    image_keys: tuple[int, int] | None
    text_keys: tuple[int, int] | None


@dataclass(frozen=True)
class Shown:
    """What a pipeline showed; word: positions of WORD[0] of the first prompt in the text that the
    denoiser gets, None if it gets none; silent: sites that no SDPA call was seen of;
    prompts: how many were drawn."""

    calls: tuple[CallShown, ...]
    sites: Mapping[tuple[str, str], SiteShown]
    word: tuple[int, ...] | None
    silent: tuple[tuple[str, str], ...] = ()
    prompts: int = 2


def prove(pipe: Any, run: Run) -> Shown:
    """Measure a pipeline; run: draws with it, a step or more.

    Two prompts are drawn if the pipeline takes two, else one. Raises UnsupportedError if no
    denoiser was called.
    """
    asked = Drawn()
    try:
        base = traced(pipe, run, asked)
    except Exception:  # whatever the pipeline says of two prompts, or of two seeds
        asked = asked.one()
        base = traced(pipe, run, asked)
    if not base:
        raise UnsupportedError(f"{type(pipe).__name__} called no denoiser, so nothing is shown")
    changed: dict[str, list[TracedCall]] = {}
    for i in range(len(asked.prompts)):
        changed[f"P{i + 1}"] = traced(pipe, run, _with(asked, "prompts", i, OTHER))
        changed[f"N{i + 1}"] = traced(pipe, run, _with(asked, "negatives", i, "photo"))
        changed[f"{i + 1}"] = traced(pipe, run, _with(asked, "seeds", i, 7 + i))
    calls = []
    for n, call in enumerate(base):
        if call.time != base[0].time:
            break
        follows = {name: call.followers(runs[n]) for name, runs in changed.items() if n < len(runs)}
        size = len(call.sample)
        tags = [
            "".join(k for k, (_, texts) in follows.items() if k[0] in "PN" and texts[row]) or "-"
            for row in range(size)
        ]
        images = [
            tuple(int(k) for k, (own, _) in follows.items() if k.isdigit() and own[row])
            for row in range(size)
        ]
        calls.append(CallShown(call.denoiser, tuple(tags), tuple(images)))
    word = _word(pipe, run, asked)
    sites, silent = _sites(pipe, run, asked)
    return Shown(tuple(calls), sites, word, silent, len(asked.prompts))


def _with(asked: Drawn, name: str, at: int, value: Any) -> Drawn:
    values = list(getattr(asked, name))
    values[at] = value
    parts = {n: getattr(asked, n) for n in ("prompts", "negatives", "seeds")}
    return Drawn(**(parts | {name: values}))


# -- sites and words -------------------------------------------------------------------------------


def _sites(
    pipe: Any, run: Run, asked: Drawn
) -> tuple[dict[tuple[str, str], SiteShown], tuple[tuple[str, str], ...]]:
    """Kinds and spans, from the first call of each site, attention silenced."""
    others = [
        Drawn([OTHER] * len(asked.prompts), asked.negatives, asked.seeds),
        Drawn(asked.prompts, asked.negatives, [9 + seed for seed in asked.seeds]),
    ]
    runs = [traced(pipe, run, drawn, silenced=True) for drawn in (asked, *others)]
    found: dict[tuple[str, str], SiteShown] = {}
    for base, texts, seeds in zip(*runs, strict=False):
        for (path, q, k), (_, q_text, k_text), (_, q_seed, k_seed) in zip(
            base.sites, texts.sites, seeds.sites, strict=False
        ):
            if (base.denoiser, path) not in found:
                moves = [
                    _moved(a, b) for a, b in ((q, q_text), (k, k_text), (q, q_seed), (k, k_seed))
                ]
                found[base.denoiser, path] = _site(q.shape[-1], k.shape[-1], *moves)
    every = [(n, p) for n, m in named_denoisers(pipe) for p, _ in attention_modules(uncompiled(m))]
    return found, tuple(one for one in every if one not in found)


def _moved(a: Tensor, b: Tensor) -> Tensor:
    """Which tokens differ in any row, bool [tokens]; all of them where the numbers differ."""
    return (a != b).any(0) if a.shape == b.shape else torch.ones(a.shape[-1], dtype=torch.bool)


def _site(
    n: int, m: int, q_text: Tensor, k_text: Tensor, q_seed: Tensor, k_seed: Tensor
) -> SiteShown:
    text = k_text & ~k_seed
    if not q_seed.any():
        kind = "text" if q_text.any() or k_text.any() else "other"
    elif not k_seed.any():
        kind = "cross"
    else:
        kind = "joint" if text.any() else "self"
    return SiteShown(kind, n, m, _span(q_seed), _span(k_seed), _span(text))


def _span(moved: Tensor) -> tuple[int, int] | None:
    at = moved.nonzero().flatten().tolist()
    return (at[0], at[-1] + 1) if at else None


def _word(pipe: Any, run: Run, asked: Drawn) -> tuple[int, ...] | None:
    """Positions that follow a word of the first prompt, the text encoders' attention silenced."""
    changed = asked.prompts[0].replace(*WORD)
    with ExitStack() as hooks:
        for name, module in getattr(pipe, "components", {}).items():
            if isinstance(module, nn.Module) and "text_encoder" in name:
                hooks.enter_context(_unheard(module))
        runs = [traced(pipe, run, drawn) for drawn in (asked, _with(asked, "prompts", 0, changed))]
    for before, after in zip(*runs, strict=False):
        if before.positions is None or after.positions is None:
            return None
        for a, b in zip(before.positions, after.positions, strict=False):
            if a != b:
                return tuple(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return ()


@contextmanager
def _unheard(encoder: nn.Module) -> Iterator[None]:
    """A text encoder in which no token hears of another."""

    def silence(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    handles = [
        module.register_forward_hook(silence)
        for module in encoder.modules()
        if any(isinstance(getattr(module, name, None), nn.Module) for name in _PROJECTIONS)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
