"""Every recipe on every family: it changes what is drawn, and idle leaves it alone, or says why.

    python -m tests.families.cells docs/recipe_families.md [family or recipe ...]

A cell is run on a tiny random pipeline. ✓: what is drawn is another than without the recipe, and at
its neutral setting the same bit for bit. –: refused, before or at the end of the run, by an error
of ours whose reason is below the table, or two prompts are compared and the pipeline draws one.
✗: anything else, such as a run in which nothing happened.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

import hookctl
from hookctl import Editor, recipes
from hookctl.errors import HookctlError
from hookctl.inspect import markdown_table
from hookctl.preset.signature import parameters
from tests.families.subjects import error
from tests.hookctl.loop.families import BY_NAME, Family
from tests.recipes.test_inversions_of_families import drawn as drawn_again
from tests.recipes.test_inversions_of_families import given, inverted
from tests.recipes.test_inversions_of_families import made as of_first_order
from tests.recipes.test_pairs import INVERSIONS, RECIPES
from tests.zoo.wild.around import smaller

FAMILIES = {
    "SD 1.5": "sd15",
    "SDXL": "sdxl",
    "SD3": "sd3",
    "FLUX.1": "flux",
    "klein": "flux2_klein",
    "Kontext": "FluxKontextPipeline",
    "Qwen-Image": "qwen_image",
    "Qwen-Edit": "QwenImageEditPipeline",
    "Z-Image": "z_image",
    "Wan": "wan",
    "LTX": "LTXPipeline",
    "Hunyuan": "HunyuanVideoPipeline",
}
FAMILIES = {shown: name for shown, name in FAMILIES.items() if name in BY_NAME}
STEPS, LEAST = 4, 1e-6
PROMPTS = ["a red cat", "a blue cat"]
LEFT = (0.0, 0.0, 0.5, 1.0)
NOTES = Path("out/cells.json")

# Where sites of a UNet stand in the shared table, or an image of its size.
MAKERS: dict[str, Callable[[Family, Any], Editor]] = {
    "DifferentialDiffusion": lambda f, p: recipes.DifferentialDiffusion(given(f)[0], LEFT),
    "ConceptAttention": lambda f, p: recipes.ConceptAttention(["cat", "background"]),
    "ConsiStory": lambda f, p: recipes.ConsiStory(PROMPTS, "cat", sites="self, joint", dropped=0.0),
    "DyPE": lambda f, p: recipes.DyPE(1 if f.name == "HunyuanVideoPipeline" else 2),
    "MasaCtrl": lambda f, p: recipes.MasaCtrl(PROMPTS, start=0.0, sites="self, joint"),
    "MultiDiffusion": lambda f, p: recipes.MultiDiffusion(**tiles(f)),
    "PAG": lambda f, p: recipes.PAG(sites="self, joint"),
    "PromptRelay": lambda f, p: recipes.PromptRelay(["a red cat", "a blue dog"]),
    "PromptSchedule": lambda f, p: recipes.PromptSchedule(schedules(f, "0.5")),
    "RealCompo": lambda f, p: recipes.RealCompo(["cat"], [LEFT], second(f), alone=0.0),
    "ReferenceOnly": lambda f, p: recipes.ReferenceOnly(PROMPTS, frame(f)),
    "SAG": lambda f, p: recipes.SAG(sites="self, joint"),
    "SEG": lambda f, p: recipes.SEG(sites="self, joint"),
    "STG": lambda f, p: recipes.STG(layers=[0]),
    "SkipLayerGuidance": lambda f, p: recipes.SkipLayerGuidance(layers=[0], start=0.0, stop=1.0),
    "StableFlow": lambda f, p: recipes.StableFlow(PROMPTS, sites="self, joint"),
}
# The neutral setting of recipes that have no window.
IDLE: dict[str, Callable[[Family], Editor]] = {
    "AttendAndExcite": lambda f: recipes.AttendAndExcite(["cat"], scale=0.0),
    "BoxDiff": lambda f: recipes.BoxDiff(["cat"], [LEFT], scale=0.0),
    "DifferentialDiffusion": lambda f: recipes.DifferentialDiffusion(given(f)[0], "full"),
    "MultiDiffusion": lambda f: recipes.MultiDiffusion(tile=512),
    "MultiInstanceSampler": lambda f: recipes.MultiInstanceSampler(["a dog"], [LEFT], share=0.0),
    "PromptSchedule": lambda f: recipes.PromptSchedule(schedules(f, "1.0")),
    "PromptToPrompt": lambda f: recipes.PromptToPrompt(PROMPTS, cross_replace=0, self_replace=0),
    "ReferenceOnly": lambda f: recipes.ReferenceOnly(PROMPTS, frame(f), start=0.5, stop=0.5),
}


# Programs on one image of flow-matching models, with what they need besides.
OF_FLOW: dict[str, dict[str, Any]] = {
    "FireFlow": {},
    "KVEdit": {"mask": LEFT, "skip": 0},
    "RFInversion": {},
    "RFSolver": {},
    "UniEditFlow": {},
}
EDITORS = {*RECIPES, *MAKERS}


class OfOnePrompt(Exception):
    """The family's pipeline draws one prompt at a time."""


class Broken(Exception):
    """A cell that neither acts nor says why."""


def frame(family: Family) -> Any:
    """An image, of a video the first frame."""
    source = given(family)[0]
    return source[0] if isinstance(source, list) else source


def schedules(family: Family, when: str) -> list[str]:
    return [f"{one}[: with a hat:{when}]" for one in PROMPTS[: len(family.prompts)]]


def tiles(family: Family) -> dict[str, int]:
    """Tiles of half the canvas."""
    sides = {"wan": 4, "HunyuanVideoPipeline": 1}
    sides |= dict.fromkeys(("flux", "flux2_klein", "qwen_image"), 4)  # of tokens
    tile = sides.get(family.name, 8)
    return {"tile": tile, "stride": max(1, tile // 2)}


def second(family: Family) -> Any:
    """A layout model: the denoiser of another pipeline of the family, with weights of its own."""
    pipe = family.make()
    model = getattr(pipe, "unet", None) or pipe.transformer
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    return model


# -- editors ---------------------------------------------------------------------------------------


def editor(name: str, family: Family, pipe: Any) -> Editor:
    """What acts in full."""
    return MAKERS[name](family, pipe) if name in MAKERS else RECIPES[name](recipes)


def idle(name: str, family: Family, pipe: Any) -> Editor | None:
    """The same at its neutral setting; None where it has none."""
    if name in IDLE:
        return IDLE[name](family)
    found = editor(name, family, pipe)
    if {"start", "stop"} <= parameters(type(found)).keys():
        for attribute in ("start", "stop"):
            setattr(found, attribute, 0.5)
        if name in ("MasaCtrl", "StyleAligned"):  # windows that are read once
            return getattr(recipes, name)(PROMPTS, start=0.5, stop=0.5)  # type: ignore[no-any-return]
        return found
    return None


class Cells:
    """The cells of one family, over one pipeline."""

    def __init__(self, family: Family) -> None:
        self.family, self.pipe = family, family.make()
        self._plain: dict[tuple[str, ...], Tensor] = {}

    def draw(self, prompts: list[str], *editors: Editor) -> Tensor:
        family = self.family
        with hookctl.control(self.pipe, *editors, strict=True):
            latents: Tensor = family.drawn(
                self.pipe, 2.0 if family.guides else 1.0, steps=STEPS, prompts=prompts
            )
        return latents

    def plain(self, prompts: list[str]) -> Tensor:
        if (key := tuple(prompts)) not in self._plain:
            family = self.family
            self._plain[key] = family.drawn(
                self.pipe, 2.0 if family.guides else 1.0, steps=STEPS, prompts=prompts
            )
        return self._plain[key]

    def prompts(self, edit: Editor) -> list[str]:
        count = len(self.family.prompts)
        if isinstance(edit, recipes.PromptRelay):
            return [edit.prompt] * count
        return list(getattr(edit, "prompts", PROMPTS[:count]))

    def editor(self, name: str) -> None:
        """Raises what refuses it, or Broken."""
        edit = editor(name, self.family, self.pipe)
        prompts = self.prompts(edit)
        if len(prompts) > len(self.family.prompts):
            raise OfOnePrompt(f"{type(self.pipe).__name__} draws one prompt, {name} compares two")
        plain = self.plain(prompts)
        found = self.draw(prompts, edit)
        if name == "ConceptAttention":  # it looks, and changes nothing
            if not (edit.maps and torch.equal(found, plain)):  # type: ignore[attr-defined]
                raise Broken("it has no maps, or the image is another")
            return
        if error(found, plain) < LEAST:
            raise Broken("it ran and changed nothing")
        quiet = idle(name, self.family, self.pipe)
        if quiet is not None:
            prompts = self.prompts(quiet)
            plain = self.plain(prompts)
            with hookctl.control(self.pipe, quiet, strict=False), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                family = self.family
                found = family.drawn(
                    self.pipe, 2.0 if family.guides else 1.0, steps=STEPS, prompts=prompts
                )
            if not torch.equal(found, plain):
                raise Broken(f"idle, it changes what is drawn by {error(found, plain):.1e}")
        if not torch.equal(self.family.drawn(
            self.pipe, 2.0 if self.family.guides else 1.0, steps=STEPS, prompts=self.prompts(edit)
        ), self.plain(self.prompts(edit))):  # fmt: skip
            raise Broken("something stays behind")

    def program(self, name: str) -> None:
        """Another prompt is another image."""
        found = [self.of_program(name, prompt) for prompt in PROMPTS]
        if not all(bool(torch.isfinite(one).all()) for one in found):
            raise Broken("what it draws is not finite")
        if error(found[0], found[1]) < LEAST:
            raise Broken("another prompt changes nothing")

    def of_program(self, name: str, prompt: str) -> Tensor:
        family, cls = self.family, getattr(recipes, name)
        # Programs refuse solvers with a memory, which is not what a cell asks.
        pipe = family.make() if family.name in ("sd15", "sdxl") else of_first_order(family)
        if family.name in ("sd15", "sdxl"):
            pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        if len(family.prompts) < 2 and name in (*INVERSIONS, "FlowEdit"):
            raise OfOnePrompt(f"{type(pipe).__name__} draws one prompt, {name} a source and edits")
        source, more = given(family)
        guidance = 3.0 if family.guides else 1.0
        if name in INVERSIONS:
            options = {"steps": 2, **INVERSIONS[name]}
            found = inverted(cls, family, pipe, **options)
            return drawn_again(found, pipe, [found.prompt, prompt], guidance=guidance)[1]  # type: ignore[no-any-return]
        with smaller(type(pipe)):
            if name == "FlowEdit":
                options = {"steps": STEPS, "n_max": STEPS, "arguments": more}
                program = cls(pipe, source, ["a dog", prompt], guidance=(1.0, guidance), **options)
            elif name in OF_FLOW:
                options = {"steps": STEPS, "arguments": more, **OF_FLOW[name]}
                program = cls(pipe, source, prompt, guidance=guidance, **options)
            elif name == "Imagic":
                few = {"text_steps": 2, "text_rate": 0.1, "model_steps": 2, "model_rate": 0.01}
                if family.name == "flux2_klein":  # the tiny text encoder has few layers
                    told(pipe, "_get_qwen3_prompt_embeds", hidden_states_layers=(1, 2, 3))
                fitted = cls(pipe, frame(family), prompt, schedule_steps=2, **few).fit()
                drawn: Tensor = fitted.draw((1.0,), steps=2, output_type="latent")
                return drawn
            else:
                half = frame(family).resize((64, 64))
                options = {"steps": STEPS, "top": 0.75, "cycles": 1}
                program = cls(pipe, half, prompt, at=(64, 0), **options)
            latents: Any = program.run(output_type="latent")
        return latents if isinstance(latents, Tensor) else torch.stack(list(latents))


def told(pipe: Any, name: str, **given: Any) -> None:
    """Let a method of one pipeline have these arguments."""
    method = getattr(pipe, name)
    setattr(pipe, name, lambda *args, **kwargs: method(*args, **{**kwargs, **given}))


def recipe_names() -> list[str]:
    return sorted(recipes.__all__, key=str.lower)


def verdict(cells: Cells, name: str) -> tuple[str, str]:
    """The mark of a cell, and the reason for it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (cells.editor if name in EDITORS else cells.program)(name)
    except (HookctlError, OfOnePrompt) as said:
        return "–", " ".join(str(said).split())
    except Exception as broken:  # a cell of the table
        return "✗", f"{type(broken).__name__}: {broken}".splitlines()[0]
    return "✓", ""


# -- the page --------------------------------------------------------------------------------------


def page(found: dict[str, dict[str, list[str]]]) -> str:
    """found: recipe -> family -> [mark, reason]."""
    marks = [mark for row in found.values() for mark, _ in row.values()]
    count = {mark: marks.count(mark) for mark in ("✓", "–", "✗")}
    rows = [[name, *(row.get(f, ["", ""])[0] for f in FAMILIES)] for name, row in found.items()]
    reasons = []
    for name, row in found.items():
        said: dict[str, list[str]] = {}
        for family, (mark, reason) in row.items():
            if mark != "✓":
                said.setdefault(_short(reason, mark), []).append(family)
        reasons += [[name, ", ".join(where), reason] for reason, where in said.items()]
    return "\n".join(
        [
            "# Every recipe on every family\n",
            "Written by `python -m tests.families.cells docs/recipe_families.md` on tiny random "
            "pipelines, which says\nthat a recipe acts and not how well. ✓: what is drawn is "
            "another, and at the recipe's neutral setting the\nsame bit for bit (of programs: "
            "another prompt is another image). –: refused by an error that names the reason.\n✗: "
            f"neither. Of {len(marks)} cells {count['✓']} act, {count['–']} are refused by name, "
            f"{count['✗']} are neither.\n",
            markdown_table(rows, ["recipe", *FAMILIES]),
            "\n## Why not\n",
            markdown_table(reasons, ["recipe", "where", "what it says"]),
            "",
        ]
    )


def _short(reason: str, mark: str) -> str:
    """The first sentence or so, with the family's own names taken out."""
    text = ("✗ " if mark == "✗" else "") + reason.partition("hookctl: raised")[0]
    return (text[:157] + "...") if len(text) > 160 else text


def main(path: str = "docs/recipe_families.md", *names: str) -> int:
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[str]]] = {}
    if NOTES.exists():
        found = json.loads(NOTES.read_text("utf-8"))
    rows = [name for name in recipe_names() if name in names] or recipe_names()
    only = [shown for shown, family in FAMILIES.items() if {shown, family} & set(names)]
    for shown in only or FAMILIES:
        cells = Cells(BY_NAME[FAMILIES[shown]])
        for name in rows:
            mark, reason = verdict(cells, name)
            print(shown, name, mark, reason[:200], flush=True)
            found.setdefault(name, {})[shown] = [mark, reason]
        NOTES.parent.mkdir(exist_ok=True)
        NOTES.write_text(json.dumps(found, indent=1, ensure_ascii=False), "utf-8")
    ordered = {name: found[name] for name in recipe_names() if name in found}
    Path(path).write_text(page(ordered), "utf-8")
    return int(any(mark == "✗" for row in ordered.values() for mark, _ in row.values()))


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
