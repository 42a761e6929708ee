"""Measure several forms of one computation: interleaved, agreement first, time and memory together.

A round runs every form once, in turn, so that whatever else the machine does falls on all of them.
Figures are medians over rounds with quartiles; ratios are medians of the ratios within a round.

On a GPU every run begins with cold caches, and a single call's time is the device's own: it is kept
busy until the host has handed everything over, or a short kernel would be as slow as Python is.
What a whole step takes is measured as it comes.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from hookctl.errors import HookctlError

Form = Callable[[], Tensor]
OURS, PLAIN = "hookctl", "plain"
_COLD = 2**28  # bytes, several times a GPU's cache
_CYCLES = 2e9  # of a GPU in a second, at most
_AHEAD = 0.05  # seconds for which a GPU is kept busy, at most


class DisagreementError(HookctlError):
    """Two forms of one computation gave different results: their times mean nothing."""


@dataclass(frozen=True, eq=False)
class Case:
    """Forms of one computation.

    forms: by name; `hookctl` is the one that the others are compared with, and `plain` (where there
    is one) is the call that nothing edits, which need not agree; truth: what the forms must give,
    of what `sample` takes from a result; tolerance: relative, of the norm; flops, traffic:
    arithmetic and bytes that no form of the edited call can do without, for the physical limit;
    inside: by form, what it runs inside of and what isn't timed, as the attaching of editors;
    whole: whether the host's share of the time counts.
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
    inside: Mapping[str, Callable[[], AbstractContextManager[Any]]] = field(default_factory=dict)
    whole: bool = False

    def within(self, name: str) -> AbstractContextManager[Any]:
        return self.inside.get(name, nullcontext)()


@dataclass(frozen=True)
class Figure:
    """Of one form: seconds (median, lower and upper quartile), peak bytes above what was there
    before (None where no operator can be watched), seconds of this form per second of `hookctl`
    (None for itself), seconds until the host had handed everything over to a GPU (None on a
    CPU)."""

    seconds: float
    low: float
    high: float
    peak: int | None
    per_ours: float | None
    host: float | None = None


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
    forms, error = _agreeing(case)
    case = replace(case, forms=forms)
    times: dict[str, list[float]] = {name: [] for name in case.forms}
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        peaks, hosts = _once(case, device)
        started, rounds = time.perf_counter(), 0
        while rounds < 3 or (time.perf_counter() - started < budget and rounds < 200):
            # In another order every round: what comes first, or after a big one, meets cold caches.
            for name in order.sample(list(case.forms), len(case.forms)):
                ahead = 0.0 if case.whole else min(2 * hosts[name], _AHEAD)
                with case.within(name):
                    times[name].append(seconds_of(case.forms[name], device, ahead))
            rounds += 1
    finally:
        gc.enable()
    figures = {}
    for name, taken in times.items():
        low, middle, high = statistics.quantiles(taken, n=4)
        ratio = None
        if name != OURS:
            ratio = statistics.median(a / b for a, b in zip(taken, times[OURS], strict=True))
        host = None if device.type == "cpu" else hosts[name]
        figures[name] = Figure(middle, low, high, peaks[name], ratio, host)
    return Measured(case.group, case.name, case.shape, figures, rounds, limit, error)


def check(case: Case) -> float:
    """The largest relative error of the forms; DisagreementError if one is above the tolerance."""
    return _agreeing(case)[1]


def _agreeing(case: Case) -> tuple[dict[str, Form], float]:
    """The forms that fit into the device's memory, and the largest relative error of one.

    Every form has then run once: nothing is compiled when it is timed.
    """
    truth = case.truth().double()
    forms: dict[str, Form] = {}
    worst = 0.0
    for name, form in case.forms.items():
        try:
            with case.within(name):
                out = form()
        except torch.OutOfMemoryError:
            if name == OURS:
                raise
            torch.cuda.empty_cache()
            continue
        forms[name] = form
        if name == PLAIN:
            continue
        error = float((case.sample(out).double() - truth).norm() / truth.norm().clamp_min(1e-30))
        if not error <= case.tolerance:
            raise DisagreementError(
                f"{case.group} {case.name} {dict(case.shape)}: {name!r} is {error:.1e} from the "
                f"reference, and {case.tolerance:g} is allowed; no figures"
            )
        worst = max(worst, error)
    return forms, worst


def _once(case: Case, device: torch.device) -> tuple[dict[str, int | None], dict[str, float]]:
    """Of every form the peak of a run and the host's seconds."""
    peaks, hosts = {}, {}
    for name, form in case.forms.items():
        with case.within(name):
            peaks[name] = peak_of(form, device)
        with case.within(name):
            form()  # warm again: nothing compiled runs under a watch
            started = time.perf_counter()
            form()
            hosts[name] = time.perf_counter() - started
    return peaks, hosts


def seconds_of(form: Form, device: torch.device, ahead: float = 0.0) -> float:
    """One run: processor time on a CPU, the device's own time on a GPU, kept busy for some seconds
    before."""
    if device.type == "cpu":
        started = time.process_time()
        form()
        return time.process_time() - started
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    _elsewhere(device).zero_()
    if ahead:
        torch.cuda._sleep(int(ahead * _CYCLES))
    start.record()
    form()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop) / 1e3


@lru_cache(maxsize=1)
def _elsewhere(device: torch.device) -> Tensor:
    """Memory that pushes everything else out of the cache."""
    return torch.empty(_COLD, dtype=torch.uint8, device=device)


def peak_of(form: Form, device: torch.device) -> int | None:
    """Bytes that one run holds at once, above those that were held before; None on a CPU for
    operators that let nothing watch them (FlexAttention)."""
    if device.type == "cpu":
        try:
            with warnings.catch_warnings(action="ignore"), Held() as held:
                form()
        except (NotImplementedError, torch._dynamo.exc.TorchDynamoException):
            return None
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
