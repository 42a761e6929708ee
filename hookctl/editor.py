"""`Editor`: what changes a pipeline's attention, and everything round it.

An editor overrides the methods it needs; what it does not override costs nothing. It says *where*
by a site selector and *when* by a window, and it says what it claims for itself, so that two
editors that would undo each other are refused before anything runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hookctl.address.clock import Clock, Window
from hookctl.address.sites import Selector
from hookctl.errors import InputError, check_returned, naming

if TYPE_CHECKING:
    from hookctl.attention.call import AttentionCall
    from hookctl.loop.branches import Branch
    from hookctl.loop.inserting import BlockCall, InsertCall, LinearCall, StemCall
    from hookctl.loop.positions_call import PositionsCall
    from hookctl.loop.residuals import Residuals
    from hookctl.loop.state import FeatureCall, Predictions, Proceed, State

# Shared by editors to whom places of the image or its whole latents mean something, held alone by
# one that shows the denoiser parts of the image.
WHOLE_IMAGE = "whole image"
# Shared by editors to whom words of the prompts mean something, held alone by one that lets the
# prompts change.
WORDS = "words of the prompts"
# Shared by editors that change what stands at words, held alone by one that has rows see texts of
# regions in place of their prompt.
TEXTS = "texts that rows see"
# Held by an editor that sets places of the latents between the steps.
LATENTS = "latents between the steps"


@dataclass(frozen=True)
class Claim:
    """Something that only one editor can do at a site at a time.

    what: the thing claimed, e.g. "substitution" (whose q, k, v), "token map", WHOLE_IMAGE;
    sites: where; window: when; prompts: for the rows of which prompts, None for all. shared:
    others may share it, but none may have it alone. cure: what to do about a conflict.
    """

    what: str
    sites: Selector = None
    window: Window = Window()
    prompts: tuple[int, ...] | None = None
    shared: bool = False
    cure: str = ""


class Editor:
    """Base of all editors: override the hooks that are needed, and give an instance to `control`.

    What a hook returns is read where it says so; the others change a call by its verbs, or by
    assigning to what they are given. They are called in this order, editor by editor.

    Once               attach, claims        when a pipeline comes under control
    Once a run         begin
    Each denoiser call before, branches, context
                       denoise               round the call; inside it, site by site:
                       attention, features, block
                       residuals, stem, insert, linear   (trained modules)
                       positions             rotary ones
    Each step          combine, after        before and after the scheduler's step

    sites: which attention sites `attention` is called for, after which `insert` is, and in whose
    blocks `block` is, such as "cross", "self up @<=1/2" or a function of a `Site`
    (`address.sites.matcher` has the grammar); None for all.
    start, stop: fractions of the schedule, 0 to 1, between which the editor acts.
    """

    sites: Selector = None
    start: float = 0.0
    stop: float = 1.0

    @property
    def name(self) -> str:
        """What reports and errors call the editor."""
        return type(self).__name__

    def window(self) -> Window:
        """The span of the schedule from `start` to `stop`."""
        return Window.of((self.start, self.stop), f"{self.name}.start, stop")

    def active(self, clock: Clock) -> bool:
        """Whether the editor acts at this time."""
        return self.window().holds(clock)

    def neutral(self) -> bool | None:
        """Whether its settings make it change nothing, such as a scale of 0.

        If not, a run in which it did nothing at all is told of (`control`). None: it may only look.
        """
        return None

    def claims(self) -> Sequence[Claim]:
        """What the editor must have for itself."""
        return ()

    def attach(self, target: Any) -> None:
        """Check the editor's own arguments against the pipeline or denoiser, before any work."""

    def begin(self, state: State) -> None:
        """A new run starts: forget the last one's maps and check the batch."""

    def context(self, state: State) -> Mapping[str, Tensor] | None:
        """Further text for the denoiser to see: name -> embeddings [1 | rows, tokens, channels].

        Its k and v pass the model's own projections (LoRA included) and are found by
        `AttentionCall.context(name)`; the plain call does not attend to them.
        """
        return None

    def branches(self, state: State) -> Mapping[str, Branch]:
        """Further rows for the denoiser to predict: name of the new branch -> what it copies.

        They are in every hook that follows (`context`, `attention`, `features`, `denoise`), tagged
        with the name, and `combine` finds their predictions under it.
        """
        return {}

    def attention(self, call: AttentionCall) -> None:
        """Rewrite one attention call through its verbs."""

    def features(self, call: FeatureCall) -> None:
        """Change a skip connection: assign `call.backbone` or `call.skip`."""

    def residuals(self, state: State) -> Residuals | None:
        """What is added to the encoder's skips and the middle, beside a ControlNet's own."""
        return None

    def block(self, call: BlockCall) -> None:
        """Change what a transformer block is given: `call.skip(rows)`, or assign `call.hidden`."""

    def insert(self, call: InsertCall) -> None:
        """Change a transformer block's stream after its self-attention: assign `call.hidden`."""

    def linears(self, path: str) -> bool:
        """Which linear layers `linear` is called for, by their path inside the denoiser."""
        return False

    def linear(self, call: LinearCall) -> None:
        """Change what a linear layer gives: `call.add(down, up)`, or assign `call.output`."""

    def stem(self, call: StemCall) -> None:
        """Change how the latents enter: `call.convolve(...)`, or assign `call.output`."""

    def positions(self, call: PositionsCall) -> None:
        """Rewrite the rotary positions of a denoiser call: assign `call.frequencies` and its kin.

        With `sites` the attention there alone sees them."""

    def before(self, state: State) -> None:
        """Before a step's denoiser call; may assign `state.latents`."""

    def denoise(self, state: State, proceed: Proceed) -> Any:
        """Stand round the denoiser call: return what `proceed()`, which makes it, returns."""
        return proceed()

    def combine(self, predictions: Predictions) -> Tensor:
        """Return the prediction that the scheduler gets, [images, channels, ...]."""
        return predictions.guided

    def after(self, state: State) -> None:
        """After the scheduler's step; may assign `state.latents`."""


# What an editor does something by.
HOOKS = (
    *("begin", "before", "branches", "context", "denoise", "attention", "features", "residuals"),
    *("block", "insert", "linear", "stem", "positions", "combine", "after"),
)
# Those that change what layers inside the model give.
INSIDE = ("block", "insert", "linear", "stem", "positions")
_METHODS = ("attach", "claims", "window", "active", "neutral", "linears", *HOOKS)
_INSTEAD = {
    "features": "assign call.backbone or call.skip",
    "block": "use call.skip(rows), or assign call.hidden",
    "insert": "assign call.hidden",
    "linear": "assign call.output, or call.add(down, up)",
    "stem": "assign call.output",
    "positions": "assign call.positions, call.frequencies or call.amplitudes",
    "before": "assign state.latents",
    "after": "assign state.latents",
}


def overrides(editor: Editor, method: str) -> bool:
    """Whether an editor's class has its own version of a method."""
    return getattr(type(editor), method) is not getattr(Editor, method)


def tell(editor: Editor, hook: str, given: Any) -> None:
    """Call a hook whose value is not read; InputError, with what to do, if it returns one."""
    with naming(editor.name, hook):
        check_returned(editor.name, hook, getattr(editor, hook)(given), _INSTEAD.get(hook, ""))


def check_editor(editor: Any, where: str) -> None:
    """Raise InputError, with the cure, for what is no editor or can't mean what it says.

    That is a class, a hook that is misspelt, takes other arguments or is set on an instance, and a
    subclass without any hook.
    """
    if isinstance(editor, type):
        name = editor.__name__
        raise InputError(f"{where} is the class {name}; give an instance of it: {name}(...)")
    if not isinstance(editor, Editor):
        several = isinstance(editor, list | tuple)
        cure = "give each by itself: control(pipe, *editors)" if several else "give instances"
        raise InputError(f"{where} is {editor!r}; {cure} of hookctl.Editor")
    cls = type(editor)
    missing = [name for name in _METHODS if not overrides(editor, name)]
    for name in _public_methods(cls):
        if near := get_close_matches(name, missing, n=1, cutoff=0.85):
            raise InputError(
                f"{cls.__name__}.{name} is no hook of hookctl.Editor, so nothing calls it; did you "
                f"mean {near[0]!r}? If not, give it a name that begins with _"
            )
    for name in missing:
        if name in getattr(editor, "__dict__", {}):
            raise InputError(
                f"{where}: {name} is set on an instance of {cls.__name__}, where nothing finds it; "
                "define it in a class"
            )
    for name in _METHODS:
        if name not in missing:
            _check_signature(editor, name)
    if not any(name in HOOKS for name in _METHODS if name not in missing):
        raise InputError(
            f"{where}: {cls.__name__} overrides no hook of hookctl.Editor, so it would change "
            f"nothing; define one of {', '.join(HOOKS)}"
        )


def _public_methods(cls: type) -> Iterator[str]:
    """What the subclasses of Editor among a class and its bases define and Editor does not."""
    for owner in cls.__mro__:
        if owner is not Editor and issubclass(owner, Editor):
            for name, value in vars(owner).items():
                is_method = inspect.isfunction(value) or isinstance(
                    value, classmethod | staticmethod
                )
                if is_method and not name.startswith("_") and not hasattr(Editor, name):
                    yield name


def _check_signature(editor: Editor, name: str) -> None:
    wanted = list(inspect.signature(getattr(Editor, name)).parameters)[1:]
    method = getattr(editor, name)
    try:
        inspect.signature(method).bind(*wanted)
    except (TypeError, ValueError):  # ValueError: not even `self`, or not written in Python
        if not inspect.ismethod(method) and not inspect.isfunction(method):
            return
        taken = inspect.signature(getattr(method, "__func__", method))
        raise InputError(
            f"{type(editor).__name__}.{name}{taken} can't be called with ({', '.join(wanted)}); "
            f"define it as {name}({', '.join(['self', *wanted])})"
        ) from None
