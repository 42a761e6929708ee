"""How much signal and how much noise the latents hold, for every kind of scheduler.

Whatever the space that a scheduler keeps its latents in, a level is x = signal * x0 + noise * eps:

    alpha-bar space (DDIM, DDPM, PNDM, DPM-Solver++, UniPC)   sqrt(alpha_bar), sqrt(1 - alpha_bar)
    sigma space (Euler, Heun, LMS, KDPM2)                      1, sigma
    flow matching (SD3, Flux)                                  1 - sigma, sigma
    flow matching with inverted sigmas (Mochi, OmniGen)        sigma, 1 - sigma

so that editors and programs convert predictions and renoise without knowing which it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hookctl.address.families import names_of
from hookctl.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from hookctl.loop.state import State

_FLOW = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LTXEulerAncestralRFScheduler",
)
# Schedulers whose every step goes back by the same number of training timesteps.
_OF_ONE_LENGTH = ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler")
_OF_NOISE = ("RePaintScheduler",)  # whose predictions are eps, though it has no word for it
# Those whose every other timestep lies between two of their sigmas, at their geometric mean.
_HALFWAY = ("KDPM2DiscreteScheduler", "DPMSolverSDEScheduler")

KINDS = ("epsilon", "v_prediction", "sample", "flow_prediction")


@dataclass(frozen=True)
class Level:
    """x = signal * x0 + noise * eps."""

    signal: float
    noise: float

    def mix(self, x0: Tensor, eps: Tensor) -> Tensor:
        """The latents at this level."""
        return self.signal * x0 + self.noise * eps

    @property
    def size(self) -> float:
        """The standard deviation of latents whose clean images have 1."""
        return float((self.signal**2 + self.noise**2) ** 0.5)


class Noise:
    """The levels of a scheduler and what its model's predictions mean at them.

    kind: "epsilon", "v_prediction", "sample" or "flow_prediction". Read anew from the scheduler at
    every call, so that it may be made before `set_timesteps`.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.flow = matches_flow(scheduler)
        self.inverted = bool(getattr(scheduler.config, "invert_sigmas", False))
        fallback = "epsilon" if _is_any_of(scheduler, _OF_NOISE) else "none known"
        fallback = "flow_prediction" if self.flow else fallback
        self.kind: str = getattr(scheduler.config, "prediction_type", fallback)
        sigmas, alphas = (hasattr(scheduler, name) for name in ("sigmas", "alphas_cumprod"))
        if (
            self.kind not in KINDS
            or not (sigmas or alphas)
            or hasattr(scheduler, "precondition_inputs")
        ):
            raise UnsupportedError(
                f"{type(scheduler).__name__} (prediction_type={self.kind!r}) has levels that are "
                "not known; use one such as DDIMScheduler, EulerDiscreteScheduler, "
                "DPMSolverMultistepScheduler or FlowMatchEulerDiscreteScheduler"
            )

    @property
    def timesteps(self) -> list[float]:
        """The distinct timesteps of the run, noisiest first (PNDM visits some twice)."""
        if self.scheduler.timesteps is None or not len(self.scheduler.timesteps):
            raise InputError("the scheduler has no timesteps yet; call scheduler.set_timesteps(n)")
        return list(dict.fromkeys(float(t) for t in self.scheduler.timesteps))

    def level(self, timestep: Tensor | float) -> Level:
        """The level that the latents are at when the denoiser is called with `timestep`.

        Of a timestep that comes several times (the rounded ones of Karras' sigmas) it is the last
        one's, which its step starts from.
        """
        times, t = self.scheduler.timesteps, float(timestep)
        if not hasattr(self.scheduler, "sigmas"):
            return self._of_alphas(t)
        return self.at(len(times) - 1 - int((times.float() - t).abs().flip(0).argmin()))

    def at(self, entry: int) -> Level:
        """The level of the latents at an entry of the scheduler's timesteps."""
        scheduler = self.scheduler
        if not hasattr(scheduler, "sigmas"):
            return self._of_alphas(float(scheduler.timesteps[entry]))
        sigma = float(scheduler.sigmas[entry])
        if entry % 2 and _is_any_of(scheduler, _HALFWAY):
            sigma = (float(scheduler.sigmas[entry - 1]) * sigma) ** 0.5
        return self._from_sigma(sigma)

    def _of_alphas(self, t: float) -> Level:
        alphas = self.scheduler.alphas_cumprod
        if not 0 <= int(t) < len(alphas):
            raise InputError(
                f"timestep {t:g}: the model knows 0 to {len(alphas) - 1}; take fewer steps, or a "
                "scheduler with steps_offset=0"
            )
        return _from_alpha(float(alphas[int(t)]))

    def time_of(self, share: Tensor) -> Tensor:
        """The timestep of a share of noise, from 0 (clean) to 1, for flow matching."""
        total: int = getattr(self.scheduler.config, "num_train_timesteps", 1000)
        return (1 - share if self.inverted else share) * total

    def after(self, timestep: Tensor | float) -> Level:
        """The level that a step from `timestep` leads to.

        That of the next timestep, but for DDIM: its steps have one length, whatever the spacing of
        the timesteps, and end between two of them (linspace).
        """
        scheduler, times = self.scheduler, self.timesteps
        if _is_any_of(scheduler, _OF_ONE_LENGTH):
            total = scheduler.config.num_train_timesteps
            there = int(float(timestep)) - total // scheduler.num_inference_steps
            return self.level(there) if there >= 0 else _from_alpha(float(self._final))
        index = min(range(len(times)), key=lambda i: abs(times[i] - float(timestep)))
        if index + 1 < len(times):
            return self.level(times[index + 1])
        if hasattr(scheduler, "sigmas"):
            return self._from_sigma(float(scheduler.sigmas[-1]))
        return _from_alpha(float(self._final))

    @property
    def _final(self) -> Tensor | float:
        """The alpha-bar that the last step leads to."""
        final: Tensor | float = getattr(self.scheduler, "final_alpha_cumprod", 1.0)
        return final

    def levels(self) -> list[Level]:
        """The level of every timestep and the one that the last step leads to, noisiest first."""
        times = self.timesteps
        return [*(self.level(t) for t in times), self.after(times[-1])]

    def _from_sigma(self, sigma: float) -> Level:
        if self.flow:
            share = 1.0 - sigma if self.inverted else sigma
            return Level(1.0 - share, share)
        root = (sigma**2 + 1) ** 0.5
        # Only a scheduler that starts from scaled noise keeps its latents in sigma space.
        scaled = abs(float(getattr(self.scheduler, "init_noise_sigma", 1.0)) - 1.0) > 1e-6
        return Level(1.0, sigma) if scaled else Level(1.0 / root, sigma / root)

    # -- what a prediction means ---------------------------------------------------------------

    def split(self, x: Tensor, prediction: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Latents and the denoiser's prediction at a level -> (x0, eps), all of one shape.

        At a level without any signal an epsilon-prediction says nothing of x0: UnsupportedError.
        """
        a, s = level.signal, level.noise
        if self.kind == "flow_prediction":
            prediction = -prediction if self.inverted else prediction
            x0 = (x - s * prediction) / (a + s)
            return x0, x0 + prediction
        if self.kind == "v_prediction":
            r = (a * a + s * s) ** 0.5
            x0 = (a / r) * (x / r) - (s / r) * prediction
            return x0, (s / r) * (x / r) + (a / r) * prediction
        if self.kind == "sample":
            return prediction, (x - a * prediction) / max(s, 1e-8)
        if a < 1e-6:
            raise UnsupportedError(
                "the clean image can't be told from an epsilon-prediction at a level without "
                "signal; use a model with v-prediction, or another timestep spacing"
            )
        return (x - s * prediction) / a, prediction

    def join(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """The prediction that means (x0, eps) at a level: the inverse of `split`."""
        if self.kind == "flow_prediction":
            return x0 - eps if self.inverted else eps - x0
        if self.kind == "v_prediction":
            r = (level.signal**2 + level.noise**2) ** 0.5
            return (level.signal / r) * eps - (level.noise / r) * x0
        return x0 if self.kind == "sample" else eps

    def factors(self, here: Level, there: Level) -> tuple[float, float]:
        """(alpha, beta) of a first-order step, x' = alpha x + beta prediction."""
        one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        alpha, beta = (
            float(there.mix(*self.split(x, prediction, here)))
            for x, prediction in ((one, zero), (zero, one))
        )
        return alpha, beta

    def renoise(
        self, x: Tensor, here: Level, there: Level, generator: torch.Generator | None = None
    ) -> Tensor:
        """Diffuse latents from one level to a noisier one with fresh noise from `generator`.

        x' = (a'/a) x + sqrt(s'^2 - (a'/a)^2 s^2) xi, xi standard normal.
        """
        if here.signal <= 0:
            raise InputError("renoise: the latents hold no signal that could be kept")
        keep = there.signal / here.signal
        fresh = there.noise**2 - (keep * here.noise) ** 2
        if fresh < -1e-9:
            raise InputError(
                f"renoise: the level {there} is not noisier than {here}; give an earlier timestep"
            )
        return keep * x + max(fresh, 0.0) ** 0.5 * noise_like(x, generator)


def matches_flow(scheduler: Any) -> bool:
    """Whether a scheduler is one of flow matching."""
    config = getattr(scheduler, "config", None)
    return _is_any_of(scheduler, _FLOW) or bool(getattr(config, "use_flow_sigmas", False))


def _is_any_of(scheduler: Any, names: tuple[str, ...]) -> bool:
    """Whether a scheduler is of one of these classes, or of one made from them."""
    return any(name in names for name in names_of(scheduler))


def noise_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal noise drawn on the generator's own device, as pipelines do."""
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def _from_alpha(alpha_bar: float) -> Level:
    return Level(alpha_bar**0.5, max(1.0 - alpha_bar, 0.0) ** 0.5)


def level_of(state: State) -> Level:
    """Signal and noise of the latents of a call."""
    return Noise(state.pipe.scheduler).at(state.clock.entry)
