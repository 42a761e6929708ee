"""What makes a job's pipeline and editors, here or in a worker; all of it can be pickled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hookctl
from hookctl.batch.identity import description, fingerprint
from hookctl.batch.job.spec import Job, read_job
from hookctl.batch.run import Work
from hookctl.batch.settings import check_vary
from hookctl.cli.hooks import attach_hooks, check_hooks
from hookctl.cli.known import editors_by_name, measures_by_name
from hookctl.cli.lora import check_loras, put_on
from hookctl.cli.models import EMBEDDED, find_model
from hookctl.cli.quiet import quiet
from hookctl.cli.stacks import stack_file
from hookctl.errors import InputError
from hookctl.preset import HookSpec, LoraSpec, Preset, check_early, preset_of

if TYPE_CHECKING:
    import torch

    from hookctl.editor import Editor


def checked_job(path: Path | str, model: str | None) -> Job:
    """A job and all that it names, checked without torch; model: before the job's own."""
    job = read_job(path, stack_file, measures_by_name())
    known = check_early(job.stack.data, job.stack.path)
    if known.takes_image(job.stack.data):
        raise InputError(
            f"{job.stack.path}: takes an image, and a batch draws both images of a pair from "
            "noise; give a stack without [inversion], [program] and editors that take one"
        )
    job = replace(job, model=model or job.model)
    if job.model is None:
        raise InputError(f"which model? Give --model, or model = in {job.path}")
    find_model(job.model)
    check_loras(job.stack.loras)
    check_hooks(job.stack.hooks)
    return job


def prepared(
    job: Job, device: torch.device, dtype: str | None
) -> tuple[Preset, Loader, dict[str, Any]]:
    """The stack of a job with the job's settings, what loads the model, and what determines the
    images."""
    assert job.model is not None  # `checked_job` looked
    preset = replace(preset_of(job.stack, editors_by_name()), run=job.run)
    check_vary(job, preset)
    return preset, *loader(job.model, preset, job, device, dtype)


def working(job: Job, preset: Preset, core_id: str) -> Work:
    """What its tasks have in common; InputError for a filter's function that is not there."""
    work = Work(job, preset, core_id, measures_by_name(), attaching(preset.hooks))
    assert work.filters is not None
    return work


@dataclass(frozen=True)
class Loader:
    """Makes the pipeline, here or in a worker."""

    model: str
    device: str
    dtype: str
    loras: tuple[LoraSpec, ...] = ()

    def __call__(self) -> Any:
        from hookctl.cli.loading import load_pipeline

        with quiet():
            pipe = load_pipeline(self.model, self.device, self.dtype)
            put_on(pipe, self.loras)
        return pipe


@dataclass(frozen=True)
class Attach:
    """Makes the editors of learned weights."""

    hooks: tuple[HookSpec, ...]

    def __call__(self, pipe: Any, prompts: Sequence[str]) -> list[Editor]:
        return [one.editor for one in attach_hooks(pipe, self.hooks, prompts, None)]


def attaching(hooks: tuple[HookSpec, ...]) -> Attach | None:
    return Attach(hooks) if hooks else None


def loader(
    model: str, preset: Preset, job: Job, device: torch.device, dtype: str | None
) -> tuple[Loader, dict[str, Any]]:
    """What loads the model, and what determines the images of a job."""
    from hookctl.cli.loading import downloaded, usual_dtype

    folder = find_model(model)
    if model in EMBEDDED:
        dtype, place = dtype or "float32", Path(hookctl.__file__).parent / EMBEDDED[model]
    else:
        place = folder or downloaded(model)
        dtype = str(usual_dtype(dtype, device, place)).removeprefix("torch.")
        model = model if folder is None else str(folder.resolve())
    core = description(job, preset, fingerprint(place), device=device.type, dtype=dtype)
    return Loader(model, str(device), dtype, preset.loras), core
