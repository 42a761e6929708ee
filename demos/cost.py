"""What drawing costs, counted where it is paid: rows that a denoiser evaluates, and live memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hookctl
from hookctl.editor import Editor

MIB = 2**20
FEW = 4  # steps that show a run's peak: each step lets go of what the last one made


@dataclass
class Cost:
    """calls of a denoiser, the rows that they held, and those rows in images of `side` cells."""

    side: int
    calls: int = 0
    rows: int = 0
    images: float = 0.0

    def note(self, sample: Any) -> None:
        self.calls += 1
        self.rows += len(sample)
        self.images += len(sample) * sample.shape[-1] * sample.shape[-2] / self.side**2


@contextmanager
def counted(denoiser: nn.Module) -> Iterator[Cost]:
    """Count the calls of a denoiser meanwhile."""
    config: Any = denoiser.config
    cost = Cost(int(config.sample_size))
    given = next(iter(signature(denoiser.forward).parameters))  # "sample", or "hidden_states"
    handle = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: cost.note(args[0] if args else kwargs[given]),
        with_kwargs=True,
    )
    try:
        yield cost
    finally:
        handle.remove()


# -- memory ----------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Follows the storages of all tensors made meanwhile, until they are let go.

    now, most: bytes alive, and the most that ever were at once. What was there before (weights,
    the caller's tensors) counts for nothing, nor do the scratch pads inside an operation: the
    figure is the same on every machine that takes the same operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        self._meet((args, given), new=False)
        out = func(*args, **given)
        self._meet(out, new=True)
        return out

    def _meet(self, tensors: Any, new: bool) -> None:
        for x in tree_leaves(tensors):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                key, size = storage._cdata, storage.nbytes() if new else 0
                if key not in self._known:
                    self._known.add(key)
                    self.now += size
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_mib(work: Callable[[], Any]) -> float:
    """The most memory, in MiB, that the tensors made by `work` take at once."""
    with Live() as live:
        work()
    return round(live.most / MIB, 2)


def drawing_mib(
    pipe: Any, prompts: str | list[str], *editors: Editor, guidance: float, **arguments: Any
) -> float:
    """Of a few steps of the pipeline under editors; without the decoder, which they leave alone."""
    count = 1 if isinstance(prompts, str) else len(prompts)

    def work() -> None:
        with hookctl.control(pipe, *editors):
            pipe(
                prompts,
                num_inference_steps=FEW,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(0) for _ in range(count)],
                output_type="latent",
                **arguments,
            )

    return peak_mib(work)
