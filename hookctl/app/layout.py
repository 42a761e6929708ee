"""What is on the page: its widgets, and where they stand. Needs gradio, the extra "app"."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported

import gradio as gr  # noqa: E402

from hookctl.app import pictures  # noqa: E402
from hookctl.app.person import Desk, Person  # noqa: E402
from hookctl.app.places import GRID  # noqa: E402
from hookctl.app.stack import Wanted  # noqa: E402
from hookctl.app.telling import NOTHING_DONE  # noqa: E402
from hookctl.cli.models import EMBEDDED  # noqa: E402

_STATIC = Path(__file__).parent / "static"
_KEPT = 3600  # s that the server keeps what belongs to a page that is gone
CSS = (_STATIC / "page.css").read_text("utf-8")
ASK = (
    "<div class='empty-state'>Click the picture: which words does that place look at, and which "
    "other places?</div>"
)


class Layout:
    """The widgets of a page, by name.

    examples: by what they do; first: the name of the one that the page starts with.
    """

    def __init__(self, desk: Desk, examples: dict[str, Wanted], first: str) -> None:
        self.desk, self.examples = desk, examples
        self.start = first if first in examples else next(iter(examples), "")
        self.first = examples.get(self.start, Wanted(""))
        with gr.Blocks(title="hookctl", analytics_enabled=False, fill_width=True) as self.blocks:
            self._layout()

    def _layout(self) -> None:
        self.person = gr.State(Person(), time_to_live=_KEPT)
        gr.HTML(
            f"<h1>hookctl</h1><p>Edit what {_named(self.desk.model)} pays attention to, and see "
            "what it changes.</p>",
            elem_id="head",
        )
        with gr.Row():
            with gr.Column(scale=5, min_width=290):
                self._left()
            with gr.Column(scale=7, min_width=290):
                self._right()

    def _left(self) -> None:
        first = self.first
        self.example = gr.Dropdown(
            list(self.examples), value=self.start, label="Start from an example", elem_id="example"
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
        self.cards = gr.HTML(
            {},
            html_template="<div class='deck'></div>",
            js_on_load=(_STATIC / "cards.js").read_text("utf-8"),
            elem_id="cards",
            apply_default_css=False,
        )
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
                    "<small>Drag boxes on the picture or paint, and write what belongs in each "
                    "place. Editors with places (RegionalPrompts, LayoutGuidance …) use them all."
                    "</small>"
                )
                self.canvas = gr.HTML(
                    canvas_of(Person()),
                    html_template=(_STATIC / "canvas.html").read_text("utf-8"),
                    js_on_load=(_STATIC / "canvas.js").read_text("utf-8"),
                    colours=list(pictures.COLOURS),
                    grid=GRID,
                    elem_id="canvas",
                    apply_default_css=False,
                )
            with gr.Tab("Where words act", id="maps"):
                self._maps()
            with gr.Tab("What was done", id="report"):
                self.report = gr.HTML(NOTHING_DONE, elem_id="report")
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
        with gr.Column(visible="hidden") as self.of_maps:
            self.word = gr.Radio([], label="Word", elem_id="word", show_label=False)
            self.hues = gr.HTML(elem_id="hues", apply_default_css=False)
            with gr.Row():
                with gr.Column(scale=1, min_width=240):
                    self.map = gr.Image(
                        format="png", interactive=False, show_label=False, elem_id="map",
                        elem_classes="picture", buttons=["download"],
                    )  # fmt: skip
                    self.step = gr.Slider(
                        0, 25, 0, step=1, label="Step", elem_id="step",
                        info="0 is the mean of all steps; the colours mean the same throughout",
                    )  # fmt: skip
                with gr.Column(scale=1, min_width=240):
                    self.seen = gr.Image(
                        format="png", interactive=False, show_label=False, elem_id="seen",
                        elem_classes="picture", buttons=["download"], visible="hidden",
                    )  # fmt: skip
                    self.looks = gr.HTML(ASK, elem_id="looks")


def canvas_of(person: Person) -> dict[str, Any]:
    """What the canvas holds: a person's places over the last picture."""
    made = person.made
    words = [] if made is None else list(made.maps)
    picture = pictures.data_url(None if made is None else made.edited)
    return {"places": [one.data() for one in person.places], "words": words, "picture": picture}


def _named(model: str) -> str:
    return "a small model of shapes" if model in EMBEDDED else Path(model).name
