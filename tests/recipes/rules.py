"""What the tests of the guidance rules share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hookctl import Editor
from hookctl.recipes import APG, FDG, TCFG, CFGZeroStar

RULES: list[type[Any]] = [APG, CFGZeroStar, TCFG, FDG]


class Watch(Editor):
    """Keeps what each step's predictions were."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, Tensor], Tensor]] = []

    def combine(self, predictions: Any) -> Tensor:
        self.steps.append((dict(predictions.branches), predictions.guided))
        return predictions.guided
