"""The hooks on a scheduler: its steps, and the model inputs that it makes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from hookctl.hooks.pipeline import Inner, Port


class SchedulerPort(Port):
    """Hands every step to `around(step, arguments)`, and the latents of every model input that it
    makes to `scaled`, with what does the same to others."""

    def __init__(
        self,
        scheduler: Any,
        around: Callable[[Inner, dict[str, Any]], Any],
        scaled: Callable[[Tensor, Callable[[Tensor], Tensor]], None],
    ) -> None:
        super().__init__()
        self.scheduler, self._around, self._scaled = scheduler, around, scaled

    def install(self) -> None:
        scheduler = self.scheduler
        self._hook(scheduler, "step", self._step)
        if hasattr(scheduler, "scale_model_input"):
            self._hook(scheduler, "scale_model_input", self._scale)

    def _step(self, original: Inner, args: Any, kwargs: Any) -> Any:
        arguments, step = step_arguments(self.scheduler, original, args, kwargs)
        if not {"model_output", "sample"} <= set(arguments):
            return original(*args, **kwargs)
        return self._around(step, arguments)

    def _scale(self, original: Inner, args: Any, kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        latents, rest = (args[0], args[1:]) if args else (kwargs.pop("sample"), args)
        self._scaled(latents, lambda x: original(x, *rest, **kwargs))
        return out


_STEPPED = ("model_output", "timestep", "sample")  # what a step is of, in order


def step_arguments(
    scheduler: Any, step: Inner, args: Any, kwargs: Any
) -> tuple[dict[str, Any], Inner]:
    """The arguments of a scheduler's step by name, and the step as a function of them.

    The names are those of the scheduler's class: a function put in the place of its step may name
    its parameters otherwise, or take any. A class with names of its own is given the usual ones.
    """
    own = list(inspect.signature(type(scheduler).step).parameters.values())[1:]
    names = [
        one.name for one in own if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
    ]
    usual = {"model_output", "sample"} <= set(names)
    renamed = {} if usual else dict(zip(names, _STEPPED, strict=False))
    names = names if usual else [*_STEPPED, *names[len(_STEPPED) :]]
    placed = names[: len(args)]
    if len(placed) < len(args) or set(placed) & set(kwargs):
        return {}, step
    arguments = dict(zip(placed, args, strict=True))
    arguments |= {renamed.get(name, name): value for name, value in kwargs.items()}
    back = {new: name for name, new in renamed.items()}

    def called(**given: Any) -> Any:
        positional = [given.pop(name) for name in placed]
        return step(*positional, **{back.get(name, name): value for name, value in given.items()})

    return arguments, called
