"""The denoiser calls of a pipeline's first step, caught before they are made.

A pipeline knows best how to read its prompts, which further conditions its denoiser takes and what
noise a generator means. So a program lets the pipeline prepare a run and stops it where the first
step would begin: what the denoiser was about to receive is the pattern for all calls of the
program. Where guidance takes several calls, each is answered with zeros to see the next.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hookctl.address import families, pipelines
from hookctl.address.families.loops import PLAIN, Loop
from hookctl.address.latent import latent_grid
from hookctl.address.rows import COND, UNCOND, resolve_rows
from hookctl.errors import HookctlError, InputError, UnsupportedError
from hookctl.hooks.patch import Patch
from hookctl.hooks.pipeline import DenoiserPort, PipelinePort
from hookctl.hooks.scheduler import SchedulerPort
from hookctl.loop.driven import Scaling
from hookctl.loop.pattern import Pattern, Template

_TIMES = ("timestep", "timesteps", "t")
_TEXTS = ("encoder_hidden_states", "cap_feats", "context")
# Computed from the latents of the step, or drawn from them: the first step's are no pattern.
_PER_STEP = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "controlnet_block_samples",
    "block_controlnet_hidden_states",
)


class _Ready(BaseException):
    """The pipeline stands before its step; no handler of ordinary errors may stop it."""


@dataclass(eq=False)
class _Seen:
    """What a pipeline did up to its first step."""

    calls: list[tuple[nn.Module, dict[str, Any]]] = field(default_factory=list)
    scaling: Scaling | None = None
    latents: Tensor | None = None
    guided: bool | None = None
    encoding: dict[str, Any] = field(default_factory=dict)


def prepare(pipe: Any, arguments: Mapping[str, Any], prompts: int, images: int) -> Template:
    """Let a pipeline prepare a run with these arguments of its call, and stop it there.

    Raises UnsupportedError for pipelines whose loop is more than denoiser calls, guidance and step.
    """
    loop = families.loop_of(pipe)
    _check_kind(pipe, loop)
    seen = _prepared(pipe, arguments, loop)
    if not seen.calls:
        raise UnsupportedError(
            f"{type(pipe).__name__} never called its denoiser, so it can't be driven"
        )
    return _template(pipe, loop or PLAIN, seen, prompts, images)


def _check_kind(pipe: Any, loop: Loop | None) -> None:
    """Refuse pipelines whose loop is not known to be denoiser calls, guidance and a step."""
    name, layout = type(pipe).__name__, pipelines.layout_of(pipe)
    if loop is None and layout.sequential:
        raise UnsupportedError(
            f"{name} guides by several denoiser calls in a step, in a way that is not declared, "
            "which programs don't do; use the family's text-to-image pipeline, or declare it: "
            "hookctl.address.families.declare_loops(...)"
        )
    if loop is None and (layout.groups.get(2) != (UNCOND, COND) or max(layout.groups) > 2):
        raise UnsupportedError(
            f"{name} combines its predictions in a way of its own; programs do classifier-free "
            "guidance, so use the plain text-to-image pipeline"
        )
    declared = families.pipeline_of(pipe)
    if loop is None and declared is not None and declared.handing is not None:
        raise UnsupportedError(
            f"{name} hands its scheduler something else than its denoiser's prediction, which "
            "programs don't do"
        )
    if getattr(pipe, "controlnet", None) is not None or hasattr(pipe, "adapter"):
        raise UnsupportedError(
            f"{name} computes its control anew at every step, which programs don't do; use the "
            "plain text-to-image pipeline"
        )


def _prepared(pipe: Any, arguments: Mapping[str, Any], loop: Loop | None) -> _Seen:
    """What the pipeline does with a call up to its first step."""
    seen, name = _Seen(), type(pipe).__name__
    thread = threading.get_ident()  # others may call the model meanwhile

    def catching(denoiser: nn.Module) -> Callable[..., Any]:
        def caught(inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return inner(*args, **kwargs)
            signature = inspect.signature(type(families.uncompiled(denoiser)).forward)
            given = dict(list(signature.bind(None, *args, **kwargs).arguments.items())[1:])
            seen.calls.append((denoiser, given))
            seen.guided = pipelines.is_guided(pipe)
            if loop is None:
                raise _Ready
            return (_zeros(next(iter(given.values()))),)

        return caught

    def stepped(step: Callable[..., Any], given: dict[str, Any]) -> Any:
        if threading.get_ident() != thread:
            return step(**given)
        seen.latents = given["sample"]
        raise _Ready

    def scaled(x: Tensor, again: Callable[[Tensor], Tensor]) -> None:
        if threading.get_ident() == thread:
            seen.scaling = Scaling(x, again)

    def encoded(given: dict[str, Any]) -> None:
        if threading.get_ident() == thread and not seen.encoding:
            seen.encoding = given

    ports: list[Any] = [
        *(DenoiserPort(one, catching(one)) for _, one in families.named_denoisers(pipe)),
        SchedulerPort(pipe.scheduler, stepped, scaled),
        PipelinePort(pipe, lambda given: None, lambda: None, encoded, lambda: None),
        Patch(pipe, "_progress_bar_config", {"disable": True}),
    ]

    def back() -> None:
        for port in ports:
            port.remove()

    try:
        try:
            for port in ports:
                port.install()
            pipe(**arguments)
        except _Ready:
            pass
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, HookctlError):
                raise
            said = ", ".join(key for key, value in arguments.items() if value is not None)
            raise InputError(
                f"{name} can't prepare a run with {said}: {error}. Give what its call needs "
                "besides, as further arguments of it"
            ) from error
        finally:
            back()
    finally:
        back()  # what an interrupt of the first time left out
    return seen


def _zeros(model_input: Any) -> Any:
    """A prediction of nothing for a model input."""
    if isinstance(model_input, list):
        return [torch.zeros_like(one) for one in model_input]
    return torch.zeros_like(model_input)


def _template(pipe: Any, loop: Loop, seen: _Seen, prompts: int, images: int) -> Template:
    name, (denoiser, given) = type(pipe).__name__, seen.calls[0]
    sample = next(iter(given))
    time = next((key for key in _TIMES if key in given), None)
    per_step = [key for key in _PER_STEP if given.get(key) is not None]
    listed = loop.wrap is not None and isinstance(given[sample], list)
    if time is None or not (listed or isinstance(given[sample], Tensor)) or per_step:
        raise UnsupportedError(
            f"{name} computes {', '.join(per_step) or 'its model input'} anew at every step, "
            "which programs don't do; use the plain text-to-image pipeline"
        )
    layout = pipelines.layout_of(pipe)
    patterns = [
        Pattern(
            arguments,
            resolve_rows(
                len(arguments[sample]),
                layout,
                prompts=prompts,
                images_per_prompt=images,
                guided=seen.guided,
                branch=layout.sequential[i] if i < len(layout.sequential) else None,
                call=i,
            ),
        )
        for i, (_, arguments) in enumerate(seen.calls)
    ]
    settings = families.settings_of(pipe, loop)
    latents = seen.latents
    if latents is None:
        latents = given[sample] if seen.scaling is None else seen.scaling.latents
    latents = latents[: prompts * images]
    if not (listed or loop.references or latents.shape[1:] == given[sample].shape[1:]):
        raise UnsupportedError(
            f"{name} appends images or masks to the latents, which programs don't do; use the "
            "plain text-to-image pipeline"
        )
    _check_time(pipe, loop, given[time], latents)
    grid = () if listed else latent_grid(given[sample], given, denoiser)
    text = next((key for key in _TEXTS if given.get(key) is not None), None)
    return Template(
        tuple(patterns), sample, time, text, latents, grid, loop, settings, seen.encoding
    )


def _check_time(pipe: Any, loop: Loop, given: Any, latents: Tensor) -> None:
    """Refuse pipelines that change the timestep's units on the way to the denoiser in a way of
    their own, or begin in the middle of the schedule."""
    told = float(given.flatten()[0] if isinstance(given, Tensor) else given)
    first = pipe.scheduler.timesteps[0]
    wanted = float(loop.time(torch.as_tensor(first), latents))
    if abs(told - wanted) > 1e-2 * max(loop.time is PLAIN.time, abs(told)):
        raise UnsupportedError(
            f"{type(pipe).__name__} hands its denoiser {told:g} for the timestep "
            f"{float(first):g}, which programs don't do"
        )
