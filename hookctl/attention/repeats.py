"""Calls that are like earlier ones: the same verbs on tensors of the same form.

A sampler makes the same edits at every turn, and at every site of a shape. What such calls ask of
torch is recorded at the second of them, played beside the plain way at the third, and played
alone once both gave the same bits. (On a GPU the fourth is played beside it too: kernels are
launched by Triton the first time, and by themselves from then on.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from hookctl.attention.noted import NotedCall
from hookctl.attention.operations import Operation
from hookctl.attention.tape import Recorder, Tape, same

_KEPT = 512
_PLAIN = (Tensor, torch.nn.Parameter)  # not what traces or fakes

# Makes, of a call, what is said of it and its tensors.
Evaluation = Callable[[], tuple[Any, list[Tensor]]]


@dataclass(eq=False, slots=True)
class _Known:
    """What is known of the calls of one form.

    constants: tensors whose ids are part of the form, and must stay theirs; said: what goes with
    the results; tape: recorded at the second call; proofs: how often it gave the bits of the plain
    way; proven: often enough; hopeless: there is none that does.
    """

    constants: list[Tensor]
    said: Any = None
    tape: Tape | None = None
    proofs: int = 0
    proven: bool = False
    hopeless: bool = False


class Repeats:
    """The calls seen while the same editors are attached."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, _Known] = OrderedDict()

    def evaluated(
        self, call: NotedCall, what: Hashable, plainly: Evaluation
    ) -> tuple[Any, list[Tensor]]:
        """What `plainly` gives for the call, by the shortest way that is proven; what: tells apart
        evaluations of one call."""
        form = None if _observed() else form_of(call)
        if form is None:
            return plainly()
        key, given, constants = (what, form[0]), form[1], form[2]
        known = self._known.get(key)
        if known is None:
            self._known[key] = _Known(constants)
            if len(self._known) > _KEPT:
                self._known.popitem(last=False)
            return plainly()
        self._known.move_to_end(key)
        if known.proven and known.tape is not None:
            return known.said, known.tape.play(given)
        return plainly() if known.hopeless else self._learned(known, given, plainly)

    def _learned(
        self, known: _Known, given: Sequence[Tensor], plainly: Evaluation
    ) -> tuple[Any, list[Tensor]]:
        """The plain way, recorded, or held against what was."""
        if given[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return plainly()  # nothing can be compared before it is run
        if known.tape is None:
            recorder = Recorder(given)
            with recorder:
                known.said, made = plainly()
            known.tape = recorder.tape(made)
            known.hopeless = known.tape is None
            return known.said, made
        said, made = plainly()
        known.hopeless = said != known.said or not same(known.tape.play(given), made)
        known.proofs += not known.hopeless
        known.proven = known.proofs == (2 if given[0].is_cuda else 1)
        return said, made


def _observed() -> bool:
    """Whether somebody traces, counts or transforms the calls of torch, and is to see them all."""
    return (
        torch.compiler.is_compiling()
        or _get_current_dispatch_mode() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def form_of(call: NotedCall) -> tuple[tuple[Hashable, ...], list[Tensor], list[Tensor]] | None:
    """What calls have in common whose evaluation asks the same of torch; None if nobody can tell.

    Returns a key, the tensors that may be others in each of them, and those that are the same.
    """
    device = call.q.device.type
    if not torch.amp.is_autocast_available(device):
        return None  # the meta device, say, which has no numbers to compare
    given: list[Tensor] = [call.q, call.k, call.v]
    if call.mask is not None:
        given.append(call.mask)
    places = {id(x): i for i, x in enumerate(given)}
    constants: list[Tensor] = []
    said: list[Hashable] = []
    for operation in call.operations:
        if operation.alike is None or not _collect(operation, given, places, constants, said):
            return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return None  # what is saved for a backward pass is checkpointing's to count
    forms = [_form(x) for x in given]
    if None in forms:
        return None
    key = (
        tuple(said),
        tuple(forms),
        tuple([(r.row.index, r.tokens, r.summed, r.heads) for r in call.read_outs]),
        call.mask is None,
        call.site.kind,
        call.scale,
        call.sequence,
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device),
    )
    return key, given, constants


def _collect(
    operation: Operation,
    given: list[Tensor],
    places: dict[int, int],
    constants: list[Tensor],
    said: list[Hashable],
) -> bool:
    """Add an operation to the form of its call; False if its result can't be played again."""
    said += [operation.verb, operation.rows, operation.alike]
    for x in operation.given:
        place = places.setdefault(id(x), len(given))
        if place == len(given):
            given.append(x)
        said.append(place)
    for x in operation.constants:
        if x.requires_grad or x.is_inference():  # may change without a trace
            return False
        said += [id(x), x._version]
        constants.append(x)
    return True


def _form(x: Tensor) -> Hashable:
    if type(x) not in _PLAIN:
        return None
    return x.shape, x.stride(), x.dtype, x.device, x.requires_grad
