"""What a step costs the host at each attention call: a UNet of SDXL's shape, with hardly any sums.

    python -m tests.benchmarks.host_time [rounds]

On a fast GPU a step takes as long as the host needs to launch it. SDXL's 140 attention calls are
made here on tensors so small that Python and dispatch are all there is. Printed is the time over
that of the plain model, per call, in microseconds of process time; medians of interleaved rounds,
one thread. "launched" goes the way of a GPU down to Triton's launcher, which launches nothing.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from typing import Any
from unittest.mock import patch

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)

import torch
from diffusers import UNet2DConditionModel

import hookctl
from hookctl import Editor
from hookctl.kernels.common import guard, launch, launch_tables
from tests.benchmarks.driverless import driverless
from tests.benchmarks.moves import Edits

Context = Callable[[Any], Any]
WARM_UP = 4  # rounds that are not counted


class Idle(Editor):
    def attention(self, call: Any) -> None:
        pass


class Reading(Editor):
    """The maps of three words of both images."""

    sites = "cross"

    def attention(self, call: Any) -> None:
        call.read(call.rows.where(branch="cond"), (1, 2, 3), lambda row, values: None)


class Replacing(Editor):
    """The maps of the first image in the place of the second's, guided rows."""

    def attention(self, call: Any) -> None:
        source, edited = call.rows.where(branch="cond")
        call.borrow(edited, q=source, k=source)


def like_sdxl() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(1, 1, 2),
        cross_attention_dim=16,
        norm_num_groups=4,
        use_linear_projection=True,
    ).eval()


def controlled(editor: Editor, backend: str = "auto") -> Context:
    return lambda unet: hookctl.control(unet, editor, rows=("uncond", "cond"), backend=backend)


@contextmanager
def launched(unet: Any) -> Iterator[None]:
    """Edited by kernels that are launched up to the driver's door. Nobody fills their outputs."""
    with ExitStack() as stack:
        for target, name, value in (
            (guard, "available", lambda device: None),
            (launch, "available", lambda device: None),
            (guard, "_tried", {"cpu": None}),
            (launch_tables, "arch_of", lambda device: "sm_90"),
            (torch.cuda, "device_of", lambda like: nullcontext()),
        ):
            stack.enter_context(patch.object(target, name, value))
        stack.enter_context(driverless())
        stack.enter_context(controlled(Replacing(), "triton")(unet))
        yield


CASES: dict[str, Context] = {
    "plain": lambda unet: nullcontext(),
    "every call shown": controlled(Idle()),
    "maps read": controlled(Reading()),
    "borrow": controlled(Replacing()),
    "P2P": controlled(Edits()),
    "borrow, launched": launched,
}


def main(rounds: int = 15) -> None:
    torch.set_num_threads(1)
    unet = like_sdxl()
    inputs = (torch.randn(4, 4, 8, 8), torch.tensor(500), torch.randn(4, 77, 16))
    calls = sum(hasattr(module, "processor") for module in unet.modules())
    models = {name: deepcopy(unet) for name in CASES}
    times: dict[str, list[float]] = {name: [] for name in CASES}
    with torch.no_grad(), ExitStack() as stack:
        for name, context in CASES.items():
            stack.enter_context(context(models[name]))
        for i in range(rounds + WARM_UP):
            for name, model in models.items():
                start = time.process_time()
                model(*inputs)
                taken = time.process_time() - start
                if i >= WARM_UP:
                    times[name].append(taken)
    print(f"plain: {1000 * statistics.median(times['plain']):.1f} ms, {calls} attention calls")
    for name, taken in times.items():
        over = [a - b for a, b in zip(taken, times["plain"], strict=True)]
        print(f"{name:30} {1e6 * statistics.median(over) / calls:7.0f} us a call")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
