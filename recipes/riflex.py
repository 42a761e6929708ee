"""RIFLEx: videos longer than a model was trained for, that do not repeat.

Zhao et al., "RIFLEx: A Free Lunch for Length Extrapolation in Video Diffusion Transformers", arXiv
2502.15894 (ICML 2025). Videos that are too long repeat themselves after as many frames as one pair
of channels takes for a rotation. That pair is slowed, so that all L frames of the latent are less
than a period (eq. 8):

    f_k = 0.9 * 2 pi / L          k the pair whose period 2 pi / f is nearest to the repetition
"""

from __future__ import annotations

import math
from typing import Any

from hookctl.address.families import denoiser_of, rotary_of
from hookctl.arguments import checked, number, whole
from hookctl.editor import Editor
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.positions_call import PositionsCall


class RIFLEx(Editor):
    """Draw videos longer than a model was trained for, without a repetition.

        with hookctl.control(pipe, RIFLEx(repeats=48)):         # HunyuanVideo
            frames = pipe("a fox runs", num_frames=257).frames[0]

    repeats: after how many frames of the latent a video that is too long repeats itself
        (HunyuanVideo 48).
    k: in its place, which pair of the rotary positions rotates so, from 1 (HunyuanVideo 4).
    share: how much of a period the video is made.
    paper: slow the pair whatever its period; else only where the video is longer than that share
        of it, since it would rotate faster.

    start, stop: fractions of the schedule. A video that is short enough is left bit for bit, which
    is an error unless control(..., strict=False). Raises UnsupportedError for images, and for
    models whose frames have no rotary positions, or fractions for positions (LTX).
    """

    @checked()
    def __init__(
        self,
        repeats: int | None = None,
        *,
        k: int | None = None,
        share: float = 0.9,
        paper: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        if (repeats is None) == (k is None):
            raise InputError(
                f"RIFLEx: repeats={repeats}, k={k}; give one of them, such as repeats=48 "
                "(HunyuanVideo), after how many frames of the latent a long video repeats itself"
            )
        self.repeats = None if repeats is None else whole(repeats, "RIFLEx: repeats", 2)
        self.k = None if k is None else whole(k, "RIFLEx: k", 1)
        self.share = number(share, "RIFLEx: share", low=0, high=1)
        if not self.share:
            raise InputError("RIFLEx: share=0 would stop the pair; give more, such as 0.9")
        self.paper, self.start, self.stop = paper, start, stop

    def neutral(self) -> bool:
        return False  # told of where a video is short enough

    def attach(self, target: Any) -> None:
        model = denoiser_of(target)
        found, name = rotary_of(model), type(model).__name__
        if found is None:
            return  # the hook says which have none
        if "frame" not in found[2].axes:
            raise UnsupportedError(f"RIFLEx is of videos, and {name} draws images")
        if found[2].theta(found[1]) is None:
            raise UnsupportedError(
                f"RIFLEx: frames of {name} are fractions of a length, which do not repeat"
            )
        pairs = found[1].t_dim // 2 if hasattr(found[1], "t_dim") else found[1].rope_dim[0] // 2
        if self.k is not None and self.k > pairs:
            raise InputError(f"RIFLEx: k={self.k}; {pairs} pairs of {name} turn with the frames")

    def positions(self, call: PositionsCall) -> None:
        length, pairs = call.extent("frame"), call.pairs("frame")
        if length < 2:
            raise UnsupportedError("RIFLEx is of videos, and this run draws one frame")
        frequencies = call.frequencies.clone()
        pair = pairs[self._pair(frequencies[pairs].tolist())]
        slowed = self.share * 2 * math.pi / length
        if self.paper or slowed < float(frequencies[pair]):
            frequencies[pair] = slowed
            call.frequencies = frequencies

    def _pair(self, frequencies: list[float]) -> int:
        """Which of the frames' pairs is slowed, from 0."""
        if self.k is not None:
            return self.k - 1
        assert self.repeats is not None  # one of them is given
        away = [abs(round(2 * math.pi / f) - self.repeats) for f in frequencies]
        return away.index(min(away))
