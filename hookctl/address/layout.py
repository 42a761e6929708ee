"""Which grids hold a picture's layout: fine enough to tell objects apart, coarse enough to be calm.

The methods speak of "the 16 x 16 layers" of a 64 x 64 latent. That is a quarter of the latent's
side, and the same rule finds the 32 x 32 layers of SDXL. On a latent so small that a quarter of it
is no picture any more, the published number of cells is what is meant.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

from hookctl.address.sites import Grid, Site

LAYOUT_RESOLUTION = Fraction(1, 4)
LAYOUT_CELLS = 16


def within(grid: Grid, latent: tuple[int, ...], resolution: Fraction = LAYOUT_RESOLUTION) -> bool:
    """Whether a grid is no finer than `resolution` of the latent (or than LAYOUT_CELLS cells)."""
    side = max(latent[-2:])
    return max(grid.height, grid.width) <= max(side * resolution, min(side, LAYOUT_CELLS))


def finest_within(
    sites: Iterable[Site], latent: tuple[int, ...], resolution: Fraction = LAYOUT_RESOLUTION
) -> Fraction | None:
    """The finest resolution among `sites` that is `within`, else the coarsest there is."""
    side = max(latent[-2:])
    known = sorted({site.resolution for site in sites if site.resolution is not None})
    bound = max(side * resolution, min(side, LAYOUT_CELLS))
    fitting = [r for r in known if side * r <= bound]
    if fitting:
        return fitting[-1]
    return known[0] if known else None
