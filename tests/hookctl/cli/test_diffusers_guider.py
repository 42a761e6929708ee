"""Editors as a guider of a modular pipeline: the same as under `control`, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler, StableDiffusion3AutoBlocks
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance

import hookctl
from hookctl import Editor
from hookctl.attention.call import AttentionCall
from hookctl.cli.diffusers_guider import Edited, EditedGuidance
from hookctl.errors import UnsupportedError
from hookctl.recipes import APG, FDG, PAG, TCFG, CFGZeroStar, FreeU, PromptToPrompt
from tests import zoo
from tests.families.fingerprint import differences, fingerprint
from tests.families.subjects import error
from tests.hookctl.loop.test_modular import PROMPTS, SDXL, drawn, modular, of_class


class EditedAPG(Edited, AdaptiveProjectedGuidance):
    pass


def edits() -> list[Editor]:
    return [PromptToPrompt(PROMPTS, self_replace=0.5, self_resolution=1.0), FreeU()]


class Breaks(Editor):
    """Ends the run in its second step, once."""

    broken = False

    def attention(self, call: AttentionCall) -> None:
        if call.clock.step == 1 and not Breaks.broken:
            Breaks.broken = True
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edited", "own"),
    [(EditedGuidance, ClassifierFreeGuidance), (EditedAPG, AdaptiveProjectedGuidance)],
)
def test_a_guider_edits_as_control_does(edited: Any, own: Any) -> None:
    blocks = modular(SDXL.make(), own(guidance_scale=5.0))
    plain = drawn(blocks)
    with hookctl.control(blocks, *edits(), texts=PROMPTS):
        want = drawn(blocks)
    guider = edited(blocks, *edits(), texts=PROMPTS, guidance_scale=5.0)
    blocks.update_components(guider=guider)
    before = fingerprint(blocks)
    for _ in range(2):
        assert torch.equal(drawn(blocks), want) and not torch.equal(want, plain)
        assert not differences(before, fingerprint(blocks))
    assert guider.session is not None and "PromptToPrompt" in guider.session.report()


@pytest.mark.slow
def test_a_run_that_breaks_off_and_a_scheduler_of_second_order() -> None:
    """The next run ends what was left; every step is edited where each time comes twice."""
    pipe = SDXL.make()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    blocks = modular(pipe)
    with hookctl.control(blocks, *edits(), texts=PROMPTS):
        want = drawn(blocks)
    blocks.update_components(guider=EditedGuidance(blocks, *edits(), Breaks(), texts=PROMPTS))
    before = fingerprint(blocks)
    with pytest.raises(KeyboardInterrupt):
        drawn(blocks)
    assert torch.equal(drawn(blocks), want)
    assert not differences(before, fingerprint(blocks))


@pytest.mark.parametrize("editor", [APG(), PAG(sites="self"), PromptToPrompt(PROMPTS, blend="cat")])
def test_editors_of_the_scheduler_step_are_refused(editor: Editor) -> None:
    blocks = modular(SDXL.make())
    with pytest.raises(UnsupportedError, match=f"{editor.name} acts round the scheduler's step"):
        EditedGuidance(blocks, editor, texts=PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("make", [APG, TCFG, CFGZeroStar, FDG, lambda: PAG(sites="self"), FreeU])
def test_under_control_they_go_with_a_guider(make: Any) -> None:
    """As in the ordinary pipeline, which predicts both branches at once."""
    found = modular(SDXL.make())
    with hookctl.control(found, make(), texts=PROMPTS):
        latents = drawn(found)
    assert error(latents, of_class(SDXL.make(), make())) < 1e-5


@pytest.mark.slow
def test_blocks_of_a_transformer() -> None:
    own = ClassifierFreeGuidance(guidance_scale=5.0)
    blocks = modular(zoo.PIPELINES["sd3"].make(), own, blocks=StableDiffusion3AutoBlocks)
    edit = PromptToPrompt(PROMPTS, self_replace=0.5)
    with hookctl.control(blocks, edit, texts=PROMPTS):
        want = drawn(blocks)
    guider = EditedGuidance(blocks, edit, texts=PROMPTS, guidance_scale=5.0)
    blocks.update_components(guider=guider)
    assert torch.equal(drawn(blocks), want)
