"""What an idle hook costs: interleaved medians on a CPU, one thread.

    python -m tests.benchmarks.idle_overhead [rounds]

A reduced SD1.5 UNet (64-128-256-256 channels, 32 x 32 latents, batch of 2) is called bare ("none"
twice, which shows the noise), with an editor whose window is over, with one that is shown a single
site and does nothing, and with one that is shown every site and does nothing. Ratios are medians of
the ratio to the bare call of the same round, in process time.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import UNet2DConditionModel

import hookctl
from hookctl import Editor


class Idle(Editor):
    def attention(self, call: Any) -> None:
        pass


class Over(Idle):
    stop = 0.0


class OneSite(Idle):
    sites = "mid self"


def reduced_sd15() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 128, 256, 256),
        cross_attention_dim=768,
        attention_head_dim=8,
    ).eval()


def main(rounds: int = 30) -> None:
    torch.set_num_threads(1)
    unet = reduced_sd15()
    inputs = (torch.randn(2, 4, 32, 32), torch.tensor(500), torch.randn(2, 77, 768))
    cases: dict[str, Callable[[], Any]] = {
        "none": nullcontext,
        "none again": nullcontext,
        "window over": lambda: hookctl.control(unet, Over(), rows=("uncond", "cond")),
        "one site shown": lambda: hookctl.control(unet, OneSite(), rows=("uncond", "cond")),
        "every site shown": lambda: hookctl.control(unet, Idle(), rows=("uncond", "cond")),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    with torch.no_grad():
        for i in range(rounds + 2):
            for name, context in cases.items():
                with context():
                    start = time.process_time()
                    unet(*inputs)
                    taken = time.process_time() - start
                if i >= 2:
                    times[name].append(taken)
    for name, taken in times.items():
        ratios = [a / b for a, b in zip(taken, times["none"], strict=True)]
        print(
            f"{name:18} {1000 * statistics.median(taken):8.1f} ms {statistics.median(ratios):7.4f}"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
