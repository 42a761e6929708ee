"""The hooks round the attention: the denoiser call, the scheduler, the pipeline's own words.

Each port only catches and hands over; what happens then is the owner's affair. The denoiser is
caught in the slot that torch keeps for compiled calls (`Module._compiled_call_impl`), the
outermost point of a module call: offloading, which rewrites `forward` and its hooks at every
pipeline call, does not reach it, and an editor can stand round the whole call.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import set_eval_frame

from hookctl.hooks.patch import Patch

Inner = Callable[..., Any]
_SLOT = "_compiled_call_impl"


class DenoiserPort:
    """Hands every call of the denoiser to `around(inner, args, kwargs)`."""

    def __init__(self, module: nn.Module, around: Callable[[Inner, Any, Any], Any]) -> None:
        self.module, self.around = module, around
        self.compiled: Inner | None = module.__dict__.get(_SLOT)
        self._eager = False
        self._patches = [
            Patch(module, _SLOT, self._caught()),
            Patch(module, "compile", self._compile),
        ]
        if hasattr(module, "cache_context"):
            self._patches.append(Patch(module, "cache_context", self._cache_context()))
        self.branch: str | None = None

    def remove(self) -> None:
        for patch in reversed(self._patches):
            patch.remove()
        if self.compiled is not None and _SLOT not in self.module.__dict__:
            self.module.__dict__[_SLOT] = self.compiled

    def _caught(self) -> Inner:
        """The call in the slot: torch.compile sees the model, but none of what is done round it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            tracer = set_eval_frame(None)

            def inner(*args: Any, **kwargs: Any) -> Any:
                set_eval_frame(None if self._eager else tracer)
                try:
                    return (self.compiled or self.module._call_impl)(*args, **kwargs)
                finally:
                    set_eval_frame(None)

            try:
                return self.around(inner, args, kwargs)
            finally:
                set_eval_frame(tracer)

        # Not recursive: a model compiled round the hook is compiled inside it. A function, since
        # torch 2.6 marks what it is given, and a bound method can't be marked.
        return torch.compiler.disable(call, recursive=False)

    @contextmanager
    def eagerly(self) -> Iterator[None]:
        """Run the model uncompiled meanwhile, whatever of it or round it is compiled."""
        if "torch._dynamo" not in sys.modules:  # nothing can be compiled, and the import is dear
            yield
            return
        before, self._eager = self._eager, True
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self._eager = before

    def _compile(self, *args: Any, **kwargs: Any) -> None:
        """`module.compile()` inside the context: compiled within the hook, not over it."""
        self.compiled = torch.compile(self.module._call_impl, *args, **kwargs)
        self._patches[0].before = self.compiled

    def _cache_context(self) -> Any:
        original: Any = self.module.cache_context

        @functools.wraps(original)
        @contextmanager
        def cache_context(name: str, *args: Any, **kwargs: Any) -> Any:
            before, self.branch = self.branch, name
            try:
                with original(name, *args, **kwargs):
                    yield
            finally:
                self.branch = before

        return cache_context


def is_compiled(port: DenoiserPort | None, *denoisers: nn.Module) -> bool:
    """Whether any code of a denoiser may have been compiled already.

    denoisers: as it was given and as the pipeline holds it now, wrappers of `torch.compile` too.
    """
    if port is not None and port.compiled is not None:
        return True
    if any(hasattr(denoiser, "_orig_mod") for denoiser in denoisers):
        return True
    model = denoisers[0]
    return any(
        getattr(module, _SLOT, None) is not None
        for module in model.modules()
        if module is not model
    )


class SchedulerPort:
    """Hands every step to `around(step, arguments)`, and the latents of every model input that it
    makes to `scaled`, with what does the same to others."""

    def __init__(
        self,
        scheduler: Any,
        around: Callable[[Inner, dict[str, Any]], Any],
        scaled: Callable[[Tensor, Callable[[Tensor], Tensor]], None],
    ) -> None:
        self.scheduler, self._around, self._scaled = scheduler, around, scaled
        self._patches = [Patch(scheduler, "step", _Method(scheduler, "step", self._step))]
        if hasattr(scheduler, "scale_model_input"):
            method = _Method(scheduler, "scale_model_input", self._scale)
            self._patches.append(Patch(scheduler, "scale_model_input", method))

    def remove(self) -> None:
        for patch in self._patches:
            patch.remove()

    @property
    def installed(self) -> bool:
        return self._patches[0].installed

    def _step(self, original: Inner, args: Any, kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(*args, **kwargs)
        arguments = dict(bound.arguments)
        arguments |= arguments.pop("kwargs", {})
        if "args" in arguments or not {"model_output", "sample"} <= set(arguments):
            return original(*args, **kwargs)
        return self._around(original, arguments)

    def _scale(self, original: Inner, args: Any, kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        latents, rest = (args[0], args[1:]) if args else (kwargs.pop("sample"), args)
        self._scaled(latents, lambda x: original(x, *rest, **kwargs))
        return out


class _Method:
    """A method of one object with a hook round it; a deep copy of the object gets its own."""

    def __init__(self, owner: Any, name: str, hook: Callable[[Inner, Any, Any], Any]) -> None:
        self._owner, self._name, self._hook = owner, name, hook
        self._original: Inner = getattr(owner, name)
        functools.update_wrapper(self, self._original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._hook(self._original, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._owner), self._owner)
        return getattr(type(copied), self._name).__get__(copied)


class PipelinePort:
    """Learns from a pipeline's own methods when a run starts and what it draws."""

    def __init__(
        self,
        pipe: Any,
        started: Callable[[dict[str, Any]], None],
        prepared: Callable[[], None],
        texts: Callable[[dict[str, Any]], None],
    ) -> None:
        """started: at the start of a run, with what the pipeline checks of its call; prepared: while one is prepared, where no method of the
        pipeline's stands for its start alone (Z-Image); texts: of what is encoded."""
        self._patches: list[Patch] = []
        checks = hasattr(pipe, "check_inputs")
        if checks:
            self._watch(pipe, "check_inputs", started)
        elif hasattr(pipe, "prepare_latents"):
            self._watch(pipe, "prepare_latents", lambda given: prepared())

        def encoding(given: dict[str, Any]) -> None:
            if not checks:
                prepared()
            texts(given)

        for name in ("encode_prompt", "_encode_prompt"):
            if hasattr(pipe, name):
                self._watch(pipe, name, encoding)
                break

    def _watch(self, pipe: Any, name: str, note: Callable[[dict[str, Any]], None]) -> None:
        original = getattr(pipe, name)
        signature = inspect.signature(original)

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            # A pipeline may write its template into the list of prompts that its caller holds.
            args = tuple(list(a) if isinstance(a, list) else a for a in args)
            kwargs = {k: list(a) if isinstance(a, list) else a for k, a in kwargs.items()}
            note(dict(signature.bind(*args, **kwargs).arguments))
            return original(*args, **kwargs)

        self._patches.append(Patch(pipe, name, watched))

    def remove(self) -> None:
        for patch in self._patches:
            patch.remove()
