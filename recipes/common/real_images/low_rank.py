"""Low-rank changes of a model's linear and convolutional layers that leave its weights alone.

y = W x + s B A x, with A [rank, inputs] and B [outputs, rank] beside the model (Hu et al., "LoRA",
arXiv 2106.09685); of a convolution, A has its kernel and B is 1 x 1. Forward hooks add the second
term while they are in; nothing is written into the model, so nothing has to be taken out again but
the hooks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hookctl.arguments import refusal, whole
from hookctl.errors import InputError


class LowRank:
    """A low-rank change of every linear or convolutional layer whose path matches a pattern.

    pattern: regular expression; grouped convolutions, and those that pad with anything but zeros,
    are left out. rank: of the change; generator: draws A.

    `factors` holds (A, B) by path, float32; B starts at zero, so that at first nothing changes.

    Raises InputError for a rank below 1, and for a pattern that matches no layer.
    """

    def __init__(
        self, model: nn.Module, pattern: str, rank: int, generator: torch.Generator
    ) -> None:
        self.model, self.factors = model, dict[str, tuple[Tensor, Tensor]]()
        try:
            found = [(p, m) for p, m in model.named_modules() if re.search(pattern, p)]
        except re.error as error:
            raise refusal("layers", pattern, f"a regular expression ({error})") from None
        layers = [(path, module) for path, module in found if _is_supported(module)]
        if layers:
            rank = whole(rank, "rank", 1, max(min(m.weight.shape[:2]) for _, m in layers))
        for path, module in layers:
            weight: Tensor = module.weight
            outputs, inputs, *kernel = weight.shape
            a = torch.randn(rank, inputs, *kernel, generator=generator)
            a /= rank * math.prod(kernel) ** 0.5
            b = torch.zeros(outputs, rank, *[1] * len(kernel))
            self.factors[path] = (a.to(weight.device), b.to(weight.device))
        if not self.factors:
            raise InputError(
                f"layers={pattern!r} matches no linear or convolutional layer of the model"
            )

    @property
    def tensors(self) -> list[Tensor]:
        return [x for pair in self.factors.values() for x in pair]

    def state(self) -> dict[str, Tensor]:
        """Every factor by name."""
        return {
            f"{path}.{name}": x.detach().cpu().contiguous()
            for path, pair in self.factors.items()
            for name, x in zip("AB", pair, strict=True)
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over the factors of `state()`."""
        with torch.no_grad():
            for path, pair in self.factors.items():
                for name, x in zip("AB", pair, strict=True):
                    x.copy_(state[f"{path}.{name}"])

    @contextmanager
    def applied(self, scale: float = 1.0) -> Iterator[None]:
        """The change is in the model meanwhile; at scale 0 nothing is hooked at all."""
        modules = dict(self.model.named_modules())
        hooks = []
        for path, (a, b) in self.factors.items() if scale else ():
            hook = _adds(scale, a, b)
            hooks.append(modules[path].register_forward_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _is_supported(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros"
    return isinstance(module, nn.Linear)


def _adds(scale: float, a: Tensor, b: Tensor) -> Callable[..., Tensor]:
    def add(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Tensor) -> Tensor:
        x = args[0] if args else kwargs["input"]
        if isinstance(module, nn.Conv2d):
            inner = F.conv2d(x, a.to(x), None, module.stride, module.padding, module.dilation)
            return out + scale * F.conv2d(inner, b.to(x))
        return out + scale * (x @ a.to(x).T) @ b.to(x).T

    return add
