"""Small attention calls of every kind, as an `AttentionCall` and as explicit matrices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hookctl.address.clock import Clock
from hookctl.address.rows import Row, Rows
from hookctl.address.sites import Site
from hookctl.attention.call import AttentionCall
from hookctl.evaluate import plan
from tests.hookctl.attention.explicit import Explicit

ROWS = Rows(
    [Row(0, "uncond", 0, 0), Row(1, "uncond", 1, 0)] + [Row(2 + i, "cond", i, 0) for i in range(3)]
)
TEXT, IMAGE = 6, 12
KINDS = ("cross", "self", "text_image", "image_text")
Script = Callable[[Any], Any]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


@dataclass
class Case:
    """The tensors of one call; `kind` is self, cross, or the order of a joint sequence."""

    kind: str
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    mask: Tensor | None = None

    @property
    def joint(self) -> bool:
        return self.kind not in ("self", "cross")

    def call(self, kind: str | None = None) -> AttentionCall:
        kind = "joint" if self.joint else self.kind
        return AttentionCall(
            Site("a.site", kind, "up", 1, 0),
            self.q,
            self.k,
            self.v,
            rows=Rows(ROWS[: self.q.shape[0]]),
            clock=Clock(0, 10, 1.0),
            scale=self.scale,
            mask=self.mask,
            latent=(3, 4),
            text_tokens=TEXT if self.joint else None,
            joint_order=self.kind if self.joint else None,
        )

    def explicit(self) -> Explicit:
        text, edited = None, None
        if self.joint:
            first = self.kind == "text_image"
            text = (0, TEXT) if first else (IMAGE, IMAGE + TEXT)
            edited = torch.zeros(IMAGE + TEXT, dtype=torch.float64)
            edited[slice(TEXT, None) if first else slice(IMAGE)] = 1
        return Explicit(self.q, self.k, self.v, self.scale, self.mask, text, edited)


def make(
    kind: str = "cross", *, sub: int = 1, heads: int = 2, d: int = 8, seed: int = 0, **kwargs: Any
) -> Case:
    n, m = {"cross": (IMAGE, TEXT), "self": (IMAGE, IMAGE)}.get(kind, (IMAGE + TEXT,) * 2)
    q, k, v = (random(5, sub, heads, t, d, seed=seed + i) for i, t in enumerate((n, m, m)))
    return Case(kind, q, k, v, 0.5, **kwargs)


class _Counted(TorchFunctionMode):
    """How often each function of torch is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def torch_calls(case: Case, script: Script) -> Counter[str]:
    """What an edit asks of torch when it is evaluated, by name."""
    call = case.call()
    script(call)
    with _Counted() as counted:
        plan.evaluate(call)
    return counted.calls


def close(got: Tensor, want: Tensor, tolerance: float, name: str = "output") -> None:
    """Relative error, of the norm and of the worst element."""
    got, want = got.double(), want.double()
    assert got.shape == want.shape, name
    assert torch.isfinite(got).all(), name
    error = (got - want).abs().max() / want.abs().max().clamp(min=1e-30)
    assert error <= tolerance, f"{name}: relative error {float(error):.2e} > {tolerance:g}"
