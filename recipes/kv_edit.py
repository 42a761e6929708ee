"""KV-Edit: an edit inside of a mask, for which the background is keys and values alone.

Zhu et al., "KV-Edit: Training-Free Image Editing for Precise Background Preservation", arXiv
2502.17363 (ICCV 2025). Euler's inversion of the image keeps its latents, and the keys and values
of the background at every level and attention site. The edit is drawn from there on, with those
in the place of its own; what it draws of the background is not used: this is the image's to the
bit. The official code has at every level the background of one level below, draws from latents of
that too, and adds 1 to the scores of the background's keys: `paper=True`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hookctl.address.regions import RegionLike
from hookctl.arguments import checked, number, whole
from hookctl.editor import Editor
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes.common.features import places
from hookctl.recipes.common.features.store import storing
from hookctl.recipes.common.real_images import flow
from hookctl.session import control


class KVEdit(flow.FlowProgram):
    """Edit a real image inside of a mask.

        edited = KVEdit(pipe, image, "a dog on grass", (0.2, 0.1, 0.9, 1.0)).run()[0]

    image: PIL, mode RGB, or for pipelines of videos a list of frames; prompt: of the edit. Or a
        list of each, of images of one size. mask: where the image may change, a region or a mask
        of the image's shape; a cell of the latents that it touches may. source_prompt: the
        image's, one or a list.
    steps: of the schedule; skip: how many, the noisiest, are left out. guidance: scale of the edit:
        of classifier-free guidance, or the one that a model was taught; inversion_guidance:
        likewise upwards; (1, 1) for distilled models. negative: of the unconditional rows.
    inversion: False moves the image by the difference of two velocities, as FlowEdit does, for the
        memory of one step. restart: draw from fresh noise in the place of the inverted one, to
        remove what is there. separate: in the inversion neither side of the mask sees the other.
        bias: of the scores of the background's keys, by default 0 (1 with `paper`). seed: of noise,
        the same for all images.
    on_cpu, memory, arguments: as of `RFSolver`. paper: as the official code, see above; a cell is
        inside where the mask is not 0 after bilinear resizing. Raises as `RFSolver` does, and for a
        mask of another shape.
    """

    @checked(own=("arguments",))
    def __init__(
        self,
        pipe: Any,
        image: Any,
        prompt: str | Sequence[str],
        mask: RegionLike,
        *,
        source_prompt: str | Sequence[str] = "",
        steps: int = 28,
        skip: int = 4,
        guidance: float = 5.5,
        inversion_guidance: float = 1.5,
        negative: str | None = None,
        inversion: bool = True,
        restart: bool = False,
        separate: bool = False,
        bias: float | None = None,
        seed: int = 0,
        on_cpu: bool = True,
        memory: float | None = None,
        arguments: Mapping[str, Any] | None = None,
        paper: bool = False,
    ) -> None:
        flow.require_flow(pipe, "KVEdit")
        self.skip = whole(skip, "KVEdit: skip", 0, steps - 1)
        self.bias = number(float(paper) if bias is None else bias, "KVEdit: bias")
        super().__init__(pipe, image, prompt, steps=steps, negative=negative, arguments=arguments)
        self.sources = flow.for_each_image(source_prompt, self.prompts, "KVEdit")
        self.region = flow.region_of_image(mask, self.size, "KVEdit: mask")
        self.scales = [inversion_guidance] * len(self.prompts), [guidance] * len(self.prompts)
        self.inversion, self.restart, self.separate = inversion, restart, separate
        self.moments, self.takes_editors = steps - skip if inversion else 1, inversion
        self.seed, self.paper, self.storing = seed, paper, storing("KVEdit", on_cpu, memory)

    @checked()
    def bytes(self) -> int:
        """The memory that the background's keys and values will take."""
        source, store = self._source()
        return store.expected_bytes(source, self.moments)

    @torch.no_grad()
    @checked()
    def run(self, *editors: Editor, output_type: str = "pil") -> Any:
        """The edit; a list of images, or as output_type= has it.

        editors: that act inside the denoiser as the edit is drawn, and not in the inversion;
        without an inversion there can be none.
        """
        flow.check_editors(editors, self)
        source, store = self._source()
        store.check_fits(source, self.moments)
        program = self._program(self.prompts, self.scales[1])
        program.start = source.start = self.skip
        keeper = places.SourcePass(store, separate=self.separate)
        injector = places.EditPass(store, bias=self.bias)
        inside, image = places.in_latents(store.cells, program), self.clean.to(program.latents)
        ask, x = partial(self._velocity, source, self.scales[0]), flow.wide(image)
        if self.inversion:
            with control(self.pipe, keeper):
                path = keeper.invert(ask, x, source, self.skip, published=self.paper)
            with control(self.pipe, injector, *editors) as self.session:
                drawn = self._drawn(program, injector, path, inside)
        else:
            with control(self.pipe, keeper, injector) as self.session:
                drawn = self._moved(x, ask, program, (keeper, injector), inside)
        program.write(drawn.to(image), level=self.steps)
        return program.decode(output_type)

    def _source(self) -> tuple[Trajectory, places.BackgroundStore]:
        source = self._program(self.sources, self.scales[0])
        store = places.BackgroundStore.of("KVEdit", source, self.region, self.paper, **self.storing)
        return source, store

    def _drawn(self, program: Trajectory, injector: Any, path: places.Path, inside: Any) -> Tensor:
        lag = int(self.paper)
        x = self._noised(program, self.skip, self.seed) if self.restart else path[self.skip + lag]
        for i in range(self.skip, self.steps):
            injector.moment = (i + lag, 0)
            x = torch.where(inside, x, path[i + lag])
            x = x + flow.length(program, i, i + 1) * self._velocity(program, self.scales[1], x, i)
        return torch.where(inside, x, path[self.steps])

    def _moved(
        self, image: Tensor, ask: Any, program: Trajectory, passes: Any, inside: Tensor
    ) -> Tensor:
        """Without an inversion: the image, moved by the difference of two velocities."""
        x, (keeper, injector) = image, passes
        for i in range(self.skip, self.steps):
            noisy = self._noised(program, i, self.seed)
            keeper.moment, injector.moment = (0, 0), None
            own = ask(noisy, i)
            keeper.moment, injector.moment = None, (0, 0)
            v = self._velocity(program, self.scales[1], noisy + (x - image), i) - own
            x = x + flow.length(program, i, i + 1) * v * inside
        return x
