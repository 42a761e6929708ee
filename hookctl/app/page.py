"""The page: what its buttons do, and how it is served. It needs gradio, the extra "app"."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from hookctl.app.layout import ASK, CSS, Layout, canvas_of  # isort: skip  (before gradio)

import gradio as gr

from hookctl.app import cards, copying, drawing, pictures, worker
from hookctl.app.person import Desk, Person, examples, looked_over
from hookctl.app.telling import bar, failed, report, stopped, summed, waiting
from hookctl.cli.stacks import PRESETS
from hookctl.errors import HookctlError

_FIRST = "A word swapped, and nothing outside the named object may change (local blend)"
_TRIES = 5  # of asking the server whether it runs, 3 s each: on a busy machine it takes longer


def serve(desk: Desk, *, port: int | None = None, browser: bool = True) -> None:
    """Serve the page to this machine until it is interrupted."""
    folder = tempfile.mkdtemp(prefix="hookctl-app-")
    os.environ["GRADIO_TEMP_DIR"] = folder
    page = build(desk)
    try:
        launched(page, port=port, browser=browser)
        print(f"hookctl: the page is at {page.local_url} (Ctrl-C ends it)", file=sys.stderr)
        page.block_thread()
    finally:
        for stop in list(desk.stops.values()):
            stop.set()
        page.close(verbose=False)
        shutil.rmtree(folder, ignore_errors=True)


def launched(page: gr.Blocks, *, port: int | None = None, browser: bool = False) -> str:
    """Serve the page in threads of its own; its address."""
    font = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(
        primary_hue="blue", font=font, font_mono=["ui-monospace", "monospace"]
    ).set(
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_300",
    )
    page.queue(default_concurrency_limit=20)
    for left in reversed(range(_TRIES)):
        try:
            page.launch(
                server_name="127.0.0.1",
                server_port=port,
                share=False,
                inbrowser=browser,
                prevent_thread_lock=True,
                quiet=True,
                footer_links=[],
                run_history=False,
                ssr_mode=False,
                theme=theme,
                css=CSS,
            )
            break
        except ValueError as error:  # it answered late: it runs, and is asked again
            if not left or "localhost" not in str(error):
                raise
    return str(page.local_url)


def build(desk: Desk) -> gr.Blocks:
    """The page of a pipeline."""
    return _Page(desk).blocks


class _Page(Layout):
    """The widgets, and what is done with them."""

    def __init__(self, desk: Desk) -> None:
        super().__init__(desk, examples(PRESETS, desk.kinds), _FIRST)
        with self.blocks:
            self._wire()

    def _wire(self) -> None:
        self.inputs = [
            self.prompt, self.edit, self.seed, self.steps, self.guidance, self.upload,
        ]  # fmt: skip
        quiet = {"show_progress": "hidden"}
        every = [self.person, self.cards, *self.inputs]
        self.blocks.load(self._take, [self.example, self.person], self._taken(), **quiet)
        self.example.input(self._take, [self.example, self.person], self._taken(), **quiet)
        self.kind.select(self._add, [self.kind, *every], [self.kind, self.cards], **quiet)
        self.cards.input(self._pressed, every, self.cards, **quiet)
        for text in (self.prompt, self.edit):  # cards offer their words
            text.blur(self._reword, every, self.cards, **quiet)
        fitted = self.upload.upload(self._fitted, self.upload, self.upload, **quiet)
        fitted.then(self._mended, [self.canvas, *every], self.cards, **quiet)
        self.canvas.input(self._places, [self.canvas, self.person], None, queue=False, **quiet)
        self.canvas.input(self._mended, [self.canvas, *every], self.cards, **quiet)
        drawn = self.run.click(
            self._run,
            every,
            [
                self.run, self.stop, self.status, self.source, self.edited, self.canvas, self.cards,
                self.no_maps, self.of_maps, self.report, *self.texts.values(),
            ],
            concurrency_limit=20,
            **quiet,
        )  # fmt: skip
        # By itself: a picture for a place that the same answer brings on the page is lost.
        drawn.then(
            self._mapped,
            self.person,
            [self.word, self.hues, self.step, self.map, self.seen, self.looks],
            **quiet,
        )
        self.stop.click(self._stop, None, None, queue=False, **quiet)
        seen = [self.person, self.word, self.step]
        for changed in (self.word.input, self.step.change):
            changed(self._look, seen, [self.map, self.looks], trigger_mode="always_last", **quiet)
        self.map.select(self._point, seen, [self.seen, self.looks], **quiet)
        self.blocks.unload(self._stop)

    def _taken(self) -> list[Any]:
        return [
            self.person, self.prompt, self.edit, self.seed, self.steps, self.guidance, self.canvas,
            self.cards,
        ]  # fmt: skip

    def _take(self, name: str, person: Person) -> list[Any]:
        """An example in place of what was there."""
        wanted = self.examples.get(name) or self.first
        person = person or Person()
        person.take(wanted)
        guidance = wanted.guidance or 7.5
        return [
            person, wanted.prompt, wanted.edit, wanted.seed, wanted.steps, guidance,
            canvas_of(person), self._drawn(person, wanted.prompt, wanted.edit),
        ]  # fmt: skip

    def _add(self, kind: str, person: Person, said: Any, *values: Any) -> tuple[None, Any]:
        self._hear(person, said)
        if kind in self.desk.kinds.forms:
            person.cards.append(cards.Card(kind))
            self._look_over(person, *values)
        return None, self._drawn(person, *values)

    def _pressed(self, person: Person, said: Any, *values: Any) -> Any:
        self._hear(person, said)
        cards.pressed(person, said)
        self._look_over(person, *values)
        return self._drawn(person, *values)

    def _hear(self, person: Person, said: Any) -> None:
        cards.hear(person, self.desk.kinds.forms, said)

    def _look_over(self, person: Person, *values: Any) -> None:
        try:
            looked_over(self.desk, person, person.wanted(*values))
        except HookctlError as error:
            person.note(error)

    def _reword(self, person: Person, said: Any, *values: Any) -> Any:
        """The cards are drawn anew if the words that they offer are others now."""
        self._hear(person, said)
        same = person.words == self._words(*values[:2])
        return gr.skip() if same else self._drawn(person, *values)

    def _words(self, *prompts: str) -> list[str]:
        found = [word for text in prompts for word in drawing.words(self.desk.pipe, text)]
        return list(dict.fromkeys(found))

    def _drawn(self, person: Person, prompt: str, edit: str, *values: Any) -> dict[str, str]:
        """The cards, with the words of the prompts."""
        person.words = self._words(prompt, edit)
        return {"html": cards.html(person, self.desk.kinds.forms)}

    def _places(self, value: Any, person: Person) -> None:
        """What was drawn; at once, so that a press of the button finds it."""
        person.set_places((value or {}).get("places"))

    def _mended(self, value: Any, person: Person, said: Any, *values: Any) -> Any:
        """Cards that missed a place or a picture are looked over again."""
        self._hear(person, said)
        before = person.notes
        if before:
            self._places(value, person)
            self._look_over(person, *values)
        return self._drawn(person, *values) if before != person.notes else gr.skip()

    def _fitted(self, image: Any) -> Any:
        return None if image is None else pictures.fitted(image, drawing.size_of(self.desk.pipe))

    def _stop(self, request: gr.Request) -> None:
        stop = self.desk.stops.get(str(request.session_hash))
        if stop is not None:
            stop.set()

    def _run(
        self, request: gr.Request, person: Person, said_on: Any, *values: Any
    ) -> Iterator[dict[Any, Any]]:
        """Draw, and tell of it. Whatever happens, the page lives on."""
        self._hear(person, said_on)
        last: worker.Step | None = None
        notes = dict(person.notes)
        yield {self.run: gr.update(interactive=False), self.stop: gr.update(interactive=True),
               self.status: bar("getting ready", 0, 1)}  # fmt: skip
        for said in worker.drawn(self.desk, person, values, str(request.session_hash)):
            if isinstance(said, worker.Step):
                last = said
                yield {self.status: bar(said.title, said.done, said.total)}
            elif isinstance(said, worker.Waiting):
                yield {self.status: waiting()}
            elif isinstance(said, worker.Shown):
                yield {self.source: said.value}
            elif isinstance(said.error, drawing.Stopped):
                yield {self.status: stopped(last)}
            elif said.error is not None:
                if isinstance(said.error, HookctlError):
                    person.note(said.error)
                yield {self.status: failed(said.error)}
            else:
                yield self._made(person)
        changed = {self.cards: self._drawn(person, *values)} if person.notes != notes else {}
        yield {self.run: gr.update(interactive=True), self.stop: gr.update(interactive=False),
               **changed}  # fmt: skip

    def _made(self, person: Person) -> dict[Any, Any]:
        """What a run changes on the page."""
        made = person.made
        assert made is not None
        texts = copying.as_texts(made.preset, self.desk.device, self.desk.dtype)
        found: dict[Any, Any] = {
            self.status: summed(made),
            self.source: made.source,
            self.edited: made.edited,
            self.canvas: canvas_of(person),
            self.report: report(made.rows),
            self.no_maps: gr.update(visible=not made.maps),
            self.of_maps: gr.update(visible=True if made.maps else "hidden"),
            **{self.texts[name]: text for name, text in texts.items()},
        }
        return found

    def _mapped(self, person: Person) -> dict[Any, Any]:
        """The maps of a run, once."""
        made = person.made
        if made is None or not made.maps or made is person.mapped:
            return {}
        person.point, person.mapped = None, made
        word, words = drawing.telling(made), list(made.maps)
        places = made.wanted.places
        return {
            self.word: gr.update(choices=words, value=word),
            self.hues: pictures.hues(words, places),
            self.step: gr.update(maximum=len(made.maps[word]), value=0),
            self.map: pictures.map_picture(made.edited, made.maps, word, None, places),
            self.looks: ASK,
            self.seen: gr.update(visible="hidden"),
        }

    def _look(self, person: Person, word: str, step: float) -> tuple[Any, Any]:
        """The map of a word at a step, and what the place that was clicked looks at then."""
        made = person.made
        if made is None or word not in made.maps:
            return gr.skip(), gr.skip()
        at = _at(step, len(made.maps[word]))
        drawn = pictures.map_picture(made.edited, made.maps, word, at, made.wanted.places)
        return drawn, self._attended(person, at)

    def _point(self, person: Person, word: str, step: float, event: gr.SelectData) -> Any:
        """What the place that is clicked looks at: in the picture, and of the words."""
        made = person.made
        if made is None or word not in made.maps:
            return gr.skip(), gr.skip()
        width, height = pictures.map_size(made.edited)
        x, y = event.index
        person.point = min(max(x / width, 0.0), 1.0), min(max(y / height, 0.0), 1.0)
        found = self._attended(person, _at(step, len(made.maps[word])))
        if made.looks is None:
            return gr.skip(), found
        drawn = pictures.looks_picture(made.edited, made.looks, *person.point)
        return gr.update(value=drawn, visible=True), found

    def _attended(self, person: Person, at: int | None) -> Any:
        if person.point is None or person.made is None:
            return gr.skip()
        found = pictures.attended(person.made.maps, *person.point, at)
        return pictures.bars(found, *person.point)


def _at(step: float, steps: int) -> int | None:
    """Which step a slider means; None for the mean of all."""
    return None if step < 1 else min(int(step), steps) - 1
