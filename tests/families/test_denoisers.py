"""Denoisers of further families, without their pipelines: caught, idle, edited."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hookctl import AttentionCall, Editor, control
from hookctl.address.families import describe_sites
from hookctl.address.sites import Grid
from hookctl.errors import UnsupportedError
from tests.families.fingerprint import differences, fingerprint
from tests.families.subjects import MODULE_ROWS, Idle, error
from tests.zoo.denoisers import CASES, DenoiserCase

BY_NAME = {case.name: case for case in CASES}


class Borrow(Editor):
    """The second row attends to the first one's image and text."""

    def attention(self, call: AttentionCall) -> None:
        call.borrow(call.rows[1], k=call.rows[0], v=call.rows[0])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_denoiser(case: DenoiserCase) -> None:
    model = case.make()
    plain, before, idle = case.run(model), fingerprint(model), Idle()
    with control(model, idle, rows=MODULE_ROWS):
        assert torch.equal(case.run(model), plain)
    kinds = [site.kind for site, _ in describe_sites(model)]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == case.sites
    assert len(idle.calls) == len(kinds) - kinds.count("text")  # which nobody picks unasked
    frames, height, width = case.grid
    for call in idle.calls:
        assert call.grid == Grid(height, width, frames)
        text = call.spans.text_keys
        if call.site.kind == "joint":
            assert text is not None and text[1] - text[0] == case.tokens
    edited = {}
    for backend in ("sdpa", "reference"):
        with control(model, Borrow(), rows=MODULE_ROWS, backend=backend):
            edited[backend] = case.run(model)
    assert error(edited["sdpa"], edited["reference"]) < 1e-5
    assert error(edited["sdpa"][0], plain[0]) < 1e-5
    assert error(edited["sdpa"][1], plain[1]) > 1e-5
    assert not differences(before, fingerprint(model))


def test_texts_of_unequal_length_in_one_sequence() -> None:
    """Where the image begins differs by row then, so nothing may be said of places."""
    case = BY_NAME["lumina2"]
    model, inputs = case.make(), case.inputs()
    inputs["encoder_attention_mask"][1, 4:] = False

    class Reads(Editor):
        sites = "joint"

        def attention(self, call: Any) -> None:
            call.grid  # noqa: B018

    with (
        control(model, Reads(), rows=MODULE_ROWS),
        pytest.raises(UnsupportedError, match="length of the text"),
        torch.no_grad(),
    ):
        model(**inputs)
