"""Catch every attention call of a module, and nothing else.

A forward pre-hook of the attention module enters a torch-function mode and an always-called
forward hook leaves it, so the mode sees the torch calls of this module alone: neither text
encoders nor the VAE, in this thread only, and again when gradient checkpointing recomputes. q, k
and v arrive after projection, norm, LoRA and rotary embedding, whatever processor made them. Once
it is seen that all attention calls go by their name, that name is watched in place of the mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from hookctl.address.sites import Site
from hookctl.attention.sdpa_call import SDPACall
from hookctl.errors import HoleError
from hookctl.hooks import by_name
from hookctl.hooks.by_name import SDPA
from hookctl.hooks.compiled import CompiledMode, attention_ports
from hookctl.hooks.eager import EagerFollower
from hookctl.hooks.patch import lock

_MULTI_HEAD = "torch.nn.MultiheadAttention, which computes attention by itself"
_OWN_SOFTMAX = "a softmax of its own (an eager processor)"
_TELLTALES: dict[Any, str] = {
    F.multi_head_attention_forward: _MULTI_HEAD,
    torch.softmax: _OWN_SOFTMAX,
    Tensor.softmax: _OWN_SOFTMAX,
    F.softmax: _OWN_SOFTMAX,
}


class Untouched(Exception):
    """No editor rewrote this call: let the processor that was exchanged do it in its own way."""


class Handler(Protocol):
    """What a port asks of its owner."""

    def watching(self, port: SitePort) -> bool:
        """Whether anything wants this site's calls now; notes that the site ran."""

    def attend(
        self,
        port: SitePort,
        index: int,
        call: SDPACall,
        original: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """The output of one attention call, [batch, heads, N, channels].

        index: of the call in its module's forward; original: what the model itself would do, None
        for SDPA over these arguments.
        """

    def batch(self) -> int:
        """Rows of the denoiser call in progress."""

    def is_strict(self) -> bool:
        """Whether attention that could not be caught is an error."""


class SiteMode(TorchFunctionMode):
    """Sees the torch calls of one forward of one attention module.

    calls: to attention; by_name: those that went by its name; seen: what else forms attention.
    """

    def __init__(self, port: SitePort) -> None:
        super().__init__()
        self.port = port
        self.calls = self.by_name = 0
        self.seen = "neither scaled_dot_product_attention nor a softmax that was seen"
        self.follower: EagerFollower | None = None
        if port.spelled_out:
            self.follower = EagerFollower(port.site.heads, port.handler.batch(), self._followed)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if by_name.watcher() is not self:
            return func(*args, **(kwargs or {}))  # of a module inside, or of an evaluation
        if func is SDPA:
            with by_name.hidden():
                return self._caught(SDPACall(*args, **(kwargs or {})))
        if self.follower is not None:
            return self.follower.follow(func, args, kwargs or {})
        if func in _TELLTALES:
            self.seen = _TELLTALES[func]
            with by_name.hidden():  # torch's own module attends by name in some of its ways
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.by_name += 1
        return self._caught(SDPACall(*args, **kwargs))

    def _caught(self, call: SDPACall, original: Callable[[], Tensor] | None = None) -> Tensor:
        index, self.calls = self.calls, self.calls + 1
        return self.port.caught(index, call, original)

    def _followed(self, call: SDPACall, original: Callable[[], Tensor]) -> Tensor:
        with by_name.hidden():
            return self._caught(call, original)


class Named:
    """Sees the attention calls of one forward of a module whose calls all go by name."""

    seen = "another way than at first"

    def __init__(self, port: SitePort) -> None:
        self.port, self.calls = port, 0

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index, self.calls = self.calls, self.calls + 1
        return self.port.caught(index, SDPACall(*args, **kwargs))


class SitePort:
    """The hooks on one attention module, from `install` until `remove`.

    own_call: which attention call of the module's forward is the model's own (adapters make
    further ones). spelled_out: the module forms its matrix itself, so its torch calls are
    followed; exchanged: its processor stands in for another, which does the untouched calls.
    """

    def __init__(
        self,
        site: Site,
        module: nn.Module,
        handler: Handler,
        *,
        own_call: int = 0,
    ) -> None:
        self.site, self.module, self.handler, self.own_call = site, module, handler, own_call
        self.spelled_out = self.exchanged = False
        self.traced = False
        self._names: Any = None  # the processor whose attention calls all go by name
        # Made beforehand: traced code can't make a mode and leave it entered at a graph break.
        self._compiled = CompiledMode(attention_ports.register(self, site.path))
        self._running: set[Any] = set()  # watchers of forwards between our two hooks
        self._handles: list[Any] = []  # the one that ends a forward first

    def install(self) -> None:
        module, handles = self.module, self._handles
        handles.append(module.register_forward_hook(self._leave, always_call=True))
        handles.append(module.register_forward_pre_hook(self._enter))

    def remove(self) -> None:
        """Take the hooks out. A forward in progress, perhaps in another thread, still needs the
        one that ends it: this goes when the denoiser call is over (`unwind`)."""
        for handle in self._handles[1:]:
            handle.remove()
        if self._running:
            if self not in _retired:
                _retired.append(self)
        else:
            self.finish()

    def finish(self) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def watched(self) -> bool:
        """Whether the module's forward is running under our eyes."""
        running = by_name.watcher()
        return running is not None and running.port is self

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            self._compiled.calls = 0
            self._compiled.__enter__()
        elif self.handler.watching(self):
            if self._goes_by_name() and by_name.is_free():
                self._watch(Named(self))
                return
            mode = SiteMode(self)
            self._watch(mode)
            mode.__enter__()

    def _watch(self, watcher: SiteMode | Named) -> None:
        by_name.enter(watcher)
        self._running.add(watcher)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            self._compiled.__exit__(None, None, None)
            return
        mode = _get_current_function_mode()
        if mode is self._compiled:
            mode.__exit__(None, None, None)  # entered in compiled code, left after a graph break
            return
        running = by_name.watcher()
        if running is None or running.port is not self:
            return
        _leave()
        if isinstance(running, SiteMode):
            running.__exit__(None, None, None)
            every = running.by_name == running.calls > 0
            self._names = getattr(module, "processor", None) if every else None
        # An output of None means that the forward raised: its own error is the one to show.
        if output is not None and running.calls == 0:
            self._names = None
            if not self.handler.is_strict():
                return
            raise HoleError(
                f"{self.site.path} ran, but its attention could not be caught: it used "
                f"{running.seen}. Put the model on its default SDPA processors "
                "(unet.set_attn_processor(AttnProcessor2_0()) or reset_attention_backend()), leave "
                "this site out with the editor's sites=, or pass strict=False"
            )

    def _goes_by_name(self) -> bool:
        """Whether all attention calls of the module as it is were seen to go by their name."""
        return (
            self._names is not None
            and self._names is getattr(self.module, "processor", None)
            and not (self.spelled_out or self.exchanged)
        )

    def caught(
        self, index: int, call: SDPACall, original: Callable[[], Tensor] | None = None
    ) -> Tensor:
        if self.exchanged and index == 0 and not torch.compiler.is_compiling():
            original = _raise_untouched
        return self.handler.attend(self, index, call, original)


def _raise_untouched() -> Tensor:
    raise Untouched


_retired: list[SitePort] = []  # removed while a forward was running


def _leave() -> None:
    watcher = by_name.watcher()
    if watcher is not None:
        watcher.port._running.discard(watcher)
    by_name.leave()


def unwind(entered: tuple[int, int]) -> None:
    """Leave what was entered since `depth` said so: an interrupt (no `Exception`) skips hooks, and
    so does a hook that was removed."""
    while by_name.depth() > entered[1]:
        _leave()
    if _retired:
        with lock:
            for port in [port for port in _retired if not port._running]:
                port.finish()
                _retired.remove(port)
    while torch._C._len_torch_function_stack() > entered[0]:
        mode = _get_current_function_mode()
        if not isinstance(mode, SiteMode | CompiledMode):
            return
        mode.__exit__(None, None, None)


def depth() -> tuple[int, int]:
    """How many torch-function modes are entered in this thread, and how many modules watched."""
    return torch._C._len_torch_function_stack(), by_name.depth()


__all__ = ["Handler", "SitePort", "Untouched", "depth", "unwind"]
