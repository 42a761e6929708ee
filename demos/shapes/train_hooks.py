"""Trains modules over the frozen embedded pipeline: `instances` (grounding and ScaleU) and
`collaboration` (a model that reads masks, and dynamic diffusers).

    python -m hookctl.demos.shapes.train_hooks instances --out out/hooks --minutes 90
    python -m hookctl.demos.shapes.train_hooks instances --out out/hooks --minutes 30 --resume

Seeded; kept every few minutes in `--out`, where `--resume` finds it; the weights are written there
as `NAME.safetensors` under the names of the official checkpoints.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from hookctl.demos.shapes.hooks.collaboration import CollaborationTask
from hookctl.demos.shapes.hooks.identity import IdentityTask
from hookctl.demos.shapes.hooks.identity_encoder import IdentityEncoderTask
from hookctl.demos.shapes.hooks.identity_net import IdentityNetTask
from hookctl.demos.shapes.hooks.instances import InstancesTask
from hookctl.demos.shapes.hooks.task import Base, Task
from hookctl.demos.shapes.muon import Muon
from hookctl.demos.shapes.train import log

TASKS: dict[str, Callable[[Base], Task]] = {
    "instances": InstancesTask,
    "collaboration": CollaborationTask,
    "identity_encoder": IdentityEncoderTask,
    "identity": IdentityTask,
    "identity_net": IdentityNetTask,
}
WARMUP, LOOK, SAVE = 100, 100, 50  # in steps
DECAY = 0.999  # of the averaged weights


class Training:
    """One task's training: optimizer, averaged weights and the clock."""

    def __init__(self, task: Task, minutes: float, seed: int, folder: Path, name: str) -> None:
        self.task, self.minutes, self.seed = task, minutes, seed
        self.folder, self.name = folder, name
        self.parameters = list(task.module.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = Muon(task.module, task.others)
        self.step, self.spent = 0, 0.0
        self.looks: list[dict[str, float]] = []

    @property
    def file(self) -> Path:
        return self.folder / f"{self.name}.pt"

    def resume(self) -> None:
        """Go on from what the folder holds."""
        kept = torch.load(self.file, weights_only=True)
        self.task.module.load_state_dict(kept["module"])
        self.average = kept["average"]
        self.optimizer.buffers = kept["buffers"]
        self.optimizer.adam.load_state_dict(kept["adam"])
        self.step, self.spent, self.looks = kept["step"], kept["spent"], kept["looks"]

    def save(self) -> None:
        """Keep everything, and the averaged weights as they are shipped."""
        made = self.file.with_suffix(".tmp")
        torch.save(
            {
                "module": self.task.module.state_dict(),
                "average": self.average,
                "buffers": self.optimizer.buffers,
                "adam": self.optimizer.adam.state_dict(),
                "step": self.step,
                "spent": self.spent,
                "looks": self.looks,
            },
            made,
        )
        made.replace(self.file)
        own = [p.detach().clone() for p in self.parameters]
        self._take(self.average)
        state = {k: _half(v) for k, v in self.task.state().items()}
        self._take(own)
        save_file(state, self.folder / f"{self.name}.safetensors", metadata={"format": "pt"})
        (self.folder / f"{self.name}.json").write_text(json.dumps(self.looks) + "\n", "utf-8")

    @torch.no_grad()
    def _take(self, values: Sequence[Tensor]) -> None:
        for p, value in zip(self.parameters, values, strict=True):
            p.copy_(value)

    def run(self) -> None:
        """Train until the minutes are over."""
        budget = 60.0 * self.minutes
        began, before, losses = time.time(), self.spent, []
        while self.spent < budget:
            part = self.spent / budget
            fall = 1.0 if part < 0.6 else 0.5 + 0.5 * math.cos(math.pi * (part - 0.6) / 0.4)
            if self.step in self.task.stages:
                self._take(self.average)
            rng = np.random.default_rng((self.seed, self.step))
            torch.manual_seed(self.step)
            loss = self.task.loss(rng, self.step)
            self.task.module.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            warm = min(1.0, (self.step + 1) / WARMUP)
            self.optimizer.step(self.task.rate * warm * max(fall, 0.01))
            ramp = min(DECAY, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - ramp)
            losses.append(float(loss.detach()))
            self.step += 1
            self.spent = before + time.time() - began
            if self.step % LOOK == 0:
                seen = self.task.look()
                self.looks.append({"step": self.step, **seen})
                said = " ".join(f"{k} {v:g}" for k, v in seen.items())
                mean = 1000 * sum(losses) / len(losses)
                log(f"{self.name} {self.step} {self.spent / budget:.0%} loss {mean:.1f} {said}")
                losses = []
            if self.step % SAVE == 0:
                self.save()
        self.save()


def _half(value: Tensor) -> Tensor:
    """Matrices in half precision; gates and vectors as they are."""
    value = value.detach().cpu().contiguous()
    return value.half() if value.dim() > 1 else value.clone()


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m hookctl.demos.shapes.train_hooks")
    parser.add_argument("name", choices=tuple(TASKS))
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--minutes", type=float, default=90.0, help="wall clock of the training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from what --out holds")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    task = TASKS[options.name](Base(options.device))
    training = Training(task, options.minutes, options.seed, options.out, options.name)
    if options.resume and training.file.exists():
        training.resume()
    size = sum(p.numel() for p in training.parameters) / 1e6
    log(f"{options.name}: {size:.2f} M parameters")
    training.run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
