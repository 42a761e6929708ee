"""The promises that need `torch.compile`: dear, so apart from the others."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tests.families.subjects import Borrow, Subject, error

TOLERANCE = 1e-4  # fp32, compiled code orders sums in its own way
BACKEND = "aot_eager"  # "eager" would run the traced graph under the modes once more


def graphs() -> int:
    """How many graphs were compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def compile_target(subject: Subject, target: Any) -> Any:
    """What a user does: the pipeline's denoiser, or the module, compiled from outside."""
    if not subject.is_pipeline:
        return torch.compile(target, backend=BACKEND)
    setattr(target, subject.case.denoiser, torch.compile(subject.denoiser(target), backend=BACKEND))
    return target


def expected(subject: Subject, window: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Plain, and edited in a window, both uncompiled."""
    target = subject.make()
    plain = subject.run(target)
    with subject.control(target, Borrow(*window)):
        edited = subject.run(target)
    assert error(edited, plain) > 10 * TOLERANCE
    return plain, edited


def window_of(subject: Subject) -> tuple[float, float]:
    """The first of two steps; a bare module has no schedule to speak of."""
    return (0.0, 0.5) if subject.is_pipeline else (0.0, 1.0)


def compiled_before(subject: Subject) -> None:
    """A model that was compiled, and has run, before control() comes: edits in a window."""
    torch._dynamo.reset()
    plain, edited = expected(subject, window_of(subject))
    target = compile_target(subject, subject.make())
    assert error(subject.run(target), plain) < TOLERANCE
    with subject.control(target, Borrow(*window_of(subject))):
        assert error(subject.run(target), edited) < TOLERANCE
        count = graphs()
        assert error(subject.run(target), edited) < TOLERANCE
        assert graphs() == count, "an edited run compiles anew"
    with subject.control(target, Borrow(stop=0.0)):
        assert error(subject.run(target), plain) < TOLERANCE
    _check_plain(subject, target, plain)


def compiled_after(subject: Subject) -> None:
    """A model compiled inside control()."""
    torch._dynamo.reset()
    plain, edited = expected(subject, window_of(subject))
    target = subject.make()
    with subject.control(target, Borrow(*window_of(subject))):
        held = compile_target(subject, target)
        assert error(subject.run(held), edited) < TOLERANCE
        count = graphs()
        assert error(subject.run(held), edited) < TOLERANCE
        assert graphs() == count, "an edited run compiles anew"
    _check_plain(subject, held, plain)
    denoiser = subject.denoiser(held)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in denoiser.modules())
    assert "_compiled_call_impl" not in denoiser.__dict__


def compiled_in_place(subject: Subject, inside: bool) -> None:
    """`model.compile()`, before or inside control()."""
    torch._dynamo.reset()
    plain, edited = expected(subject, window_of(subject))
    target = subject.make()
    denoiser: nn.Module = subject.denoiser(target)
    if not inside:
        denoiser.compile(backend=BACKEND)
        subject.run(target)
    with subject.control(target, Borrow(*window_of(subject))):
        if inside:
            denoiser.compile(backend=BACKEND)
        assert error(subject.run(target), edited) < TOLERANCE
        count = graphs()
        assert error(subject.run(target), edited) < TOLERANCE
        assert graphs() == count, "an edited run compiles anew"
    assert denoiser.__dict__["_compiled_call_impl"] is not None
    _check_plain(subject, target, plain)


def _check_plain(subject: Subject, target: Any, plain: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert error(subject.run(target), plain) < TOLERANCE
