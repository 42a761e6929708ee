"""Prompt schedules: a text that is another one from some step on, or from step to step.

The prompt editing and alternating words of A1111's web UI (features of AUTOMATIC1111's
stable-diffusion-webui, 2022), in its syntax (`hookctl.address.schedules`):

    a [cat:dog:0.4] in the snow       a cat for 0.4 of the steps, then a dog
    a [big :10]dog                    big from step 10 on
    a [cow|horse] in a field          a cow and a horse, a new one at each step
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hookctl.address.clock import Window
from hookctl.address.families import denoiser_of
from hookctl.address.rows import COND, UNCOND
from hookctl.address.schedules import ScheduledPrompt
from hookctl.arguments import checked, is_list, is_text, refusal
from hookctl.editor import WORDS, Claim, Editor
from hookctl.errors import InputError
from hookctl.loop.prompt_rows import PromptRows
from hookctl.loop.prompts import check_encoder
from hookctl.loop.state import State
from hookctl.run_state import RunState


class PromptSchedule(Editor):
    """Let prompts change on the way.

        edit = PromptSchedule("a [cat:dog:0.4] in the snow")
        with hookctl.control(pipe, edit):
            images = pipe(prompt=edit.prompts, ...).images

    schedule: a prompt, or a list with one for each of the run, in the syntax above.
    negative: likewise the negative prompt; call the pipeline with `negative_prompt=edit.negatives`.
        None leaves it alone.
    prompts, negatives: what the run begins with, which the pipeline is called with.

    Every text is encoded once, by the pipeline itself. Give it before other editors; those that
    read or edit words are refused where the words may be others. A ControlNet sees the first text
    throughout. Without a change in it a schedule is a plain run, bit for bit. Raises InputError for
    a time that is none, and UnsupportedError where prompts can't be encoded by themselves.
    """

    _rows: RunState[PromptRows | None] = RunState(None)

    @checked(own=("schedule", "negative"))
    def __init__(
        self, schedule: str | Sequence[str], *, negative: str | Sequence[str] | None = None
    ) -> None:
        self.schedules = _read(schedule, f"{self.name}: schedule")
        self.negative_schedules: list[ScheduledPrompt] = []
        if negative is not None:
            given = [negative] * len(self.schedules) if is_text(negative) else negative
            self.negative_schedules = _read(given, f"{self.name}: negative")
            if len(self.negative_schedules) != len(self.schedules):
                raise InputError(
                    f"{self.name}: {len(self.negative_schedules)} negative prompts and "
                    f"{len(self.schedules)} prompts; give one for all, or one for each"
                )
        self.prompts = [one.first for one in self.schedules]
        self.negatives = [one.first for one in self.negative_schedules]

    def neutral(self) -> bool:
        return not any(one.changes for one in (*self.schedules, *self.negative_schedules))

    def claims(self) -> Sequence[Claim]:
        changing = [one for one in self.schedules if one.changes]
        if not changing:
            return []
        window = Window(min(one.start for one in changing), 1.0)
        cure = "Give words= that act before the prompt changes (stop=), or a prompt that stays"
        return [Claim(WORDS, window=window, cure=cure)]

    def attach(self, target: Any) -> None:
        if target is denoiser_of(target):
            raise InputError(
                f"{self.name}: a bare denoiser encodes no prompts; control the pipeline"
            )
        if not self.neutral():
            check_encoder(target)

    def begin(self, state: State) -> None:
        self._rows = None
        if state.prompts != tuple(self.prompts):
            given = list(state.prompts) if state.prompts else "embeddings"
            raise InputError(
                f"{self.name} begins with the prompts {self.prompts}, but the pipeline was called "
                f"with {given}; call {state.call_with('edit.prompts')}"
            )
        if self.neutral():
            return
        steps, changing = state.clock.steps, [one for one in self._both() if one.changes]
        texts = [text for one in changing for text in (one.first, *one.of_steps(steps))]
        self._rows = PromptRows(state, texts, self.name)
        begun = self._texts(state, lambda one: one.first if one.changes else None)
        self._rows.check(state, begun)

    def before(self, state: State) -> None:
        if self._rows is None:
            return
        clock = state.clock

        def now(one: ScheduledPrompt) -> str | None:
            text = one.at(clock.step, clock.steps)
            return None if text == one.first else text

        if rows := self._texts(state, now):
            self._rows.put(state, rows)

    def _both(self) -> list[ScheduledPrompt]:
        return [*self.schedules, *self.negative_schedules]

    def _texts(self, state: State, text_of: Any) -> dict[int, str]:
        """Batch row -> its text, of those for which a schedule has one."""
        found: dict[int, str] = {}
        for role, schedules in ((COND, self.schedules), (UNCOND, self.negative_schedules)):
            for row in state.rows.where(role=role) if schedules else ():
                if (text := text_of(schedules[row.prompt])) is not None:
                    found[row.index] = text
        return found


def _read(given: Any, name: str) -> list[ScheduledPrompt]:
    texts = [given] if is_text(given) else given
    if not is_list(texts) or not texts or not all(is_text(one) for one in texts):
        raise refusal(name, given, "a prompt, or a list of prompts")
    try:
        return [ScheduledPrompt.read(one) for one in texts]
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
