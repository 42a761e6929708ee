"""Which keys a query may see, as bit sets per token: no mask is ever formed."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.errors import UnsupportedError

_BITS = 64


class KeyRegions:
    """Per-token bit sets: a query sees a key where `queries & keys` is not 0.

    queries: int64 [N]; keys: int64 [M], on `device`. A query that may see no key gives 0.
    """

    def __init__(self, queries: Tensor, keys: Tensor, device: torch.device) -> None:
        self.queries, self.keys = queries.to(device), keys.to(device)
        # Their values are looked at where they were made: the CPU, so that no call waits.
        self._made = (queries, keys)
        self._extended: dict[int, KeyRegions] = {}
        self._spans: dict[tuple[int, int, int], KeyRegions] = {}
        self._joined: dict[KeyRegions, KeyRegions] = {}
        self._masks: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}
        # Tiles of keys that the region kernel visits, by the dtype and width of what attends.
        self.tiles: dict[tuple[torch.dtype, int], tuple[Tensor, Tensor]] = {}

    @cached_property
    def _kinds(self) -> tuple[Tensor, Tensor]:
        return self._made[0].unique(return_inverse=True)

    @property
    def kinds(self) -> int:
        """How many distinct bit sets the queries have."""
        return len(self._kinds[0])

    @cached_property
    @torch.inference_mode(False)  # kept for later calls, which may be learned through
    def blocks(self) -> tuple[tuple[Tensor | None, Tensor | None], ...]:
        """(positions of queries, of the keys they see) for each distinct bit set of a query.

        None means all; queries that see nothing are left out.
        """
        device, found = self.queries.device, []
        labels, which = self._kinds
        for i, label in enumerate(labels.tolist()):
            seen = (self._made[1] & label) != 0
            if bool(seen.any()):
                rows = None if len(labels) == 1 else (which == i).nonzero()[:, 0].to(device)
                found.append((rows, None if bool(seen.all()) else seen.nonzero()[:, 0].to(device)))
        return tuple(found)

    @cached_property
    def allow_all(self) -> bool:
        """Whether every query is known to see every key; never known of tensors on a device."""
        if any(made.device.type != "cpu" for made in self._made):
            return False
        return all(bool((self._made[1] & label).all()) for label in self._kinds[0].tolist())

    def mask(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is added to scores, [1, 1, 1, N, M] in the dtype of `like`, and which queries see no
        key, [N, 1], None if each sees some. Kept: for few tokens.
        """
        if like.dtype not in self._masks:
            self._masks[like.dtype] = self._made_mask(like.dtype)
        return self._masks[like.dtype]

    @torch.inference_mode(False)
    def _made_mask(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        queries, keys = self._made
        allowed = (queries[:, None] & keys) != 0
        empty = ~allowed.any(-1, keepdim=True)
        # A query without keys sees all of them here: a softmax of nothing has no gradient.
        bias = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        bias = bias.masked_fill(~(allowed | empty), float("-inf"))[None, None, None]
        device = self.queries.device
        return bias.to(device), empty.to(device) if empty.any() else None

    def extended(self, extra: int) -> KeyRegions:
        """With `extra` further keys, which belong to every region."""
        if not extra:
            return self
        if extra not in self._extended:
            keys = F.pad(self._made[1], (0, extra), value=-1)
            self._extended[extra] = KeyRegions(self._made[0], keys, self.queries.device)
        return self._extended[extra]

    def of_span(self, start: int, stop: int, extra: int) -> KeyRegions:
        """Of a span of the keys, and of `extra` further ones, which belong to every region."""
        if (start, stop, extra) not in self._spans:
            keys = F.pad(self._made[1][start:stop], (0, extra), value=-1)
            made = KeyRegions(self._made[0], keys, self.queries.device)
            self._spans[start, stop, extra] = made
        return self._spans[start, stop, extra]

    def both(self, other: KeyRegions) -> KeyRegions:
        """What both allow: each distinct pair of a query's bit sets becomes one bit."""
        if other not in self._joined:
            (q, k), (other_q, other_k) = ([m.cpu() for m in r._made] for r in (self, other))
            pairs, which = torch.stack([q, other_q]).unique(dim=1, return_inverse=True)
            kinds = pairs.shape[1]
            if kinds > _BITS:
                raise UnsupportedError(
                    f"restrict: two restrictions of one row divide its queries into {kinds} "
                    f"kinds, and at most {_BITS} can be told apart; join them in one restrict"
                )
            bits = torch.ones(kinds, dtype=torch.int64) << torch.arange(kinds)
            seen = ((k[:, None] & pairs[0]) != 0) & ((other_k[:, None] & pairs[1]) != 0)
            # Distinct bits: their sum is their union.
            keys = torch.where(seen, bits, 0).sum(1)
            self._joined[other] = KeyRegions(bits[which], keys, self.queries.device)
        return self._joined[other]
