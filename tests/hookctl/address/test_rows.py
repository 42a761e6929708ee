"""Who: rows of every layout, also where they change in mid-run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback

import hookctl
from hookctl.address import pipelines
from hookctl.address.rows import Row, Rows, resolve_rows
from hookctl.editor import Editor
from hookctl.errors import LayoutError
from tests import zoo


class Seen(Editor):
    def __init__(self) -> None:
        self.rows: list[Rows] = []

    def before(self, state: Any) -> None:
        self.rows.append(state.rows)


def tags(rows: Rows) -> list[str]:
    return [f"{row.branch}{row.prompt}.{row.image}" for row in rows]


def test_batched_guidance() -> None:
    rows = resolve_rows(8, pipelines.BATCHED, prompts=2, images_per_prompt=2, guided=True)
    assert tags(rows) == [f"{b}{p}.{i}" for b in ("uncond", "cond") for p in (0, 1) for i in (0, 1)]
    assert [row.index for row in rows] == list(range(8))


def test_positive_first() -> None:
    rows = resolve_rows(2, pipelines.POSITIVE_FIRST, prompts=1)
    assert tags(rows) == ["cond0.0", "uncond0.0"]


def test_one_call_for_each_branch() -> None:
    calls = [resolve_rows(2, pipelines.SEQUENTIAL, prompts=2, call=i) for i in (0, 1)]
    assert [tags(rows)[0] for rows in calls] == ["cond0.0", "uncond0.0"]
    named = resolve_rows(2, pipelines.SEQUENTIAL, prompts=2, call=0, branch="uncond")
    assert tags(named) == ["uncond0.0", "uncond1.0"]


def test_skip_layer_guidance_makes_a_second_call() -> None:
    rows = resolve_rows(1, pipelines.BATCHED_THEN_SKIP, prompts=1, guided=True)
    assert tags(rows) == ["perturbed0.0"]
    assert tags(resolve_rows(1, pipelines.BATCHED_THEN_SKIP, prompts=1, guided=False)) == [
        "cond0.0"
    ]


def test_perturbed_attention_guidance() -> None:
    assert [r.branch for r in resolve_rows(3, pipelines.PAG, prompts=1, guided=True)] == [
        "uncond",
        "cond",
        "perturbed",
    ]
    unguided = resolve_rows(2, pipelines.PAG, prompts=1, guided=False)
    assert tags(unguided) == ["cond0.0", "perturbed0.0"]


def test_unknown_batch_is_no_guess() -> None:
    with pytest.raises(LayoutError, match="has 5 rows, but the pipeline draws 2 images"):
        resolve_rows(5, pipelines.BATCHED, prompts=2)
    with pytest.raises(LayoutError, match="2 or 4 rows"):
        resolve_rows(6, pipelines.BATCHED, prompts=2)


def test_where_and_twin() -> None:
    rows = resolve_rows(4, pipelines.BATCHED, prompts=2)
    assert [row.index for row in rows.where(branch="cond")] == [2, 3]
    assert rows.twin(rows[3], prompt=0) == Row(2, "cond", 0, 0)
    assert rows.twin(rows[3], branch="uncond").index == 1
    with pytest.raises(LayoutError, match="no row branch='cond', prompt=7"):
        rows.twin(rows[3], prompt=7)


def test_guidance_that_ends_in_mid_run() -> None:
    case, seen = zoo.PIPELINES["sd15"], Seen()
    pipe = case.make()
    callback = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    with hookctl.control(pipe, seen):
        case.run(pipe, steps=4, callback_on_step_end=callback)
    assert [tags(rows) for rows in seen.rows] == 3 * [["uncond0.0", "cond0.0"]] + [["cond0.0"]]


def test_embeddings_in_place_of_prompts() -> None:
    case, seen = zoo.PIPELINES["sd15"], Seen()
    pipe = case.make()
    text = torch.randn(2, 77, 32)
    with hookctl.control(pipe, seen):
        pipe(
            prompt_embeds=text,
            negative_prompt_embeds=text,
            num_inference_steps=1,
            num_images_per_prompt=2,
            output_type="latent",
        )
    assert tags(seen.rows[0])[4:] == ["cond0.0", "cond0.1", "cond1.0", "cond1.1"]


def test_skip_layers_of_sd3() -> None:
    case, seen = zoo.PIPELINES["sd3"], Seen()
    pipe = case.make()
    with hookctl.control(pipe, seen):
        case.run(
            pipe,
            steps=2,
            skip_guidance_layers=[1],
            skip_layer_guidance_stop=1.0,
            skip_layer_guidance_start=0.0,
        )
    assert ["perturbed0.0"] in [tags(rows) for rows in seen.rows]


def test_unguided_pag() -> None:
    case, seen = zoo.PIPELINES["sd15_pag"], Seen()
    pipe = case.make()
    with hookctl.control(pipe, seen):
        case.run(pipe, guidance=1.0)
    assert [row.branch for row in seen.rows[0]] == ["cond", "perturbed"]


def test_two_groups_that_may_be_either() -> None:
    """Without a word on guidance, two groups of PAG are two branches of it or of guidance."""
    with pytest.raises(LayoutError, match="2 rows"):
        resolve_rows(2, pipelines.PAG, prompts=1)
    assert tags(resolve_rows(3, pipelines.PAG, prompts=1))[2] == "perturbed0.0"
