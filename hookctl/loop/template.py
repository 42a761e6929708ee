"""The first denoiser call of a pipeline, caught before it is made.

A pipeline knows best how to read its prompts, which further conditions its denoiser takes and what
noise a generator means. So a program lets the pipeline prepare a run and stops it where the loop
would begin: what the denoiser was about to receive is the pattern for all calls of the program.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hookctl.address import families, pipelines
from hookctl.address.rows import COND, UNCOND, Row, Rows, resolve_rows
from hookctl.errors import HookctlError, InputError, UnsupportedError
from hookctl.hooks.patch import Patch
from hookctl.hooks.pipeline import DenoiserPort, PipelinePort, SchedulerPort
from hookctl.loop.driven import Scaling

_TIMES = ("timestep", "timesteps", "t")
TEXT = "encoder_hidden_states"
# Computed from the latents of the step, or drawn from them: the first step's are no pattern.
_PER_STEP = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "controlnet_block_samples",
    "block_controlnet_hidden_states",
)


class _Ready(BaseException):
    """The pipeline stands before its loop; no handler of ordinary errors may stop it."""


@dataclass(frozen=True)
class Template:
    """The pattern of a program's denoiser calls.

    arguments: of the first call, by name; sample, time: names of the model input and the timestep;
    latents: [images, ...], the noise that the pipeline starts from; rows: of the call; encoding:
    arguments of the pipeline's `encode_prompt`.
    """

    arguments: Mapping[str, Any]
    sample: str
    time: str
    latents: Tensor
    rows: Rows
    encoding: dict[str, Any]

    @property
    def branches(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.branch for row in self.rows))

    def text(self, branch: str) -> Tensor:
        """The text embeddings of a branch's rows, [images, tokens, channels]."""
        index = self.rows_of([branch])[1]
        embeddings: Tensor = self.arguments[TEXT]
        return embeddings[index.to(embeddings.device)]

    def rows_of(self, branches: Sequence[str]) -> tuple[Rows, Tensor]:
        """The rows of a call with these branches alone, and their indices in the full call."""
        kept = [row for row in self.rows if row.branch in branches]
        rows = [Row(i, row.branch, row.prompt, row.image) for i, row in enumerate(kept)]
        return Rows(rows), torch.tensor([row.index for row in kept])

    def call(
        self,
        model_input: Tensor,
        timestep: Tensor,
        index: Tensor,
        texts: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Any]:
        """The arguments of a call of some rows.

        model_input: [rows, ...]; timestep: 0-d; index: which rows of the full call, [rows];
        texts: branch -> embeddings [1 | images, tokens, channels] in place of the prompt's.
        """
        arguments = {
            name: value if len(index) == len(self.rows) else _select(value, index, len(self.rows))
            for name, value in self.arguments.items()
        }
        arguments[self.sample] = model_input
        pattern = arguments[self.time]
        if isinstance(pattern, Tensor):
            timestep = timestep.to(pattern)
            arguments[self.time] = timestep if not pattern.dim() else timestep.expand_as(pattern)
        else:
            arguments[self.time] = timestep
        if texts:
            arguments[TEXT] = self._text(arguments[TEXT], index, texts)
        return arguments

    def _text(self, own: Tensor, index: Tensor, texts: Mapping[str, Tensor]) -> Tensor:
        branches = [self.rows[int(i)].branch for i in index]
        images = len(self.latents)
        parts = []
        for branch in dict.fromkeys(branches):
            at = branches.index(branch)
            part, text = own[at : at + images], texts.get(branch)
            if text is not None:
                if text.shape[1:] != part.shape[1:] or text.shape[0] not in (1, images):
                    raise InputError(
                        f"contexts[{branch!r}] is {tuple(text.shape)}; give "
                        f"[1 or {images}, {part.shape[1]}, {part.shape[2]}]"
                    )
                part = text.to(part).expand_as(part)
            parts.append(part)
        return torch.cat(parts)


def prepare(pipe: Any, arguments: Mapping[str, Any], prompts: int, images: int) -> Template:
    """Let a pipeline prepare a run with these arguments of its call, and stop it there.

    Raises UnsupportedError for pipelines whose loop is more than denoiser call, guidance and step.
    """
    denoiser, name = families.denoiser_of(pipe), type(pipe).__name__
    layout = pipelines.layout_of(pipe)
    if layout.sequential:
        raise UnsupportedError(
            f"{name} guides by several denoiser calls in a step, which programs don't do; use one "
            "that guides in one call (Stable Diffusion 1, 2, XL or 3, PixArt)"
        )
    if layout.groups.get(2) != (UNCOND, COND) or max(layout.groups) > 2:
        raise UnsupportedError(
            f"{name} combines its predictions in a way of its own; programs do classifier-free "
            "guidance, so use the plain text-to-image pipeline"
        )
    declared = families.pipeline_of(pipe)
    if declared is not None and declared.handing is not None:
        raise UnsupportedError(
            f"{name} hands its scheduler something else than its denoiser's prediction, which "
            "programs don't do"
        )
    if getattr(pipe, "controlnet", None) is not None or hasattr(pipe, "adapter"):
        raise UnsupportedError(
            f"{name} computes its control anew at every step, which programs don't do; use the "
            "plain text-to-image pipeline"
        )
    seen: dict[str, Any] = {}
    thread = threading.get_ident()  # others may call the model meanwhile

    def caught(inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return inner(*args, **kwargs)
        signature = inspect.signature(type(families.uncompiled(denoiser)).forward)
        seen["arguments"] = dict(list(signature.bind(None, *args, **kwargs).arguments.items())[1:])
        seen["guided"] = pipelines.is_guided(pipe)
        raise _Ready

    def scaled(x: Tensor, again: Callable[[Tensor], Tensor]) -> None:
        if threading.get_ident() == thread:
            seen["scaling"] = Scaling(x, again)

    def encoded(given: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            seen.setdefault("encoding", given)

    ports: list[Any] = [
        DenoiserPort(denoiser, caught),
        SchedulerPort(pipe.scheduler, lambda step, given: step(**given), scaled),
        PipelinePort(pipe, lambda given: None, lambda: None, encoded),
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
        except (TypeError, ValueError) as error:
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
    if "arguments" not in seen:
        raise UnsupportedError(f"{name} never called its denoiser, so it can't be driven")
    return _template(pipe, denoiser, seen, prompts, images)


def _template(
    pipe: Any, denoiser: nn.Module, seen: Mapping[str, Any], prompts: int, images: int
) -> Template:
    name, given = type(pipe).__name__, seen["arguments"]
    sample = next(iter(given))
    time = next((key for key in _TIMES if key in given), None)
    per_step = [key for key in _PER_STEP if given.get(key) is not None]
    if time is None or not isinstance(given[sample], Tensor) or per_step:
        raise UnsupportedError(
            f"{name} computes {', '.join(per_step) or 'its model input'} anew at every step, "
            "which programs don't do; use the plain text-to-image pipeline"
        )
    rows = resolve_rows(
        given[sample].shape[0],
        pipelines.layout_of(pipe),
        prompts=prompts,
        images_per_prompt=images,
        guided=seen["guided"],
    )
    if getattr(pipe, "guidance_rescale", 0.0):
        raise UnsupportedError("guidance_rescale: programs do classifier-free guidance without it")
    scaling: Scaling | None = seen.get("scaling")
    source = given[sample] if scaling is None else scaling.latents
    latents = source[: prompts * images]
    if latents.shape[1:] != given[sample].shape[1:]:
        raise UnsupportedError(
            f"{name} appends images or masks to the latents, which programs don't do; use the "
            "plain text-to-image pipeline"
        )
    _check_time(pipe, given[time])
    return Template(given, sample, time, latents, rows, seen.get("encoding", {}))


def _check_time(pipe: Any, given: Any) -> None:
    """Refuse pipelines that change the timestep's units on the way to the denoiser."""
    first = given.flatten()[0] if isinstance(given, Tensor) else given
    if abs(float(first) - float(pipe.scheduler.timesteps[0])) > 1e-2 * max(1.0, abs(float(first))):
        raise UnsupportedError(
            f"{type(pipe).__name__} hands its denoiser {float(first):g} for the timestep "
            f"{float(pipe.scheduler.timesteps[0]):g}, which programs don't do"
        )


def _select(value: Any, index: Tensor, batch: int) -> Any:
    """The rows of an argument, wherever it holds one for each row of the full call."""
    if isinstance(value, Tensor):
        rowwise = value.dim() > 0 and value.shape[0] == batch
        return value.index_select(0, index.to(value.device)) if rowwise else value
    if isinstance(value, Mapping):
        return {key: _select(part, index, batch) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_select(part, index, batch) for part in value)
    return value
