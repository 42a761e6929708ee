"""Layers inside a model: what one gives, after editors saw what it was given.

For learned modules: low-rank deltas of linears, further channels for the first convolution, and
what is inserted in a transformer block between its self-attention and what follows. For guidance:
whole blocks, which some rows pass by.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hookctl.errors import UnsupportedError
from hookctl.hooks import by_name
from hookctl.hooks.compiled import Ports, opaque_operator
from hookctl.hooks.forward import hook_before, hook_behind

# Given what went into a layer and what came out: what is to come out, None for the same.
Edit = Callable[[Tensor, Tensor], "Tensor | None"]


class LayerPort:
    """The hook on one layer, from `install` until `remove`."""

    def __init__(self, module: nn.Module, path: str, edit: Edit) -> None:
        self.module, self.path, self.edit = module, path, edit
        self.name, self.traced = _ports.register(self, path), False
        self._handles: list[Any] = []
        self._argument = list(inspect.signature(type(module).forward).parameters)[1]

    def install(self) -> None:
        self._handles.append(hook_behind(self.module, self._after))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """What went into the layer that came out beside its output; None if that wasn't seen."""
        found: Tensor = args[0] if args else kwargs[self._argument]
        return found

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        given = self.given(args, kwargs)
        if given is None:
            return None
        if torch.compiler.is_compiling():
            return _layer_operator(given, output, self.name)
        return self.edited(given, output)

    def edited(self, given: Tensor, output: Tensor) -> Tensor | None:
        # Attention inside of an edit is not the model's own.
        with by_name.hidden():
            return self.edit(given, output)


class InsertPort(LayerPort):
    """The hooks on a block's self-attention: shown is the residual stream with its output.

    What the edit makes of the stream x + a is given back as the attention's output, less x, which
    the block adds.
    """

    def __init__(self, block: nn.Module, path: str, edit: Edit) -> None:
        super().__init__(block.get_submodule("attn1"), path, edit)
        self.block = block
        self._streams: dict[int, Tensor] = {}  # of the blocks that are running, by thread
        self._traced: Tensor | None = None  # in code that is being compiled

    def install(self) -> None:
        super().install()
        self._handles.append(hook_before(self.block, self._before))

    def remove(self) -> None:
        super().remove()
        self._streams.clear()

    def _before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = args[0] if args else kwargs["hidden_states"]
        if torch.compiler.is_compiling():
            self._traced = stream
        else:
            self._streams[threading.get_ident()] = stream

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        if torch.compiler.is_compiling():
            stream, self._traced = self._traced, None
        else:  # none if the hooks came, for another thread, while the block was running
            stream = self._streams.pop(threading.get_ident(), None)
        return stream

    def edited(self, given: Tensor, output: Tensor) -> Tensor | None:
        stream = given + output
        with by_name.hidden():
            found = self.edit(given, stream)
        return None if found is None else found - given


# Given what goes into a block: that or something else, and the places in the batch that pass by.
Passing = Callable[[Tensor], "tuple[Tensor, Sequence[int]]"]


class _Half:
    """What is done before a block, or behind it, to one of its streams."""

    def __init__(self, path: str, edited: Edit) -> None:
        self.name, self.traced = _ports.register(self, path), False
        self.edited = edited

    def __call__(self, given: Tensor, output: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return _layer_operator(given, output, self.name)
        found = self.edited(given, output)
        return output if found is None else found


class BlockPort:
    """The hooks on a transformer block: its input may be changed, and rows may pass it by.

    streams: the names of the arguments that it carries on, in the order in which it returns them;
    image: which of them is shown.
    """

    def __init__(
        self, module: nn.Module, path: str, edit: Passing, streams: Sequence[str], image: str
    ) -> None:
        self.module, self.path, self.edit = module, path, edit
        self.streams, self.image = tuple(streams), image
        self._names = list(inspect.signature(type(module).forward).parameters)[1:]
        self._before, self._behind = _Half(path, self._enters), _Half(path, self._passes)
        self._passing: dict[int, Sequence[int]] = {}  # of the blocks that are running, by thread
        self._given: dict[int, list[Any]] = {}
        self._handles: list[Any] = []

    @property
    def traced(self) -> bool:
        """Whether compiled code calls it."""
        return self._before.traced or self._behind.traced

    def install(self) -> None:
        self._handles.append(hook_before(self.module, self._enter))
        self._handles.append(self.module.register_forward_hook(self._leave))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._passing.clear()
        self._given.clear()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = dict(zip(self._names, args, strict=False)) | kwargs
        shown: Tensor = named[self.image]
        named[self.image] = changed = self._before(shown, shown)
        self._given[_thread()] = [named.get(name) for name in self.streams]
        if self.image in kwargs:
            return args, {**kwargs, self.image: changed}
        at = self._names.index(self.image)
        return (*args[:at], changed, *args[at + 1 :]), kwargs

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        given = self._given.pop(_thread(), None)
        if given is None:  # the hooks came, for another thread, while the block was running
            return None
        if isinstance(output, Tensor):
            return self._behind(given[self.streams.index(self.image)], output)
        if len(output) != len(given):
            raise UnsupportedError(
                f"block {self.path}: a {type(module).__name__} returns {len(output)} streams, and "
                f"only {', '.join(self.streams)} is known here, so rows can't pass it by; leave it "
                "out with sites="
            )
        pairs = zip(given, output, strict=True)
        return type(output)(out if out is None else self._behind(x, out) for x, out in pairs)

    def _enters(self, given: Tensor, output: Tensor) -> Tensor:
        with by_name.hidden():
            changed, passing = self.edit(given)
        self._passing[_thread()] = passing
        return changed

    def _passes(self, given: Tensor, output: Tensor) -> Tensor | None:
        passing = self._passing.get(_thread(), ())
        if not len(passing):
            return None
        changed = output.clone()
        at = list(passing)
        changed[at] = given[at].to(output)
        return changed


def _thread() -> int:
    # Traced code knows no threads, and is traced in one at a time.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


# -- torch.compile ---------------------------------------------------------------------------------

_ports = Ports()


def _evaluate(given: Tensor, output: Tensor, port: str) -> Tensor:
    owner = _ports.get(port)
    found = None if owner is None else owner.edited(given, output)
    return output if found is None else found


_layer_operator = opaque_operator(
    "layer",
    "Tensor given, Tensor output, str port",
    _evaluate,
    lambda given, output, port: tuple(output.shape),
    _ports,
)
