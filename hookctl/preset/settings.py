"""The settings of a run: the keys of [run] in a file, and the options of the same names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hookctl import bounds


@dataclass(frozen=True)
class Setting:
    """One thing that a file or the command line says of a run.

    hint: the type of its value in a file; help, metavar: of its option; least, most: the smallest
    and the greatest whole number that will do; argument: of a pipeline's call that it becomes, None
    if it becomes none by itself; draws: whether it says how images are drawn, whatever they show.
    """

    name: str
    hint: Any
    help: str
    metavar: str
    least: int | None = None
    argument: str | None = None
    draws: bool = True
    most: int = bounds.SEED

    def lacks(self, value: Any) -> str | None:
        """What would do in place of a value of the right type, None if it will do."""
        if self.least is not None and value < self.least:
            return f"a whole number >= {self.least}"
        if self.least is not None and value > self.most:
            return f"a whole number of at most {self.most}"
        if self.hint is float and not math.isfinite(value):
            return "a number"
        return None

    @property
    def instead(self) -> str:
        """How to say it to a run."""
        return f"write {self.name} = in [run], or give --{self.name}"


_OWN = "default: the model's own"
SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("prompt", str, "what the image shows, before any edit", "TEXT", draws=False),
        Setting(
            "edit",
            str | list[str],
            "what it shall show instead; may be repeated",
            "TEXT",
            draws=False,
        ),
        Setting("seed", int, "of the noise; image j has N + j (default: 0)", "N", 0),
        Setting(
            "steps",
            int,
            "how many denoising steps (default: 30)",
            "N",
            1,
            "num_inference_steps",
            most=bounds.STEPS,
        ),
        Setting(
            "guidance",
            float,
            "guidance scale (default: the pipeline's own)",
            "X",
            argument="guidance_scale",
        ),
        Setting(
            "negative", str, "what the images shall not show", "TEXT", argument="negative_prompt"
        ),
        Setting(
            "images",
            int,
            "images of each prompt (default: 1)",
            "N",
            1,
            "num_images_per_prompt",
            most=bounds.IMAGES,
        ),
        Setting("width", int, _OWN, "PX", 1, "width", most=bounds.SIDE),
        Setting("height", int, _OWN, "PX", 1, "height", most=bounds.SIDE),
    )
}
