"""Rotary positions: what a model's table of them is made of, and how it is put together anew.

A pair of channels rotates by an angle, the token's position along one axis times the pair's
frequency (RoPE, arXiv 2104.09864; several axes, as in FLUX). The tables differ in form alone:
cosines and sines of each channel, or complex numbers of each pair; one table, or one
for images and one for text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hookctl.address.families.record import names_of, uncompiled

FRAME, IMAGE, ROW, COLUMN, TEXT = "frame", "image", "row", "column", "text"
PATHS = ("pos_embed", "rope", "rope_embedder")

Form = Callable[[Tensor, Tensor], Any]  # angles, amplitudes [..., tokens, pairs] -> the table


@dataclass(frozen=True, eq=False)
class RotaryTable:
    """What one table is made of, in float64.

    positions: [[rows,] tokens, axes]; frequencies: [pairs], in radians for a position; axis: which
    axis a pair rotates by, [pairs]; form: puts a table together; words: how many of the last tokens
    are of a text that goes on along all axes.
    """

    positions: Tensor
    frequencies: Tensor
    axis: Tensor
    form: Form
    words: int = 0

    def build(self, positions: Tensor, frequencies: Tensor, amplitudes: Tensor) -> Any:
        """The table of other positions, frequencies and amplitudes [pairs]."""
        angles = positions[..., self.axis] * frequencies
        return self.form(angles, amplitudes.expand_as(angles))


@dataclass(frozen=True)
class Rotary:
    """The part of a model that makes its table.

    axes: their names. theta: of the module, whose powers the frequencies are; None where positions
    are fractions of a size. read: module, arguments, its output -> the table. shared: blocks get
    what the module gives, not something made of it.
    """

    axes: tuple[str, ...]
    read: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], RotaryTable]
    theta: Callable[[Any], float | None] = lambda module: float(module.theta)
    shared: bool = True


def rotary_of(denoiser: nn.Module) -> tuple[str, Any, Rotary] | None:
    """Path, module and record of what makes a model's rotary positions; None if it has none."""
    model: Any = uncompiled(denoiser)
    for path in PATHS:
        module = getattr(model, path, None)
        if record := next((RECORDS[name] for name in names_of(module) if name in RECORDS), None):
            return path, module, record
    return None


def powers(theta: float, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(frequencies, axis) of pairs: theta^(-2j/d) of each axis of d channels."""
    every = [theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d) for d in dims]
    axis = [torch.full((d // 2,), i) for i, d in enumerate(dims)]
    return torch.cat(every), torch.cat(axis)


# -- forms -----------------------------------------------------------------------------------------


def _real(like: tuple[Tensor, Tensor]) -> Form:
    """Cosines and sines, each twice."""

    def form(angles: Tensor, amplitudes: Tensor) -> tuple[Tensor, Tensor]:
        def one(values: Tensor) -> Tensor:
            wide = (values * amplitudes).repeat_interleave(2, -1)
            return wide.to(like[0]).reshape(like[0].shape)

        return one(angles.cos()), one(angles.sin())

    return form


def _complex(like: Tensor) -> Form:
    def form(angles: Tensor, amplitudes: Tensor) -> Tensor:
        return torch.polar(amplitudes, angles).to(like)

    return form


def _grid(sides: Sequence[int]) -> Tensor:
    """The places of a grid, [places, axes], the last axis fastest."""
    axes = [torch.arange(side, dtype=torch.float64) for side in sides]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def _argument(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], place: int = 0) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


# -- families --------------------------------------------------------------------------------------


def _numbered(module: Any, args: Any, kwargs: Any, output: Any) -> RotaryTable:
    """FLUX: positions are given."""
    ids = _wide(_argument("ids", args, kwargs))
    frequencies, axis = powers(module.theta, module.axes_dim[: ids.shape[-1]])
    return RotaryTable(*_on(ids, frequencies, axis), _real(output))


def _looked_up(module: Any, args: Any, kwargs: Any, output: Any) -> RotaryTable:
    """Z-Image: likewise, complex."""
    ids = _wide(_argument("ids", args, kwargs))
    frequencies, axis = powers(module.theta, module.axes_dims)
    return RotaryTable(*_on(ids, frequencies, axis), _complex(output))


def _of_patches(dims: Callable[[Any], Sequence[int]], patch: Callable[[Any], Sequence[int]]) -> Any:
    """Wan, HunyuanVideo: the grid of a latent's patches."""

    def read(module: Any, args: Any, kwargs: Any, output: Any) -> RotaryTable:
        sides = _argument("hidden_states", args, kwargs).shape[-3:]
        grid = _grid([side // part for side, part in zip(sides, patch(module), strict=True)])
        frequencies, axis = powers(_theta_of(module), dims(module))
        return RotaryTable(*_on(grid, frequencies, axis), _real(output))

    return read


def _theta_of(module: Any) -> float:
    """Wan keeps cosines alone: the second pair's frequency at position 1 tells theta."""
    if hasattr(module, "theta"):
        return float(module.theta)
    angle = torch.atan2(module.freqs_sin[1, 2].double(), module.freqs_cos[1, 2].double())
    found = float(angle) ** (-module.t_dim / 2)
    return 10000.0 if abs(found / 10000.0 - 1) < 1e-3 else found


def _centred(module: Any, args: Any, kwargs: Any, output: Any) -> RotaryTable:
    """Qwen-Image: images numbered along the first axis, then text on all axes alike."""
    sizes, parts, first = _argument("video_fhw", args, kwargs), [], 0
    sizes = sizes[0] if isinstance(sizes, list) else sizes
    for i, (frames, height, width) in enumerate(sizes if isinstance(sizes, list) else [sizes]):
        grid = _grid([frames, height, width])
        grid[:, 0] += i
        if module.scale_rope:
            grid[:, 1:] -= torch.tensor([height - height // 2, width - width // 2])
        parts.append(grid)
        part = 2 if module.scale_rope else 1
        first = max(first, height // part, width // part)
    images, text = output
    words = torch.arange(first, first + len(text), dtype=torch.float64)[:, None].expand(-1, 3)
    frequencies, axis = powers(module.theta, module.axes_dim)

    def form(angles: Tensor, amplitudes: Tensor) -> tuple[Tensor, Tensor]:
        made = _complex(images)(angles, amplitudes)
        return made[: len(images)], made[len(images) :]

    return RotaryTable(*_on(torch.cat([*parts, words]), frequencies, axis), form, len(text))


def _in_fractions(module: Any, args: Any, kwargs: Any, output: Any) -> RotaryTable:
    """LTX: places as fractions of a size from -1 to 1; channels that no axis has stand in front."""
    names = ("hidden_states", "num_frames", "height", "width", "rope_interpolation_scale")
    given = [_argument(name, args, kwargs, i) for i, name in enumerate(names)]
    coords = _argument("video_coords", args, kwargs, 5)
    if coords is None:
        grid = module._prepare_video_coords(len(given[0]), *given[1:], device=given[0].device)
    else:
        sizes = (module.base_num_frames, module.base_height, module.base_width)
        grid = torch.stack([coords[:, i] / size for i, size in enumerate(sizes)], -1)
    count, rest = module.dim // 6, module.dim % 6
    exponents = torch.linspace(0, 1, count, dtype=torch.float32)  # as the model has them
    frequencies = (module.theta**exponents * math.pi / 2.0).double().repeat_interleave(3)
    axis = torch.arange(3).repeat(count)

    def form(angles: Tensor, amplitudes: Tensor) -> tuple[Tensor, Tensor]:
        def one(values: Tensor, padding: float) -> Tensor:
            wide = (values * amplitudes).repeat_interleave(2, -1)
            return F.pad(wide, (rest, 0), value=padding).to(output[0])

        return one(angles.cos(), 1.0), one(angles.sin(), 0.0)

    return RotaryTable(*_on(_wide(grid) * 2 - 1, frequencies, axis), form)


def _wide(positions: Tensor) -> Tensor:
    """In float64, which not every device has."""
    return (positions.cpu() if positions.device.type in ("mps", "npu") else positions).double()


def _on(positions: Tensor, frequencies: Tensor, axis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return positions, frequencies.to(positions.device), axis.to(positions.device)


_VIDEO = (FRAME, ROW, COLUMN)
RECORDS: dict[str, Rotary] = {
    "FluxPosEmbed": Rotary((IMAGE, ROW, COLUMN), _numbered),
    "BriaEmbedND": Rotary((IMAGE, ROW, COLUMN), _numbered),
    # Text and image each by a call, joined for the blocks.
    "Flux2PosEmbed": Rotary((IMAGE, ROW, COLUMN, TEXT), _numbered, shared=False),
    "QwenEmbedRope": Rotary((IMAGE, ROW, COLUMN), _centred),
    # Split into rows and padded for the blocks.
    "RopeEmbedder": Rotary((IMAGE, ROW, COLUMN), _looked_up, shared=False),
    "WanRotaryPosEmbed": Rotary(
        _VIDEO,
        _of_patches(lambda m: (m.t_dim, m.h_dim, m.w_dim), lambda m: m.patch_size),
        _theta_of,
    ),
    "HunyuanVideoRotaryPosEmbed": Rotary(
        _VIDEO,
        _of_patches(lambda m: m.rope_dim, lambda m: (m.patch_size_t, m.patch_size, m.patch_size)),
    ),
    "LTXVideoRotaryPosEmbed": Rotary(_VIDEO, _in_fractions, lambda module: None),
}
