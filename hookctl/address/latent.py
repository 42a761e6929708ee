"""What a denoiser call shows of its time, its latent and its text: grids and numbers of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from hookctl.address.families import model_of, uncompiled
from hookctl.address.families.record import Model
from hookctl.address.sites import Grid, ImageTokens, Site

_UNDECLARED = Model()
_TIMES = ("timestep", "timesteps", "t", "timestep_ratio")


def time_told(arguments: Mapping[str, Any], denoiser: nn.Module) -> Any:
    """What a denoiser is told of the time, falling from step to step; None if it is told nothing.

    arguments: of the call, by name.
    """
    time = next((arguments[name] for name in _TIMES if name in arguments), None)
    counts_up = (model_of(denoiser) or _UNDECLARED).counts_up
    return 1 - time if counts_up and time is not None else time


def latent_grid(
    sample: Tensor, arguments: Mapping[str, Any], denoiser: nn.Module
) -> tuple[int, ...]:
    """([frames,] height, width) of the latent of one denoiser call; () if it shows none.

    sample: the model input; arguments: of the call, by name. Where the latent is packed into a
    sequence of tokens, an argument of the model says how.
    """
    record = model_of(denoiser) or _UNDECLARED
    if record.placeless is not None:
        return ()
    if sample.dim() == 5:
        side = dict(zip(record.axes, sample.shape, strict=True))
        return side["f"], side["h"], side["w"]
    if sample.dim() == 4:
        return tuple(sample.shape[-2:])
    images = image_tokens(sample, arguments, denoiser)
    if images is not None:
        grid = images.grids[images.target]
        return (grid.frames, grid.height, grid.width) if grid.frames > 1 else tuple(grid)
    sides = (arguments.get(key) for key in ("num_frames", "height", "width"))
    said = tuple(side for side in sides if isinstance(side, int))
    return said if len(said) == 3 else ()


def image_tokens(
    sample: Any, arguments: Mapping[str, Any], denoiser: nn.Module
) -> ImageTokens | None:
    """The images that stand in one sequence with each other (and with the text, in joint models).

    None where the arguments of the call do not tell them.
    """
    record = model_of(denoiser) or _UNDECLARED
    if record.placeless is not None:
        return None
    if isinstance(sample, list) and len({one.shape for one in sample}) == 1:
        sample = torch.stack(sample)
    mask = arguments.get("encoder_attention_mask")
    if record.text_masked and isinstance(mask, Tensor) and len(set(mask.sum(1).tolist())) > 1:
        return None  # each row's image begins somewhere else
    if not isinstance(sample, Tensor):
        return None
    if record.parts == "img_ids" and isinstance(arguments.get("img_ids"), Tensor):
        found = _numbered(arguments["img_ids"], record.target)
    elif record.parts == "img_shapes" and arguments.get("img_shapes"):
        found = _listed(arguments["img_shapes"][0], denoiser)
    elif record.order is not None and sample.dim() in (4, 5):
        return _patched(sample, record, denoiser)
    else:
        return None
    return found if found is not None and found.count == sample.shape[1] else None


def _listed(shapes: Any, denoiser: nn.Module) -> ImageTokens:
    """From the (frames, height, width) of each image; layers are the target's frames."""
    grids = [Grid(h, w, f) for f, h, w in (shapes if isinstance(shapes, list) else [shapes])]
    if getattr(getattr(uncompiled(denoiser), "config", {}), "use_layer3d_rope", False):
        first, *_, given = grids  # layers of one size, then the image that falls into them
        grids = [Grid(first.height, first.width, len(grids) - 1), given]
    return ImageTokens(tuple(grids))


def _numbered(ids: Tensor, target: int | None) -> ImageTokens | None:
    """From (number of the image, row, column, ...) of every token, [tokens, axes]."""
    ids = ids[0] if ids.dim() == 3 else ids
    numbers = ids[:, 0].tolist()
    edges = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1]]
    grids, firsts = [], []
    for start, stop in zip([0, *edges], [*edges, len(numbers)], strict=True):
        part = ids[start:stop]
        sides = [int(part[:, axis].max() - part[:, axis].min()) + 1 for axis in (1, 2)]
        if math.prod(sides) != stop - start:
            return None
        grids.append(Grid(*sides))
        firsts.append(numbers[start])
    if target is not None and target not in firsts:  # rows of a grid of images, all of them drawn
        if len({grid.width for grid in grids}) > 1:
            return None
        return ImageTokens((Grid(sum(grid.height for grid in grids), grids[0].width),))
    return ImageTokens(tuple(grids), firsts.index(min(firsts)))


def _patched(sample: Tensor, record: Model, denoiser: nn.Module) -> ImageTokens | None:
    """From the sides of a latent and the patches that the model cuts it into."""
    config: Any = getattr(uncompiled(denoiser), "config", {})
    if not hasattr(config, "get"):
        return None
    size = config.get("patch_size") or config.get("all_patch_size")
    if isinstance(size, list | tuple):
        size = size[0] if len(size) == 1 else tuple(size)
    if isinstance(size, int):
        time = config.get("patch_size_t") or config.get("temporal_patch_size")
        size = (time if isinstance(time, int) else 1, size, size)
    if not isinstance(size, tuple) or len(size) not in (2, 3):
        return None
    axes = record.axes if sample.dim() == 5 else "bchw"
    sides = {"f": 1} | dict(zip(axes, sample.shape, strict=True))
    frames, height, width = (
        -(-sides[axis] // part) for axis, part in zip("fhw", (1, *size)[-3:], strict=True)
    )
    return ImageTokens((Grid(height, width, frames),))


def text_tokens(text: Any, arguments: Mapping[str, Any], denoiser: nn.Module) -> int | None:
    """How many tokens the attention sees of the text that a pipeline gave.

    text: the call's text argument. None if there is none, or if each row has a number of its own.
    """
    model, record = uncompiled(denoiser), model_of(denoiser) or _UNDECLARED
    if record.several_texts or getattr(model, "config", {}).get("encoder_hid_dim_type") == (
        "text_image_proj"  # Kandinsky 2.1 puts an image's embedding before the text
    ):
        return None
    if isinstance(text, list) and text and all(isinstance(one, Tensor) for one in text):
        longest = max(len(one) for one in text)
        return -(-longest // record.text_block) * record.text_block
    if not isinstance(text, Tensor):
        return None
    mask = arguments.get("encoder_attention_mask")
    # Each row's text, as long as it is, stands right before its image.
    if record.text_masked and isinstance(mask, Tensor):
        lengths = mask.sum(1)
        return int(lengths[0]) if bool((lengths == lengths[0]).all()) else None
    if text.dim() < 3:
        return None
    tokens = text.shape[2] if text.dim() == 4 and text.shape[1] == 1 else text.shape[1]
    return tokens + registers(model)


def text_rotations(denoiser: nn.Module) -> Tensor | None:
    """By how much queries and keys of the text are rotated at each position, complex [positions,
    channels / 2], where the model numbers the positions itself and rotations are powers of the one
    at position 1 (Qwen-Image); None elsewhere."""
    record, model = model_of(denoiser) or _UNDECLARED, uncompiled(denoiser)
    if record.rotations is None:
        return None
    table: Any = model.get_submodule(record.rotations).pos_freqs
    return table if isinstance(table, Tensor) else None


def registers(denoiser: nn.Module) -> int:
    """Learned tokens that a model puts before the text (AuraFlow)."""
    found = getattr(uncompiled(denoiser), "register_tokens", None)
    return found.shape[1] if isinstance(found, Tensor) and found.dim() == 3 else 0


LAYOUT_RESOLUTION = Fraction(1, 4)
LAYOUT_CELLS = 16


def finest_within(
    sites: Iterable[Site], latent: tuple[int, ...], resolution: Fraction = LAYOUT_RESOLUTION
) -> Fraction | None:
    """The finest resolution among `sites` that holds the layout of a latent ([frames,] h, w).

    That is no finer than `resolution` of the latent, or than LAYOUT_CELLS cells. Where no site is
    as coarse (a transformer has one grid throughout), the coarsest there is; None without any.
    """
    side = max(latent[-2:])
    known = sorted({site.resolution for site in sites if site.resolution is not None})
    bound = max(side * resolution, Fraction(min(side, LAYOUT_CELLS)))
    fitting = [r for r in known if side * r <= bound]
    if fitting:
        return fitting[-1]
    return known[0] if known else None


def latent_axes(denoiser: nn.Module, dims: int) -> str:
    """Of so many dimensions of a family's latents, in order: b images, n packed tokens, c channels,
    f frames, h and w sides."""
    return {3: "bnc", 4: "bchw"}.get(dims, (model_of(denoiser) or _UNDECLARED).axes)


def over_latent(mask: Tensor, latent: Tensor, axes: str) -> Tensor:
    """A mask, or weights, [frames | 1, height, width] in the shape of one latent of any family.

    axes: of latents (`latent_axes`).
    """
    if latent.dim() == 2:  # packed tokens [frames * height * width, channels]
        if mask.numel() == len(latent):
            return mask.reshape(-1, 1)
        return mask[0].reshape(-1, 1).repeat(len(latent) // mask[0].numel(), 1)
    if latent.dim() == 4:  # of a video
        frames = latent.shape[axes.index("f") - 1]
        every = mask if mask.shape[0] in (1, frames) else mask.any(0, keepdim=True)
        return every.unsqueeze(axes.index("c") - 1)
    return mask
