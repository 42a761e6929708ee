"""Programs drive every family: a plain run is the pipeline's own, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.families.fingerprint import unchanged
from tests.hookctl.loop.families import FAMILIES, Family


def tensor(images: Any) -> Tensor:
    return images if isinstance(images, Tensor) else torch.as_tensor(np.asarray(images))


def guidances(family: Family) -> list[float]:
    return [1.0, 4.0] if family.guides else [1.0]


EVERY = [
    pytest.param(family, guidance, id=f"{family.name}-{guidance:g}")
    for family in FAMILIES
    for guidance in guidances(family)
]


@pytest.mark.parametrize(("family", "guidance"), EVERY)
def test_a_plain_program_is_the_pipelines_run(family: Family, guidance: float) -> None:
    pipe = family.make()
    expected = family.drawn(pipe, guidance)
    with unchanged(pipe):
        run = family.program(pipe, guidance)
        run.run()
        latents = run.decode("latent")
    assert torch.equal(latents, expected)
    # There and back, in the form that masks and noise have.
    assert torch.equal(run.packed(run.unpacked()), run.latents)
