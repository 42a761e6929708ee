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

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hookctl.address.regions import Region, RegionLike, region_of
from hookctl.editor import WHOLE_IMAGE, Editor
from hookctl.errors import InputError
from hookctl.loop import prompts as further
from hookctl.loop.branches import Branch
from hookctl.loop.images import encode
from hookctl.loop.state import Predictions, State
from hookctl.loop.trajectory import Trajectory
from hookctl.session import Session, control

GRAY = (128, 128, 128)
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
    steps, guidance, negative: of the sampling. start, top, finish: the levels r, b and that of the
        last writing, as fractions of the steps from the clean image. cycles: how often it is
        disturbed and constructed again. eta, final_eta: fresh noise in the cycles and after them.
    suppress, diverse: what must not appear outside the region, and what may instead; two more rows
        in the cycles (`Suppression`).
    inversion_guidance: scale in the inversions. writes: whether the image is written at all.
    seed: of all noise.
    paper: the official code: 10 steps, guidance in the inversions, its prompts against a second
        face, only cells of the mask whose centre counts, and fresh noise by the levels next to
        those that the latents are at.

    Without cycles and writing it is DDIM sampling of the inverted canvas.
    """

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
        self.pipe, self.paper, self.seed = pipe, paper, int(seed)
        self.session: Session | None = None
        self.prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        self.images = [image] if isinstance(prompt, str) else list(image)
        self.steps = int(steps or (10 if paper else 50))
        if len(self.images) != len(self.prompts) or not self.prompts:
            raise InputError(
                f"CyclicOneWay: {len(self.images)} images and {len(self.prompts)} prompts"
            )
        self._set_levels(start, top, finish, cycles)
        self.guidance, self.negative = float(guidance), negative or (NEGATIVE if paper else None)
        self.inversion_guidance = (
            float(inversion_guidance) if inversion_guidance is not None
            else self.guidance if paper else 1.0
        )  # fmt: skip
        self.eta, self.final_eta, self.writes = float(eta), float(final_eta), writes
        self.suppress = suppress or (SUPPRESS if paper else None)
        self.diverse = diverse or (DIVERSE if paper else None)
        if (self.suppress is None) != (self.diverse is None):
            raise InputError("CyclicOneWay: give suppress and diverse, both or neither")
        if image_size is not None:
            self.images = [self._resized(p, image_size) for p in self.images]
        self._set_canvas(size, at)
        self.region = Region.full() if region is None else region_of(region)

    def _set_levels(self, start: float, top: float, finish: float, cycles: int) -> None:
        """Levels as a program counts them: from the noisiest on."""
        if not 0 <= finish <= start < top <= 1 or cycles < 0:
            raise InputError(
                f"CyclicOneWay: start={start}, top={top}, finish={finish}, cycles={cycles}; give "
                "0 <= finish <= start < top <= 1 and a number of cycles"
            )
        n = self.steps
        self.low, self.high, self.last = (n - int(x * n + 1e-9) for x in (start, top, finish))
        self.cycles = int(cycles)
        if self.paper and self.high < 1:
            raise InputError(f"CyclicOneWay: top={top} leaves no noisier level; give less than 1")

    @staticmethod
    def _resized(image: Any, size: tuple[int, int]) -> Any:
        if not isinstance(image, Image.Image) or min(size) < 1:
            raise InputError(
                f"CyclicOneWay: a {type(image).__name__} and image_size={size}; give PIL "
                "images and a width and height from 1 px on"
            )
        return image.resize((int(size[0]), int(size[1])), Image.Resampling.LANCZOS)

    def _set_canvas(self, size: tuple[int, int] | None, at: tuple[int, int]) -> None:
        factor = int(getattr(self.pipe, "vae_scale_factor", 8))
        side = self.pipe.unet.config.sample_size * factor if hasattr(self.pipe, "unet") else 1024
        self.size = (side, side) if size is None else (int(size[0]), int(size[1]))
        sizes = {p.size if isinstance(p, Image.Image) else None for p in self.images}
        found = sizes.pop() if len(sizes) == 1 else None
        if found is None:
            raise InputError("CyclicOneWay: give PIL images of one size")
        (width, height), (x, y) = found, at
        fits = 0 <= x and 0 <= y and x + width <= self.size[0] and y + height <= self.size[1]
        if not fits or any(side % factor for side in (x, y, width, height)):
            raise InputError(
                f"CyclicOneWay: an image of {width} x {height} px at {at} on a canvas of "
                f"{self.size[0]} x {self.size[1]}; sides and place must be multiples of {factor} "
                "and lie inside"
            )
        self.at = (x, y)
        self.cells = tuple(c // factor for c in (x, y, width, height))

    # -- the program ---------------------------------------------------------------------------

    def run(self, *editors: Editor, output_type: str = "pil") -> Any:
        """Draw; a list of images, or as output_type= has it.

        editors: active in all of it; those to whom places of the canvas mean something not where
        the image is inverted on its own. What they did is in `session` afterwards.
        """
        with control(self.pipe, *(editor for editor in editors if not _of_places(editor))):
            written = self._condition()
        with control(self.pipe, *editors) as self.session:
            program = self._canvas()
            generator = program.generator
            outside = 1 - self._mask(program.latents)
            suppression = Suppression(self, outside) if self.suppress else None
            with control(self.pipe, *([suppression] if suppression else ())):
                for _ in range(self.cycles):
                    self._disturb(program, generator)
                    self._write(program, written)
                    for level in range(self.high, self.low):
                        program.denoise(level, eta=self.eta)
                        self._write(program, written)
            for level in range(self.low, program.steps):
                program.denoise(level, eta=self.final_eta)
                if program.level == self.last:
                    self._write(program, written)
            return program.decode(output_type)

    def _condition(self) -> list[Tensor]:
        """The images' own latents at every level from `high` on, inverted on their own."""
        width, height = self.images[0].size
        clean = torch.cat([encode(self.pipe, p) for p in self.images])
        program = self._program(clean, width, height)
        path = {program.steps: program.latents}
        for level in reversed(range(self.high, program.steps)):
            path[level] = program.invert(level, guidance=self.inversion_guidance)
        return [path.get(level, program.latents) for level in range(program.steps + 1)]

    def _canvas(self) -> Trajectory:
        """A program whose latents are the pasted images at level `low`."""
        pasted = []
        for image in self.images:
            canvas = Image.new("RGB", self.size, GRAY)
            seen = self._pixels(image)
            canvas.paste(image, self.at, seen)
            pasted.append(encode(self.pipe, canvas))
        program = self._program(torch.cat(pasted), *self.size)
        for level in reversed(range(self.low, program.steps)):
            program.invert(level, guidance=self.inversion_guidance)
        return program

    def _program(self, clean: Tensor, width: int, height: int) -> Trajectory:
        program = Trajectory(
            self.pipe,
            self.prompts,
            steps=self.steps,
            guidance=self.guidance,
            negative=self.negative,
            latents=clean,
            generator=torch.Generator().manual_seed(self.seed),
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

    def _disturb(self, program: Trajectory, generator: Any) -> None:
        if not self.paper:
            program.renoise(self.low, self.high, generator)
            return
        # The official code reads both levels one step too noisy.
        here, there = (program.levels[i - 1] for i in (self.low, self.high))
        noised = program.noise.renoise(program.latents, here, there, generator)
        program.write(noised, level=self.high)

    def _write(self, program: Trajectory, written: list[Tensor]) -> None:
        """The images over their region, as they are at the program's level."""
        if not self.writes:
            return
        x, y, width, height = self.cells
        latents = torch.zeros_like(program.latents)
        latents[..., y : y + height, x : x + width] = written[program.level].to(latents)
        program.write(latents, self._mask(latents))

    # -- places --------------------------------------------------------------------------------

    def _mask(self, latents: Tensor) -> Tensor:
        """Where images are written, 0 or 1, [1, 1, height, width] of the canvas's latents."""
        x, y, width, height = self.cells
        if self.paper:
            inside = torch.from_numpy(self.region.outline.inside(height, width))
        else:
            inside = self.region.tokens(height, width).reshape(height, width)
        mask = latents.new_zeros(1, 1, *latents.shape[-2:])
        mask[..., y : y + height, x : x + width] = inside.to(latents)
        return mask

    def _pixels(self, image: Any) -> Image.Image:
        """Which pixels of an image are pasted."""
        inside = self.region.outline.inside(image.height, image.width)
        return Image.fromarray(inside.astype("uint8") * 255)


def _of_places(editor: Editor) -> bool:
    return any(claim.what == WHOLE_IMAGE for claim in editor.claims())


class Suppression(Editor):
    """Keep a thing out of what is drawn round the images, during the cycles.

        n = eps_uncond + (1 - M) (eps_suppress - eps_diverse),   eps = n + g (eps_cond - n)

    which is the guided prediction + (1 - g) (1 - M) (eps_suppress - eps_diverse).
    """

    def __init__(self, program: CyclicOneWay, outside: Tensor) -> None:
        self.program, self.outside = program, outside
        self._texts: Tensor | None = None

    def branches(self, state: State) -> Mapping[str, Branch]:
        if self._texts is None:
            texts = [str(self.program.suppress), str(self.program.diverse)]
            self._texts = further.encode(self.program.pipe, texts, state.encoding).sequence
        return {name: Branch(text=text[None]) for name, text in zip(ROWS, self._texts, strict=True)}

    def combine(self, predictions: Predictions) -> Tensor:
        suppress, diverse = (predictions[name] for name in ROWS)
        factor = 1 - self.program.guidance
        return predictions.guided + factor * self.outside * (suppress - diverse)


ROWS = ("suppressed", "diverse")
