"""Programs that invert an image, and draw its edit with features of the inversion."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.address.sites import Site
from hookctl.arguments import checked, whole
from hookctl.editor import Editor
from hookctl.loop.inversion import unit_noise
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes.common.features.store import (
    FeatureInjector,
    FeatureKeeper,
    FeatureStore,
    Moment,
    storing,
)
from hookctl.recipes.common.real_images import flow
from hookctl.session import control

# The velocity of latents at a share of noise; which of the calls of the run this is.
Ask = Callable[[Tensor, float, Moment], Tensor]


class SharedProgram(flow.FlowProgram):
    """Base of programs whose edit has features of the image's inversion in its first steps.

    image, prompt, steps, negative, arguments: see `FlowProgram`; source_prompt: of the inversion,
    one or a list; guidance: scale of the edit, inversion_guidance: of the inversion; unit_noise: as
    of `loop.inversion`, of the inverted; inject: of how
    many steps the features are shared; sites: where; names: which of "q", "k", "v"; text, on_cpu,
    memory: as of `FeatureStore`; paper: see `_source`.
    """

    def __init__(
        self,
        pipe: Any,
        image: Any,
        prompt: str | Sequence[str],
        *,
        source_prompt: str | Sequence[str],
        steps: int,
        guidance: float,
        inversion_guidance: float,
        unit_noise: bool,
        negative: str | None,
        inject: int,
        sites: Sequence[Site],
        names: Sequence[str],
        text: bool,
        on_cpu: bool,
        memory: float | None,
        arguments: Mapping[str, Any] | None,
        paper: bool,
    ) -> None:
        name = type(self).__name__
        self.inject = whole(inject, f"{name}: inject", 0, steps)
        super().__init__(pipe, image, prompt, steps=steps, negative=negative, arguments=arguments)
        self.sources = flow.for_each_image(source_prompt, self.prompts, name)
        self.guidance, self.unit_noise = float(guidance), unit_noise
        self.inversion_guidance, self.paper = float(inversion_guidance), paper
        self._storing: dict[str, Any] = {
            "sites": sites,
            "names": names,
            "text": text,
            **storing(name, on_cpu, memory),
        }

    @checked()
    def run(self, *editors: Editor, output_type: str = "pil") -> Any:
        """Invert and draw; a list of images, or as output_type= has it.

        editors: that act inside the denoiser as the edit is drawn, and not in the inversion.
        Raises InputError, before any denoising, if the features would not fit into memory.
        """
        flow.check_editors(editors, self)
        store = self._store()
        inverted, scales = self._inverted(store), [self.guidance] * len(self.prompts)
        own = [self._injector(store)] if store.moments else []
        with control(self.pipe, *own, *editors) as self.session:
            program = self._program(self.prompts, scales)

            def ask(x: Tensor, sigma: float, moment: Moment) -> Tensor:
                if own:
                    own[0].moment = self._source(moment)
                return self._velocity(program, scales, x, sigma=sigma)

            with torch.no_grad():
                drawn = self._walk(ask, flow.wide(inverted), _levels(program))
            program.write(drawn.to(program.latents), level=self.steps)
            return program.decode(output_type)

    @checked()
    def invert(self) -> Tensor:
        """The noise of the images, [images, ...] as the pipeline's scheduler has it."""
        return self._inverted(None)

    @checked()
    def bytes(self) -> int:
        """The memory that the features will take."""
        return self._store().expected_bytes(self._upwards(), len(self._kept()))

    # -- passes --------------------------------------------------------------------------------

    @torch.no_grad()
    def _inverted(self, store: FeatureStore | None) -> Tensor:
        program, scales = self._upwards(), [self.inversion_guidance] * len(self.prompts)
        kept = self._kept() if store else set()
        if store:
            store.check_fits(program, len(kept))
        keeper = [FeatureKeeper(store)] if store and kept else []
        with control(self.pipe, *keeper):

            def ask(x: Tensor, sigma: float, moment: Moment) -> Tensor:
                for one in keeper:
                    one.moment = moment if moment in kept else None
                return self._velocity(program, scales, x, sigma=sigma)

            levels = _levels(program)
            clean = flow.wide(self.clean.to(program.latents))
            x = self._walk(ask, clean, levels, upwards=True)
            if self.unit_noise:
                x = unit_noise(x, clean, program.levels[0])
            return x.to(program.latents)

    def _upwards(self) -> Trajectory:
        """The program of the inversion."""
        return self._program(self.sources, [self.inversion_guidance] * len(self.prompts))

    @abstractmethod
    def _walk(
        self, ask: Ask, x: Tensor, levels: Sequence[float], *, upwards: bool = False
    ) -> Tensor:
        """Solve from noise to image, or from image to noise.

        levels: shares of noise, noisiest first. The moment of a call is its level and 0 for the
        first of a step, and the upper level of its step and 1 for one between.
        """

    # -- features ------------------------------------------------------------------------------

    def _store(self) -> FeatureStore:
        return FeatureStore(type(self).__name__, **self._storing)

    def _injector(self, store: FeatureStore) -> FeatureInjector:
        return FeatureInjector(store)

    def _asked(self) -> set[Moment]:
        """The moments of the inversion."""
        asked: set[Moment] = set()

        def ask(x: Tensor, sigma: float, moment: Moment) -> Tensor:
            asked.add(moment)
            return x

        levels = [1 - i / self.steps for i in range(self.steps + 1)]
        self._walk(ask, torch.zeros(()), levels, upwards=True)
        return asked

    def _kept(self) -> set[Moment]:
        """The moments of the inversion whose features are shared."""
        sources = [self._source((i, call)) for i in range(self.inject) for call in (0, 1)]
        return self._asked() & {moment for moment in sources if moment is not None}

    def _source(self, moment: Moment) -> Moment | None:
        """Whose features a moment of the edit has, if any.

        Those of the same level; of the noisiest, which no inversion asks at, of the next. In the
        official code a step's first call has those of the inversion's first call in the same step,
        which is a level below.
        """
        level, call = moment
        if level >= self.inject:
            return None
        return moment if call else (level + 1 if self.paper else max(level, 1), 0)


def _levels(program: Trajectory) -> list[float]:
    return [level.noise for level in program.levels]


def steps_of(levels: Sequence[float], upwards: bool) -> list[tuple[int, float, float, int]]:
    """(upper level, share of noise before, after, the level before) of each step in its order."""
    last = range(len(levels) - 1)
    if upwards:
        return [(i, levels[i + 1], levels[i], i + 1) for i in reversed(last)]
    return [(i, levels[i], levels[i + 1], i) for i in last]
