"""Tiles of a canvas: they cover all of it, and put together are the canvas again."""

from __future__ import annotations

import pytest
import torch

from hookctl.errors import InputError
from hookctl.recipes.common.canvas.tiles import Tile, tiles_of


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize(("height", "width"), [(16, 28), (17, 16), (9, 40), (16, 16), (5, 3)])
def test_tiles_cover_the_canvas(height: int, width: int, wrap: bool) -> None:
    tiles = tiles_of(height, width, (16, 16), (8, 6), wrap=wrap)
    count, back = torch.zeros(height, width), torch.zeros(2, height, width)
    x = torch.randn(2, height, width)
    for tile in tiles:
        assert tile.cut(x).shape == (2, min(16, height), min(16, width))
        tile.add(torch.ones(tile.height, tile.width), count)
        tile.add(tile.cut(x), back)
    assert (count > 0).all()
    assert torch.allclose(back / count, x)
    assert len(set(tiles)) == len(tiles)
    if wrap and width > 16:
        assert count[0].sum() == 16 * len({tile.left for tile in tiles})
        if width % 6 == 4:  # 40: seven lefts, all round
            assert count[0].min() >= 2


def test_the_last_tile_ends_at_the_side() -> None:
    lefts = [tile.left for tile in tiles_of(16, 30, (16, 16), (8, 8))]
    assert lefts == [0, 8, 14]
    assert tiles_of(16, 16, (16, 16)) == [Tile(0, 0, 16, 16, 16, 16)]
    assert [tile.left for tile in tiles_of(16, 20, (16, 16))] == [0, 2, 4]
    with pytest.raises(InputError, match="20 rows from tile to tile"):
        tiles_of(40, 40, (16, 16), (20, 8))
