"""Every decoder concat of a UNet is shown, and what is assigned to it is what is joined."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import zoo
from tests.families.subjects import error
from tests.hookctl.drawing import SD15, TWO, draw, editor


@pytest.mark.parametrize(
    ("name", "count"), [("sd15", 8), ("sdxl", 6), ("svd", 4), ("animatediff", 4)]
)
def test_every_concat_is_shown(name: str, count: int) -> None:
    case, seen = zoo.PIPELINES[name], []
    pipe = case.make()
    edited = draw(case, pipe, editor(features=lambda call: seen.append(call)), steps=1)
    assert torch.equal(edited, case.run(pipe, TWO, steps=1))
    assert [call.order for call in seen] == list(range(count))
    joined = [call.backbone.shape[1] + call.skip.shape[1] for call in seen]
    resnets = [r for block in pipe.unet.up_blocks for r in block.resnets]
    convolutions = [getattr(r, "spatial_res_block", r).conv1.in_channels for r in resnets]
    assert joined == convolutions
    assert all(call.backbone.shape[2:] == call.skip.shape[2:] for call in seen)


def test_scaled_backbone_is_diffusers_own_freeu() -> None:
    """FreeU with s = 1 scales half of the backbone's channels in the first two decoder blocks."""
    pipe = SD15.make()

    def scale(call: Any) -> None:
        if call.block < 2:
            half, gain = call.backbone.shape[1] // 2, (1.3, 1.2)[call.block]
            changed = call.backbone.clone()
            changed[:, :half] *= gain
            call.backbone = changed

    edited = draw(SD15, pipe, editor(features=scale))
    channels = [block.resnets[0].out_channels for block in pipe.unet.up_blocks]
    assert channels[:2] == [32, 32]
    assert not torch.equal(edited, SD15.run(pipe, TWO))
    assert error(edited, _by_hand(pipe)) < 1e-6


def _by_hand(pipe: Any) -> Tensor:
    handles = []
    for block, gain in zip(pipe.unet.up_blocks[:2], (1.3, 1.2), strict=True):
        for resnet in block.resnets:

            def hook(module: Any, args: Any, gain: float = gain) -> Any:
                joined = args[0].clone()
                joined[:, :16] *= gain  # half of the 32 channels of the backbone
                return (joined, *args[1:])

            handles.append(resnet.register_forward_pre_hook(hook))
    result = SD15.run(pipe, TWO)
    for handle in handles:
        handle.remove()
    return result
