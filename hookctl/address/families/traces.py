"""The denoiser calls of a run, kept as numbers: one for each row, one for each position.

Two runs are compared by them; no tensor of a run is kept.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hookctl.address.families.access import named_denoisers
from hookctl.address.families.record import uncompiled
from hookctl.address.families.sites import attention_modules

PROMPTS = ("a red cat", "a blue dog")
NEGATIVES = ("blurry", "green")
TEXTS = ("encoder_hidden_states", "cap_feats", "context")


@dataclass(frozen=True)
class Drawn:
    """What a run is asked for: lists of equal length, a seed for each image."""

    prompts: Sequence[str] = PROMPTS
    negatives: Sequence[str] = NEGATIVES
    seeds: Sequence[int] = (0, 1)

    def one(self) -> Drawn:
        return Drawn(self.prompts[:1], self.negatives[:1], self.seeds[:1])


Run = Callable[[Drawn], Any]


@dataclass
class TracedCall:
    """A denoiser call: digests of its tensors, one for each row."""

    denoiser: str
    time: float
    sample: list[float]
    texts: dict[str, list[float]]
    positions: list[list[float]] | None
    sites: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)

    def followers(self, other: TracedCall) -> tuple[list[bool], list[bool]]:
        """Which rows differ in their sample, and which in what they are conditioned on."""
        rows = range(len(self.sample))
        own = [self.sample[r] != other.sample[r] for r in rows]
        texts = [
            any(mine[r] != other.texts[name][r] for name, mine in self.texts.items()) for r in rows
        ]
        return own, texts


class Recorder(TorchFunctionMode):
    """Notes the attention calls of one forward; silenced, their output is 0."""

    def __init__(self, call: TracedCall, at: list[str], silenced: bool) -> None:
        super().__init__()
        self.call, self.at, self.silenced = call, at, silenced

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not self.at:
            return func(*args, **kwargs)
        q, k, v = [*args, *(kwargs[n] for n in ("query", "key", "value") if n in kwargs)][:3]
        self.call.sites.append((self.at[-1], _digest(q), _digest(k)))
        if self.silenced:
            return q.new_zeros(*q.shape[:-1], v.shape[-1])
        return func(*args, **kwargs)


def traced(pipe: Any, run: Run, asked: Drawn, *, silenced: bool = False) -> list[TracedCall]:
    """The denoiser calls of a run."""
    calls: list[TracedCall] = []
    with ExitStack() as hooks, torch.no_grad():
        for name, denoiser in named_denoisers(pipe):
            hooks.enter_context(_watched(name, uncompiled(denoiser), calls, silenced))
        run(asked)
    return calls


@contextmanager
def _watched(
    name: str, model: nn.Module, calls: list[TracedCall], silenced: bool
) -> Iterator[None]:
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    at: list[str] = []
    modes: list[Recorder] = []

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(_call(name, dict(zip(names, args, strict=False)) | kwargs))
        modes.append(Recorder(calls[-1], at, silenced))
        modes[-1].__enter__()

    def end(module: nn.Module, args: Any, output: Any) -> None:
        modes.pop().__exit__(None, None, None)

    handles = [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(end, always_call=True),
    ]
    for path, module in attention_modules(model):
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: at.append(path)))
        handles.append(
            module.register_forward_hook(lambda *_: (at.pop(), None)[1], always_call=True)
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        while modes:
            modes.pop().__exit__(None, None, None)


def _call(name: str, arguments: dict[str, Any]) -> TracedCall:
    sample = next(iter(arguments))
    rows = len(arguments[sample])
    time = next((arguments[n] for n in ("timestep", "timesteps", "t") if n in arguments), None)
    # Where each token or frame has its own, those of given images are 0.
    now = float(time.max()) if isinstance(time, Tensor) else float(time or 0)
    texts = {}
    for key, value in _leaves(arguments):
        # Residuals of a control model follow both, and are what the sample is to them.
        if not key.startswith(sample) and "residual" not in key and "block" not in key:
            if (digests := _by_row(value, rows)) is not None:
                texts[key] = digests
    text = next((arguments[n] for n in TEXTS if arguments.get(n) is not None), None)
    return TracedCall(name, now, _by_row(arguments[sample], rows) or [], texts, _positions(text))


def _leaves(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in arguments.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", leaf) for inner, leaf in _leaves(value))
        else:
            yield key, value


def _by_row(value: Any, rows: int) -> list[float] | None:
    """A number for each row of a batch, that any change of the row changes."""
    if isinstance(value, list | tuple) and len(value) == rows:
        if all(isinstance(one, Tensor) for one in value):
            return [float(_weighed(one.reshape(1, -1))[0]) for one in value]
        return None
    if not isinstance(value, Tensor) or not value.dim() or value.shape[0] % rows:
        return None
    if not value.numel():
        return None
    return [float(x) for x in _weighed(value.reshape(rows, -1))]


def _positions(text: Any) -> list[list[float]] | None:
    """A number for each position of each row's text."""
    if isinstance(text, list | tuple) and text and all(isinstance(one, Tensor) for one in text):
        if all(one.dim() == 2 for one in text):
            return [_weighed(one).tolist() for one in text]
        text = text[0]
    if not isinstance(text, Tensor) or text.dim() < 3:
        return None
    if text.dim() == 4:
        text = text[:, 0] if text.shape[1] == 1 else text.flatten(2)
    return [_weighed(row).tolist() for row in text]


def _digest(x: Tensor) -> Tensor:
    """[batch, heads, tokens, channels] -> [batch, tokens]"""
    return _weighed(x.transpose(-2, -3).flatten(-2)).cpu()


def _weighed(x: Tensor) -> Tensor:
    """[..., n] -> [...]: sums with weights that no two entries share."""
    n = x.shape[-1]
    weights = torch.arange(1, n + 1, dtype=torch.float64, device=x.device).mul_(math.sqrt(2))
    return (x.detach().to(torch.float64) * weights.frac_().add_(0.5)).sum(-1)
