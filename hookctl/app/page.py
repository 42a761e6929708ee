"""The page: what is on it, and what its buttons do. It needs gradio, the extra "app".

What gradio is told by its environment has to stand there before it is imported.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr  # noqa: E402

from hookctl.app import cards, copying, drawing, pictures, worker  # noqa: E402
from hookctl.app.person import Desk, Person, examples, looked_over  # noqa: E402
from hookctl.app.stack import Wanted  # noqa: E402
from hookctl.app.telling import bar, failed, stopped, summed, waiting  # noqa: E402
from hookctl.cli.stacks import PRESETS  # noqa: E402
from hookctl.errors import HookctlError  # noqa: E402
from hookctl.report import HEADERS  # noqa: E402

_STATIC = Path(__file__).parent / "static"
_FIRST = "A word swapped, and nothing outside the named object may change (local blend)"
_KEPT = 3600  # s that the server keeps what belongs to a page that is gone
_ALL = "all steps"


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
    )
    page.queue(default_concurrency_limit=20).launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        inbrowser=browser,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        ssr_mode=False,
        theme=theme,
        css=(_STATIC / "page.css").read_text("utf-8"),
    )
    return str(page.local_url)


def build(desk: Desk) -> gr.Blocks:
    """The page of a pipeline."""
    return _Page(desk).blocks


class _Page:
    """The widgets, and the handlers that know them."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.examples = examples(PRESETS, desk.kinds)
        self.first = self.examples.get(_FIRST) or Wanted("")
        with gr.Blocks(title="hookctl", analytics_enabled=False, fill_width=True) as self.blocks:
            self._layout()
            self._wire()

    # -- what is on it -----------------------------------------------------------------------------

    def _layout(self) -> None:
        self.person = gr.State(Person(), time_to_live=_KEPT)
        self.tick = gr.State(0)
        gr.HTML(
            f"<h1>hookctl</h1><p>Edit what {_named(self.desk.model)} pays attention to, and see "
            "what it changes.</p>",
            elem_id="head",
        )
        with gr.Row():
            with gr.Column(scale=5, min_width=340):
                self._left()
            with gr.Column(scale=7, min_width=340):
                self._right()

    def _left(self) -> None:
        first = self.first
        self.example = gr.Dropdown(
            list(self.examples), value=_FIRST, label="Start from an example", elem_id="example"
        )
        self.prompt = gr.Textbox(
            first.prompt, label="Prompt", elem_id="prompt", max_lines=4,
            info="What the picture shows",
        )  # fmt: skip
        self.edit = gr.Textbox(
            first.edit, label="Edited prompt", elem_id="edit", max_lines=4,
            info="What it shall show instead; empty: editors alone change the picture",
        )  # fmt: skip
        with gr.Row():
            self.seed = gr.Number(
                first.seed, label="Seed", precision=0, minimum=0, elem_id="seed", min_width=90
            )
            self.steps = gr.Slider(1, 100, first.steps, step=1, label="Steps", elem_id="steps")
            self.guidance = gr.Slider(
                0, 15, first.guidance or 7.5, step=0.5, label="Guidance", elem_id="guidance"
            )
        with gr.Row():
            self.kind = gr.Dropdown(
                [(f"{name}: {form.summary}", name) for name, form in self.desk.kinds.forms.items()],
                value=None, label="Add an editor", elem_id="kind", scale=5,
            )  # fmt: skip
        self.cards = gr.Column(elem_id="cards")
        with gr.Accordion("Your own picture", open=False, elem_id="own"):
            gr.HTML(
                "<small>It is cut to the middle and brought to the model’s size. The prompt says "
                "what it shows, the edited prompt what it shall show.</small>"
            )
            self.upload = gr.Image(
                type="pil", image_mode="RGB", sources=["upload", "clipboard"], format="png",
                height=220, show_label=False, elem_id="upload",
            )  # fmt: skip

    def _right(self) -> None:
        with gr.Row(elem_id="go"):
            self.run = gr.Button("Draw", variant="primary", elem_id="run", scale=4)
            self.stop = gr.Button("Stop", elem_id="stop", scale=1, interactive=False, min_width=90)
        self.status = gr.HTML(elem_id="status")
        with gr.Row():
            self.source, self.edited = (
                gr.Image(
                    label=label,
                    elem_id=name,
                    format="png",
                    interactive=False,
                    elem_classes="picture",
                    buttons=["download", "fullscreen"],
                    min_width=150,
                )  # fmt: skip
                for label, name in (("Source", "source"), ("Edited", "edited"))
            )
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Places", id="places"):
                gr.HTML(
                    "<small>Drag boxes on the picture, and write what belongs in each. Editors "
                    "with places (RegionalPrompts, LayoutGuidance …) use them all.</small>"
                )
                self.canvas = gr.HTML(
                    self._canvas(Person()),
                    html_template=(_STATIC / "canvas.html").read_text("utf-8"),
                    js_on_load=(_STATIC / "canvas.js").read_text("utf-8"),
                    colours=list(pictures.COLOURS),
                    elem_id="canvas",
                    apply_default_css=False,
                )
            with gr.Tab("Where words act", id="maps"):
                self._maps()
            with gr.Tab("What was done", id="report"):
                self.report = gr.Dataframe(
                    headers=[name.capitalize() for name in HEADERS],
                    interactive=False, wrap=True, show_label=False, elem_id="report",
                )  # fmt: skip
            with gr.Tab("Take it along", id="copy"):
                gr.HTML("<small>Each of these draws the edited picture again, bit for bit.</small>")
                languages = {"TOML": None, "Python": "python", "Command line": "shell"}
                self.texts = {
                    name: gr.Code(
                        label=name,
                        language=language,
                        interactive=False,
                        elem_id=f"copy-{name.split()[0].lower()}",
                    )  # fmt: skip
                    for name, language in languages.items()
                }

    def _maps(self) -> None:
        self.no_maps = gr.HTML(
            "<div class='empty-state'>Draw a picture; then click a word to see where it acts.</div>"
        )
        with gr.Column(visible=False) as self.of_maps:
            self.word = gr.Radio([], label="Word", elem_id="word", show_label=False)
            with gr.Row():
                with gr.Column(scale=3, min_width=240):
                    self.map = gr.Image(
                        format="png", interactive=False, show_label=False, elem_id="map",
                        elem_classes="picture", buttons=["download"],
                    )  # fmt: skip
                with gr.Column(scale=2, min_width=200):
                    self.step = gr.Slider(
                        0, 25, 0, step=1, label="Step", elem_id="step",
                        info="0 is the mean of all steps; the colours mean the same throughout",
                    )  # fmt: skip
                    self.looks = gr.HTML(
                        "<p>Click the picture: what does that place look at?</p>", elem_id="looks"
                    )

    # -- what its buttons do -----------------------------------------------------------------------

    def _wire(self) -> None:
        self.inputs = [
            self.prompt, self.edit, self.seed, self.steps, self.guidance, self.upload,
        ]  # fmt: skip
        quiet = {"show_progress": "hidden"}
        with self.cards:
            gr.render([self.person, self.prompt, self.edit], triggers=[self.tick.change], **quiet)(
                self._show_cards
            )
        every = [self.person, self.tick, *self.inputs]
        self.blocks.load(self._take, [self.example, self.person, self.tick], self._taken(), **quiet)
        self.example.input(
            self._take, [self.example, self.person, self.tick], self._taken(), **quiet
        )
        self.kind.input(self._add, [self.kind, *every], [self.kind, self.tick], **quiet)
        self.upload.upload(self._fitted, self.upload, self.upload, **quiet)
        self.canvas.input(
            self._boxes, [self.canvas, self.person, *self.inputs], None, queue=False, **quiet
        )
        self.run.click(
            self._run,
            every,
            [
                self.run, self.stop, self.status, self.source, self.edited, self.canvas, self.tick,
                self.no_maps, self.of_maps, self.word, self.step, self.map, self.looks,
                self.report, *self.texts.values(),
            ],
            concurrency_limit=20,
            **quiet,
        )  # fmt: skip
        self.stop.click(self._stop, None, None, queue=False, **quiet)
        seen = [self.person, self.word, self.step]
        for changed in (self.word.input, self.step.change):
            changed(self._look, seen, [self.map, self.looks], trigger_mode="always_last", **quiet)
        self.map.select(self._point, seen, self.looks, **quiet)
        self.blocks.unload(self._stop)

    def _taken(self) -> list[Any]:
        return [
            self.person, self.prompt, self.edit, self.seed, self.steps, self.guidance, self.canvas,
            self.tick,
        ]  # fmt: skip

    def _take(self, name: str, person: Person, tick: int) -> list[Any]:
        """An example in place of what was there."""
        wanted = self.examples.get(name) or self.first
        person = person or Person()
        person.take(wanted)
        guidance = wanted.guidance or 7.5
        return [
            person, wanted.prompt, wanted.edit, wanted.seed, wanted.steps, guidance,
            self._canvas(person), tick + 1,
        ]  # fmt: skip

    def _add(self, kind: str, person: Person, tick: int, *values: Any) -> tuple[None, int]:
        if kind in self.desk.kinds.forms:
            person.cards.append(cards.Card(kind))
            self._look_over(person, *values)
        return None, tick + 1

    def _look_over(self, person: Person, *values: Any) -> None:
        try:
            looked_over(self.desk, person, person.wanted(*values))
        except HookctlError as error:
            person.note(error)

    def _show_cards(self, person: Person, prompt: str, edit: str) -> None:
        words = [word for text in (prompt, edit) for word in drawing.words(self.desk.pipe, text)]
        cards.show(
            person, self.desk.kinds.forms, list(dict.fromkeys(words)), self.person, self.tick,
            self._look_over, self.inputs,
        )  # fmt: skip

    def _boxes(self, value: Any, person: Person, *values: Any) -> None:
        person.set_boxes((value or {}).get("boxes"))

    def _canvas(self, person: Person, picture: Any = None) -> dict[str, Any]:
        """What the canvas holds."""
        boxes = [
            {"x0": b.x0, "y0": b.y0, "x1": b.x1, "y1": b.y1, "text": b.text} for b in person.boxes
        ]
        words = [] if person.made is None else list(person.made.maps)
        if picture is None and person.made is not None:
            picture = person.made.edited
        return {"boxes": boxes, "words": words, "picture": pictures.data_url(picture)}

    def _fitted(self, image: Any) -> Any:
        return None if image is None else pictures.fitted(image, drawing.size_of(self.desk.pipe))

    def _stop(self, request: gr.Request) -> None:
        stop = self.desk.stops.get(str(request.session_hash))
        if stop is not None:
            stop.set()

    def _run(
        self, person: Person, tick: int, *values: Any, request: gr.Request
    ) -> Iterator[dict[Any, Any]]:
        """Draw, and tell of it. Whatever happens, the page lives on."""
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
        changed = {self.tick: tick + 1} if person.notes != notes else {}
        yield {self.run: gr.update(interactive=True), self.stop: gr.update(interactive=False),
               **changed}  # fmt: skip

    def _made(self, person: Person) -> dict[Any, Any]:
        """What a run changes on the page."""
        made = person.made
        assert made is not None
        texts = copying.as_texts(made.preset, self.desk.device, self.desk.dtype)
        words = list(made.maps)
        word = drawing.telling(made)
        found: dict[Any, Any] = {
            self.status: summed(made),
            self.source: made.source,
            self.edited: made.edited,
            self.canvas: self._canvas(person),
            self.report: [list(row) for row in made.rows],
            self.no_maps: gr.update(visible=not words),
            self.of_maps: gr.update(visible=bool(words)),
            **{self.texts[name]: text for name, text in texts.items()},
        }
        if words:
            steps = len(made.maps[word])
            found |= {
                self.word: gr.update(choices=words, value=word),
                self.step: gr.update(maximum=steps, value=0),
                self.map: pictures.map_picture(
                    made.edited, made.maps, word, None, made.wanted.boxes
                ),
                self.looks: "<p>Click the picture: what does that place look at?</p>",
            }
            person.place = None
        return found

    def _look(self, person: Person, word: str, step: float) -> tuple[Any, Any]:
        """The map of a word at a step, and what the place that was clicked looks at then."""
        made = person.made
        if made is None or word not in made.maps:
            return gr.skip(), gr.skip()
        at = _at(step, len(made.maps[word]))
        drawn = pictures.map_picture(made.edited, made.maps, word, at, made.wanted.boxes)
        return drawn, self._attended(person, at)

    def _point(self, person: Person, word: str, step: float, event: gr.SelectData) -> Any:
        made = person.made
        if made is None or word not in made.maps:
            return gr.skip()
        width, height = pictures.map_size(made.edited)
        x, y = event.index
        person.place = min(max(x / width, 0.0), 1.0), min(max(y / height, 0.0), 1.0)
        return self._attended(person, _at(step, len(made.maps[word])))

    def _attended(self, person: Person, at: int | None) -> Any:
        if person.place is None or person.made is None:
            return gr.skip()
        found = pictures.attended(person.made.maps, *person.place, at)
        return pictures.bars(found, *person.place)


def _at(step: float, steps: int) -> int | None:
    """Which step a slider means; None for the mean of all."""
    return None if step < 1 else min(int(step), steps) - 1


def _named(model: str) -> str:
    return "a small model of shapes" if model == "shapes" else Path(model).name
