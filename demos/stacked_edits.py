"""Stacks of methods that edit: each member's figures, and those of the same images without it.

Prompt-to-Prompt with FreeU, and on an inverted image with a local blend; MasaCtrl with a LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from hookctl.demos import guidance, striped
from hookctl.demos.cases import EditCase
from hookctl.demos.cases import draw as draw_edit
from hookctl.demos.cost import FEW, counted, drawing_mib, peak_mib
from hookctl.demos.figures import EditFigures, measure, source_is_right, summary
from hookctl.demos.inversion import images_of, psnr
from hookctl.demos.masactrl import SITES, Case, Outcome, appearances, draw_case
from hookctl.demos.prompt_to_prompt import SETTINGS as EDITS
from hookctl.demos.shapes.detect import detect
from hookctl.recipes import DirectInversion, FreeU, MasaCtrl, PromptToPrompt
from hookctl.recipes.common.source_and_edits import SourceAndEdits

STEPS, GUIDANCE = 25, 3.0
NOISES = 2  # drawn at once of every prompt
BATCH = 8  # images inverted at once
COMMON: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
KEPT = ("appearance_kept", "with_new_layout")
PAIR = 2 * 2 * STEPS  # rows of a source and its edit

FREEU = "FreeU, of sources"

Row = list[Image.Image]
Figures = dict[str, dict[str, float]]  # member of the stack -> what it answers for


@dataclass(frozen=True, eq=False)
class Stacked:
    """What a stack did.

    rows: source or boxes, plain image and the stack's, for each case; figures: of the stack and
    of the plain images; judged: cases that edits are judged in, those whose source is right;
    evaluated: denoiser rows for each case under the stack; theory: the same as it must be; peaks:
    MiB of one case, under the stack and plainly.
    """

    rows: list[Row]
    figures: dict[str, Figures]
    judged: int
    evaluated: float
    theory: float
    peaks: tuple[float, float]

    @property
    def cost(self) -> dict[str, float]:
        return {
            "cases_judged": self.judged,
            "rows_per_case": round(self.evaluated, 1),
            "rows_in_theory": round(self.theory, 1),
            "peak_mib_of_a_case": self.peaks[0],
            "peak_mib_of_it_plainly": self.peaks[1],
        }


def noises(count: int) -> Iterator[tuple[int, int]]:
    """(the first of some cases, how many of them) that share their prompts."""
    for first in range(0, count, NOISES):
        yield first, min(NOISES, count - first)


def _without(pipe: Any, edit: SourceAndEdits, seed: int, images: int) -> Row:
    """The images of an edit as the pipeline draws them by itself."""
    noise = edit.generators(seed, images)
    drawn = pipe(edit.prompts, num_images_per_prompt=images, generator=noise, **COMMON)
    return list(drawn.images)


# -- Prompt-to-Prompt ------------------------------------------------------------------------------


def _swap(case: EditCase) -> PromptToPrompt:
    return PromptToPrompt([case.source, case.target], blend=case.words, **EDITS[case.kind])


def with_freeu(pipe: Any, seed: int, count: int) -> Stacked:
    """Prompt-to-Prompt and FreeU, which acts on the source and the edit alike."""
    rng = np.random.default_rng([seed, 11])
    cases, plainly, stacked = list[EditCase](), list[Row](), list[Row]()
    rows = 0
    for first, images in noises(count):
        case = draw_edit("colour", rng)
        edit, start = _swap(case), seed + first
        plain = _without(pipe, edit, start, images)
        with counted(pipe.unet) as cost:
            made = edit.run(pipe, FreeU(), seed=start, images=images, **COMMON)
        cases, rows = [*cases, *[case] * images], rows + cost.rows
        for found, drawn in ((plainly, plain), (stacked, made)):
            found += [[drawn[j], drawn[images + j]] for j in range(images)]
    first_edit = _swap(cases[0])
    figures = {"stack": _swapped(cases, stacked), "plain": _swapped(cases, plainly)}
    moved = [psnr(a[0], b[0]) for a, b in zip(plainly, stacked, strict=True)]
    figures["stack"][FREEU]["psnr_to_plain"] = round(float(np.mean(moved)), 2)
    return Stacked(
        [[a[0], a[1], b[1]] for a, b in zip(plainly, stacked, strict=True)],
        figures,
        sum(source_is_right(c, detect(b[0])) for c, b in zip(cases, stacked, strict=True)),
        rows / count,
        PAIR,
        (
            drawing_mib(pipe, first_edit.prompts, first_edit, FreeU(), guidance=GUIDANCE),
            drawing_mib(pipe, first_edit.prompts, guidance=GUIDANCE),
        ),
    )


def _swapped(cases: Sequence[EditCase], pairs: Sequence[Row]) -> Figures:
    """Of sources and edits: the edit's figures where sources are right, FreeU's of all sources."""
    valid = [
        measure(case, source, edited)
        for case, (source, edited) in zip(cases, pairs, strict=True)
        if source_is_right(case, detect(source))
    ]
    sources = [source for source, _ in pairs]
    return {
        "Prompt-to-Prompt": summary(valid),
        FREEU: guidance.figures([case.source for case in cases], sources),
    }


def on_inverted(pipe: Any, seed: int, count: int) -> Stacked:
    """Prompt-to-Prompt with a local blend, on images that no model drew.

    Plainly: the same inverted noise, drawn with the edited prompt.
    """
    rng = np.random.default_rng([seed, 11])
    cases = [draw_edit("colour", rng) for _ in range(count)]
    images = images_of(cases, rng)
    with counted(pipe.unet) as cost:
        inverted = _inverted(pipe, cases, images, STEPS)
        stacked = [
            one.edit(pipe, _swap(case), guidance=GUIDANCE)
            for case, one in zip(cases, inverted, strict=True)
        ]
    noise = torch.cat([one.latents for one in inverted])
    plainly = pipe([case.target for case in cases], latents=noise, **COMMON).images

    def shortly() -> None:
        (one,) = _inverted(pipe, cases[:1], images[:1], FEW)
        one.edit(pipe, _swap(cases[0]), guidance=GUIDANCE, output_type="latent")

    edits = [measure(c, p, b[1]) for c, p, b in zip(cases, images, stacked, strict=True)]
    others = [measure(c, p, a) for c, p, a in zip(cases, images, plainly, strict=True)]
    again = [psnr(p, b[0]) for p, b in zip(images, stacked, strict=True)]
    return Stacked(
        [[p, a, b[1]] for p, a, b in zip(images, plainly, stacked, strict=True)],
        {
            "stack": {"inversion": {"psnr": round(float(np.mean(again)), 2)}, **_parted(edits)},
            "plain": _parted(others),
        },
        count,
        cost.rows / count,
        PAIR + STEPS,
        (peak_mib(shortly), drawing_mib(pipe, cases[0].target, guidance=GUIDANCE)),
    )


def _inverted(
    pipe: Any, cases: Sequence[EditCase], images: Sequence[Image.Image], steps: int
) -> list[Any]:
    found = []
    for i in range(0, len(cases), BATCH):
        prompts = [case.source for case in cases[i : i + BATCH]]
        given: dict[str, Any] = {"steps": steps, "guidance": GUIDANCE, "unit_noise": True}
        found += DirectInversion(pipe, images[i : i + BATCH], prompts, **given).run()
    return found


def _parted(figures: Sequence[EditFigures]) -> Figures:
    """The background is the blend's, all else the edit's."""
    both = summary(figures)
    background = both.pop("background_psnr")
    return {"Prompt-to-Prompt": both, "local blend": {"background_psnr": background}}


# -- MasaCtrl --------------------------------------------------------------------------------------


@contextmanager
def striping(pipe: Any, state: striped.State) -> Iterator[None]:
    """The LoRA of `demos.striped` is on meanwhile."""
    # Not by the pipeline, which looks for an adapter of its text encoder too, and warns.
    pipe.unet.load_lora_adapter(dict(state), prefix="unet", adapter_name=striped.PATTERN)
    try:
        yield
    finally:
        pipe.unet.unload_lora()


def with_lora(pipe: Any, seed: int, count: int) -> Stacked:
    """MasaCtrl while a LoRA is on: the source's keys and values are the adapter's.

    Prompts ask for plain objects: stripes are the LoRA's doing, the kept appearance MasaCtrl's.
    """
    rng, state = np.random.default_rng([seed, 17]), striped.lora(pipe)
    plainly, stacked, rows = list[Outcome](), list[Outcome](), 0
    for first, images in noises(count):
        case, start = _patterned(draw_case("MasaCtrl", rng), "plain"), seed + first
        edit = MasaCtrl(case.prompts, sites=SITES)
        plain = _without(pipe, edit, start, images)
        with striping(pipe, state):
            alone = _without(pipe, edit, start, images)
            with counted(pipe.unet) as cost:
                made = edit.run(pipe, seed=start, images=images, **COMMON)
        plainly += _outcomes(case, plain, plain)
        stacked += _outcomes(_patterned(case, striped.PATTERN), alone, made)
        rows += cost.rows
    figures = {
        "stack": _kept(stacked, "edit"),
        "LoRA alone": _kept(stacked, "plain"),
        "plain": _kept(plainly, "plain"),
    }
    return Stacked(
        [[b.source, *a.plain, *b.edited] for a, b in zip(plainly, stacked, strict=True)],
        figures,
        appearances(stacked)["cases_with_right_source"],
        rows / count,
        PAIR,
        _peaks_with_lora(pipe, edit, state),
    )


def _outcomes(case: Case, plain: Row, made: Row) -> list[Outcome]:
    """Of sources and then as many edits; the sources are those made."""
    half = len(made) // 2
    return [Outcome(case, made[j], [plain[half + j]], [made[half + j]]) for j in range(half)]


def _patterned(case: Case, pattern: str) -> Case:
    return replace(case, things=tuple(replace(thing, pattern=pattern) for thing in case.things))


def _kept(outcomes: Sequence[Outcome], which: str) -> Figures:
    """which: "edit" or "plain"; striped: the share of all objects that are, 0 without objects."""
    drawn = [(o.source, *(o.edited if which == "edit" else o.plain)) for o in outcomes]
    patterns = [o.pattern for pair in drawn for one in pair for o in detect(one).objects]
    share = patterns.count(striped.PATTERN) / max(1, len(patterns))
    read = appearances(outcomes)[which]
    kept = {name: read[name] for name in KEPT if name in read}
    return {"MasaCtrl": kept, "LoRA": {"striped": round(share, 3)}}


def _peaks_with_lora(pipe: Any, edit: MasaCtrl, state: striped.State) -> tuple[float, float]:
    plainly = drawing_mib(pipe, edit.prompts, guidance=GUIDANCE)
    with striping(pipe, state):
        return drawing_mib(pipe, edit.prompts, edit, guidance=GUIDANCE), plainly
