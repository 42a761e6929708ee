"""Guiders of diffusers whose predictions are edited: a part of a modular pipeline, not a `with`."""

from contextlib import ExitStack
from typing import Any

from diffusers.guiders import ClassifierFreeGuidance

from hookctl.editor import Editor, overrides
from hookctl.errors import UnsupportedError
from hookctl.session import Session, control


class Edited:
    """Makes an editing guider of any: `class EditedAPG(Edited, AdaptiveProjectedGuidance): ...`.

    pipe: the modular pipeline; editors: that act inside the denoiser; texts: its prompts, as of
    `control`; options: of the guider. session: of the run in progress, or of the last one.

    The model is as it was once a run's last predictions are combined; if a run breaks off, after
    `close`, or the next one. UnsupportedError for editors that act round the scheduler's step.
    """

    def __init__(self, pipe: Any, *editors: Editor, texts: Any = None, **options: Any) -> None:
        super().__init__(**options)
        for editor in editors:
            after = overrides(editor, "after") and getattr(editor, "local", True) is not None
            if after or any(overrides(editor, hook) for hook in ("before", "denoise", "combine")):
                raise UnsupportedError(
                    f"{editor.name} acts round the scheduler's step, of which no guider is told; "
                    "enter `with hookctl.control(pipe, ...)`, which goes with every guider"
                )
        self.pipe, self.editors, self.texts = pipe, editors, texts
        self.session: Session | None = None
        self._entered, self._last = ExitStack(), 0  # steps so far at the schedule's last time
        self.close = self._entered.close

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        if step == 0:
            self.close()
            given = control(self.pipe, *self.editors, texts=self.texts)
            self.session, self._last = self._entered.enter_context(given), 0
        times = self.pipe.scheduler.timesteps
        self._last += int(timestep == times[-1])  # twice for schedulers of second order
        super().set_state(step, num_inference_steps, timestep)  # type: ignore[misc]

    def __call__(self, data: Any) -> Any:
        guided = super().__call__(data)  # type: ignore[misc]
        times = self.pipe.scheduler.timesteps
        if self._last == int((times == times[-1]).sum()):
            self.close()
        return guided


class EditedGuidance(Edited, ClassifierFreeGuidance): ...
