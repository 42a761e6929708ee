"""Denoiser calls: asking for one more, and which of them an attention call belongs to.

Gradient checkpointing runs modules again during backward, when the denoiser call is long over and
others may have followed. Every autograd node carries the number of its creation, so the node that
asks for the recomputation tells which call it was made in.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hookctl.address.families import uncompiled
from hookctl.address.rows import Row, Rows
from hookctl.errors import HoleError, UnsupportedError
from hookctl.evaluate.one_call import EditedSite
from hookctl.loop.arguments import (
    check_rows_can_change,
    narrow,
    rows_are_fixed,
    take_rows,
)
from hookctl.loop.driven import Reading, reading_in, reading_of
from hookctl.loop.outputs import predictions, stacked
from hookctl.loop.state import State
from hookctl.loop.text_lengths import RowText, put_texts, repeats_of


@dataclass(eq=False)
class Call:
    """One denoiser call: its state, the editors that act in it, and the sites that ran.

    acting: attached editors; by_site: for each edited site those that are shown its calls;
    owner: the `Denoising` it belongs to; repeated: the whole call is made again for a backward
    pass. rotary: the tables of its rotary positions, where editors rewrite them. nodes: the numbers
    of its autograd nodes, from and to; backwards: the backward passes that went through it.
    """

    state: State
    acting: tuple[Any, ...]
    by_site: dict[str, EditedSite]
    owner: Any
    ran: set[str] = field(default_factory=set)
    thread: int = field(default_factory=threading.get_ident)
    nodes: tuple[int, int] = (0, 0)
    backwards: set[int] = field(default_factory=set)
    repeated: bool = False
    rotary: Any = None


class Calls:
    """The denoiser calls in progress, thread by thread, and those whose graph is still alive."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._graphs: weakref.WeakValueDictionary[int, Call] = weakref.WeakValueDictionary()

    @property
    def open(self) -> Call | None:
        """The call in progress in this thread."""
        return getattr(self._local, "call", None)

    @property
    def current(self) -> Call | None:
        """The call that attention belongs to now: recomputed in a backward, or in progress."""
        if self._graphs and in_backward():
            found = self._recomputed()
            if found is not None:
                return found
        return getattr(self._local, "call", None)

    def repeated(self, model: nn.Module) -> Call | None:
        """The call of which this one of a denoiser, made in a backward, is the recomputation."""
        if not self._graphs or not in_backward():
            return None
        return self._recomputed(lambda call: uncompiled(call.state.denoiser) is model)

    def repeats(self, call: Call) -> bool:
        """Whether attention in `call` is computed not for the first time."""
        return call.repeated or (in_backward() and self.open is not call)

    @contextmanager
    def during(self, call: Call) -> Iterator[None]:
        before = self.open
        start = _next_node()
        try:
            self._local.call = call
            yield
        finally:
            self._local.call = before
            call.nodes = (start, _next_node())

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """A call that nobody controls is made meanwhile."""
        before = self.open
        try:
            self._local.call = None
            yield
        finally:
            self._local.call = before

    def abandon(self) -> None:
        """No call is in progress in this thread, whatever an interrupt left."""
        self._local.call = None

    def keep(self, call: Call, output: Any, denoiser: nn.Module, alive: Any) -> None:
        """Let the graph of an edited call find it again.

        alive: says whether the edits are still attached; a backward that would recompute without
        them is an error.
        """

        def check(grads: Any) -> None:
            if not alive():
                raise HoleError(
                    "backward through an edited denoiser call after its control() ended: "
                    "gradient checkpointing would recompute it without the edits. Call "
                    "backward() inside the context"
                )

        guarded = bool(call.by_site) and _recomputes(denoiser)
        for made in predictions(output):
            if made.grad_fn is None:
                continue
            metadata: Any = made.grad_fn.metadata
            metadata["hookctl"] = call  # lives as long as the graph
            self._graphs[id(call)] = call
            made.grad_fn.register_prehook(partial(_passes, call))
            if guarded:
                made.grad_fn.register_prehook(check)

    def follow(self, call: Call, reading: Reading) -> None:
        """Let a backward of a call that is made for its maps find it again: it may end early, and
        then has no output to be kept by."""
        reading.call = call
        self._graphs[id(call)] = call

    def _recomputed(self, whole: Callable[[Call], bool] | None = None) -> Call | None:
        """The call that the backward's node was made in; of whole calls, or else the last before.

        whole: which may be recomputed as a whole.
        """
        node = torch._C._current_autograd_node()
        if node is None:
            return None
        number, thread = node._sequence_nr(), threading.get_ident()
        # Numbers are per thread, but a backward may run in another than the call: in one of the
        # user's, known by the pass, or of torch's own.
        backward = torch._C._current_graph_task_id()
        own = isinstance(threading.current_thread(), threading._DummyThread)
        # Listed at once: another thread may be adding to them.
        alive = [c for c in (ref() for ref in self._graphs.valuerefs()) if c is not None]
        calls = [c for c in alive if c.nodes[0] <= number]
        calls = [c for c in calls if own or c.thread == thread or backward in c.backwards]
        inside = [c for c in calls if number < c.nodes[1]]
        if whole is not None:
            inside = [c for c in inside or calls if whole(c)]
        # A nested call's interval lies inside its outer call's.
        return max(inside, key=lambda c: c.nodes[0], default=None)


calls = Calls()


def _passes(call: Call, grads: Any) -> None:
    """A backward pass has come to a call."""
    call.backwards.add(torch._C._current_graph_task_id())


def in_backward() -> bool:
    """Whether this thread is executing a backward pass."""
    return torch._C._current_graph_task_id() != -1


def _next_node() -> int:
    number: int = torch._C._autograd._get_sequence_nr()
    return number


def _recomputes(denoiser: nn.Module) -> bool:
    return any(getattr(m, "gradient_checkpointing", False) for m in denoiser.modules())


EVERYONE = object()  # as a reader: whose read-outs are served as in the pipeline's own call


def predict(
    state: State,
    rows: Sequence[Row],
    *,
    latents: Tensor | None = None,
    text: Tensor | None = None,
    reader: Any = None,
    change: Callable[[dict[str, Any]], None] | None = None,
) -> Tensor:
    """Ask the denoiser of a call once more: the predictions of some of its rows, [rows, ...].

    rows: adjacent ones of `state`, perhaps with other tags; their conditions are the call's own,
    without the texts and rows that editors appended, and the editors that change the model act on
    them as they do in the pipeline's own call. latents: [images, ...] in the scheduler's space,
    text: [1 | rows, tokens, channels], in place of the call's. reader: the editor whose read-outs
    are served, None for nobody's, or EVERYONE; inside `reading_in`, it is that one's. change:
    alters the arguments last.

    Raises UnsupportedError without rows, or if the denoiser's output is no tensor.
    """
    denoiser = state.denoiser
    if not rows:
        raise UnsupportedError(
            "none of the rows to be predicted again are in the last denoiser call of this step, "
            f"which has only {state.rows!r}"
        )
    check_rows_can_change(state)
    # Whatever divides the batch into the pipeline's own rows must be given all of them.
    asked = list(state.rows) if rows_are_fixed(state) else list(rows)
    first = rows[0].index - asked[0].index
    stop = first + len(rows)
    arguments = take_rows(state, [(asked[0].index, asked[-1].index + 1)])
    narrow(state, arguments)
    if latents is not None:
        repeats = len(asked) // len(latents)
        many = latents if repeats == 1 else latents.repeat(repeats, *[1] * (latents.dim() - 1))
        arguments[state.sample] = state.model_input(many, arguments[state.sample])
    if text is not None:
        _set_text(state, arguments, text, (first, stop), len(asked))
    if change is not None:
        change(arguments)
    asked[first:stop] = rows  # perhaps with other tags
    asking = Rows([replace(row, index=i) for i, row in enumerate(asked)])
    opened = reader is EVERYONE or reading_of(denoiser) is not None
    asked_before, state.asking = state.asking, asking
    try:
        with nullcontext() if opened else reading_in(Reading(uncompiled(denoiser), reader)):
            found = stacked(_called(denoiser, arguments))
    finally:
        state.asking = asked_before
    if found is None:
        raise UnsupportedError(
            f"{type(denoiser).__name__} returns no predictions of one size for all rows"
        )
    return found if len(asked) == len(rows) else found[first:stop]


def _set_text(
    state: State, arguments: dict[str, Any], text: Tensor, span: tuple[int, int], rows: int
) -> None:
    """Put a text, [1 | rows, tokens, channels], in the place of that of a span of the rows."""
    name, (start, stop) = str(state.text), span
    before = arguments[name]
    repeats = repeats_of(before, rows)
    many = text.to(before[0])
    if len(many) != (stop - start) * repeats:
        many = many.expand((stop - start) * repeats, -1, -1)
    if isinstance(before, list) or many.shape[1] != before.shape[1]:
        texts = {row: RowText(many[(row - start) * repeats]) for row in range(start, stop)}
        put_texts(state, arguments, texts, rows)
        return
    parts = [before[: start * repeats], many, before[stop * repeats :]]
    arguments[name] = torch.cat([part for part in parts if len(part)])


def _called(denoiser: nn.Module, arguments: Mapping[str, Any]) -> Any:
    """What a denoiser returns for arguments by name."""
    bound = inspect.signature(type(uncompiled(denoiser)).forward).bind_partial(None)
    bound.arguments.update(arguments)
    return denoiser(*bound.args[1:], **bound.kwargs)
