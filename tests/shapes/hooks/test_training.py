"""The trainer of modules: a step, what it keeps, and going on from there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hookctl.demos.shapes.muon import Muon
from hookctl.demos.shapes.train_hooks import Training


class Sums:
    """Learns the sum of four numbers."""

    others, rate, stages = ("last",), 0.01, (2,)

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.ModuleDict({"first": nn.Linear(4, 8), "last": nn.Linear(8, 1)})

    def loss(self, rng: np.random.Generator, step: int) -> Tensor:
        x = torch.from_numpy(rng.standard_normal((16, 4), np.float32))
        made: Tensor = self.module["last"](self.module["first"](x))
        return (made[:, 0] - x.sum(1)).square().mean()

    def look(self) -> dict[str, float]:
        return {"bias": float(self.module["last"].bias)}

    def state(self) -> dict[str, Tensor]:
        return {f"sums.{name}": value for name, value in self.module.state_dict().items()}


def training(folder: Path, minutes: float) -> Training:
    return Training(Sums(), minutes, 0, folder, "sums")


def test_it_learns_and_goes_on_from_what_it_kept(tmp_path: Path) -> None:
    first = training(tmp_path, 1e-3)
    before = [p.detach().clone() for p in first.parameters]
    first.run()
    assert first.step > 0
    assert all(not torch.equal(a, b) for a, b in zip(before, first.parameters, strict=True))
    again = training(tmp_path, 2e-3)
    again.resume()
    assert (again.step, again.spent) == (first.step, first.spent)
    for mine, theirs in ((again.parameters, first.parameters), (again.average, first.average)):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.optimizer.buffers, first.optimizer.buffers, strict=True)
    )
    again.run()
    assert again.step > first.step
    kept = load_file(tmp_path / "sums.safetensors")
    assert kept["sums.first.weight"].dtype == torch.float16  # the averaged ones
    torch.testing.assert_close(kept["sums.first.bias"], again.average[1])


def test_matrices_without_a_gradient_stay() -> None:
    module = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    optimizer, before = Muon(module, ()), module["b"].weight.detach().clone()
    optimizer.step(0.1)
    module["a"](torch.ones(1, 3)).sum().backward()
    a = module["a"].weight.detach().clone()
    optimizer.step(0.1)
    assert torch.equal(module["b"].weight, before) and not torch.equal(module["a"].weight, a)
