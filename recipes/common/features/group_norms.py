"""Group norms whose statistics a row shares with another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hookctl.errors import HoleError


@contextmanager
def shared_group_norms(model: nn.Module, rows: int, sources: Mapping[int, int]) -> Iterator[None]:
    """Normalise rows together with others while a denoiser call lasts.

    rows: how many the call has; sources: index of a row -> index of the row that it is normalised
    with, as one feature map of twice the height (Hertz et al., "StyleAligned", arXiv 2312.02133).
    Raises HoleError if no group norm ran through its hooks.
    """
    ran: list[bool] = []

    def shared(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        ran.append(True)
        x: Tensor = args[0] if args else kwargs["input"]
        if x.dim() < 3 or x.shape[0] % rows:
            return output
        stack, out = x.unflatten(0, (rows, -1)), output.unflatten(0, (rows, -1)).clone()
        for row, source in sources.items():
            joint = module.forward(torch.cat([stack[row], stack[source]], 2))
            out[row] = joint[:, :, : x.shape[2]]
        return out.flatten(0, 1)

    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    handles = [norm.register_forward_hook(shared, with_kwargs=True) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if norms and not ran:
        raise HoleError(
            "no group norm ran in a denoiser call: a compiled graph is bypassing the hooks. Share "
            "no group norms, or don't compile the model"
        )
