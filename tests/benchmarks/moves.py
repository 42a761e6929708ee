"""How far one edited attention call travels: files it passes, and moves between them.

    python -m tests.benchmarks.moves

A UNet under Prompt-to-Prompt's edits (a token map at cross-attention, the source's map at
self-attention). Counted by `sys.setprofile` between the model's own call of
`scaled_dot_product_attention` and its return, once everything that is bound once is bound: each
Python call or return that leads from one file of the library to another is a move.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

import hookctl
from hookctl import Editor, Routing

LIBRARY = Path(hookctl.__file__).parent


class Edits(Editor):
    """The second picture's rows take their maps from the first's."""

    def __init__(self) -> None:
        matrix, blend = torch.eye(77), torch.ones(77)
        matrix[3, 3], matrix[3, 4], blend[5:8] = 0, 1, 0
        self.routing = Routing.of(77, matrix, blend)

    def attention(self, call: Any) -> None:
        source, edited = call.rows.where(branch="cond")
        if call.site.kind == "cross":
            call.route_by(edited, source, self.routing)
        else:
            call.borrow(edited, q=source, k=source)


class Journey:
    """The files between which one call moves."""

    def __init__(self) -> None:
        self.path: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "return"):
            return
        at: FrameType | None = frame if event == "call" else frame.f_back
        if at is None or not at.f_code.co_filename.startswith(str(LIBRARY)):
            return
        file = str(Path(at.f_code.co_filename).relative_to(LIBRARY))
        if not self.path or self.path[-1] != file:
            self.path.append(file)


def journeys() -> dict[str, Journey]:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=16,
        norm_num_groups=4,
    ).eval()
    inputs = (torch.randn(4, 4, 8, 8), torch.tensor(500), torch.randn(4, 77, 16))
    found: dict[str, Journey] = {}
    with torch.no_grad(), hookctl.control(unet, Edits(), rows=("uncond", "cond")):
        for _ in range(4):
            unet(*inputs)
        processor = type(next(m.processor for m in unet.modules() if hasattr(m, "processor")))
        original = processor.__call__

        def watched(self: Any, attention: Any, *args: Any, **kwargs: Any) -> Any:
            caught, journey = F.scaled_dot_product_attention, Journey()

            def followed(*of: Any, **named: Any) -> Any:
                sys.setprofile(journey)
                try:
                    return caught(*of, **named)
                finally:
                    sys.setprofile(None)

            F.scaled_dot_product_attention = followed
            try:
                return original(self, attention, *args, **kwargs)
            finally:
                F.scaled_dot_product_attention = caught
                found["cross" if attention.is_cross_attention else "self"] = journey

        processor.__call__ = watched
        try:
            unet(*inputs)
        finally:
            processor.__call__ = original
    return found


def main() -> None:
    for kind, journey in journeys().items():
        files = list(dict.fromkeys(journey.path))
        print(f"{kind}: {len(files)} files, {len(journey.path) - 1} moves")
        print("   " + " > ".join(files))


if __name__ == "__main__":
    main()
