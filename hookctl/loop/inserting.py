"""What editors see inside a model beside its attention: streams, layers, residuals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hookctl.address.clock import Clock
from hookctl.address.rows import Row, Rows
from hookctl.address.sites import Grid, ImageTokens, Site, grid_of
from hookctl.errors import InputError, UnsupportedError


@dataclass(eq=False)
class InsertCall:
    """The residual stream of a transformer block, between its self-attention and what follows.

    site: of the self-attention.
    hidden: [rows (x frames), tokens, channels]; assign another of its shape to change the stream.
    rows: whose the batch rows are (`Rows`).
    clock: when (`Clock`).
    grid: the grid of the tokens, `height, width = call.grid`, None if they form none.
    """

    site: Site
    hidden: Tensor
    rows: Rows
    clock: Clock
    grid: Grid | None


@dataclass(eq=False)
class BlockCall:
    """A transformer block, before it runs.

    site: of its attention to the image; name: its path inside the model.
    hidden: what it is given of the image (of text and image where they are one sequence),
        [rows (x frames), tokens, channels]; assign another of its shape to change it.
    image: (first, past the last) of the tokens of the image that is drawn, None where unknown.
    rows: whose the batch rows are (`Rows`).
    clock: when (`Clock`).
    grid: the grid of those tokens, None if they form none.
    passing: the indices of the rows that pass the block by.
    """

    name: str
    site: Site
    hidden: Tensor
    rows: Rows
    clock: Clock
    grid: Grid | None
    image: tuple[int, int] | None = None
    passing: set[int] = field(default_factory=set)

    def skip(self, rows: Row | Iterable[Row]) -> None:
        """Let rows pass the block by: what they are goes on unchanged, the text's stream too."""
        self.passing |= {row.index for row in ([rows] if isinstance(rows, Row) else rows)}

    def places(self, rows: Iterable[Row]) -> list[int]:
        """Indices of rows in the batch of `hidden`; a video's row may have one for each frame."""
        return self._at([row.index for row in rows])

    @property
    def passed(self) -> list[int]:
        """The places in the batch of the rows that pass the block by."""
        return self._at(self.passing)

    def _at(self, rows: Iterable[int]) -> list[int]:
        repeats = self.hidden.shape[0] // len(self.rows)
        return [row * repeats + i for row in sorted(rows) for i in range(repeats)]


@dataclass(eq=False)
class LinearCall:
    """A linear layer.

    name: its path inside the model, such as "down_blocks.0.attentions.0...attn2.to_k".
    input: [rows (x frames), ..., inputs]; output: [..., outputs]; assign to change it. Of a
    convolution, [rows (x frames), channels, height, width].
    rows: whose the batch rows are (`Rows`).
    clock: when (`Clock`).
    latent: sides of the latent, ([frames,] height, width).
    layer: the module, a linear layer or a convolution.
    images: those of the sequence, of models that tell them; text: tokens of the texts of the call,
    further ones included; own_text: of the pipeline's own, which come first.
    """

    name: str
    input: Tensor
    output: Tensor
    rows: Rows
    clock: Clock
    latent: tuple[int, ...]
    layer: nn.Module | None = None
    images: ImageTokens | None = None
    text: int | None = None
    own_text: int | None = None

    @property
    def grid(self) -> Grid | None:
        """The grid of the input's tokens over the latent, None if they form none."""
        if self.input.dim() != 3:
            return None
        return grid_of(self.input.shape[-2], self.latent, len(self.input) // len(self.rows))

    def add(
        self,
        down: Tensor,
        up: Tensor,
        scale: float | Tensor = 1.0,
        *,
        rows: Iterable[Row] | None = None,
        tokens: Tensor | None = None,
    ) -> None:
        """Add scale * up (down input) to the output (LoRA, arXiv 2106.09685).

        down: [rank, inputs]; up: [outputs, rank]; of a convolution [rank, inputs, kernel, kernel]
        and [outputs, rank, 1, 1]. rows: of which alone, None for all; tokens: how much at each
        token, [tokens], from 0 to 1, such as a region's share of it; of a convolution at each place
        of its output, [height, width]. Raises InputError for other shapes.
        """
        if isinstance(layer := getattr(self.layer, "base_layer", self.layer), nn.Conv2d):
            return self._convolve(layer, down, up, scale, rows, tokens)
        inputs, outputs = self.input.shape[-1], self.output.shape[-1]
        if down.shape[1:] != (inputs,) or up.shape != (outputs, down.shape[0]):
            raise InputError(
                f"{self.name}: a low-rank delta of {tuple(down.shape)} and {tuple(up.shape)}; give "
                f"[rank, {inputs}] and [{outputs}, rank]"
            )
        if tokens is not None and tokens.shape != self.input.shape[1:-1]:
            raise InputError(
                f"{self.name}: tokens={tuple(tokens.shape)}; its input has "
                f"{tuple(self.input.shape[1:-1])}"
            )
        chosen = None if rows is None else self._places(rows)
        if chosen == []:
            return
        x = self.input if chosen is None else self.input[chosen]
        delta = F.linear(F.linear(x, down.to(x)), up.to(x)) * scale
        if tokens is not None:
            delta = delta * tokens.to(delta)[..., None]
        self._add(delta, chosen)

    def _convolve(
        self,
        layer: nn.Conv2d,
        down: Tensor,
        up: Tensor,
        scale: float | Tensor,
        rows: Iterable[Row] | None,
        tokens: Tensor | None,
    ) -> None:
        inputs, outputs = layer.in_channels, layer.out_channels
        if down.shape[1:] != (inputs, *layer.kernel_size) or up.shape != (
            outputs,
            down.shape[0],
            1,
            1,
        ):
            raise InputError(
                f"{self.name}: a low-rank delta of {tuple(down.shape)} and {tuple(up.shape)}; give "
                f"[rank, {inputs}, {', '.join(map(str, layer.kernel_size))}] and [{outputs}, rank, "
                "1, 1]"
            )
        if tokens is not None and tokens.shape != self.output.shape[-2:]:
            raise InputError(
                f"{self.name}: tokens={tuple(tokens.shape)}; its output has "
                f"{tuple(self.output.shape[-2:])}"
            )
        chosen = None if rows is None else self._places(rows)
        if chosen == []:
            return
        x = self.input if chosen is None else self.input[chosen]
        inner = F.conv2d(x, down.to(x), None, layer.stride, layer.padding, layer.dilation)
        delta = F.conv2d(inner, up.to(x)) * scale
        self._add(delta if tokens is None else delta * tokens.to(delta), chosen)

    def _add(self, delta: Tensor, chosen: list[int] | None) -> None:
        if chosen is None:
            self.output = self.output + delta
        else:
            changed = self.output.clone()
            changed[chosen] += delta
            self.output = changed

    def _places(self, rows: Iterable[Row]) -> list[int]:
        """Batch indices of some rows; a video's row has one for each frame."""
        repeats = self.input.shape[0] // len(self.rows)
        return [row.index * repeats + i for row in rows for i in range(repeats)]


@dataclass(eq=False)
class StemCall:
    """The layer that takes the latents into the model.

    layer: the module; input: what it is given, [rows, channels, [frames,] height, width] of a
    convolution; output: assign to change it.
    rows: whose the batch rows are (`Rows`).
    clock: when (`Clock`).
    """

    layer: nn.Module
    input: Tensor
    output: Tensor
    rows: Rows
    clock: Clock

    def convolve(self, weight: Tensor, bias: Tensor | None, extra: Tensor | None = None) -> None:
        """Make the output by another convolution, of the input and further channels.

        weight: [outputs, channels + further, kernel, kernel]; bias: [outputs]; extra: [1 | rows,
        further, height, width]. Raises InputError for other shapes, UnsupportedError for a stem
        that is no convolution over images.
        """
        if not isinstance(self.layer, nn.Conv2d):
            raise UnsupportedError(
                f"the first layer of this model is a {type(self.layer).__name__}; further channels "
                "need a convolution over images (nn.Conv2d)"
            )
        given = self.input
        if extra is not None:
            many = extra.to(given).expand(given.shape[0], -1, -1, -1)
            if many.shape[2:] != given.shape[2:]:
                raise InputError(
                    f"extra={tuple(extra.shape)}; the latents are {tuple(given.shape[2:])}"
                )
            given = torch.cat([given, many], 1)
        if weight.shape[1] != given.shape[1] or weight.shape[0] != self.output.shape[1]:
            raise InputError(
                f"weight={tuple(weight.shape)}; {given.shape[1]} channels go in, "
                f"{self.output.shape[1]} come out"
            )
        bias = None if bias is None else bias.to(given)
        layer = self.layer
        self.output = F.conv2d(given, weight.to(given), bias, layer.stride, layer.padding)
