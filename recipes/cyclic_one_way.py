"""Cyclic One-Way diffusion (COW): an image pasted into a seed, and a scene grown round it.

Wang et al., "Diffusion in Diffusion: Cyclic One-Way Diffusion for Text-Vision-Conditioned
Generation", arXiv 2306.08247 (ICLR 2024). Counted in denoising steps from the clean image, with
r = 0.5 N and b = 0.7 N:

    seed      the image is pasted on a gray canvas, which is inverted to level r;
              the image alone is inverted to level b, and every level is kept
    disturb   x_b = (a_b / a_r) x_r + fresh noise
    construct for k = b ... r: denoise to level k, then write the image's own level k
              over its region
    at last   denoise from r to 0; the image is written once more at 0.4 N

Disturbing and constructing is repeated; what is written flows outwards, and nothing flows back in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hookctl.address.regions import Region, RegionLike, region_of
from hookctl.address.rows import UNCOND
from hookctl.arguments import checked, images_and_prompts, whole
from hookctl.editor import LATENTS, WHOLE_IMAGE, Editor
from hookctl.errors import InputError
from hookctl.loop import prompts
from hookctl.loop.images import encode
from hookctl.loop.program import Generators
from hookctl.loop.solver import require_eta
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes.common.canvas.pasted_images import PastedImages, require_grid, resized
from hookctl.recipes.common.canvas.suppression import Suppression
from hookctl.session import Session, control

# What the official code says of every image.
NEGATIVE = "a bad quality and low resolution image,extra fingers,deformed hands"
SUPPRESS, DIVERSE = "human face", "a high quality and colorful image"


class CyclicOneWay:
    """Draw a scene round a given image.

        program = CyclicOneWay(pipe, image, "a person in a forest", at=(128, 0))
        drawn = program.run()[0]

    image: PIL in mode RGB, smaller than the canvas; prompt: of the whole scene. Or a list of
        each, of images of one size, which are drawn in one batch.
    at: where its upper left corner goes, px: (x, y), multiples of the autoencoder's factor.
    image_size: (width, height) in px to which images are resized first (the official code: half
        the canvas's sides), by default they are taken as they are.
    region: which part of the image counts, by default all of it. A mask is bright there; of the
        official masks, which are black there, give `~Region.mask(mask)`.
    size: of the canvas, (width, height) in px, by default the pipeline's.
    steps, guidance, negative: of the sampling.
    start, top: how noisy the canvas is in the cycles, at least and at most: r and b, in fractions
        of the steps from the clean image. finish: likewise where the image is written for the last
        time; the text may repaint the seam after it.
    cycles: how often the canvas is disturbed and constructed again. eta, final_eta: fresh noise in
        the cycles and after them.
    suppress, diverse: what must not appear outside the region, and what may instead, "" for
        nothing; two more rows in the cycles (`recipes.common.suppression`).
    inversion_guidance: scale in the inversions. writes: whether the image is written at all.
    seed: of all noise, of each image alike.
    paper: the official code: 10 steps, guidance in the inversions, its prompts against a second
        face, the negative prompt (its own, unless one is given) in the cycles alone, images that
        are gray outside the region and are drawn from the encoder's distribution, cells of the mask
        whose first pixel counts, and fresh noise by the levels next to those that the latents are
        at. One generator draws all noise: of the images' encodings, the canvases' and the steps'.

    Without cycles and writing it is DDIM sampling of the inverted canvas. Raises InputError for
    levels in another order, and for images that do not fit on the canvas; UnsupportedError for
    models without a grid of latents, and for fresh noise in a scheduler whose steps take none.
    """

    @checked()
    def __init__(
        self,
        pipe: Any,
        image: Any,
        prompt: str | Sequence[str],
        *,
        at: tuple[int, int] = (0, 0),
        image_size: tuple[int, int] | None = None,
        region: RegionLike | None = None,
        size: tuple[int, int] | None = None,
        steps: int | None = None,
        guidance: float = 7.5,
        negative: str | None = None,
        start: float = 0.5,
        top: float = 0.7,
        finish: float = 0.4,
        cycles: int = 10,
        eta: float = 1.0,
        final_eta: float = 0.1,
        suppress: str | None = None,
        diverse: str | None = None,
        inversion_guidance: float | None = None,
        writes: bool = True,
        seed: int = 0,
        paper: bool = False,
    ) -> None:
        self.pipe, self.paper, self.seed = pipe, paper, seed
        self.session: Session | None = None
        images, self.prompts = images_and_prompts(image, prompt, "CyclicOneWay")
        default_steps = 10 if paper else 50
        self.steps = whole(steps or default_steps, "CyclicOneWay: steps", 1)
        self._set_levels(start, top, finish, cycles)
        self.guidance = float(guidance)
        if inversion_guidance is None:
            inversion_guidance = self.guidance if paper else 1.0
        self.inversion_guidance = float(inversion_guidance)
        self.negative = NEGATIVE if negative is None and paper else negative
        self.suppress = SUPPRESS if suppress is None and paper else suppress
        self.diverse = DIVERSE if diverse is None and paper else diverse
        if (self.suppress is None) != (self.diverse is None):
            raise InputError("CyclicOneWay: give suppress and diverse, both or neither")
        self.eta, self.final_eta, self.writes = float(eta), float(final_eta), writes
        if self.eta or self.final_eta:
            require_eta(pipe.scheduler, f"{type(self).__name__}: eta, final_eta")
        if image_size is not None:
            name = "CyclicOneWay: image_size"
            images = [resized(image, image_size, name) for image in images]
        factor = int(getattr(pipe, "vae_scale_factor", 8))
        require_grid(pipe, type(self).__name__)
        own = getattr(pipe, "default_sample_size", None)
        if hasattr(pipe, "unet"):
            own = pipe.unet.config.sample_size
        side = int(own) * factor if own else 1024
        self.pasted = PastedImages(
            "CyclicOneWay",
            images,
            at=at,
            size=(side, side) if size is None else (size[0], size[1]),
            factor=factor,
            region=Region.full() if region is None else region_of(region),
            official=paper,
        )

    def _set_levels(self, start: float, top: float, finish: float, cycles: int) -> None:
        """r, b and the level of the last writing as a program counts them: from the noisiest on."""
        self.cycles = whole(cycles, "CyclicOneWay: cycles")
        if not 0 <= finish <= start < top <= 1:
            raise InputError(
                f"CyclicOneWay: start={start}, top={top}, finish={finish}, cycles={cycles}; give "
                "0 <= finish <= start < top <= 1 and a number of cycles"
            )
        n, slack = self.steps, 0.0 if self.paper else 1e-9
        self.low, self.high, self.last = (n - int(x * n + slack) for x in (start, top, finish))
        if self.paper and self.high < 1:
            raise InputError(f"CyclicOneWay: top={top} leaves no noisier level; give less than 1")

    @checked()
    def run(self, *editors: Editor, output_type: str = "pil") -> Any:
        """Draw; a list of images, or as output_type= has it.

        editors: active in all of it, except that those to whom places of the canvas mean something
        are not where the image is inverted on its own. What they did is in `session` afterwards.
        """
        without_places = [editor for editor in editors if not _knows_places(editor)]
        # One for each image, which is then drawn as it is alone.
        each = [torch.Generator().manual_seed(self.seed) for _ in self.prompts]
        generator: Generators = each[0] if self.paper else each
        images, canvases = self._encoded(each[0])
        with control(self.pipe, *without_places):
            levels = self._levels_of_the_images(images, generator)
        with control(self.pipe, *editors) as self.session:
            program = self._inverted_canvas(canvases, generator)
            contexts = self._quality(program)
            with control(self.pipe, *self._suppression(program.latents)):
                for _ in range(self.cycles):
                    self._disturb(program, generator)
                    self._write(program, levels)
                    for level in range(self.high, self.low):
                        program.denoise(level, eta=self.eta, contexts=contexts)
                        self._write(program, levels)
            for level in range(self.low, program.steps):
                program.denoise(level, eta=self.final_eta)
                if program.level == self.last:
                    self._write(program, levels)
            return program.decode(output_type)

    def _encoded(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The latents of the images and of their canvases, [images, channels, height, width]."""
        drawn = generator if self.paper else None
        images, canvases = (
            torch.cat([encode(self.pipe, image, drawn) for image in of])
            for of in (self.pasted.images, self.pasted.canvases())
        )
        return images, canvases

    def _levels_of_the_images(self, clean: Tensor, generator: Generators) -> list[Tensor]:
        """The images' own latents at every level, inverted on their own as far as `high`."""
        width, height = self.pasted.images[0].size
        program = self._program(clean, width, height, generator)
        path = {program.steps: program.latents}
        for level in reversed(range(self.high, program.steps)):
            path[level] = program.invert(level, guidance=self.inversion_guidance)
        # Nothing is written at levels before `high`.
        return [path.get(level, program.latents) for level in range(program.steps + 1)]

    def _inverted_canvas(self, clean: Tensor, generator: Generators) -> Trajectory:
        """A program whose latents are the pasted images at level `low`."""
        program = self._program(clean, *self.pasted.size, generator)
        for level in reversed(range(self.low, program.steps)):
            program.invert(level, guidance=self.inversion_guidance)
        return program

    def _quality(self, program: Trajectory) -> dict[str, Tensor] | None:
        """The official code's negative prompt, which acts in the cycles alone."""
        if not self.paper or self.negative is None or UNCOND not in program.template.branches:
            return None
        encoded = prompts.encode(self.pipe, [self.negative], program.template.encoding)
        return {UNCOND: encoded.sequence}

    def _program(self, clean: Tensor, width: int, height: int, generator: Generators) -> Trajectory:
        program = Trajectory(
            self.pipe,
            self.prompts,
            steps=self.steps,
            guidance=self.guidance,
            negative=None if self.paper else self.negative,
            latents=clean,
            generator=generator,
            width=width,
            height=height,
        )
        if program.steps != self.steps:
            raise InputError(
                f"CyclicOneWay: this scheduler takes {program.steps} steps for {self.steps}; use "
                "one of first order, such as DDIMScheduler"
            )
        program.write(clean, level=program.steps)
        return program

    def _suppression(self, latents: Tensor) -> list[Editor]:
        if self.suppress is None or self.diverse is None:
            return []
        outside, texts = 1 - self.pasted.mask(latents), (self.suppress, self.diverse)
        return [Suppression(self.pipe, *texts, guidance=self.guidance, outside=outside)]

    def _disturb(self, program: Trajectory, generator: Any) -> None:
        if not self.paper:
            program.renoise(self.low, self.high, generator)
            return
        # The official code reads both levels one step too noisy.
        low, high = (program.levels[level - 1] for level in (self.low, self.high))
        noised = program.noise.renoise(program.latents, low, high, generator)
        program.write(noised, level=self.high)

    def _write(self, program: Trajectory, levels: list[Tensor]) -> None:
        """The images over their region, as they are at the program's level."""
        if self.writes:
            latents = self.pasted.in_place(levels[program.level], program.latents)
            program.write(latents, self.pasted.mask(latents))


def _knows_places(editor: Editor) -> bool:
    return any(claim.what in (WHOLE_IMAGE, LATENTS) for claim in editor.claims())
