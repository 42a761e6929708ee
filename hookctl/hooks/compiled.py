"""Hooks inside compiled code: an opaque operator in the place of each edited call.

`torch.compile` traces past Python that runs during tracing only, so schedules and editors must
stand behind an operator that it cannot look into. They then stay ordinary Python: no graph break,
and no new graph when an edit starts or stops. A captured CUDA graph would replay the first step's
edit for ever, so the operators are tagged as unsafe to capture.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hookctl.attention.sdpa_call import SDPACall
from hookctl.hooks.by_name import SDPA

_UNSAFE_TO_CAPTURE = getattr(torch.Tag, "cudagraph_unsafe", None)  # torch knows it from 2.9 on


class Port(Protocol):
    """Whoever stands behind an operator. traced: set when compiled code calls it."""

    traced: bool


class Ports:
    """Ports by the name that compiled graphs know them by: a number would be made a free variable.

    They are not kept alive: compiled code that outlives its port makes the plain call.
    """

    def __init__(self) -> None:
        self._ports: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
        self._numbers = itertools.count(1)

    def register(self, port: Port, path: str) -> str:
        """A name of its own for a port."""
        name = f"{path}#{next(self._numbers)}"
        self._ports[name] = port
        return name

    def get(self, name: str) -> Any:
        return self._ports.get(name)


def opaque_operator(
    name: str,
    arguments: str,
    evaluate: Callable[..., Tensor],
    shape: Callable[..., tuple[int, ...]],
    ports: Ports,
) -> Callable[..., Tensor]:
    """An operator "hookctl::name" of tensors and constants that gives one tensor.

    arguments: its schema; the tensors that may be learned through come first, those that may be
    None next, and `str port` is among the rest. evaluate: what it does, ordinary Python that is
    made again, with gradients, in a backward pass. shape: of the output, for these arguments.
    """
    learned = arguments.count("Tensor ")
    tensors = arguments.count("Tensor")
    names = [part.split()[-1] for part in arguments.split(",")]
    port_at = names.index("port")
    tags = () if _UNSAFE_TO_CAPTURE is None else (_UNSAFE_TO_CAPTURE,)
    known = inspect.signature(torch.library.custom_op).parameters
    options: dict[str, Any] = {"tags": tags} if tags and "tags" in known else {}

    def forward(*given: Any) -> Tensor:
        out = evaluate(*given)
        # An operator returns none of its inputs, and what was promised to the tracer.
        return out.clone() if any(out is x for x in given) else out.contiguous()

    def again(grad: Tensor, *given: Any) -> tuple[Tensor, ...]:
        """Evaluate once more, with gradients: the edit itself is differentiable."""
        leaves = [x.detach().requires_grad_() for x in given[:learned]]
        with torch.enable_grad():
            # Views, since what is evaluated may return its input as it is.
            out = evaluate(*(x.view_as(x) for x in leaves), *given[learned:])
        found = torch.autograd.grad(out, leaves, grad, allow_unused=True)
        return tuple(
            torch.zeros_like(x) if g is None else g.contiguous()
            for x, g in zip(leaves, found, strict=True)
        )

    def fake(*given: Any) -> Tensor:
        port = ports.get(given[port_at])
        if port is not None:
            port.traced = True
        empty: Tensor = given[0].new_empty(shape(*given))
        return empty

    def fake_again(grad: Tensor, *given: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given[:learned])

    operator = torch.library.custom_op(
        f"hookctl::{name}",
        forward,
        mutates_args=(),
        schema=f"({arguments}) -> Tensor",
        **options,
    )
    gradients = ", ".join(["Tensor"] * learned)
    backward_operator = torch.library.custom_op(
        f"hookctl::{name}_backward",
        again if learned > 1 else lambda grad, *given: again(grad, *given)[0],
        mutates_args=(),
        schema=f"(Tensor grad, {arguments}) -> " + (f"({gradients})" if learned > 1 else gradients),
        **options,
    )
    operator.register_fake(fake)
    backward_operator.register_fake(
        fake_again if learned > 1 else lambda grad, *given: fake_again(grad, *given)[0]
    )

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:tensors])
        ctx.rest = inputs[tensors:]

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        again_op = getattr(torch.ops.hookctl, f"{name}_backward")
        found = again_op(grad, *ctx.saved_tensors, *ctx.rest)
        found = found if learned > 1 else (found,)
        return (*found, *(None,) * (len(names) - learned))

    operator.register_autograd(backward, setup_context=save)
    traceable: Callable[..., Tensor] = getattr(torch.ops.hookctl, name)
    return traceable


# -- attention -------------------------------------------------------------------------------------

attention_ports = Ports()


def _evaluate(*given: Any) -> Tensor:
    *call, port, index = given
    owner = attention_ports.get(port)
    if owner is None or not owner.handler.watching(owner):
        return SDPACall(*call).attend()
    out: Tensor = owner.caught(index, SDPACall(*call))
    return out


_attention_operator = opaque_operator(
    "attention",
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, bool is_causal, "
    "float? scale, bool enable_gqa, str port, int index",
    _evaluate,
    lambda query, key, value, *rest: (*query.shape[:-1], value.shape[-1]),
    attention_ports,
)


class CompiledMode(TorchFunctionMode):
    """What SiteMode does while `torch.compile` traces: the call becomes one opaque operator."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is SDPA:
            index, self.calls = self.calls, self.calls + 1
            return _attention_operator(*SDPACall(*args, **(kwargs or {})), self.name, index)
        if func is Tensor.unflatten:
            # Under a mode, tracing breaks at the `super()` call inside the method.
            return torch.unflatten(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
