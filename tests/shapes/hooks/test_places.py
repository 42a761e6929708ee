"""Networks that find the mask of a place before they have learned anything."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hookctl.demos.shapes.hooks.collaboration import build_network
from hookctl.demos.shapes.hooks.places import fit_places, reserve_places, set_tokens, waves

SIDE = 16


def test_waves_are_orthonormal_and_begin_with_the_even_one() -> None:
    found = waves(8, 30)
    torch.testing.assert_close(found @ found.T, torch.eye(30))
    assert bool((found[0] == found[0, 0]).all())


def squares() -> Tensor:
    """Masks of the background and of two squares, one-hot, [8, 3, cells]."""
    ids = torch.zeros(8, SIDE, SIDE, dtype=torch.long)
    for i in range(8):
        ids[i, i : i + 5, 0:5], ids[i, 2:7, 8 + i // 2 : 13 + i // 2] = 1, 2
    return nn.functional.one_hot(ids.flatten(1), 3).transpose(1, 2).float()


@pytest.mark.slow
def test_attention_finds_the_mask_over_a_place() -> None:
    """Whatever the noise, places in a square look at its token first."""
    torch.manual_seed(0)
    unet, linear, maps = (
        build_network(4, 1, (16, 32, 32)),
        nn.Linear(SIDE * SIDE, 128),
        squares(),
    )
    set_tokens(linear)
    tokens = linear(maps).detach()

    def run(x: Tensor) -> Any:
        return unet(x, torch.arange(8) * 100, tokens, return_dict=False)

    run_once = partial(run, torch.randn(8, 4, SIDE, SIDE))
    reserve_places(unet, run_once)
    told = [fit_places(unet, SIDE * SIDE, run_once) for _ in range(2)][-1]
    assert len(told) == 7 and min(told.values()) > 0.25 and max(told.values()) > 0.7
    seen: dict[str, tuple[Any, Tensor]] = {}
    for name, module in unet.named_modules():
        if name.endswith(".attn2"):
            module.register_forward_pre_hook(
                lambda attn, args, name=name: seen.__setitem__(name, (attn, args[0]))
            )
    with torch.no_grad():
        run(torch.randn(8, 4, SIDE, SIDE))
    for name, (attn, h) in seen.items():
        grid = round(h.shape[1] ** 0.5)
        q, k = attn.to_q(h)[..., :16], attn.to_k(tokens)[..., :16]  # the first head
        cell = SIDE // grid
        covered = maps.view(8, 3, grid, cell, grid, cell).mean((3, 5)).flatten(2)
        inside = covered[:, 1:].amax(1) > 0.7
        right = (q @ k.transpose(1, 2)).argmax(-1) == covered.argmax(1)
        assert float(right[inside].float().mean()) > 0.8, name
