"""Trains the flow-matching sibling of the embedded pipeline, and writes it in the diffusers layout.

    python -m hookctl.demos.shapes.train_flow --out out/flow --minutes 180
    python -m hookctl.demos.shapes.train_flow --out out/flow --minutes 240 --resume

Text encoder, autoencoder and latents are the embedded pipeline's. The state is kept in `--out`
every two minutes, where `--resume` finds it; figures are written to `--out`/measurements.json and
the pipeline to `--out`/weights, both every 20 minutes. Schedules go by the share of the planned
minutes, so more of them may be given on the way.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from hookctl.demos.shapes.flow.export import export
from hookctl.demos.shapes.flow.looks import look
from hookctl.demos.shapes.flow.training import STATE, Parts, Plan, Trainer
from hookctl.demos.shapes.train import log

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def measured(trainer: Trainer) -> dict[str, float]:
    """Figures of the averaged weights, which are written as a pipeline beside."""
    export(trainer.parts, trainer.trained(), trainer.plan.folder)
    return look(trainer)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m hookctl.demos.shapes.train_flow")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--minutes", type=float, default=180.0, help="of the training")
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall",
        help="what the minutes are of; cpu: of one core, where the machine is shared with others",
    )  # fmt: skip
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--batch", type=int, default=64, help="pictures in a step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16",
        help="of the network; bfloat16 is the quicker one on a GPU and on a CPU with AMX",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from what --out holds")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        options.minutes, options.out, options.seed, options.batch, options.rate,
        device=options.device, dtype=getattr(torch, options.dtype), log=log,
        clock=CLOCKS[options.clock],
    )  # fmt: skip
    trainer = Trainer(plan, Parts.embedded(options.device))
    if options.resume and (options.out / STATE).exists():
        trainer.resume()
    size = sum(p.numel() for p in trainer.parameters) / 1e6
    log(f"{size:.2f} M parameters, from step {trainer.steps} at {trainer.spent / 60:.1f} minutes")
    trainer.run(measured)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
