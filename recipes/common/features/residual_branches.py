"""The residual branch of a decoder's block, as another row has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from hookctl.errors import HoleError, InputError, UnsupportedError
from hookctl.hooks.skips import Concat, concats


def decoder_block(who: str, model: nn.Module, layer: int | None, resolution: Fraction) -> Concat:
    """One of the residual blocks of a UNet's decoder.

    layer: which, from 0, the coarsest; None for the second at a resolution relative to the latent.
    Raises InputError for a layer that there is not, UnsupportedError for a model that is no such
    UNet, or where None means nothing.
    """
    name = type(model).__name__
    found = [
        one for one in concats(model) if isinstance(getattr(one.module, "conv2", None), nn.Module)
    ]
    if not found:
        raise UnsupportedError(
            f"{who}: {name} has no decoder of residual blocks, as the UNets of Stable Diffusion "
            "have; give it a UNet pipeline"
        )
    if layer is None:
        at = [one for one in found if one.resolution == resolution]
        if len(at) < 2:
            raise UnsupportedError(
                f"{who}: the decoder of this {name} has no second residual block at {resolution} "
                f"of the latent; give layer=, from 0 to {len(found) - 1}"
            )
        return at[1]
    if layer >= len(found):
        raise InputError(
            f"{who}: layer={layer}; the decoder of this {name} has {len(found)} residual blocks, "
            f"so give 0 to {len(found) - 1}"
        )
    return found[layer]


@contextmanager
def given_residuals(block: nn.Module, rows: int, sources: Mapping[int, int]) -> Iterator[None]:
    """While a denoiser call lasts, rows add to their shortcut what other rows would add.

    block: with a last convolution `conv2`, whose output is that; rows: how many the call has;
    sources: index of a row -> index of the row that it is taken from. Raises HoleError if the block
    did not run.
    """
    ran: list[bool] = []

    def give(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        ran.append(True)
        stack, out = output.unflatten(0, (rows, -1)), output.unflatten(0, (rows, -1)).clone()
        for row, source in sources.items():
            out[row] = stack[source]
        return out.flatten(0, 1)

    handle = block.get_submodule("conv2").register_forward_hook(give)
    try:
        yield
    finally:
        handle.remove()
    if not ran:
        raise HoleError(
            "a residual block whose features are injected did not run in a denoiser call: a "
            "compiled graph or a cache is bypassing the hooks. Don't compile the model, switch the "
            "cache off, or inject no features (feature_stop=0)"
        )
