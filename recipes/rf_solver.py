"""RF-Solver-Edit: inversion and editing by a solver of second order, with the inversion's values.

Wang et al., "Taming Rectified Flow for Inversion and Editing", arXiv 2411.04746 (ICML 2025). With
v the model's velocity and s the level (1 is noise), a step of either direction is

    v1 = v(x, s)        v2 = v(x + (s' - s) / 2 v1, (s + s') / 2)        x' = x + (s' - s) v2

which is the explicit midpoint rule: the paper's Taylor step with its difference quotient for the
derivative. The round trip's error falls with the square of the number of steps, Euler's with the
number. In the first `inject` steps of the edit, self-attention in the later blocks has the values
that it had in the inversion at the same level. The official code has the text's values of the
source there too, and in a step's first call those of one level below: `paper=True`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hookctl.address.sites import Selector
from hookctl.arguments import checked
from hookctl.recipes.common.features.store import late_sites
from hookctl.recipes.common.real_images import flow
from hookctl.recipes.common.real_images.shared import Ask, SharedProgram, steps_of


class RFSolver(SharedProgram):
    """Draw an edit of a real image from its own noise, with its own values.

        edit = RFSolver(pipe, image, "a photo of a dog", source_prompt="a photo of a cat")
        edited = edit.run()[0]

    image: PIL, mode RGB, or for pipelines of videos a list of frames; prompt: of the edit. Or a
        list of each, of images of one size.
    source_prompt: of the inversion, one or a list, by default none. steps: up and down each, of
        two predictions. guidance: scale of the edit: of classifier-free guidance, or the one that a
        model was taught; 1 for distilled ones. inversion_guidance: likewise upwards. negative:
        prompt of the unconditional rows.
    unit_noise: bring the inverted noise to mean 0 and variance 1, no part of the paper: for models
        that don't know the velocity near an image well, whose inversions end in other noise than
        they draw from.
    inject: in so many steps, the noisiest, the values are shared; 2 to 5 as published, 0 not at
        all. sites: where, by default the later half of the single-stream blocks (FLUX.1: 20 to 37),
        or of all. text: share the text's values of the source too, for which both prompts must
        have one number of tokens; by default only with `paper`.
    on_cpu: keep them there, not where the model is; memory: GB that they may take, by default what
        is free there; `bytes()` says what they will. arguments: further ones of the pipeline's
        call. paper: values as the official code shares them, see above.

    Raises InputError for arguments out of bounds and, in `run`, for values that don't fit;
    UnsupportedError for other models than those of flow matching, and for schedulers that are not
    of first order.
    """

    @checked(own=("arguments",))
    def __init__(
        self,
        pipe: Any,
        image: Any,
        prompt: str | Sequence[str],
        *,
        source_prompt: str | Sequence[str] = "",
        steps: int = 15,
        guidance: float = 2.0,
        inversion_guidance: float = 1.0,
        unit_noise: bool = False,
        negative: str | None = None,
        inject: int = 2,
        sites: Selector | None = None,
        text: bool | None = None,
        on_cpu: bool = True,
        memory: float | None = None,
        arguments: Mapping[str, Any] | None = None,
        paper: bool = False,
    ) -> None:
        flow.require_flow(pipe, "RFSolver")
        super().__init__(
            pipe,
            image,
            prompt,
            source_prompt=source_prompt,
            steps=steps,
            guidance=guidance,
            inversion_guidance=inversion_guidance,
            unit_noise=unit_noise,
            negative=negative,
            inject=inject,
            sites=late_sites("RFSolver", pipe, sites),
            names=("v",),
            text=paper if text is None else text,
            on_cpu=on_cpu,
            memory=memory,
            arguments=arguments,
            paper=paper,
        )

    def _walk(
        self, ask: Ask, x: Tensor, levels: Sequence[float], *, upwards: bool = False
    ) -> Tensor:
        for i, here, there, level in steps_of(levels, upwards):
            length = there - here
            v = ask(x, here, (level, 0))
            between = ask(x + length / 2 * v, (here + there) / 2, (i, 1))
            x = x + length * between
        return x
