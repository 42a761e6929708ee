"""DyPE: images larger than a model was trained for, by positions that follow the denoising.

Issachar et al., "DyPE: Dynamic Position Extrapolation for Ultra High Resolution Diffusion", arXiv
2510.20766 (ICML 2026). An axis of P tokens, s = P / base times what the model has seen, rotates its
pairs of channels j by frequencies between the model's own f_j, slower ones f_j / s and the powers
of a raised theta (YaRN, arXiv 2309.00071):

    ntk_j = (theta s^(d / (d - 2)))^(-2j / d)          d channels of the axis
    f_j  <- blend(beta) of f_j / s and ntk_j, then blend(gamma) of that and f_j

a blend takes the second for small j, the first for large ones, between the pairs that rotate r_0
and r_1 times over `base` tokens. All r are multiplied by t^power, t the level of noise: positions
are stretched while the layout is found, and the model's own in the end. Cosines and sines are
multiplied by 0.1 ln s + 1, also those of the text.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hookctl.address.clock import Clock
from hookctl.address.families import denoiser_of, names_of, rotary_of
from hookctl.arguments import checked, number, one_of, whole
from hookctl.editor import Editor
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.noise import Noise, matches_flow
from hookctl.loop.positions_call import PositionsCall
from hookctl.run_state import RunState

BETA, GAMMA = (1.25, 0.75), (16.0, 2.0)
METHODS = ("yarn", "ntk")
# Tokens along the sides that models were trained for: 1024 px, or Qwen-Image's 1328 px, by 16.
TRAINED = {"FluxPosEmbed": 64, "Flux2PosEmbed": 64, "RopeEmbedder": 64, "QwenEmbedRope": 83}


class DyPE(Editor):
    """Draw images larger than a model was trained for.

        with hookctl.control(pipe, DyPE()):
            image = pipe("a city", height=3072, width=3072).images[0]

    base: tokens along the sides that the model was trained for; None: FLUX's and Z-Image's 64,
        Qwen-Image's 83.
    method: "yarn", published as the better one, or "ntk", whose theta alone is raised, by
        s^(2 t^power d / (d - 2)), and whose amplitudes stay.
    power: how fast positions return to the trained ones as the image gets clean, a power of t; 0
        for positions that do not follow the denoising (YaRN, NTK).

    start, stop: fractions of the schedule. An image within `base` is left bit for bit, which is an
    error unless control(..., strict=False). The official code also shifts the schedule of any size
    as that of 4096 tokens; give the pipeline sigmas= for that. Raises UnsupportedError for models
    without rotary positions (UNets, SD3), or with fractions for positions (LTX).
    """

    _noise: RunState[Noise] = RunState()
    _base: RunState[int] = RunState(64)
    _extents: RunState[tuple[Clock | None, dict[str, float]]] = RunState((None, {}))

    @checked()
    def __init__(
        self,
        base: int | None = None,
        *,
        method: str = "yarn",
        power: float = 2.0,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        self.base = None if base is None else whole(base, "DyPE: base", 1)
        self.method = one_of(method, "DyPE: method", METHODS)
        self.power = number(power, "DyPE: power", low=0)
        self.start, self.stop = start, stop

    def neutral(self) -> bool:
        return False  # told of where an image is within what the model was trained for

    def attach(self, target: Any) -> None:
        model = denoiser_of(target)
        found, name = rotary_of(model), type(model).__name__
        if found is None or found[2].theta(found[1]) is None:
            return None if found is None else self._refuse(name)  # the hook says which have none
        scheduler = getattr(target, "scheduler", None)
        if not matches_flow(scheduler):
            raise UnsupportedError(
                f"DyPE follows the noise of a flow-matching scheduler, which "
                f"{type(scheduler).__name__} is not; control a pipeline that has one"
            )
        trained = (TRAINED[kind] for kind in names_of(found[1]) if kind in TRAINED)
        base = self.base or next(trained, None)
        if base is None:
            raise InputError(f"DyPE: how large {name} was trained is not known; give base=")
        self._base, self._noise, self._extents = base, Noise(scheduler), (None, {})

    def _refuse(self, name: str) -> None:
        raise UnsupportedError(
            f"DyPE: positions of {name} are fractions of a size, which larger images only reach "
            "over; draw within it"
        )

    def positions(self, call: PositionsCall) -> None:
        clock, known = self._extents
        if clock != call.clock:
            known = {}
        t = self._noise.level(self._noise.scheduler.timesteps[call.clock.entry]).noise
        frequencies, amplitudes = call.frequencies.clone(), call.amplitudes.clone()
        for axis in ("row", "column"):
            # Text that is numbered by a call of its own (FLUX.2) goes with the image before it.
            known[axis] = max(call.extent(axis), known.get(axis, 0.0))
            s, pairs = known[axis] / self._base, call.pairs(axis)
            if s > 1:
                assert call.theta is not None  # `attach` saw to it
                frequencies[pairs] = self._stretched(frequencies[pairs], call.theta, s, t)
                if self.method == "yarn":
                    amplitudes[pairs] = amplitudes[pairs] * (0.1 * math.log(s) + 1)
        call.frequencies, call.amplitudes = frequencies, amplitudes
        self._extents = (call.clock, known)

    def _stretched(self, f: Tensor, theta: float, s: float, t: float) -> Tensor:
        """The frequencies of an axis, [pairs], s times as long, at noise t."""
        d, kappa = 2 * len(f), t**self.power
        j = torch.arange(len(f), dtype=f.dtype, device=f.device)
        if d == 2:
            return f  # theta has no say
        if self.method == "ntk":
            raised = theta * s ** (d / (d - 2) * (2 * kappa if self.power else 1.0))
            return f * (theta / raised) ** (2 * j / d)
        ntk = f * s ** (-2 * j / (d - 2))
        f_beta = torch.lerp(f / s, ntk, self._share(BETA, d, theta, kappa, j))
        return torch.lerp(f_beta, f, self._share(GAMMA, d, theta, kappa, j))

    def _share(
        self, rotations: tuple[float, float], d: int, theta: float, kappa: float, j: Tensor
    ) -> Tensor:
        """How much of the second a blend takes at each pair: 1 for those that rotate often."""
        if not kappa:
            return torch.ones_like(j)
        places = [
            d * math.log(self._base / (2 * math.pi * r * kappa)) / (2 * math.log(theta))
            for r in rotations
        ]
        low, high = max(math.floor(places[0]), 0), min(math.ceil(places[1]), d - 1)
        width = high - low if high != low else 0.001
        return 1 - ((j - low) / width).clamp(0, 1)
