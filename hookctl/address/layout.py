"""Which grids hold a picture's layout: fine enough to tell objects apart, coarse enough to be calm.

The methods speak of "the 16 x 16 layers" of a 64 x 64 latent. That is a quarter of the latent's
side, and the same rule finds the 32 x 32 layers of SDXL. On a latent so small that a quarter of it
is no picture any more, the published number of cells is what is meant.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

from torch import Tensor

from hookctl.address.sites import Site

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


def over_latent(mask: Tensor, latent: Tensor) -> Tensor:
    """A mask, or weights, [frames | 1, height, width] in the shape of one latent of any family."""
    if latent.dim() == 2:  # packed tokens [height * width, channels]
        return mask[0].reshape(-1, 1)
    if latent.dim() == 4:  # [channels, frames, height, width]
        frames = latent.shape[1]
        return (mask if mask.shape[0] in (1, frames) else mask.any(0, keepdim=True))[None]
    return mask
