"""Stacks: methods together in one run, each stack measured for what its parts are there for.

Prompt-to-Prompt with FreeU, and on an inverted picture with a local blend; regional prompts with
masked self-attention and the multi-instance sampler; RealCompo with FreeU; Attend-and-Excite with
PAG; MasaCtrl with a LoRA. The plain pictures have the same prompts and noise.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import hookctl
from hookctl import show
from hookctl.demos import placing, striped
from hookctl.demos.cases import draw as draw_edit
from hookctl.demos.cost import counted
from hookctl.demos.figures import measure, source_is_right, summary
from hookctl.demos.layouts import LayoutCase, draw_layout
from hookctl.demos.masactrl import SETTINGS as MASACTRL
from hookctl.demos.masactrl import Outcome, appearances, draw_case
from hookctl.demos.prompt_to_prompt import SETTINGS as EDITS
from hookctl.demos.real_compo import METHODS as COMPOSED
from hookctl.demos.regional import figures as in_parts
from hookctl.demos.regional import together
from hookctl.demos.shapes.detect import detect
from hookctl.recipes import PAG, AttendAndExcite, DirectInversion, FreeU, MasaCtrl, PromptToPrompt

STEPS, GUIDANCE, SHOWN = 25, 3.0, 2
MOST = 8  # cases of a stack, however many are asked for: some stacks cost a hundred rows a picture
COMMON: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
# Gentle: the embedded UNet is far narrower than those that FreeU's gains were found on.
GENTLE: dict[str, Any] = {"b1": 1.05, "b2": 1.05, "s1": 0.95, "s2": 0.9}

Progress = Callable[[int, int], None]
Row = list[Image.Image]
Result = tuple[list[Row], dict[str, Any]]


# -- edits -----------------------------------------------------------------------------------------


def with_freeu(pipe: Any, seed: int, count: int) -> Result:
    """Prompt-to-Prompt; FreeU acts on the source and the edit alike."""
    return _recoloured(pipe, seed, count, _edited_with_freeu)


def on_inverted(pipe: Any, seed: int, count: int) -> Result:
    """Prompt-to-Prompt with a local blend, on a picture that was inverted."""
    return _recoloured(pipe, seed, count, _edited_inverted)


Drawing = Callable[[Any, Any, PromptToPrompt, int], list[Image.Image]]


def _edited_with_freeu(pipe: Any, case: Any, edit: PromptToPrompt, seed: int) -> list[Image.Image]:
    return list(edit.run(pipe, FreeU(**GENTLE), seed=seed, **COMMON))


def _edited_inverted(pipe: Any, case: Any, edit: PromptToPrompt, seed: int) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(seed)
    picture = pipe(case.source, generator=generator, **COMMON).images[0]
    inverted = DirectInversion(
        pipe, picture, case.source, steps=STEPS, guidance=GUIDANCE, unit_noise=True
    ).run()
    return [picture, inverted.edit(pipe, edit, guidance=GUIDANCE)[1]]


def _recoloured(pipe: Any, seed: int, count: int, drawing: Drawing) -> Result:
    rng = np.random.default_rng([seed, 11])
    cases = [draw_edit("colour", rng) for _ in range(count)]
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    unedited = pipe([case.target for case in cases], generator=generators, **COMMON).images
    rows, plains, edits = [], [], []
    for i, (case, plain) in enumerate(zip(cases, unedited, strict=True)):
        edit = PromptToPrompt([case.source, case.target], blend=case.words, **EDITS["colour"])
        source, edited = drawing(pipe, case, edit, seed + i)
        rows.append([source, plain, edited])
        if source_is_right(case, detect(source)):
            plains.append(measure(case, source, plain))
            edits.append(measure(case, source, edited))
    return rows, {"right_sources": len(edits), "stack": summary(edits), "plain": summary(plains)}


# -- layouts ---------------------------------------------------------------------------------------

Reading = Callable[[Sequence[LayoutCase], Sequence[Image.Image]], dict[str, float]]


def _boxes(cases: Sequence[LayoutCase], pictures: Sequence[Image.Image]) -> dict[str, float]:
    return {**placing.placed(cases, pictures), **placing.named(cases, pictures)}


def _layouts(pipe: Any, seed: int, count: int, stack: placing.Stack, read: Reading) -> Result:
    rng = np.random.default_rng([seed, 13])
    cases = [draw_layout(rng, 2) for _ in range(count)]
    plain = placing.draw(pipe, cases, lambda _: [], seed)
    stacked = placing.draw(pipe, cases, stack, seed)
    rows = [
        [placing.layout(case), a, b]
        for case, a, b in zip(cases, plain.pictures, stacked.pictures, strict=True)
    ]
    report = {
        name: read(cases, drawn.pictures) for name, drawn in (("stack", stacked), ("plain", plain))
    }
    return rows, report


def regions(pipe: Any, seed: int, count: int) -> Result:
    """Regional prompts, masked self-attention and the multi-instance sampler."""
    return _layouts(pipe, seed, count, together, in_parts)


def composed(pipe: Any, seed: int, count: int) -> Result:
    """RealCompo and FreeU, which acts in the energies too."""
    return _layouts(
        pipe, seed, count, lambda c: [*COMPOSED["RealCompo"](c), FreeU(**GENTLE)], _boxes
    )


def excited(pipe: Any, seed: int, count: int) -> Result:
    """Attend-and-Excite and PAG, whose perturbed rows are edited as their prompts' are."""
    return _layouts(
        pipe,
        seed,
        count,
        lambda c: [AttendAndExcite(placing.words(c), refinements=5), PAG(1.0)],
        _boxes,
    )


# -- an adapter ------------------------------------------------------------------------------------


@contextmanager
def striping(pipe: Any, state: striped.State) -> Iterator[None]:
    """The LoRA of `demos.striped` is on meanwhile."""
    pipe.load_lora_weights(dict(state), adapter_name="striped")
    try:
        yield
    finally:
        pipe.unload_lora_weights()


def with_lora(pipe: Any, seed: int, count: int) -> Result:
    """MasaCtrl while a LoRA is on: the source's keys and values are the adapter's.

    Prompts ask for plain objects, so stripes are the LoRA's doing, the kept appearance MasaCtrl's.
    """
    rng, state = np.random.default_rng([seed, 17]), striped.lora(pipe)
    rows, outcomes, shares = [], [], []
    for i in range(count):
        case = draw_case("MasaCtrl", rng)
        asked, wanted = (
            replace(case, things=tuple(replace(t, pattern=pattern) for t in case.things))
            for pattern in ("plain", striped.PATTERN)
        )
        edit = MasaCtrl(asked.prompts, **MASACTRL["MasaCtrl"])
        given = {"generator": edit.generators(seed + i), **COMMON}
        without = pipe(asked.prompts, **given).images
        with striping(pipe, state):
            given["generator"] = edit.generators(seed + i)
            source, plain = pipe(asked.prompts, **given).images
            _, edited = edit.run(pipe, seed=seed + i, **COMMON)
        rows.append([source, plain, edited])
        outcomes.append(Outcome(wanted, source, [plain], [edited]))
        shares.append([_striped([*without]), _striped([source, plain]), _striped([edited])])
    read = appearances(outcomes)
    names = ("without_lora", "with_lora", "stack")
    return rows, {
        "right_sources": read["cases_with_right_source"],
        "stack": read["edit"],
        "plain": read["plain"],
        "striped": dict(zip(names, np.mean(shares, 0).round(3).tolist(), strict=True)),
    }


def _striped(pictures: Sequence[Image.Image]) -> float:
    """The share of all objects that are striped; 0 where there are none."""
    patterns = [found.pattern for one in pictures for found in detect(one).objects]
    return patterns.count(striped.PATTERN) / max(1, len(patterns))


STACKS: dict[str, Callable[[Any, int, int], Result]] = {
    "Prompt-to-Prompt + FreeU": with_freeu,
    "Prompt-to-Prompt on an inverted picture + local blend": on_inverted,
    "regional prompts + masked self-attention + multi-instance sampler": regions,
    "RealCompo + FreeU": composed,
    "Attend-and-Excite + PAG": excited,
    "MasaCtrl + LoRA": with_lora,
}


def run(
    out: Path, seed: int = 0, seeds: int = 4, progress: Progress | None = None
) -> dict[str, Any]:
    """Run the demo; writes grid.png and report.json to `out` and returns the report."""
    out.mkdir(parents=True, exist_ok=True)
    pipe = hookctl.load_shapes()
    pipe.set_progress_bar_config(disable=True)
    begun, count = time.perf_counter(), min(seeds, MOST)
    shown: list[tuple[str, Row]] = []
    figures, costs = {}, {}
    for done, (name, stack) in enumerate(STACKS.items(), 1):
        with counted(pipe.unet) as cost:
            rows, figures[name] = stack(pipe, seed, count)
        costs[name] = {"rows_per_case_with_plain": round(cost.rows / count, 1)}
        shown += [(name, row) for row in rows[:SHOWN]]
        if progress is not None:
            progress(done, len(STACKS))
    report = {
        "demo": "stacks",
        "seed": seed,
        "cases_per_stack": count,
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "stacks": figures,
        "cost": costs,
        "wall_seconds": round(time.perf_counter() - begun, 1),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    show.grid(
        [row for _, row in shown],
        column_titles=["source or boxes", "plain", "stack"],
        row_titles=[name for name, _ in shown],
        cell=(128, 128),
    ).save(out / "grid.png")
    return report
