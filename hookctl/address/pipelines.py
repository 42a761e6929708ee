"""What is asked of a pipeline: its layout of branches, whether it guides, how its text is made up.

The answers stand in the records of `families`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hookctl.address import families
from hookctl.address.families import TextStream
from hookctl.address.rows import (
    BATCHED,
    BATCHED_THEN_SKIP,
    COND,
    PAG,
    PIX2PIX,
    POSITIVE_FIRST,
    SEQUENTIAL,
    UNCOND,
    Layout,
)
from hookctl.errors import LayoutError, UnsupportedError

__all__ = [
    "BATCHED",
    "BATCHED_THEN_SKIP",
    "PAG",
    "PIX2PIX",
    "POSITIVE_FIRST",
    "SEQUENTIAL",
    "TextStream",
    "asked_by_guider",
    "encoded_places",
    "inner_pipelines",
    "is_guided",
    "layout_of",
    "planned_steps",
    "schedule_of",
    "scheduler_of",
    "text_streams",
]


def layout_of(pipe: Any, denoiser: Any = None) -> Layout:
    """How a pipeline lays out the rows of a denoiser of its, the first one by default.

    Raises LayoutError for a pipeline that is not declared, and for a bare denoiser (None).
    """
    if pipe is None:
        raise LayoutError(
            "a bare denoiser does not say whose its batch rows are; give their branches in order: "
            "control(..., rows=('uncond', 'cond'))"
        )
    record = families.pipeline_of(pipe)
    if record is None:
        raise LayoutError(
            f"{type(pipe).__name__} is no pipeline that hookctl knows, so whose the rows of its "
            "denoiser calls are can't be told. Give their branches in order: "
            "control(..., rows=('uncond', 'cond')); or declare it: "
            "hookctl.address.families.declare_pipelines(...)"
        )
    if denoiser is not None:
        wanted = families.uncompiled(denoiser)
        for name, module in families.named_denoisers(pipe):
            if families.uncompiled(module) is wanted:
                return record.calls[name]
    return next(iter(record.calls.values()))


def asked_by_guider(pipe: Any, call: int) -> str | None:
    """What the guider of a pipeline of blocks names a step's call, counted from 0; None without a
    guider."""
    guider = getattr(pipe, "guider", None)
    if guider is None or not hasattr(guider, "prepare_inputs"):
        return None
    asked = guider.prepare_inputs({"branch": (COND, UNCOND)})
    return getattr(asked[call], guider._identifier_key) if call < len(asked) else None


def scheduler_of(pipe: Any, denoiser: nn.Module) -> Any:
    """The scheduler of a denoiser of a pipeline; None if there is none."""
    record = families.pipeline_of(pipe)
    for name, place in (record.schedulers if record is not None else {}).items():
        if families.uncompiled(denoiser) is families.uncompiled(getattr(pipe, name)):
            return getattr(pipe, place, None)
    return getattr(pipe, "scheduler", None)


def schedule_of(scheduler: Any) -> Any:
    """The timesteps that a scheduler steps from, [steps]; None if it has none.

    Where it lists one for every level of noise (LTXEulerAncestralRFScheduler), the last is the end.
    """
    times, sigmas = (getattr(scheduler, name, None) for name in ("timesteps", "sigmas"))
    if not isinstance(times, Tensor) or not isinstance(sigmas, Tensor) or not len(times):
        return times
    return times[:-1] if len(times) == len(sigmas) and not sigmas[-1] else times


def inner_pipelines(pipe: Any) -> tuple[Any, ...]:
    """The pipelines that a combined one hands its call on to."""
    record = families.pipeline_of(pipe)
    return tuple(getattr(pipe, name) for name in (record.inner if record is not None else ()))


def planned_steps(pipe: Any, scheduler: Any) -> Any:
    """How many steps of a scheduler a pipeline, or the one inside it that has it, says it takes."""
    inner = [one for one in inner_pipelines(pipe) if one.scheduler is scheduler]
    return getattr(inner[0] if len(inner) == 1 else pipe, "_num_timesteps", None)


def is_guided(pipe: Any) -> bool | None:
    """Whether classifier-free guidance is on, or None where the pipeline does not say."""
    try:
        value = pipe.do_classifier_free_guidance
    except Exception:  # a property over state that exists only during a call
        return None
    single = isinstance(value, Tensor) and value.numel() == 1
    return bool(value) if single or isinstance(value, bool | int) else None


def text_streams(pipe: Any) -> tuple[TextStream, ...]:
    """How the text sequence that the attention sees is made up of tokenizers.

    Raises UnsupportedError if the pipeline has no text, or puts it together in a way unknown here.
    """
    name, record = type(pipe).__name__, families.pipeline_of(pipe)
    if isinstance(pipe, nn.Module):
        why = "a bare denoiser has no tokenizer"
    elif record is None:
        why = "it is no pipeline that hookctl knows"
    elif isinstance(record.text, str):
        why = record.text
    elif getattr(pipe, "tokenizer", None) is None and getattr(pipe, "tokenizer_2", None) is None:
        why = "it has no tokenizer"
    else:
        assert record.text is not None
        return record.text(pipe)
    raise UnsupportedError(
        f"the words of {name} can't be addressed: {why}; use positions of tokens instead of words"
    )


def encoded_places(pipe: Any) -> Mapping[str, int]:
    """Where a pipeline's `encode_prompt` returns the pooled text and the mask of the tokens."""
    record = families.pipeline_of(pipe)
    return {} if record is None else record.encoded
