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
from hookctl.address.text import TextLayout
from hookctl.app.stack import Kinds, Wanted, preset_of
from hookctl.cli.draw import Drawing
from hookctl.cli.hooks import attach_hooks
from hookctl.cli.inverting import check_fits
from hookctl.editor import Editor
from hookctl.errors import InputError, UnsupportedError, WordError
from hookctl.loop.state import State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image
    from torch import Tensor

    from hookctl.preset import Preset
    from hookctl.session import Session

Tell = Callable[[str, int, int], None]  # (what is being done, steps done, steps in all)


class Stopped(Exception):
    """The person asked for the end of a run."""


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
    [steps, height, width], of the edited picture; notes: what is to be said on the cards that are
    on, by their place among all; rows: of the report; preset: what was run.
    """

    wanted: Wanted
    preset: Preset
    source: Image
    edited: Image
    maps: Mapping[str, Tensor] = field(default_factory=dict)
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
    kept = Kept() if kept is None else kept
    preset = preset_of(wanted, kinds, model, words_of(pipe))
    prompts, image = wanted.prompts, wanted.image
    drawing = Drawing(wanted.seed, wanted.steps, wanted.guidance)
    editors = preset.editors(prompts, image)
    attached = attach_hooks(pipe, preset.hooks, prompts, image)
    editors += [one.editor for one in attached]
    plain = _plain(pipe, preset, drawing, prompts, image, kept, tell, stop)
    reader = hookctl.Maps(mean=False) if _has_words(pipe) else None
    # Control comes first: it refuses what can't be done before anything is drawn.
    with hookctl.control(pipe, *editors, *([reader] if reader else []), strict=False):
        pass
    before = plain("source")
    shown(before[0])
    every = [*editors, *([reader] if reader else [])]
    make = _maker(pipe, preset, drawing, prompts, image, kept, tell, stop)
    with _told(pipe, tell, stop, "edited picture"):
        with hookctl.control(pipe, *every, strict=False) as session:
            after = make()
    notes = _notes(wanted, kinds, session, editors)
    maps = step_maps(session, len(prompts) - 1, words(pipe, prompts[-1]))
    rows = [*session.log.rows(), *session.log.hook_rows()]
    rows = [row for row in rows if reader is None or row[0] != reader.name]
    return Made(wanted, preset, before[0], after[len(prompts) - 1], maps, notes, rows)


def check(pipe: Any, wanted: Wanted, kinds: Kinds, model: str) -> None:
    """InputError or ConflictError for cards that can't be together, or not on this model."""
    preset = preset_of(wanted, kinds, model, words_of(pipe))
    editors = preset.editors(wanted.prompts, wanted.image)
    with hookctl.control(pipe, *editors, strict=False):
        pass


def _plain(
    pipe: Any,
    preset: Preset,
    drawing: Drawing,
    prompts: list[str],
    image: Image | None,
    kept: Kept,
    tell: Tell,
    stop: Event,
) -> Callable[[str], list[Image]]:
    """What gives the pictures without the cards: kept ones, if nothing that decides them changed.

    The picture of a person's own stands for itself.
    """
    if preset.inversion is not None and image is not None:
        check_fits(pipe, image, drawing)
        own: Image = image
        return lambda title: [own]
    key = (tuple(prompts), drawing)

    def make(title: str) -> list[Image]:
        if kept.plain is None or kept.plain[0] != key:
            with _told(pipe, tell, stop, title):
                kept.plain = key, _images(pipe, drawing, prompts)
        return kept.plain[1]

    return make


def _maker(
    pipe: Any,
    preset: Preset,
    drawing: Drawing,
    prompts: list[str],
    image: Image | None,
    kept: Kept,
    tell: Tell,
    stop: Event,
) -> Callable[[], list[Image]]:
    """What draws the pictures under control; an image is inverted first, once."""
    if preset.inversion is None or image is None:
        return lambda: _images(pipe, drawing, prompts)
    key = (fingerprint(image), prompts[0], drawing.steps, dict(preset.inversion.arguments))
    if kept.inverted is None or kept.inverted[0] != key:
        inversion = preset.inversion.make(pipe, image, prompts[0], steps=drawing.steps)

        def progress(done: int, total: int) -> None:
            tell("your picture, step by step back to noise", done, total)
            if stop.is_set():
                raise Stopped

        kept.inverted = key, inversion.run(progress)
    inverted = kept.inverted[1]
    return lambda: list(inverted.edit(pipe, prompts=prompts, guidance=drawing.guidance))


def _images(pipe: Any, drawing: Drawing, prompts: list[str]) -> list[Image]:
    pipe.set_progress_bar_config(disable=True)
    found = getattr(pipe(**drawing.arguments(pipe, prompts)), "images", None)
    if found is None:
        raise UnsupportedError(f"{type(pipe).__name__} makes no images; the page can't show it")
    return list(found)


@contextmanager
def _told(pipe: Any, tell: Tell, stop: Event, title: str) -> Iterator[None]:
    with hookctl.control(pipe, Steps(tell, stop, title), strict=False):
        yield


def fingerprint(image: Image) -> str:
    """Of what an image shows."""
    return hashlib.sha256(repr((image.size, image.mode)).encode() + image.tobytes()).hexdigest()


# -- words and maps --------------------------------------------------------------------------------


def _has_words(pipe: Any) -> bool:
    try:
        TextLayout(pipe)
    except UnsupportedError:
        return False
    return True


def words(pipe: Any, prompt: str) -> list[str]:
    """The words of a prompt, whatever number of tokens each has; none without a text encoder."""
    try:
        found = TextLayout(pipe).read(prompt).streams[0][1].words
    except (UnsupportedError, InputError):
        return []
    return list(dict.fromkeys(word.text for word in found))


def words_of(pipe: Any) -> Callable[[str, str], bool]:
    """Whether a prompt has a word or phrase."""

    def has(prompt: str, word: str) -> bool:
        try:
            return bool(TextLayout(pipe).read(prompt).find(word))
        except (WordError, UnsupportedError):
            return False

    return has


def step_maps(session: Session, prompt: int, words: Sequence[str]) -> dict[str, Tensor]:
    """Of each word of a prompt its maps, averaged over sites: [steps, height, width]."""
    import torch

    found = {}
    for word in (word for word in words if word in session.maps):
        maps = session.maps[word]
        if prompt not in maps.prompts:
            continue
        maps = maps.where(prompt=prompt)
        size = max(maps.grids, key=lambda grid: grid[0] * grid[1])
        by_step = [maps.where(steps=[step]).mean(size) for step in maps.steps]
        found[word] = torch.stack(by_step).detach().float().cpu()
    return found


def _notes(
    wanted: Wanted, kinds: Kinds, session: Session, editors: Sequence[Editor]
) -> dict[int, str]:
    """What the library says of cards that changed nothing, by the card's place."""
    # Recipes come first, then learned weights, each in the order of their cards.
    on = [n for n, card in enumerate(wanted.cards) if card.on]
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
