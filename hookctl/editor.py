"""`Editor`: what changes a pipeline's attention, and everything round it.

An editor overrides the methods it needs; what it does not override costs nothing. It says *where*
by a site selector and *when* by a window, and it says what it claims for itself, so that two
editors that would undo each other are refused before anything runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hookctl.address.clock import Clock, Window
from hookctl.address.sites import Selector, Site, matcher
from hookctl.errors import ConflictError

if TYPE_CHECKING:
    from hookctl.attention.call import AttentionCall
    from hookctl.loop.branches import Branch
    from hookctl.loop.state import FeatureCall, Predictions, Proceed, State

# Shared by editors to whom places of the image or its whole latents mean something, held alone by
# one that shows the denoiser parts of the image.
WHOLE_IMAGE = "whole image"


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
    """Base of all editors.

    sites: which attention sites `attention` is called for (`address.sites.matcher`);
    start, stop: fractions of the schedule between which the editor acts.
    """

    sites: Selector = None
    start: float = 0.0
    stop: float = 1.0

    @property
    def name(self) -> str:
        return type(self).__name__

    def window(self) -> Window:
        return Window.of((self.start, self.stop), f"{self.name}.start, stop")

    def active(self, clock: Clock) -> bool:
        """Whether the editor acts at this time."""
        return self.window().holds(clock)

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
        """Change the backbone and skip features at a decoder concat."""

    def before(self, state: State) -> None:
        """Before a step's denoiser call; may assign `state.latents`."""

    def denoise(self, state: State, proceed: Proceed) -> Any:
        """Stand round the denoiser call; `proceed()` makes it."""
        return proceed()

    def combine(self, predictions: Predictions) -> Tensor:
        """Step the rows' predictions into the one that the scheduler gets."""
        return predictions.guided

    def after(self, state: State) -> None:
        """After the scheduler's step; may assign `state.latents`."""


def overrides(editor: Editor, method: str) -> bool:
    """Whether an editor's class has its own version of a method."""
    return getattr(type(editor), method) is not getattr(Editor, method)


CURE = "Give one of them other sites=, or windows that do not overlap"


def check_conflicts(editors: Sequence[tuple[Any, Iterable[Site]]]) -> None:
    """Raise ConflictError if two editors claim the same thing at the same place and time.

    editors: (editor, all sites of its model) pairs, in list order.
    """
    held: list[tuple[Any, Any, frozenset[str]]] = []
    for editor, sites in editors:
        new = []
        for claim in editor.claims():
            test = matcher(claim.sites)
            paths = frozenset(site.path for site in sites if test(site))
            for other, theirs, their_paths in held:
                common = paths & their_paths
                if claim.what == theirs.what and _meet(claim, theirs, common):
                    raise ConflictError(
                        f"{other.name} and {editor.name} both claim the {claim.what}"
                        f"{_where(claim, theirs, common)}. {claim.cure or theirs.cure or CURE}"
                    )
            new.append((editor, claim, paths))
        held += new


def _meet(a: Any, b: Any, common: Collection[str]) -> bool:
    """Whether two claims to one thing can't both be held."""
    prompts = a.prompts is None or b.prompts is None or bool(set(a.prompts) & set(b.prompts))
    places = bool(common) or (a.sites is None and b.sites is None)
    return places and prompts and a.window.overlaps(b.window) and not (a.shared and b.shared)


def _where(a: Any, b: Any, common: Collection[str]) -> str:
    start, stop = max(a.window.start, b.window.start), min(a.window.stop, b.window.stop)
    time = f" between {start:g} and {stop:g} of the schedule"
    if a.sites is None and b.sites is None:
        return time
    return f" of {len(common)} sites (such as {min(common)!r}){time}"
