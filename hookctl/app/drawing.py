"""One run of the page: the pictures, maps and report of what somebody wants.

It is `hookctl run`, step by step told and stopped when asked; the pictures are the same, bit for
bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Any

import hookctl
from hookctl.app.programs import BACK, Calls, Stopped, Tell, run_program
from hookctl.app.reading import Looks, readers_of, step_maps, words, words_of
from hookctl.app.stack import Kinds, Wanted, preset_of
from hookctl.cli.draw import Drawing, images
from hookctl.cli.hooks import attach_hooks
from hookctl.cli.inverting import check_fits, drawn_prompts, program_for
from hookctl.editor import Editor
from hookctl.loop.state import State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image
    from torch import Tensor

    from hookctl.preset import Preset
    from hookctl.session import Session


class Steps(Editor):
    """Tells of every step, and ends the run where that is wanted."""

    def __init__(self, tell: Tell, stop: Event, title: str) -> None:
        self._tell, self._stop, self._title = tell, stop, title

    def before(self, state: State) -> None:
        if self._stop.is_set():
            raise Stopped
        self._tell(self._title, state.clock.step, state.clock.steps)

    def after(self, state: State) -> None:
        self._tell(self._title, state.clock.step + 1, state.clock.steps)
        if self._stop.is_set():
            raise Stopped


@dataclass
class Kept:
    """What the last runs of a person left to be used again: plain pictures, an inverted one."""

    plain: tuple[Any, list[Image]] | None = None
    inverted: tuple[Any, Any] | None = None


@dataclass(frozen=True)
class Made:
    """What a run made.

    source, edited: the pictures side by side; maps: of each word its share of attention
    [steps, height, width], of the edited picture; looks: what its places look at (`Looks`); notes:
    what is to be said on the cards that are on, by their number from 0; rows: of the report;
    preset: what was run.
    """

    wanted: Wanted
    preset: Preset
    source: Image
    edited: Image
    maps: Mapping[str, Tensor] = field(default_factory=dict)
    looks: Tensor | None = None
    notes: Mapping[int, str] = field(default_factory=dict)
    rows: Sequence[tuple[str, ...]] = ()


def draw(
    pipe: Any,
    wanted: Wanted,
    kinds: Kinds,
    model: str,
    *,
    tell: Tell,
    stop: Event,
    kept: Kept | None = None,
    shown: Callable[[Image], None] = lambda image: None,
) -> Made:
    """Run what is wanted. shown: called with the source picture as soon as it is there.

    Raises Stopped once `stop` is set; InputError and its kin for what can't be done.
    """
    preset = preset_of(wanted, kinds, model, words_of(pipe))
    run = _Run(pipe, wanted, preset, Kept() if kept is None else kept, tell, stop)
    program, editors = run.program(), run.editors()
    prompts = drawn_prompts(preset, run.prompts)
    readers = readers_of(pipe) if getattr(program, "takes_editors", True) else []
    # Control comes first: it refuses what can't be done before anything is drawn.
    with hookctl.control(pipe, *editors, *readers, strict=False):
        run.check()
    before = run.plain()
    shown(before[0])
    after, session = run.edited([*editors, *readers], program)
    notes = _notes(wanted, kinds, session, editors)
    maps = step_maps(session, words(pipe, prompts[-1]))
    own = {reader.name for reader in readers}
    rows = [row for row in [*session.log.rows(), *session.log.hook_rows()] if row[0] not in own]
    looks = next((reader.looks() for reader in readers if isinstance(reader, Looks)), None)
    return Made(wanted, preset, before[0], after[-1], maps, looks, notes, rows)


def check(pipe: Any, wanted: Wanted, kinds: Kinds, model: str) -> None:
    """InputError or ConflictError for cards that can't be together, or not on this model."""
    preset = preset_of(wanted, kinds, model, words_of(pipe))
    editors = preset.editors(wanted.prompts, wanted.image)
    with hookctl.control(pipe, *editors, strict=False):
        pass


@dataclass(frozen=True)
class _Run:
    """One press of the button."""

    pipe: Any
    wanted: Wanted
    preset: Preset
    kept: Kept
    tell: Tell
    stop: Event

    @property
    def prompts(self) -> list[str]:
        return self.wanted.prompts

    @property
    def drawing(self) -> Drawing:
        names = ("seed", "steps", "guidance")
        return Drawing(**{name: self.preset.run[name] for name in names if name in self.preset.run})

    @property
    def own(self) -> Image | None:
        """The picture that is inverted, or a program's, if one is."""
        taken = self.preset.inversion or self.preset.program
        return self.wanted.image if taken is not None else None

    def program(self) -> Any:
        """What draws after the picture by itself; None if the pipeline draws."""
        if self.preset.program is None:
            return None
        assert self.own is not None  # else `preset_of` refused
        return program_for(self.pipe, self.preset, self.own, self.drawing, self.prompts)

    def editors(self) -> list[Editor]:
        """Recipes first, then learned weights."""
        image = self.wanted.image
        attached = attach_hooks(self.pipe, self.preset.hooks, self.prompts, image)
        return [*self.preset.editors(self.prompts, image), *(one.editor for one in attached)]

    def check(self) -> None:
        if self.own is not None and self.preset.program is None:
            check_fits(self.pipe, self.own, self.drawing)

    def plain(self) -> list[Image]:
        """The pictures without the cards: kept ones, if nothing that decides them changed.

        The picture of a person's own stands for itself.
        """
        if self.own is not None:
            return [self.own]
        key = (tuple(self.prompts), self.drawing)
        if self.kept.plain is None or self.kept.plain[0] != key:
            with _told(self.pipe, self.tell, self.stop, "source"):
                self.kept.plain = key, self._images()
        return self.kept.plain[1]

    def edited(self, editors: Sequence[Editor], program: Any) -> tuple[list[Image], Session]:
        """The pictures under control; one of a person's own is inverted first, once."""
        if program is not None:
            calls = Calls(self.pipe, self.tell, self.stop, "edited picture")
            return run_program(program, editors, calls)
        inverted = None if self.own is None else self._inverted(self.own)
        with _told(self.pipe, self.tell, self.stop, "edited picture"):
            with hookctl.control(self.pipe, *editors, strict=False) as session:
                if inverted is None:
                    return self._images(), session
                guidance = self.drawing.guidance
                return list(
                    inverted.edit(self.pipe, prompts=self.prompts, guidance=guidance)
                ), session

    def _inverted(self, image: Image) -> Any:
        inversion = self.preset.inversion
        assert inversion is not None
        steps = self.drawing.steps
        key = (fingerprint(image), self.prompts[0], steps, dict(inversion.arguments))
        if self.kept.inverted is None or self.kept.inverted[0] != key:
            made = inversion.make(self.pipe, image, self.prompts[0], steps=steps)
            self.kept.inverted = key, made.run(self._progress)
        return self.kept.inverted[1]

    def _progress(self, done: int, total: int) -> None:
        self.tell(BACK, done, total)
        if self.stop.is_set():
            raise Stopped

    def _images(self) -> list[Image]:
        return images(self.pipe, self.drawing, self.prompts, "", progress=False)


@contextmanager
def _told(pipe: Any, tell: Tell, stop: Event, title: str) -> Iterator[None]:
    with hookctl.control(pipe, Steps(tell, stop, title), strict=False):
        yield


def fingerprint(image: Image) -> str:
    """Of what an image shows."""
    return hashlib.sha256(repr((image.size, image.mode)).encode() + image.tobytes()).hexdigest()


def _notes(
    wanted: Wanted, kinds: Kinds, session: Session, editors: Sequence[Editor]
) -> dict[int, str]:
    """What the library says of cards that changed nothing, by the card's place."""
    # Recipes come first, then learned weights, each in the order of their cards.
    cards = enumerate(wanted.cards)
    on = [n for n, card in cards if card.on and card.kind not in kinds.programs]
    places = sorted(on, key=lambda n: (wanted.cards[n].kind in kinds.hooks, n))
    silent = {id(e): why for e in editors for _, why in session.log.silent([e])}
    return {
        place: f"Changed nothing: {silent[id(editor)]}."
        for place, editor in zip(places, editors, strict=False)
        if id(editor) in silent
    }


def telling(made: Made) -> str:
    """Which word's map to show first: one that the edit brought, else the last one."""
    words = list(made.maps)
    source = made.wanted.prompt.lower().split()
    new = [word for word in words if word.lower() not in source] if made.wanted.edit else []
    return (new or words or [""])[0 if new else -1]


def size_of(pipe: Any) -> tuple[int, int]:
    """(width, height) in px that a pipeline draws if nothing else is said."""
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    own = getattr(getattr(denoiser, "config", None), "sample_size", None) or 64
    height, width = own if isinstance(own, list | tuple) else (own, own)
    factor = int(getattr(pipe, "vae_scale_factor", 8))
    return width * factor, height * factor
