"""Measure several forms of one computation: interleaved, agreement first, time and memory together.

A round runs every form once, in turn, so that whatever else the machine does falls on all of them.
Figures are medians over rounds with quartiles; ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from hookctl.errors import HookctlError

Form = Callable[[], Tensor]
OURS, PLAIN = "hookctl", "plain"


class DisagreementError(HookctlError):
    """Two forms of one computation gave different results: their times mean nothing."""


@dataclass(frozen=True, eq=False)
class Case:
    """Forms of one computation.

    forms: by name; `hookctl` is the one that the others are compared with, and `plain` (where there
    is one) is the call that nothing edits, which need not agree; truth: what the forms must give,
    of what `sample` takes from a result; tolerance: relative, of the norm; flops, traffic:
    arithmetic and bytes that no form of the edited call can do without, for the physical limit.
    """

    group: str
    name: str
    shape: Mapping[str, int | float]
    forms: Mapping[str, Form]
    truth: Callable[[], Tensor]
    sample: Callable[[Tensor], Tensor] = lambda out: out
    tolerance: float = 1e-4
    flops: float = 0.0
    traffic: float = 0.0


@dataclass(frozen=True)
class Figure:
    """Of one form: seconds (median, lower and upper quartile), peak bytes above what was there
    before, seconds of this form per second of `hookctl` (None for itself)."""

    seconds: float
    low: float
    high: float
    peak: int
    per_ours: float | None


@dataclass(frozen=True)
class Measured:
    """Figures of all forms of a case; limit: seconds under which the device can't be."""

    group: str
    name: str
    shape: Mapping[str, int | float]
    figures: Mapping[str, Figure]
    rounds: int
    limit: float
    error: float

    def data(self) -> dict[str, Any]:
        figures = {name: vars(figure) for name, figure in self.figures.items()}
        return {**vars(self), "shape": dict(self.shape), "figures": figures}


def measure(case: Case, limit: float, device: torch.device, budget: float) -> Measured:
    """Check, then time the forms of a case for about `budget` seconds, at least three rounds.

    Raises DisagreementError if a form's result is not the truth.
    """
    error = check(case)
    peaks = {name: peak_of(form, device) for name, form in case.forms.items()}
    times: dict[str, list[float]] = {name: [] for name in case.forms}
    order = random.Random(0)
    started, rounds = time.perf_counter(), 0
    gc.collect()
    gc.disable()
    try:
        while rounds < 3 or (time.perf_counter() - started < budget and rounds < 200):
            # In another order every round: what comes first, or after a big one, meets cold caches.
            for name in order.sample(list(case.forms), len(case.forms)):
                times[name].append(seconds_of(case.forms[name], device))
            rounds += 1
    finally:
        gc.enable()
    figures = {}
    for name, taken in times.items():
        low, middle, high = statistics.quantiles(taken, n=4)
        ratio = None
        if name != OURS:
            ratio = statistics.median(a / b for a, b in zip(taken, times[OURS], strict=True))
        figures[name] = Figure(middle, low, high, peaks[name], ratio)
    return Measured(case.group, case.name, case.shape, figures, rounds, limit, error)


def check(case: Case) -> float:
    """The largest relative error of the forms; DisagreementError if one is above the tolerance."""
    truth = case.truth().double()
    worst = 0.0
    for name, form in case.forms.items():
        if name == PLAIN:
            form()
            continue
        got = case.sample(form()).double()
        error = float((got - truth).norm() / truth.norm().clamp_min(1e-30))
        if not error <= case.tolerance:
            raise DisagreementError(
                f"{case.group} {case.name} {dict(case.shape)}: {name!r} is {error:.1e} from the "
                f"reference, and {case.tolerance:g} is allowed; no figures"
            )
        worst = max(worst, error)
    return worst


def seconds_of(form: Form, device: torch.device) -> float:
    """One run: processor time on a CPU, the device's own time on a GPU."""
    if device.type == "cpu":
        begun = time.process_time()
        form()
        return time.process_time() - begun
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    form()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop) / 1e3


def peak_of(form: Form, device: torch.device) -> int:
    """Bytes that one run holds at once, above those that were held before."""
    if device.type == "cpu":
        with Held() as held:
            form()
        return held.peak
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    form()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@dataclass
class Held(TorchDispatchMode):
    """Counts the bytes of living tensors that operators made; their own workspace is not seen."""

    peak: int = 0
    _alive: dict[int, tuple[StorageWeakRef, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_address(x) for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        self._alive = {k: kept for k, kept in self._alive.items() if not kept[0].expired()}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and _address(tensor) not in given:
                storage = tensor.untyped_storage()
                kept = (StorageWeakRef(storage), storage.nbytes())
                self._alive.setdefault(_address(tensor), kept)
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
