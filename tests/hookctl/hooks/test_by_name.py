"""Calls by name are caught without a mode, once a module was seen to make no others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hookctl.address.sites import Site
from hookctl.attention.sdpa_call import SDPACall
from hookctl.errors import HoleError
from hookctl.hooks.attention import SitePort, depth, unwind
from hookctl.hooks.by_name import SDPA
from tests.hookctl.attention.calls import random

X = random(1, 2, 4, 8)


def by_name(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def directly(x: Tensor) -> Tensor:
    return SDPA(x, x, x)


def by_softmax(x: Tensor) -> Tensor:
    return F.softmax(x @ x.mT, -1) @ x


class Processor:
    """Makes attention calls; modes: how many torch-function modes were entered for each."""

    def __init__(self, *calls: Callable[[Tensor], Tensor]) -> None:
        self.calls, self.modes = calls, list[int]()

    def __call__(self, x: Tensor) -> Tensor:
        for call in self.calls:
            self.modes.append(depth()[0])
            x = call(x)
        return x


class Attention(nn.Module):
    def __init__(self, *calls: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.processor = Processor(*calls)

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(x)


class Seen:
    """A handler that notes (site, index of the call) and attends by name itself."""

    def __init__(self, within: Callable[[], Any] = lambda: None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.within = within

    def watching(self, port: SitePort) -> bool:
        return True

    def is_strict(self) -> bool:
        return True

    def batch(self) -> int:
        return 1

    def attend(self, port: SitePort, index: int, call: SDPACall, *_: Any) -> Tensor:
        self.calls.append((port.site.path, index))
        self.within()
        return call.attend()


def port(module: nn.Module, seen: Seen, path: str = "a") -> SitePort:
    port = SitePort(Site(path, "self", "up", 1, 0), module, seen)
    port.install()
    return port


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    yield
    assert F.scaled_dot_product_attention is SDPA and depth() == (0, 0)


@pytest.mark.parametrize(
    ("calls", "modes"),
    [
        ((by_name,), [1, 0, 0]),
        ((by_name, by_name), [1, 1, 0, 0, 0, 0]),
        ((directly,), [1, 1, 1]),
        ((by_name, directly), [1] * 6),
        ((directly, by_name), [1] * 6),
        ((by_softmax, by_name), [1, 1, 0, 0, 0, 0]),
    ],
)
def test_every_call_is_caught(calls: Any, modes: list[int]) -> None:
    """By a mode unless all of them go by name; with the same output."""
    module, seen = Attention(*calls), Seen()
    want = module(X)
    module.processor.modes.clear()
    port(module, seen)
    for _ in range(3):
        assert torch.equal(module(X), want)
        assert F.scaled_dot_product_attention is SDPA
    assert module.processor.modes == modes
    count = sum(call is not by_softmax for call in calls)
    assert seen.calls == [("a", i) for i in range(count)] * 3


def test_another_processor_is_looked_at_anew() -> None:
    module, seen = Attention(by_name), Seen()
    port(module, seen)
    module(X), module(X)
    module.processor = Processor(directly)
    module(X), module(X)
    assert module.processor.modes == [1, 1] and len(seen.calls) == 4
    module.processor = Processor(by_softmax)
    with pytest.raises(HoleError, match="a softmax of its own"):
        module(X)


def test_a_processor_that_changes_its_ways() -> None:
    """The error says so; and the module is looked at anew."""
    module, seen = Attention(by_name), Seen()
    port(module, seen)
    module(X), module(X)
    module.processor.calls = (by_softmax,)
    with pytest.raises(HoleError, match="another way than at first"):
        module(X)
    with pytest.raises(HoleError, match="a softmax of its own"):
        module(X)
    module.processor.calls = (by_name,)
    module(X)
    assert len(seen.calls) == 3


def test_modules_without_a_processor_keep_the_mode() -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            modes.append(depth()[0])
            return by_name(x)

    modes: list[int] = []
    module, seen = Other(), Seen()
    port(module, seen)
    module(X), module(X)
    assert modes == [1, 1] and len(seen.calls) == 2


@pytest.mark.parametrize("step", (0, 1))
@pytest.mark.parametrize("error", (ValueError, KeyboardInterrupt))
def test_as_found_after_an_error(error: type[BaseException], step: int) -> None:
    def fail() -> None:
        if len(seen.calls) > step:
            raise error

    module, seen = Attention(by_name), Seen(fail)
    port(module, seen)
    entered = depth()
    for _ in range(step):
        module(X)
    with pytest.raises(error):
        module(X)
    unwind(entered)  # an interrupt skips the module's hooks


def test_a_module_inside_another() -> None:
    inner, seen = Attention(by_name), Seen()
    outer = Attention(by_name, inner, by_name)
    port(outer, seen, "outer"), port(inner, seen, "inner")
    for _ in range(2):
        outer(X)
    one = [("outer", 0), ("inner", 0), ("outer", 1)]
    assert seen.calls == 2 * one
    assert outer.processor.modes == [1, 1, 1, 0, 0, 0] and inner.processor.modes == [2, 0]
    inner.processor = Processor(directly)
    outer(X), outer(X)
    assert seen.calls == 4 * one and inner.processor.modes == [1, 1]


def test_calls_of_other_threads_are_theirs() -> None:
    """While a module runs: calls outside of modules, and a module of another model."""
    found: list[Any] = []

    def elsewhere() -> None:
        found.append(torch.equal(by_name(X), SDPA(X, X, X)))
        found.append(torch.equal(other(X), SDPA(X, X, X)))

    def within() -> None:
        if module.processor.modes[-1] == 0:
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()

    module, other = Attention(by_name), Attention(by_name)
    seen, theirs = Seen(within), Seen()
    port(module, seen), port(other, theirs)
    for _ in range(3):
        module(X)
    assert found == [True] * 4 and len(seen.calls) == 3 and len(theirs.calls) == 2


def test_threads_side_by_side() -> None:
    module_of = {i: Attention(by_name, by_name) for i in range(4)}
    seen_of = {i: Seen() for i in module_of}

    def run(i: int) -> None:
        for _ in range(200):
            module_of[i](X)

    for i, module in module_of.items():
        port(module, seen_of[i])
    threads = [threading.Thread(target=run, args=(i,)) for i in module_of]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(seen.calls == [("a", 0), ("a", 1)] * 200 for seen in seen_of.values())


def test_another_function_in_that_place_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tools put one there that choose a faster kernel; what it leaves to torch is caught."""

    def faster(*args: Any, **kwargs: Any) -> Tensor:
        used.append(F.scaled_dot_product_attention)
        return SDPA(*args, **kwargs)

    used: list[Any] = []
    module, seen = Attention(by_name), Seen()
    port(module, seen)
    module(X), module(X)
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", faster)
        module(X), module(X)
        assert F.scaled_dot_product_attention is faster
    module(X)
    assert len(seen.calls) == 5 and set(used) == {faster}


def test_gradient_checkpointing() -> None:
    """The forward is made again for the backward pass, in whatever thread that is."""
    module, seen = Attention(by_name), Seen()
    port(module, seen)
    for _ in range(3):
        x = X.clone().requires_grad_()
        out = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
        (got,) = torch.autograd.grad(out.sum(), x)
        y = X.clone().requires_grad_()
        (want,) = torch.autograd.grad(SDPA(y, y, y).sum(), y)
        assert torch.equal(got, want)
    assert len(seen.calls) == 6


@pytest.mark.parametrize("elsewhere", (False, True))
@pytest.mark.parametrize("seen_before", (0, 1))
def test_removed_while_the_module_runs(seen_before: int, elsewhere: bool) -> None:
    """By a hook, or by another thread: the forward ends as it began, and nothing stays."""

    def remove() -> None:
        if elsewhere:
            thread = threading.Thread(target=handle.remove)
            thread.start()
            thread.join()
        else:
            handle.remove()

    module, seen = Attention(by_name), Seen()
    handle = port(module, seen)
    entered = depth()
    for _ in range(seen_before):
        module(X)
    seen.within = remove
    module(X)
    assert F.scaled_dot_product_attention is SDPA and depth() == entered
    unwind(entered)  # as every denoiser call ends
    assert not module._forward_hooks and not module._forward_pre_hooks
    count = len(seen.calls)
    module(X)
    assert len(seen.calls) == count


def test_removed_before_an_interrupt() -> None:
    def fail() -> None:
        handle.remove()
        raise KeyboardInterrupt

    module, seen = Attention(by_name), Seen(fail)
    handle = port(module, seen)
    entered = depth()
    with pytest.raises(KeyboardInterrupt):
        module(X)
    unwind(entered)
    assert not module._forward_hooks and not module._forward_pre_hooks
