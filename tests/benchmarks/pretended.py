"""A GPU that is not there: shapes, devices and launches of one, without its values.

Tensors are fake ones on "cuda:0" (torch's FakeTensorMode), which know their shape, strides, dtype
and device, so that tensors of two devices don't mix. The operators run as they would on a GPU down
to the launch, whose arguments are held against the kernel's signature as Triton's compiler does;
the interpreter lets unknown names pass.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hookctl.kernels import (
    fourier_gain,
    latent_mixing,
    map_readout,
    region_attention,
    shared_probabilities,
    sum_of_terms,
)
from hookctl.kernels.common import guard, launch_tables, stretches
from hookctl.kernels.common.launch import INTERPRETED, SHARED_LIMIT, Launch

DEVICE = torch.device("cuda:0")
ARCHS = tuple(SHARED_LIMIT)
OPTIONS = tuple(INTERPRETED.options)
_MOST = (2**31 - 1, 65_535, 65_535)  # programs on the axes of a grid
_ADDRESS = 1 << 20  # of every tensor: allocators align on 512 bytes
_OPERATORS = (
    fourier_gain.forward.operator,
    fourier_gain.backward.operator,
    latent_mixing.forward.local_blend,
    latent_mixing.forward.merge_instances,
    latent_mixing.forward.mix_predictions,
    latent_mixing.forward.update_difference,
    map_readout.backward.operator,
    map_readout.forward.operator,
    map_readout.forward.marginals_operator,
    region_attention.forward.operator,
    region_attention.backward.operator,
    shared_probabilities.forward.operator,
    shared_probabilities.backward.operator,
    sum_of_terms.operators.forward_operator,
    sum_of_terms.operators.backward_operator,
)


@dataclass
class Seen:
    """What a GPU would have been asked for.

    launches: (kernel, tile as far as the launch says it); copied: operators to which the host
    handed a tensor, and waited for its copy; waits: numbers that it waited for.
    """

    launches: list[tuple[str, Launch]] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    waits: int = 0

    @property
    def kernels(self) -> set[str]:
        return {name for name, _ in self.launches}


class Event:
    """Of time on the device, of which none passes."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return 1.0  # milliseconds


@contextmanager
def pretended(arch: str) -> Iterator[Seen]:
    """As on a GPU of an architecture of the launch tables."""
    seen = Seen()
    with ExitStack() as stack:
        for target, name, value in _patches(arch, seen):
            stack.enter_context(patch.object(target, name, value))
        stack.enter_context(patch.dict("os.environ", {"TRITON_INTERPRET": ""}))
        stack.enter_context(_device_guard())
        stack.callback(_forget)
        _forget()
        # Tensors made of numbers are made on the CPU and seen as they go to the device.
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(_Devices(seen))
        yield seen


def _forget() -> None:
    """Tables that are kept for a device."""
    stretches.tables.cache_clear()
    shared_probabilities.forward._tables.cache_clear()


def _patches(arch: str, seen: Seen) -> Iterator[tuple[Any, str, Any]]:
    from triton.runtime.interpreter import GridExecutor

    def launched(self: Any, *args: Any, **options: Any) -> None:
        seen.launches.append((self.fn.__name__, _launch(self, args, options, arch)))

    cuda, capability = torch.cuda, (9, 0) if arch == "sm_90" else (8, 0)
    yield cuda, "is_available", lambda: True
    yield cuda, "get_device_capability", lambda device=None: capability
    yield cuda, "get_device_name", lambda device=None: f"no {arch}"
    yield cuda, "mem_get_info", lambda device=None: (75 << 30, 80 << 30)
    yield cuda, "memory_allocated", lambda device=None: 0
    yield cuda, "max_memory_allocated", lambda device=None: 1 << 20
    yield cuda, "device_of", lambda like: nullcontext()
    yield cuda, "Event", Event
    yield cuda, "is_current_stream_capturing", lambda: False
    for name in ("synchronize", "reset_peak_memory_stats", "_lazy_init", "_sleep"):
        yield cuda, name, lambda *_: None
    yield FakeTensorMode, "avoid_device_init", True
    yield torch.version, "hip", "7.0" if arch.startswith("gfx") else None
    yield torch.autograd, "grad", _gradients
    yield guard, "_tried", {"cuda": None, "cuda:0": None}
    yield GridExecutor, "__call__", launched
    yield Tensor, "data_ptr", lambda self: _ADDRESS
    for operator in _OPERATORS:
        yield operator, "_abstract_fn", _both(operator)


def _both(operator: Any) -> Callable[..., Any]:
    """An operator's own code, on fake tensors; what is said of its outputs must be true of them."""
    real, fake = operator._init_fn, operator._abstract_fn

    def run(*args: Any, **options: Any) -> Any:
        out, said = real(*args, **options), fake(*args, **options)
        pairs = zip(_flat(out), _flat(said), strict=True)
        for got, want in pairs:
            for like in ("shape", "dtype", "device"):
                assert getattr(got, like) == getattr(want, like), (operator, like, got, want)
            assert got.stride() == want.stride() or not got.numel(), (operator, got, want)
        return out

    return run


def _gradients(
    out: Tensor, inputs: Any, gradient: Tensor | None = None, retain_graph: bool | None = None
) -> tuple[Tensor, ...]:
    """`torch.autograd.grad`, node by node: its engine asks for the device's streams."""
    leaves = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    arrived = {out.grad_fn: {out.output_nr: torch.ones_like(out) if gradient is None else gradient}}
    found: dict[Any, Tensor] = {}
    for node in _ordered(out.grad_fn):
        given = arrived.pop(node, {})
        if hasattr(node, "variable"):
            found[node.variable] = given[0]
            continue
        for one, (to, at) in _sent(node, given):
            if to is not None and one is not None:
                there = arrived.setdefault(to, {})
                there[at] = there[at] + one if at in there else one
    return tuple(found[leaf] for leaf in leaves)


def _sent(node: Any, given: Mapping[int, Tensor]) -> list[tuple[Any, tuple[Any, int]]]:
    """What a node gives, and to whom."""
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        sent = node(*(given.get(i) for i in range(len(node._input_metadata))))
        return list(zip(_flat(sent), node.next_functions, strict=True))
    zeros = (torch.zeros(x.shape, dtype=x.dtype, device=DEVICE) for x in node._input_metadata)
    sent = node.apply(*(given.get(i, zero) for i, zero in enumerate(zeros)))
    wanted = [one for one, is_wanted in zip(sent, node.needs_input_grad, strict=True) if is_wanted]
    return list(zip(wanted, [x for x in node.next_functions if x[0] is not None], strict=True))


def _ordered(root: Any) -> list[Any]:
    """The nodes of a graph, each before those that it gives gradients to."""
    done: dict[Any, None] = {}
    waiting = [(root, False)]
    while waiting:
        node, seen = waiting.pop()
        if seen:
            done[node] = None
        elif node not in done:
            waiting.append((node, True))
            waiting += [(to, False) for to, _ in node.next_functions if to not in (None, *done)]
    return [*done][::-1]


def _flat(x: Any) -> list[Tensor]:
    return [x] if x is None or isinstance(x, Tensor) else list(x)


def _launch(executor: Any, args: tuple[Any, ...], options: Mapping[str, Any], arch: str) -> Launch:
    """The tile of a launch, whose arguments are all that the kernel has, each once."""
    name, names = executor.fn.__name__, list(inspect.signature(executor.fn).parameters)
    given = dict(zip(names, args, strict=False))
    assert len(args) <= len(names) and not given.keys() & options.keys(), name
    given |= {key: value for key, value in options.items() if key not in OPTIONS}
    assert given.keys() == set(names), (name, given.keys() ^ set(names))
    for key, value in given.items():
        _check(f"{name}: {key}", value, key in executor.constexprs)
    grid = (*executor.grid, 1, 1)[:3]
    for programs, most in zip(grid, _MOST, strict=True):
        assert type(programs) is int and 0 < programs <= most, (name, grid)
    tile = [given.get(a, given.get(b)) for a, b in (("BM", "C"), ("BN", "P"))]
    found = Launch(tile[0] or 0, tile[1] or 0, options["num_warps"], options["num_stages"])
    tiles = [*_tiles(arch), *launch_tables._tried.values()]
    assert any(_same(found, tile) for tile in tiles), (name, arch, found)
    return found


def _check(what: str, value: Any, constant: bool) -> None:
    if constant:
        assert type(value) in (bool, int), (what, value)
    elif isinstance(value, Tensor):
        assert value.device == DEVICE, (what, value.device)
    elif value is not None:
        assert type(value) is float or (type(value) is int and abs(value) < 2**63), (what, value)


def _tiles(arch: str) -> list[Launch]:
    tables = launch_tables.shipped().values()
    return [tile for table in tables for tile in table.get(arch, {}).values() if tile is not None]


def _same(found: Launch, ships: Launch) -> bool:
    """A kernel that holds a side whole, or has none, doesn't say it."""
    sides = zip(found[:2], ships[:2], strict=True)
    return found[2:] == ships[2:] and all(a in (0, b) for a, b in sides)


class _Fake(FakeTensorMode):
    """Where torch does not make a fake copy by itself, it is made."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.to.dtype_layout:
            func = torch.ops.aten._to_copy.default
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Devices(TorchDispatchMode):
    """What touches the device is done with fake tensors, what the CPU does is done. A number that
    the host asks the device for is 0."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen, self.fake = seen, _Fake(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        given = [x for x in tree_leaves((args, options)) if isinstance(x, Tensor)]
        on_device = [x for x in given if isinstance(x, FakeTensor)]
        to = torch.device(options.get("device") or "cpu")
        if not on_device and to.type == "cpu":
            return func(*args, **options)
        if func is torch.ops.aten._local_scalar_dense.default:
            self.seen.waits += 1
            return torch.zeros((), dtype=given[0].dtype).item()
        if to.type != "cpu":
            options = options | {"device": DEVICE}
        if any(x.dim() for x in given if not isinstance(x, FakeTensor)):
            self.seen.copied.append(str(func))
        with self.fake:
            return func(*args, **options)


@contextmanager
def _device_guard() -> Iterator[None]:
    """A torch that was built without CUDA can't stand on its devices, not even on fake ones: lend
    it the guard of the meta device, which does nothing."""
    if torch.backends.cuda.is_built():
        yield
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 16).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    of_cuda, of_meta = 1, 14  # c10/core/DeviceType.h
    guards[of_cuda] = guards[of_meta]
    try:
        yield
    finally:
        guards[of_cuda] = None
