"""One call of a pipeline from the settings of a run: what it is given."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hookctl.errors import InputError, UnsupportedError
from hookctl.preset.settings import SETTINGS

if TYPE_CHECKING:
    import torch

STEPS = 30


@dataclass(frozen=True)
class Drawing:
    """How images are drawn: the settings that say so (`preset.SETTINGS`); None is the pipeline's
    own."""

    seed: int = 0
    steps: int = STEPS
    guidance: float | None = None
    negative: str | None = None
    images: int = 1
    width: int | None = None
    height: int | None = None

    @classmethod
    def of(cls, options: Any, defaults: Mapping[str, Any] | None = None) -> Drawing:
        """From the command line, else from `defaults` (a file), else the usual."""
        given = dict(defaults or {}) | {k: v for k, v in vars(options).items() if v is not None}
        return cls(**{name: given[name] for name in cls.__annotations__ if name in given})

    def data(self) -> dict[str, Any]:
        return asdict(self)

    def arguments(self, pipe: Any, prompts: Sequence[str]) -> dict[str, Any]:
        """The keywords of the pipeline's call. Every prompt starts from the same noises.

        InputError if the pipeline takes no such thing.
        """
        taken = inspect.signature(type(pipe).__call__).parameters
        if "prompt" not in taken:
            raise UnsupportedError(f"{type(pipe).__name__} takes no prompt; give one that does")
        given: dict[str, Any] = {"prompt": list(prompts), "generator": self.generators(prompts)}
        for option, value in self.data().items():
            name = SETTINGS[option].argument
            if name is None or value is None or (option == "images" and value == 1):
                continue
            if name not in taken:
                raise InputError(
                    f"{type(pipe).__name__} takes no {name}; leave out {option} (--{option})"
                )
            factor = getattr(pipe, "vae_scale_factor", 1)
            if option in ("width", "height") and value % factor:
                raise InputError(f"{option} = {value}; this model wants a multiple of {factor}")
            most = getattr(pipe.scheduler.config, "num_train_timesteps", value)
            if option == "steps" and value > most:
                raise InputError(f"steps = {value}; this model was trained on {most}, give no more")
            given[name] = [value] * len(prompts) if option == "negative" else value
        return given

    def generators(self, prompts: Sequence[str]) -> list[torch.Generator]:
        """Image j of each prompt is seeded with seed + j, on the CPU: the same everywhere."""
        import torch

        return [
            torch.Generator("cpu").manual_seed(self.seed + j)
            for _ in prompts
            for j in range(self.images)
        ]
