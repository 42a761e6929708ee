"""Promises on gradients: checkpointing of blocks and of whole denoiser calls."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.families.fingerprint import differences, fingerprint
from tests.families.promises import need
from tests.families.subjects import Borrow, Idle, Subject, error


def gradients_checkpointed(subject: Subject) -> None:
    """Checkpointing gives equal gradients, with an edit too, in this and another thread."""
    target = subject.make()
    denoiser = subject.denoiser(target)
    need(hasattr(denoiser, "enable_gradient_checkpointing"), "has no checkpointing")
    args, kwargs, rows = denoiser_call(subject, target)

    def gradients(editor: Any, thread: bool = False) -> list[Tensor]:
        denoiser.zero_grad()
        losses = []
        with subject.control(denoiser, editor, rows=rows):
            # Two calls before the backwards: each is recomputed with its own edit.
            for scale in (1.0, 0.5):
                out = called(denoiser, args[0] * scale, args[1:], kwargs)
                losses.append((out**2).mean())
            if thread:
                worker = threading.Thread(target=sum(losses).backward)
                worker.start()
                worker.join()
            else:
                sum(losses).backward()
        return [p.grad.clone() for p in denoiser.parameters() if p.grad is not None]

    denoiser.requires_grad_(True)
    denoiser.train()
    plain, edited = gradients(Idle()), gradients(FirstHalfBorrow())
    denoiser.enable_gradient_checkpointing()
    before = fingerprint(denoiser)
    for expected, editor in ((plain, Idle), (edited, FirstHalfBorrow)):
        for thread in (False, True):
            found = gradients(editor(), thread)
            assert len(found) == len(expected)
            for a, b in zip(found, expected, strict=True):
                assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9
    assert not all(torch.equal(a, b) for a, b in zip(plain, edited, strict=True))
    assert not differences(before, fingerprint(denoiser))


def calls_checkpointed(subject: Subject) -> None:
    """Checkpointing round whole denoiser calls, each with its own edit, gives equal gradients."""
    target = subject.make()
    denoiser = subject.denoiser(target)
    if subject.is_pipeline:
        args, kwargs, rows = denoiser_call(subject, target)
    else:
        kwargs = subject.case.inputs()
        args, rows = (kwargs.pop("x"),), ("P1", "P2")
    denoiser.requires_grad_(False)

    def call(sample: Tensor) -> Tensor:
        return (
            called(denoiser, sample, args[1:], kwargs) * 0.5
        )  # a node of the checkpoint after the call

    def gradient(editor: Any, recompute: bool) -> Tensor:
        sample = x = args[0].clone().requires_grad_()
        with subject.control(denoiser, editor, rows=rows):
            for _ in range(3):
                out = checkpoint(call, x, use_reentrant=False) if recompute else call(x)
                if out.shape != x.shape:  # variances, or without the image's channels
                    break
                x = x + out
            (x**2 + (out**2).mean()).mean().backward()
        assert sample.grad is not None
        return sample.grad

    plain, edited = gradient(Idle(), False), gradient(FirstHalfBorrow(), False)
    assert error(gradient(Idle(), True), plain) < 1e-5
    assert error(gradient(FirstHalfBorrow(), True), edited) < 1e-5


def called(
    denoiser: nn.Module, sample: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """The prediction of a denoiser; those that take their images as a list get a list."""
    listed = "cap_feats" in kwargs or any(isinstance(a, list) for a in args)
    out = denoiser(list(sample.unbind(0)) if listed else sample, *args, **kwargs)
    out = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
    return torch.stack(out) if isinstance(out, list) else out


class FirstHalfBorrow(Borrow):
    """Acts in even steps only, so that two calls meet different edits."""

    def attention(self, call: Any) -> None:
        if call.clock.step % 2 == 0:
            rows = list(call.rows)
            call.borrow(rows[-1], v=rows[0])


def denoiser_call(subject: Subject, target: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """The arguments of a denoiser call of a run, sample first, and branches for its rows."""
    denoiser, seen = subject.denoiser(target), []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args, dict(kwargs)))

    handle = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    subject.run(target)
    handle.remove()
    args, kwargs = seen[0]
    if not args:
        name = next(n for n in ("sample", "hidden_states", "x") if n in kwargs)
        args = (kwargs.pop(name),)
    if isinstance(args[0], list):
        args = (torch.stack(args[0]), *args[1:])
    rows = tuple(f"{label}" for label in subject.calls[0])
    args = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
    return args, {k: v for k, v in kwargs.items() if k != "return_dict"}, rows
