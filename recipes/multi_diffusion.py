"""MultiDiffusion: images larger than the model's, and regions with prompts of their own.

Bar-Tal et al., "MultiDiffusion: Fusing Diffusion Paths for Controlled Image Generation", arXiv
2302.08113 (ICML 2023). In every step the model sees windows F_w of the canvas, for each of the
region prompts y_r; each path takes its own step, and where paths overlap they are averaged:

    x' = sum_wr m_wr step(F_w x, eps(F_w x, y_r)) / sum_wr m_wr

A step is affine in the latents and in all predictions so far, and the windows and masks are those
of every step, so this is one step of the whole canvas by the averaged predictions. No window needs
a solver of its own, with multistep solvers neither; a solver that draws noise draws one for all.

    eps(x) = sum_wr m_wr eps(F_w x, y_r) / sum_wr m_wr

While a region bootstraps, the image outside it is a plain colour, diffused to the level of the
step; the average takes nothing from there. m_0 = 1 - sum_r m_r is the prompt's own. The official
code leaves cells at the rim of some canvases in no window, which turn to 0; here a last window
ends at the rim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookctl.address.clock import Window as Schedule
from hookctl.address.families import denoiser_of
from hookctl.address.rows import COND
from hookctl.editor import WHOLE_IMAGE, Claim, Editor
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.calls import prediction_of, with_prediction
from hookctl.loop.images import decode
from hookctl.loop.prompts import EncodedTexts, check_texts
from hookctl.loop.state import Proceed, State
from hookctl.recipes.common import places
from hookctl.recipes.common.bootstrapping import Bootstrapping
from hookctl.recipes.common.places import Places, Texts, check_share, shares
from hookctl.recipes.common.tiles import Window, windows_of
from hookctl.session import control

MARGIN = 8  # cells beyond the sides of a cylinder that its decoder sees


@dataclass(frozen=True, eq=False)
class Path:
    """One diffusion path: a window, the region whose text it has (0: the prompt's own, all that is
    left), and what it counts for each row, [rows, height, width]."""

    window: Window
    region: int
    weight: Tensor


class MultiDiffusion(Editor):
    """Let the model see windows of the canvas, and average what it predicts there.

    texts, regions: what and where, as many of each; a list for every prompt of the run, or a list
        of lists, one for each. A region is a `hookctl.Region`, a box (x0, y0, x1, y1) in fractions
        of the canvas, a mask, or a text such as "box:0,0,0.5,1"; it is cut at cells of the latent.
        The prompts themselves fill the rest.
    window: (height, width) in cells of the latent, or one number; None: the model's own size.
    stride: between windows, in cells; None: an eighth of the window, as in the paper.
    wrap: the canvas is a cylinder, whose left and right sides meet.
    bootstrap: until when regions bootstrap, a fraction of the schedule; seed: of its colours.

    Call the pipeline with the height and width of the canvas, or `run`. Costs one denoiser call for
    each window and each prompt that has a place in it. Where one window is the whole canvas, and no
    region is left, a run is what it was bit for bit.
    """

    def __init__(
        self,
        texts: Texts = (),
        regions: Places = (),
        *,
        window: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] | None = None,
        wrap: bool = False,
        bootstrap: float = 0.4,
        seed: int = 0,
    ) -> None:
        self.texts = places.texts(texts, f"{self.name}: texts")
        self.regions = places.regions(regions, f"{self.name}: regions")
        self.texts.check_like(self.regions)
        self.window_size = _pair(window, f"{self.name}: window")
        self.stride = _pair(stride, f"{self.name}: stride")
        self.wrap = wrap
        self.bootstrap = check_share(bootstrap, f"{self.name}: bootstrap")
        self.bootstrapping = Bootstrapping(int(seed))

    def claims(self) -> Sequence[Claim]:
        return [Claim(WHOLE_IMAGE, cure="Use one of them: windows are parts of the image")]

    def attach(self, target: Any) -> None:
        check_texts(target, self.texts.every, self.name)
        self._size = self.window_size or _pair(
            getattr(denoiser_of(target).config, "sample_size", None), f"{self.name}: window"
        )
        if self._size is None:
            raise InputError(
                f"{self.name}: this model does not say for which size it was made; give window="
            )
        if self.texts.every and self.bootstrap:
            self.bootstrapping.check(target)

    def begin(self, state: State) -> None:
        sample = state.kwargs[state.sample]
        if isinstance(sample, list) or sample.dim() < 4:
            raise UnsupportedError(
                f"{self.name} cuts windows of latents [..., height, width], and those of "
                f"{type(state.pipe).__name__} are no such tensor"
            )
        if any("residual" in name and value is not None for name, value in state.kwargs.items()):
            raise UnsupportedError(f"{self.name} can't cut windows of a ControlNet's residuals")
        self.regions.check_rows(state.rows)
        assert self._size is not None  # `attach` saw to it
        height, width = state.grid[-2:]
        self.windows = windows_of(height, width, self._size, self.stride, wrap=self.wrap)
        self._paths: dict[tuple[int, ...], list[Path]] = {}
        self._texts = EncodedTexts(state, self.texts.every) if self.texts.every else None
        if self._texts is not None and self.bootstrap:
            self.bootstrapping.begin(state)

    # -- the step ------------------------------------------------------------------------------

    def denoise(self, state: State, proceed: Proceed) -> Any:
        if len(self.windows) == 1 and self.windows[0].whole and self._texts is None:
            return proceed()
        kwargs, grid, latents, output = state.kwargs, state.grid, state.latents, None
        total, count = torch.zeros(()), torch.zeros(())
        try:
            for path in self.paths(tuple(row.prompt for row in state.rows)):
                window = path.window
                state.kwargs = self._arguments(state, kwargs, latents, path)
                state.grid = (*grid[:-2], window.height, window.width)
                output = proceed()
                part = prediction_of(output)
                assert part is not None  # lists were refused at the start
                weight = path.weight.to(part.device).reshape(
                    len(part), *([1] * (part.dim() - 3)), window.height, window.width
                )
                if not total.dim():
                    shape = window.canvas_height, window.canvas_width
                    dtype = torch.promote_types(part.dtype, torch.float32)
                    total = part.new_zeros(*part.shape[:-2], *shape, dtype=dtype)
                    count = total.new_zeros(*weight.shape[:-2], *shape)
                window.add(part.to(total) * weight, total)
                window.add(weight, count)
        finally:
            state.kwargs, state.grid = kwargs, grid
        return with_prediction(output, (total / count).to(kwargs[state.sample]))

    def paths(self, prompts: tuple[int, ...]) -> list[Path]:
        """What is predicted in a step, for rows of these prompts: windows, region by region."""
        if prompts not in self._paths:
            canvas = self.windows[0]
            size = canvas.canvas_height, canvas.canvas_width
            masks = {p: self._masks(p, *size) for p in set(prompts)}
            every = [
                Path(window, r, torch.stack([window.cut(masks[p][r]) for p in prompts]))
                for window in self.windows
                for r in range(self.regions.most + 1)
            ]
            self._paths[prompts] = [path for path in every if bool(path.weight.any())]
        return self._paths[prompts]

    def _masks(self, prompt: int, height: int, width: int) -> Tensor:
        """What the prompt and each region have of the canvas, [1 + regions, height, width]."""
        of_regions = shares(self.regions[prompt], height, width)
        missing = torch.zeros(self.regions.most - len(of_regions), height, width)
        rest = 1 - of_regions.sum(0, keepdim=True)
        return torch.cat([torch.where(rest < 1e-6, 0.0, rest), of_regions, missing])

    def _arguments(
        self, state: State, kwargs: dict[str, Any], latents: Tensor, path: Path
    ) -> dict[str, Any]:
        """The denoiser's arguments for one path, out of those for the canvas."""
        new, like = dict(kwargs), path.window.cut(kwargs[state.sample])
        new[state.sample] = like
        if path.region == 0 or self._texts is None:
            return new
        texts = {
            row.index: self.texts[row.prompt][path.region - 1]
            for row in state.rows.where(role=COND)
            if path.region <= len(self.texts[row.prompt])
        }
        self._texts.put(new, state, texts)
        if self.bootstrap and Schedule(0.0, self.bootstrap).holds(state.clock):
            x = path.window.cut(latents)
            inside = (path.weight[: len(x)] > 0).to(x.device)[:, None]
            x = torch.where(inside, x, self.bootstrapping.outside(state, path.window))
            rows = x.repeat(len(state.rows) // len(x), 1, 1, 1)
            new[state.sample] = state.model_input(rows, like)
        return new

    # -- the whole job -------------------------------------------------------------------------

    def run(
        self,
        pipe: Any,
        prompt: str | Sequence[str],
        *editors: Editor,
        height: int,
        width: int,
        output_type: str = "pil",
        **arguments: Any,
    ) -> Any:
        """Draw canvases of height x width pixels; arguments: of the pipeline's own call.

        Returns a list of images, or latents with output_type="latent".
        """
        arguments |= {"height": height, "width": width, "output_type": "latent"}
        with control(pipe, self, *editors):
            latents = pipe(prompt, **{**arguments, "return_dict": False})[0]
        if not self.wrap or output_type == "latent":
            return decode(pipe, latents, output_type)
        # The decoder too must see what is beyond the sides.
        margin = min(MARGIN, latents.shape[-1])
        around = torch.cat([latents[..., -margin:], latents, latents[..., :margin]], -1)
        left = margin * pipe.vae_scale_factor
        images = decode(pipe, around, "pil")
        return [image.crop((left, 0, left + width, height)) for image in images]


def _pair(value: Any, name: str) -> tuple[int, int] | None:
    if value is None:
        return None
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2 or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in pair):
        raise InputError(
            f"{name}={value!r}; give cells of the latent: a number, or (height, width)"
        )
    return pair[0], pair[1]
