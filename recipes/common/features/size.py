"""How much memory features of attention take, and how much there is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from hookctl.address import families
from hookctl.address.latent import image_tokens, latent_grid, text_tokens
from hookctl.address.sites import Grid, ImageTokens, Site
from hookctl.loop.trajectory import Trajectory

_UNKNOWN = 4e9  # bytes free where the system does not tell


def bytes_of_sites(program: Trajectory, sites: Iterable[Site], *, text: bool) -> int:
    """Of one tensor, such as the values, of each site in one row of a program's calls.

    text: of the whole sequence, not of the image that is drawn alone.
    """
    size, paths = next(program.denoiser.parameters()).element_size(), {site.path for site in sites}
    # A pipeline of several denoisers asks one of them at a time.
    return size * max(
        sum(
            _tokens(site, program, text) * _width(module)
            for site, module in families.describe_sites(denoiser, name)
            if site.path in paths
        )
        for name, denoiser in families.denoisers_of(program.pipe)
    )


def free_bytes(device: torch.device) -> float:
    """Memory that is free on a device."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as file:
            free = next(line for line in file if line.startswith("MemAvailable"))
        return int(free.split()[1]) * 1024.0
    except (OSError, StopIteration):  # not Linux
        return _UNKNOWN


def _tokens(site: Site, program: Trajectory, text: bool) -> int:
    """Of a site in one row of a program's calls."""
    template, model = program.template, program.denoiser
    if text and (images := _images(program)) is not None:
        said = template.arguments.get(template.text_name or "")
        words = text_tokens(said, template.arguments, model) if site.kind == "joint" else 0
        return images.count + (words or 0)
    return token_grid(site, program).tokens


def token_grid(site: Site, program: Trajectory) -> Grid:
    """The grid that the drawn image's tokens form at a site."""
    if (images := _images(program)) is not None:
        return images.grids[images.target]
    template = program.template
    sample = template.arguments[template.sample]
    *frames, height, width = latent_grid(sample, template.arguments, program.denoiser)
    rows, columns = (math.ceil(side * (site.resolution or 1)) for side in (height, width))
    return Grid(rows, columns, *frames)


def _images(program: Trajectory) -> ImageTokens | None:
    template = program.template
    return image_tokens(template.arguments[template.sample], template.arguments, program.denoiser)


def _width(module: Any) -> int:
    """Channels of the values of an attention module, all heads together."""
    linear = getattr(module, "to_v", None)
    return int(module.inner_dim if linear is None else linear.out_features)
