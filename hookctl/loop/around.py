"""The hooks of an editor round the attention: called, checked, and noted for the report.

What an editor did is what can be seen of it: tensors that it put in the place of others or changed
in place, rows and texts that it added, a call that it stood round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from hookctl.editor import Editor, tell
from hookctl.errors import InputError, naming
from hookctl.loop.inserting import BlockCall
from hookctl.loop.state import FeatureCall, Predictions, State

CALL, STEP = "denoiser call", "step"


class Attached(Protocol):
    """One editor in one session."""

    @property
    def editor(self) -> Editor: ...

    def note_hook(self, hook: str, step: int, what: str, where: str) -> None:
        """Keep what a hook did, "" for nothing, for the session's report."""


def before(one: Attached, state: State) -> None:
    """Before a step's denoiser call; the editor may give it other latents."""
    assigned, given = state.assigned, _mark(state.kwargs[state.sample])
    text = _mark(state.kwargs.get(state.text or ""))
    tell(one.editor, "before", state)
    changed = state.assigned is not assigned or _mark(state.kwargs[state.sample]) != given
    told = _mark(state.kwargs.get(state.text or "")) != text
    what = ("assigned the latents" if changed else "", "changed the prompts" if told else "")
    _note(one, "before", state, " and ".join(filter(None, what)), STEP)


def added(one: Attached, hook: str, state: State) -> dict[str, Any]:
    """What an editor adds to a denoiser call by "branches" or "context": by name."""
    with naming(one.editor.name, hook):
        found = getattr(one.editor, hook)(state)
    if found is not None and not isinstance(found, Mapping):
        kind = "Branch" if hook == "branches" else "embeddings [1 | rows, tokens, channels]"
        raise InputError(
            f"{one.editor.name}.{hook} returned a {type(found).__name__}; return a mapping from "
            f"names to {kind}"
        )
    names = ", ".join(found or ())
    _note(one, hook, state, f"added {names}" if names else "", CALL)
    return dict(found or {})


def denoise(one: Attached, state: State, proceed: Callable[[], Any]) -> Any:
    """What the denoiser call becomes with an editor round it."""
    with naming(one.editor.name, "denoise"):
        out = one.editor.denoise(state, proceed)
    if out is None:
        raise InputError(f"{one.editor.name}.denoise returned None; return what proceed() returns")
    _note(one, "denoise", state, "stood round the call", CALL)
    return out


def features(one: Attached, call: FeatureCall) -> None:
    """A skip connection after an editor saw it."""
    marks = _mark(call.backbone), _mark(call.skip)
    tell(one.editor, "features", call)
    changed = marks != (_mark(call.backbone), _mark(call.skip))
    what = "changed the skip connection" if changed else ""
    one.note_hook("features", call.clock.step, what, f"up{call.block}.skip{call.place}")


def residuals(one: Attached, state: State) -> Any:
    """What an editor adds to the encoder's skips and the middle."""
    with naming(one.editor.name, "residuals"):
        found = one.editor.residuals(state)
    _note(one, "residuals", state, "" if found is None else "added to the skips", CALL)
    return found


def inside(one: Attached, hook: str, call: Any, result: str, path: str) -> None:
    """What a layer gives after an editor saw it; result: the attribute of the call with it."""
    given: Tensor = getattr(call, result)
    mark = _mark(given)
    tell(one.editor, hook, call)
    found = getattr(call, result)
    if not isinstance(found, Tensor) or found.shape != given.shape:
        kind = tuple(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise InputError(
            f"{one.editor.name}.{hook} assigned {kind} to call.{result}; it is {tuple(given.shape)}"
        )
    if found.dtype != given.dtype:
        setattr(call, result, found.to(given.dtype))
    one.note_hook(hook, call.clock.step, "" if _mark(found) == mark else f"changed {result}", path)


def block(one: Attached, call: BlockCall) -> None:
    """A transformer block after an editor saw what it is given."""
    hidden, mark, passing = call.hidden, _mark(call.hidden), set(call.passing)
    tell(one.editor, "block", call)
    found = call.hidden
    if not isinstance(found, Tensor) or found.shape != hidden.shape:
        kind = tuple(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise InputError(
            f"{one.editor.name}.block assigned {kind} to call.hidden; it is {tuple(hidden.shape)}"
        )
    said = ["changed hidden"] if _mark(found) != mark else []
    said += ["skipped rows"] if call.passing != passing else []
    one.note_hook("block", call.clock.step, " and ".join(said), call.name)


def combine(one: Attached, predictions: Predictions) -> Tensor:
    """The prediction that an editor makes of those of a step."""
    guided = predictions.guided
    given = _mark(guided)
    with naming(one.editor.name, "combine"):
        found = one.editor.combine(predictions)
    if not isinstance(found, Tensor) or found.shape != guided.shape:
        kind = tuple(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise InputError(
            f"{one.editor.name}.combine returned {kind}; return the prediction that the scheduler "
            f"gets, {tuple(guided.shape)}, such as predictions.guided"
        )
    what = "" if _mark(found) == given else "changed the prediction"
    _note(one, "combine", predictions.state, what, STEP)
    return found


def after(one: Attached, state: State) -> None:
    """After the scheduler's step; the editor may change its result."""
    given = _mark(state.stepped)
    tell(one.editor, "after", state)
    what = "" if _mark(state.stepped) == given else "assigned the latents"
    _note(one, "after", state, what, STEP)


def _note(one: Attached, hook: str, state: State, what: str, where: str) -> None:
    one.note_hook(hook, state.clock.step, what, where)


def _mark(x: Any) -> tuple[int, int]:
    """Which tensor it is and in which version: another one once it is changed, also in place."""
    return id(x), x._version if isinstance(x, Tensor) and not x.is_inference() else 0
