"""One run of a pipeline: what it draws, which step it is at, and the state of each call."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from hookctl.address import families, pipelines
from hookctl.address.clock import Clock, Timekeeper
from hookctl.address.families.said import note_call
from hookctl.address.latent import image_tokens, latent_grid, text_rotations, text_tokens, time_told
from hookctl.address.rows import Row, Rows, branch_of, copied, resolve_rows
from hookctl.address.text import prompts_given
from hookctl.errors import InputError, LayoutError, UnsupportedError
from hookctl.loop.driven import Driven, Scaling, driven, reading_of
from hookctl.loop.residuals import with_residuals
from hookctl.loop.state import State
from hookctl.loop.text_rows import with_text_rows

_TEXTS = ("encoder_hidden_states", "cap_feats", "context")


class Run:
    """Follows a pipeline (or a bare denoiser) from call to call."""

    def __init__(self, pipe: Any, branches: tuple[str, ...] | None = None) -> None:
        self.pipe, self.branches = pipe, branches
        self.stated: tuple[str, ...] = ()  # what embeddings in place of prompts say
        self.keeper = Timekeeper()
        self._scheduler: Any = None
        self.restart()

    def restart(self, checked: dict[str, Any] | None = None) -> None:
        """The pipeline was called: nothing is known of this run yet.

        checked: what it checks of its call, which tells the prompts where none are encoded apart.
        """
        self._checked = checked or {}
        self.prompts: tuple[str, ...] = ()
        self.count: int | None = None
        self.images_per_prompt = 1
        self._told = True  # how many images each prompt gets; some pipelines repeat them later
        self.encoding: dict[str, Any] = {}
        self.fresh = True
        self.scaling: Scaling | None = None
        self._program: Any = None
        self.keeper.restart()

    def stepped(self) -> None:
        """The scheduler took a step: the next denoiser call belongs to a new step."""
        self.scaling = None
        self.keeper.advance()

    def scaled(self, latents: Tensor, again: Callable[[Tensor], Tensor]) -> None:
        """The scheduler made a model input."""
        self.scaling = Scaling(latents, again)

    def texts(self, given: dict[str, Any]) -> None:
        """Note what the pipeline encodes; only the first of a run is its prompts."""
        if self.count is not None:
            self._negatives(given)
            return
        self.encoding = given
        prompt = given.get("prompt")
        if isinstance(prompt, str | list | tuple):
            self.prompts = prompts_given(self.pipe, given)
            self.count = 1 if isinstance(prompt, str) else len(prompt)
            if getattr(self.pipe, "free_noise_enabled", False):  # texts of the frames of one video
                self.prompts, self.count = self.prompts[:1], 1
            if self.stated and self.stated != self.prompts:
                raise InputError(
                    f"control: texts={self.stated} say what embeddings mean, but the pipeline was "
                    f"called with the prompts {self.prompts}; leave texts out, or call it with "
                    "prompt_embeds="
                )
        elif isinstance(given.get("prompt_embeds"), Tensor | list):
            self.count = len(given["prompt_embeds"])
            if self.stated and len(self.stated) != self.count:
                raise InputError(
                    f"control: texts={self.stated} for {self.count} embeddings; give one for each"
                )
            self.prompts = self.stated
        told = [value for name, value in given.items() if name.startswith("num_")]
        self._told = bool(told)
        self.images_per_prompt = next((v for v in told if isinstance(v, int)), 1)

    def _negatives(self, given: dict[str, Any]) -> None:
        """Some pipelines encode the negative prompts by a call like that of the prompts."""
        said = self._checked.get("negative_prompt")
        told = any(name.startswith("negative") for name in self.encoding)
        if said is None or told or not self.fresh or given.get("prompt") not in (said, [said]):
            return
        texts = {n: v for n, v in given.items() if re.fullmatch(r"prompt(_\d)?", n)}
        self.encoding = self.encoding | {f"negative_{name}": v for name, v in texts.items()}

    def _follow(self, call: Driven | None) -> None:
        """A program's calls are a run of its own."""
        program = None if call is None else call.program
        if program is self._program:
            return
        self.restart()
        self._program = program
        if call is not None:
            self.prompts, self.count = call.prompts, len(call.prompts)
            self.images_per_prompt, self.encoding = call.images_per_prompt, call.encoding
            note_call(self.pipe, self.encoding)

    def state(
        self,
        denoiser: nn.Module,
        args: Any,
        kwargs: Any,
        branch: str | None = None,
        outer: State | None = None,
    ) -> State:
        """The state of a call of a denoiser; `outer`: of the one inside which an editor made it."""
        arguments = _named(denoiser, args, kwargs)
        call = driven(denoiser) if outer is None else None
        if outer is None:
            self._follow(call)
        if self.fresh and outer is None:
            families.note_images(self.pipe, self.encoding)
        sample = next(iter(arguments))
        given = arguments[sample]
        _check_rows(given, self.pipe or denoiser)
        if isinstance(given, list):
            latent = tuple(given[0].shape[1:])
        else:
            latent = latent_grid(given, arguments, denoiser)
        time = time_told(arguments, denoiser)
        scheduler = pipelines.scheduler_of(self.pipe, denoiser)
        if scheduler is not self._scheduler and self._scheduler is not None and outer is None:
            self.keeper.restart()  # a prior has ended, or begins anew
        self._scheduler = scheduler if outer is None else self._scheduler
        schedule = pipelines.schedule_of(scheduler)
        if call is not None:
            clock = call.clock
        elif outer is None:
            planned = pipelines.planned_steps(self.pipe, scheduler)
            clock = self.keeper.read(time, schedule, planned)
        else:
            clock = self.keeper.peek(time, schedule, outer.clock)
        text = next((name for name in _TEXTS if arguments.get(name) is not None), None)
        return State(
            denoiser=denoiser,
            pipe=self.pipe,
            rows=self._rows(denoiser, given, branch, outer, clock) if call is None else call.rows,
            clock=clock,
            kwargs=arguments,
            sample=sample,
            text=text,
            prompts=self.prompts,
            images_per_prompt=self.images_per_prompt,
            encoding=self.encoding,
            scaling=self._scaling(given) if call is None else call.scaling,
            grid=latent,
            nested=outer is not None or (call is not None and not call.stepping),
            images_in_sequence=image_tokens(given, arguments, denoiser),
            own_text=text_tokens(arguments.get(text) if text else None, arguments, denoiser),
            text_rotations=text_rotations(denoiser),
            reading=reading_of(denoiser),
        )

    def repeat(self, before: State, args: Any, kwargs: Any) -> State:
        """The state of a call that is made again with other tensors."""
        arguments = _named(before.denoiser, args, kwargs)
        own = Rows(before.rows[: before.own_rows])
        return replace(
            before,
            rows=own,
            own_rows=None,
            kwargs=arguments,
            extra_text={},
            text_rows=None,
            further_texts=(),
            residuals=None,
            assigned=None,
            noisy=None,
            stepped=None,
        )

    def arguments(self, state: State) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments after editors changed them."""
        signature = _signature(state.denoiser)
        bound = signature.bind_partial(None)
        changed = with_text_rows(state, with_residuals(state, signature.parameters))
        bound.arguments.update(_own_lists(changed))
        return bound.args[1:], bound.kwargs

    def _rows(
        self,
        denoiser: nn.Module,
        given: Any,
        branch: str | None,
        outer: State | None,
        clock: Clock,
    ) -> Rows:
        batch = len(given)
        if outer is not None and outer.asking is not None:
            return outer.asking
        if outer is not None and batch == len(outer.rows):
            return outer.rows
        if self.branches is not None:
            if batch % len(self.branches):
                raise LayoutError(
                    f"rows={self.branches} were given, but a denoiser call has {batch} rows"
                )
            size, n = batch // len(self.branches), self.images_per_prompt
            return Rows(
                [
                    Row(g * size + i, tag, i // n, i % n)
                    for g, tag in enumerate(self.branches)
                    for i in range(size)
                ]
            )
        if self.count is None and self.stated:  # nothing was encoded where it could be seen
            self.prompts, self.count = self.stated, len(self.stated)
        layout, guided = pipelines.layout_of(self.pipe, denoiser), pipelines.is_guided(self.pipe)
        if guided and families.leaves_unguided(self.pipe, clock.entry):
            guided = False
        if self.count is None and (prompt := self._checked.get("prompt")):
            self.count, self._told = 1 if isinstance(prompt, str) else len(prompt), False
        if self.count is None and layout.images(batch, guided) is None:
            self.count = copied(given, layout.known(guided))
        if not self._told and self.count:
            images = layout.images(batch, guided)
            if images is not None and images % self.count == 0:
                self.images_per_prompt, self._told = images // self.count, True
        return resolve_rows(
            batch,
            layout,
            prompts=self.count,
            images_per_prompt=self.images_per_prompt,
            guided=guided,
            branch=branch_of(branch or pipelines.asked_by_guider(self.pipe, self.keeper.calls)),
            call=self.keeper.calls,
        )

    def _scaling(self, model_input: Any) -> Scaling | None:
        """How the scheduler made this model input, if it did."""
        scaling = self.scaling
        if scaling is None or not isinstance(model_input, Tensor):
            return None
        ours, given = scaling.latents.shape, model_input.shape
        differing = [d for d, (a, b) in enumerate(zip(ours, given, strict=False)) if a != b]
        # Images and masks may have been appended along the channels.
        fits = len(ours) == len(given) and len(differing) <= 1 and 0 not in differing
        return scaling if fits and all(ours[d] < given[d] for d in differing) else None


def _check_rows(sample: Any, owner: Any) -> None:
    """Raise UnsupportedError if a model input has no batch rows of one image each."""
    name = type(owner).__name__
    if isinstance(sample, list) and isinstance(sample[0], list):
        raise UnsupportedError(
            f"{name} gives its denoiser several images in each row, whose places among the tokens "
            "are not declared, so its attention can't be edited; draw by the family's "
            "text-to-image pipeline"
        )
    if isinstance(sample, Tensor) and sample.dim() < 2:
        raise UnsupportedError(
            f"{name} packs texts and videos into one sequence without batch rows, so whose the "
            "tokens of an attention call are can't be told, and its attention can't be edited"
        )


def _named(denoiser: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a denoiser call by name."""
    bound = _signature(denoiser).bind(None, *args, **kwargs)
    return _own_lists(dict(list(bound.arguments.items())[1:]))


def _signature(denoiser: nn.Module) -> inspect.Signature:
    return _signature_of(type(families.uncompiled(denoiser)).forward)


@functools.cache
def _signature_of(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def _own_lists(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments whose lists are copies: some models take the entries out of theirs one by one."""
    return {k: list(v) if type(v) is list else v for k, v in arguments.items()}


def check_batch(state: State, prompts: int, who: str) -> None:
    """Raise InputError unless the run draws this many prompts."""
    drawn = len({row.prompt for row in state.rows})
    if drawn != prompts:
        raise InputError(
            f"{who} was made for {prompts} prompts, but the pipeline draws {drawn}: call it with "
            f"{state.call_with('edit.prompts')}"
        )
