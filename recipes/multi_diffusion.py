"""MultiDiffusion: images larger than the model's, and regions with prompts of their own.

Bar-Tal et al., "MultiDiffusion: Fusing Diffusion Paths for Controlled Image Generation", arXiv
2302.08113 (ICML 2023). In every step the model sees tiles F_i of the canvas, for each of the
region prompts y_r; each path takes its own step, and where paths overlap they are averaged:

    x' = sum_ir m_ir step(F_i x, eps(F_i x, y_r)) / sum_ir m_ir

A step is affine in the latents and in all predictions so far, and the tiles and masks are those
of every step, so this is one step of the whole canvas by the averaged predictions. No tile needs
a solver of its own, not even with multistep solvers; a solver that draws noise draws one for all.

    eps(x) = sum_ir m_ir eps(F_i x, y_r) / sum_ir m_ir

While a region bootstraps, the image outside it is a plain colour, diffused to the level of the
step; the average takes nothing from there. m_0 = 1 - sum_r m_r is the prompt's own. The official
code leaves cells at the side of some canvases in no tile, which turn to 0; here a last tile ends
at the side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hookctl.address import per_prompt
from hookctl.address.clock import Window
from hookctl.address.families import denoiser_of
from hookctl.address.latent import image_tokens, latent_axes, text_tokens
from hookctl.address.per_prompt import Regions, Texts
from hookctl.address.rows import COND
from hookctl.arguments import checked, pair, refusal, share, whole
from hookctl.editor import TEXTS, WHOLE_IMAGE, Claim, Editor
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.images import decode
from hookctl.loop.outputs import prediction_of, with_prediction
from hookctl.loop.packing import side_of_token
from hookctl.loop.prompts import EncodedTexts, check_texts
from hookctl.loop.state import Proceed, State
from hookctl.recipes.common.canvas.plain_colours import Bootstrapping
from hookctl.recipes.common.canvas.tiles import Tile, tiles_of
from hookctl.recipes.common.canvas.token_canvas import (
    as_canvas,
    as_tokens,
    is_packed,
    masks_the_whole,
    places,
)
from hookctl.recipes.common.real_images.diffusion_paths import DiffusionPath, paths_of
from hookctl.run_state import RunState
from hookctl.session import control

MARGIN = 8  # cells beyond the sides of a cylinder that its decoder sees


class MultiDiffusion(Editor):
    """Let the model see tiles of the canvas, and average what it predicts there.

        MultiDiffusion(stride=8).run(pipe, "a mountain range", height=512, width=2048)

    texts, regions: what and where, as many of each; a list for every prompt of the run, or a list
        of lists, one for each. A region is a `hookctl.Region`, a box (x0, y0, x1, y1) in fractions
        of the canvas, a mask, or a text such as "box:0,0,0.5,1"; it is cut at cells of the latent.
        The prompts themselves fill the rest.
    tile: (height, width) in cells of the latent, or one number; None: the model's own size. Where
        the latents are packed (FLUX, FLUX.2, Qwen-Image), cells are tokens, 16 px, and it is given.
    stride: from tile to tile, in cells; None: an eighth of the tile, as in the paper.
    wrap: the canvas is a cylinder, whose left and right sides meet.
    bootstrap: until when regions bootstrap, a fraction of the schedule; seed: of its colours.

    Call the pipeline with the height and width of the canvas, or `run`. Costs one denoiser call for
    each tile and each prompt that has a place in it. Where one tile is the whole canvas, and no
    region is left, a run is what it was bit for bit.

    Raises UnsupportedError for latents that are neither [..., height, width] nor the tokens of one
    image, and with a ControlNet.
    """

    tiles: RunState[list[Tile]] = RunState()
    _tile: RunState[tuple[int, int] | None] = RunState()
    _packed: RunState[bool] = RunState(False)
    _paths: RunState[dict[tuple[int, ...], list[DiffusionPath]]] = RunState()
    _texts: RunState[EncodedTexts | None] = RunState()

    @checked(own=("texts", "regions"))
    def __init__(
        self,
        texts: Texts = (),
        regions: Regions = (),
        *,
        tile: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] | None = None,
        wrap: bool = False,
        bootstrap: float = 0.4,
        seed: int = 0,
    ) -> None:
        self.texts = per_prompt.texts(texts, f"{self.name}: texts")
        self.regions = per_prompt.regions(regions, f"{self.name}: regions")
        self.texts.check_lengths(self.regions)
        self.tile = _cells(tile, f"{self.name}: tile")
        self.stride = _cells(stride, f"{self.name}: stride")
        self.wrap = wrap
        self.bootstrap = share(bootstrap, f"{self.name}: bootstrap")
        self.bootstrapping = Bootstrapping(int(seed))

    def claims(self) -> Sequence[Claim]:
        claims = [Claim(WHOLE_IMAGE, cure="Use one of them: tiles are parts of the image")]
        if self.texts.items:
            cure = "Words of the prompts are not in the texts of regions: leave one of them out"
            claims.append(Claim(TEXTS, cure=cure))
        return claims

    def attach(self, target: Any) -> None:
        check_texts(target, self.texts.items, self.name)
        size = getattr(denoiser_of(target).config, "sample_size", None)
        self._tile = self.tile or _cells(size, f"{self.name}: tile")
        if self._tile is None:
            raise InputError(
                f"{self.name}: this model does not say for which size it was made; give tile="
            )
        if self.texts.items and self.bootstrap:
            self.bootstrapping.check(target)

    def begin(self, state: State) -> None:
        sample = state.kwargs[state.sample]
        self._packed = is_packed(state)
        flat = isinstance(sample, list) or sample.dim() < 4
        tensor = not flat and latent_axes(state.denoiser, sample.dim()).endswith("hw")
        if not (tensor or self._packed):
            images = state.images_in_sequence
            referring = images is not None and images.references
            said = "have reference images behind them" if referring else "are no such tensor"
            raise UnsupportedError(
                f"{self.name} cuts tiles of latents [..., height, width], and those of "
                f"{type(state.pipe).__name__} {said}"
            )
        controlled = [name for name, value in state.kwargs.items() if value is not None]
        if any("residual" in name or "controlnet" in name for name in controlled):
            raise UnsupportedError(f"{self.name} can't cut tiles of a ControlNet's residuals")
        if self._packed and masks_the_whole(state.kwargs):
            raise UnsupportedError(
                f"{self.name} shows the model tiles, and {type(state.pipe).__name__} gives it a "
                "mask of all tokens of the canvas (attention_mask)"
            )
        self.regions.check_prompts(state.rows)
        assert self._tile is not None  # `attach` saw to it
        height, width = state.grid[-2:]
        self.tiles = tiles_of(height, width, self._tile, self.stride, wrap=self.wrap)
        self._paths = {}
        self._texts = EncodedTexts(state, self.texts.items) if self.texts.items else None
        if self._texts is not None:
            self._texts.check_fit(state, self.name)
            if self.bootstrap:
                self.bootstrapping.begin(state)

    # -- the step ------------------------------------------------------------------------------

    def denoise(self, state: State, proceed: Proceed) -> Any:
        if len(self.tiles) == 1 and self.tiles[0].is_canvas and self._texts is None:
            return proceed()
        kwargs, grid, latents, output = state.kwargs, state.grid, state.latents, None
        total, count = torch.zeros(()), torch.zeros(())
        own_text, part_of_it, images = state.own_text, state.part, state.images_in_sequence
        try:
            for path in self.paths(tuple(row.prompt for row in state.rows)):
                tile = path.tile
                shown_less = not tile.is_canvas or path.region > 0
                state.own_text, state.part = own_text, part_of_it or shown_less
                state.kwargs = self._arguments(state, kwargs, latents, path)
                state.grid = (*grid[:-2], tile.height, tile.width)
                state.images_in_sequence = image_tokens(
                    state.kwargs[state.sample], state.kwargs, state.denoiser
                )
                output = proceed()
                part = prediction_of(output)
                assert part is not None  # lists were refused at the start
                if self._packed:
                    part = as_canvas(part, tile.height, tile.width)
                weight = path.weight.to(part.device).reshape(
                    len(part), *([1] * (part.dim() - 3)), tile.height, tile.width
                )
                if not total.dim():
                    canvas = tile.canvas_height, tile.canvas_width
                    dtype = torch.promote_types(part.dtype, torch.float32)
                    total = part.new_zeros(*part.shape[:-2], *canvas, dtype=dtype)
                    count = total.new_zeros(*weight.shape[:-2], *canvas)
                tile.add(part.to(total) * weight, total)
                tile.add(weight, count)
        finally:
            state.kwargs, state.grid = kwargs, grid
            state.own_text, state.part, state.images_in_sequence = own_text, part_of_it, images
        found = total / count
        found = as_tokens(found) if self._packed else found
        return with_prediction(output, found.to(kwargs[state.sample]))

    def paths(self, prompts: tuple[int, ...]) -> list[DiffusionPath]:
        """What is predicted in a step, for rows of these prompts: tiles, region by region."""
        if prompts not in self._paths:
            self._paths[prompts] = paths_of(self.tiles, self.regions, prompts)
        return self._paths[prompts]

    def _arguments(
        self, state: State, kwargs: dict[str, Any], latents: Tensor, path: DiffusionPath
    ) -> dict[str, Any]:
        """The denoiser's arguments for one path, out of those for the canvas."""
        new, like = dict(kwargs), self._cut(path.tile, kwargs[state.sample])
        if self._packed:
            like = as_tokens(like)
            new |= places(kwargs, path.tile)
        new[state.sample] = like
        if path.region == 0 or self._texts is None:
            return new
        texts = {
            row.index: self.texts[row.prompt][path.region - 1]
            for row in state.rows.where(role=COND)
            if path.region <= len(self.texts[row.prompt])
        }
        if state.extra_text:
            raise UnsupportedError(
                f"{self.name} puts texts of regions in the place of the prompt, behind which "
                "another editor (NAG ...) has put texts of its own; leave one of them out"
            )
        self._texts.put(new, state, texts)
        state.own_text = text_tokens(new[str(state.text)], new, state.denoiser)
        if self.bootstrap and Window(0.0, self.bootstrap).holds(state.clock):
            x = self._cut(path.tile, latents)
            inside = (path.weight[: len(x)] > 0).to(x.device)[:, None]
            x = torch.where(inside, x, self.bootstrapping.outside(state, path.tile, path.region))
            rows = x.repeat(len(state.rows) // len(x), 1, 1, 1)
            rows = as_tokens(rows) if self._packed else rows
            new[state.sample] = state.model_input(rows, like)
        return new

    def _cut(self, tile: Tile, x: Tensor) -> Tensor:
        """A tile of latents, [..., height, width]."""
        canvas = as_canvas(x, tile.canvas_height, tile.canvas_width) if self._packed else x
        return tile.cut(canvas)

    # -- the whole job -------------------------------------------------------------------------

    @checked()
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
        """Draw canvases of height x width pixels.

        editors: further editors, after this one; arguments: of the pipeline's own call.
        Returns a list of images, or latents with output_type="latent".
        """
        packs = hasattr(pipe, "_pack_latents")
        factor = side_of_token(pipe) if packs else int(getattr(pipe, "vae_scale_factor", 1))
        for name, side in (("height", height), ("width", width)):
            if side % factor:
                raise refusal(f"{self.name}.run: {name}", side, f"a multiple of {factor} px")
        if not prompt:
            raise refusal(f"{self.name}.run: prompt", prompt, "a text, or a list of texts")
        if packs and self.wrap and output_type != "latent":
            raise UnsupportedError(
                f"{self.name}.run: wrap=True, but the latents of {type(pipe).__name__} are packed, "
                "and its decoder can't be shown what is beyond their sides; give "
                'output_type="latent"'
            )
        shown = output_type if packs else "latent"
        arguments |= {"height": height, "width": width, "output_type": shown}
        with control(pipe, self, *editors):
            latents = pipe(prompt=prompt, **{**arguments, "return_dict": False})[0]
        if packs:
            return latents
        if not self.wrap or output_type == "latent":
            return decode(pipe, latents, output_type)
        # The decoder too must see what is beyond the sides.
        margin = min(MARGIN, latents.shape[-1])
        around = torch.cat([latents[..., -margin:], latents, latents[..., :margin]], -1)
        left = margin * pipe.vae_scale_factor
        images = decode(pipe, around, "pil")
        return [image.crop((left, 0, left + width, height)) for image in images]


def _cells(value: Any, name: str) -> tuple[int, int] | None:
    if value is None:
        return None
    wanted = "cells of the latent: a number, or (height, width)"
    return pair(value, name, partial(whole, least=1), wanted)
