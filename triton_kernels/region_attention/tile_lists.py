"""Which tiles of keys each tile of queries has to visit, from the bit sets of their tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Join = Callable[[Tensor, Tensor], Tensor]


def tile_lists(
    query_regions: Tensor, key_regions: Tensor, query_tile: int, key_tile: int
) -> tuple[Tensor, Tensor]:
    """Lists of tiles, made on the device of the regions without waiting for it.

    Regions: int64 [batch | 1, tokens]; tiles: powers of two. Returns int32 lists [batch | 1, query
    tiles, key tiles], first the tiles all of whose pairs are allowed because all tokens share one
    region, then those whose pairs need a test, and how many the first and both are, int32 [batch
    | 1, query tiles, 2]. A tile without any allowed pair is never among them.
    """
    q_any = _joined(query_regions, query_tile, 0, torch.bitwise_or)
    k_any = _joined(key_regions, key_tile, 0, torch.bitwise_or)
    # Queries past the end agree with everything, since nothing is written for them; keys past the
    # end are in no region, so that their tile gets the test that leaves them out.
    q_all = _joined(query_regions, query_tile, -1, torch.bitwise_and)
    k_all = _joined(key_regions, key_tile, 0, torch.bitwise_and)
    some = (q_any[:, :, None] & k_any[:, None, :]) != 0
    whole = (q_all[:, :, None] & k_all[:, None, :]) != 0
    rank = 2 - some.int() - whole.int()
    order = torch.sort(rank, dim=-1, stable=True).indices.int()
    return order, torch.stack([whole.sum(-1), some.sum(-1)], -1).int()


def apart(order: Tensor) -> int:
    """Lists from one row of the batch to the next; 0 where one row serves all."""
    return order.shape[1] if order.shape[0] > 1 else 0


def _joined(regions: Tensor, tile: int, beyond: int, join: Join) -> Tensor:
    """The bit sets of each tile joined, [batch, tiles]; `beyond` stands past the end."""
    padded = F.pad(regions, (0, -regions.shape[-1] % tile), value=beyond)
    joined = padded.unflatten(-1, (-1, tile))
    while joined.shape[-1] > 1:
        joined = join(*joined.chunk(2, -1))
    return joined[..., 0]
