"""The hooks round the attention: the denoiser call and the pipeline's own words.

Each port only catches and hands over; what happens then is the owner's affair. The denoiser is
caught in the slot that torch keeps for compiled calls (`Module._compiled_call_impl`), the
outermost point of a module call: offloading, which rewrites `forward` and its hooks at every
pipeline call, does not reach it, and an editor can stand round the whole call.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import set_eval_frame

from hookctl.address.pipelines import inner_pipelines
from hookctl.errors import UnsupportedError
from hookctl.hooks.patch import Patch

Inner = Callable[..., Any]
_SLOT = "_compiled_call_impl"


class Port:
    """Patches that are in from `install` until `remove`, each noted before it is."""

    def __init__(self) -> None:
        self._patches: list[Patch] = []

    def install(self) -> None:
        raise NotImplementedError

    def _patch(self, target: Any, name: str, value: Any) -> None:
        patch = Patch(target, name, value)
        self._patches.append(patch)
        patch.install()

    def _hook(self, target: Any, name: str, hook: Callable[[Inner, Any, Any], Any]) -> None:
        method = _Method(target, name, hook)
        self._patches.append(method.patch)
        method.patch.install()

    def remove(self) -> None:
        for patch in reversed(self._patches):
            patch.remove()


class _PerThread(threading.local):
    """branch: what the pipeline calls the call in progress; eager: whether it runs uncompiled."""

    branch: str | None = None
    eager: bool = False


class DenoiserPort(Port):
    """Hands every call of the denoiser to `around(inner, args, kwargs)`."""

    def __init__(self, module: nn.Module, around: Callable[[Inner, Any, Any], Any]) -> None:
        super().__init__()
        self.module, self.around = module, around
        self.compiled: Inner | None = module.__dict__.get(_SLOT)
        self._here = _PerThread()

    def install(self) -> None:
        module = self.module
        self.compiled = module.__dict__.get(_SLOT)  # perhaps since the port was made
        self._patch(module, _SLOT, self._caught())
        self._patch(module, "compile", self._compile)
        if hasattr(module, "cache_context"):
            self._patch(module, "cache_context", self._cache_context())
        for name in ("__deepcopy__", "__reduce_ex__"):
            self._patch(module, name, self._uncopied)

    def remove(self) -> None:
        self.around = _through  # another port may have been put in over this one
        super().remove()
        if self.compiled is not None and _SLOT not in self.module.__dict__:
            self.module.__dict__[_SLOT] = self.compiled

    @property
    def branch(self) -> str | None:
        """What the pipeline calls the call that this thread makes."""
        return self._here.branch

    def _uncopied(self, *args: Any) -> Any:
        raise UnsupportedError(
            f"this {type(self.module).__name__} is under hookctl.control(...), whose hooks can't "
            "be copied or pickled with it; do that outside of the context"
        )

    def _caught(self) -> Inner:
        """The call in the slot: torch.compile sees the model, but none of what is done round it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            tracer = set_eval_frame(None)

            def inner(*args: Any, **kwargs: Any) -> Any:
                set_eval_frame(None if self._here.eager else tracer)
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
        before, self._here.eager = self._here.eager, True
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self._here.eager = before

    def _compile(self, *args: Any, **kwargs: Any) -> None:
        """`module.compile()` inside the context: compiled within the hook, not over it."""
        self.compiled = torch.compile(self.module._call_impl, *args, **kwargs)
        self._patches[0].before = self.compiled

    def _cache_context(self) -> Any:
        original: Any = self.module.cache_context

        @functools.wraps(original)
        @contextmanager
        def cache_context(name: str, *args: Any, **kwargs: Any) -> Any:
            before, self._here.branch = self._here.branch, name
            try:
                with original(name, *args, **kwargs):
                    yield
            finally:
                self._here.branch = before

        return cache_context


def _through(inner: Inner, args: Any, kwargs: Any) -> Any:
    return inner(*args, **kwargs)


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
        hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        or (module is not model and getattr(module, _SLOT, None) is not None)
        for module in model.modules()
    )


def forget_compiled() -> bool:
    """Have everything compiled anew at its next call; False if nothing was compiled so far."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    if frames is None or not getattr(frames, "cached_backends", True):
        return False
    torch._dynamo.reset()
    return True


class _Method:
    """A method of one object with a hook round it; a deep copy of the object gets its own."""

    def __init__(self, owner: Any, name: str, hook: Callable[[Inner, Any, Any], Any]) -> None:
        self._owner, self._name, self._hook = owner, name, hook
        self.patch = Patch(owner, name, self)
        functools.update_wrapper(self, self.patch.below)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._hook(self.patch.below, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._owner), self._owner)
        return Patch(copied, self._name, None).below


class PipelinePort(Port):
    """Learns from a pipeline's own methods when a run starts and ends, and what it draws."""

    def __init__(
        self,
        pipe: Any,
        started: Callable[[dict[str, Any]], None],
        prepared: Callable[[], None],
        texts: Callable[[dict[str, Any]], None],
        ended: Callable[[], None],
    ) -> None:
        """started: at the start of a run, with what the pipeline checks of its call; prepared:
        while one is prepared, where no method of the pipeline's stands for its start alone
        (Z-Image); texts: of what is encoded; ended: when a call has drawn what it was to draw."""
        super().__init__()
        self.pipe, self._started, self._prepared = pipe, started, prepared
        self._texts, self._ended = texts, ended

    def install(self) -> None:
        for pipe in (self.pipe, *inner_pipelines(self.pipe)):
            self._install(pipe)
        if hasattr(self.pipe, "maybe_free_model_hooks"):
            self._watch(self.pipe, "maybe_free_model_hooks", lambda given: self._ended())

    def _install(self, pipe: Any) -> None:
        checks = hasattr(pipe, "check_inputs")
        if checks:
            self._watch(pipe, "check_inputs", self._started)
        elif hasattr(pipe, "prepare_latents"):
            self._watch(pipe, "prepare_latents", lambda given: self._prepared())

        def encoding(given: dict[str, Any]) -> None:
            if not checks:
                self._prepared()
            self._texts(given)

        for name in ("encode_prompt", "_encode_prompt"):
            if hasattr(pipe, name):
                self._watch(pipe, name, encoding)
                break

    def _watch(self, pipe: Any, name: str, note: Callable[[dict[str, Any]], None]) -> None:
        signature = inspect.signature(getattr(pipe, name))

        def watched(original: Inner, args: Any, kwargs: Any) -> Any:
            # A pipeline may write its template into the list of prompts that its caller holds.
            args = tuple(list(a) if isinstance(a, list) else a for a in args)
            kwargs = {k: list(a) if isinstance(a, list) else a for k, a in kwargs.items()}
            note(dict(signature.bind(*args, **kwargs).arguments))
            return original(*args, **kwargs)

        self._hook(pipe, name, watched)
