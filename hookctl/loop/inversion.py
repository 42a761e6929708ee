"""Inversions: from a real image's latents to what leads back to them.

Each takes a `Trajectory` of the source prompts and works on all its images at once. A *path*
holds the latents of every level, noisiest first, `steps` + 1 of them; sampling follows it if each
step is given its `Correction`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from hookctl.address.rows import COND, UNCOND
from hookctl.errors import UnsupportedError
from hookctl.loop.energy import frozen, gradients
from hookctl.loop.guidance import combined
from hookctl.loop.noise import Level, noise_like
from hookctl.loop.trajectory import Trajectory

Path = Sequence[Tensor]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Correction:
    """What one step is given so that the source keeps to its path.

    contexts: branch -> text embeddings for all images, [images, tokens, channels]; noise: in
    place of fresh noise, for all; target: latents that the source alone is set to, [images, ...].
    """

    contexts: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    noise: Tensor | None = None
    target: Tensor | None = None


def ddim_path(
    program: Trajectory,
    clean: Tensor,
    *,
    guidance: float = 1.0,
    contexts: Mapping[str, Tensor] | None = None,
    refine: int = 0,
    timestep: str = "target",
    progress: Progress | None = None,
) -> list[Tensor]:
    """DDIM inversion: the deterministic sampler run backwards (Song et al., arXiv 2010.02502).

    clean: [1 | images, ...]; guidance, contexts, refine, timestep: as for `Trajectory.invert`.
    """
    program.write(clean, level=program.steps)
    path = [program.latents]
    for i in reversed(range(program.steps)):
        found = program.invert(
            i, guidance=guidance, contexts=contexts, refine=refine, timestep=timestep
        )
        path.append(found)
        _tell(progress, program.steps - i, program.steps)
    return path[::-1]


def unit_noise(x: Tensor, clean: Tensor, level: Level) -> Tensor:
    """Latents at a level with their noise brought to mean 0 and variance 1, image by image.

    With x = a clean + s e, what the model would not have drawn so in an image is divided by a small
    s when it is inverted, and e ends far from the N(0, 1) that sampling starts from. Here its
    divergence from N(0, 1), as in the regulariser of Parmar et al. (arXiv 2302.03027), is least, at
    once instead of by descent. The steps no longer lead back to the image by themselves.
    """
    clean = clean.float()
    eps = (x.float() - level.signal * clean) / level.noise
    every = tuple(range(1, eps.dim()))
    spread, mean = torch.std_mean(eps, every, correction=0, keepdim=True)
    return level.mix(clean, (eps - mean) / spread.clamp_min(1e-12)).to(x)


def with_unit_noise(path: Path, levels: Sequence[Level]) -> list[Tensor]:
    """A path with `unit_noise` at every level but the last, which is the image."""
    # It is so even where a scheduler counts some noise as its level.
    noised = zip(path[:-1], levels[:-1], strict=True)
    return [*(unit_noise(x, path[-1], level) for x, level in noised), path[-1]]


def null_texts(
    program: Trajectory,
    path: Path,
    *,
    guidance: float,
    iterations: int = 10,
    rate: float = 1e-2,
    tolerance: float = 1e-5,
    progress: Progress | None = None,
) -> list[Tensor]:
    """Null-text optimisation (Mokady et al., arXiv 2211.09794, algorithm 1).

    At every step the unconditional embedding, started from the last step's, is fitted by Adam so
    that the guided step ends on the path: mean (x*_{i+1} - step(x_i, uncond))^2 -> min, with
    learning rate `rate` (1 - i / 2N), until `iterations` or a loss below `tolerance` + 1e-3 i / N.
    The next step starts from where this one truly ends, so that errors are made good later.

    Returns the embeddings of each step, [images, tokens, channels]. Every image stops for
    itself; the model's parameters are frozen meanwhile.
    """
    program.solver.forget()
    program.write(path[0], level=0)
    leaf = program.template.text(UNCOND).detach().float()
    found = []
    with frozen(program.denoiser):
        for i in range(program.steps):
            late = i / program.steps
            leaf = _fitted(
                program,
                path[i + 1],
                leaf,
                guidance,
                iterations,
                rate * (1 - late / 2),
                tolerance + 1e-3 * late,
            )
            program.denoise(i, guidance=guidance, contexts={UNCOND: leaf})
            found.append(leaf)
            _tell(progress, i + 1, program.steps)
    return found


def _fitted(
    program: Trajectory,
    target: Tensor,
    start: Tensor,
    guidance: float,
    iterations: int,
    rate: float,
    enough: float,
) -> Tensor:
    """The unconditional embedding whose guided step from here ends nearest to the target."""
    i, x = program.level, program.latents
    alpha, beta = program.factors(i)
    with torch.no_grad():
        cond = program.branches(x, i, [COND])[COND]
    leaf = start.clone().requires_grad_(True)
    adam = torch.optim.Adam([leaf], lr=rate)
    going = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(iterations):
        with torch.enable_grad():
            uncond = program.branches(x, i, [UNCOND], {UNCOND: leaf})[UNCOND]
            guided = combined({COND: cond, UNCOND: uncond}, guidance, program.template)
            error = (alpha * x + beta * guided - target).float()
            loss = error.square().flatten(1).mean(1)
            (leaf.grad,) = gradients(loss.sum(), [leaf], cond.dtype)
        before = leaf.detach().clone()
        adam.step()
        with torch.no_grad():
            leaf.copy_(torch.where(going[:, None, None], leaf, before))
        # Looked at after the update, as published: one that is good enough moves once more.
        going &= loss.detach() >= enough
        if not going.any():
            break
    return leaf.detach()


def edit_friendly_noise(
    program: Trajectory,
    clean: Tensor,
    *,
    guidance: float,
    generator: torch.Generator,
    start: int = 0,
    eta: float = 1.0,
    exact: bool = True,
    progress: Progress | None = None,
) -> tuple[list[Tensor], list[Correction]]:
    """Edit-friendly DDPM inversion (Huberman-Spiegelglas et al., arXiv 2304.06140, algorithm 1).

    x_i = a_i x_0 + s_i xi_i with independent xi_i, the same for all images, then z_i =
    (x_{i+1} - mu(x_i)) / sigma_i, and x_{i+1} is set to mu + sigma_i z_i, so that rounding does
    not add up. The last step gets no noise; the source is set to where it should end (`exact`; the
    official code lets it go).

    Returns the path and the corrections of all steps (empty ones before `start`).
    """
    program.solver.forget()
    clean = clean.to(program.latents).expand_as(program.latents)
    path = [level.mix(clean, noise_like(clean[:1], generator)) for level in program.levels[:-1]]
    path.append(clean)
    zero = torch.zeros_like(clean)
    corrections = [Correction()] * start
    for i in range(start, program.steps):
        x, entry = path[i], program.solver.entries[i][0]
        with torch.no_grad():
            prediction = program.predict(x, i, guidance)
        mean = program.solver.at(i, prediction, x, eta=eta, noise=zero)
        spread = program.solver.spread(i, x, eta)
        if i == program.steps - 1:
            correction = Correction(noise=zero, target=path[i + 1] if exact else None)
        elif spread <= 0:
            raise UnsupportedError(
                f"step {i} (timestep {float(program.solver.timesteps[entry]):g}) has no fresh "
                "noise, which this inversion puts to use; give eta above 0"
            )
        else:
            correction = Correction(noise=(path[i + 1] - mean) / spread)
            path[i + 1] = program.solver.at(i, prediction, x, eta=eta, noise=correction.noise)
        program.solver.leave(i + 1)
        corrections.append(correction)
        _tell(progress, i + 1 - start, program.steps - start)
    return path, corrections


# -- what a scheduler must be able to do -----------------------------------------------------------

_FIRST_ORDER = "DDIMScheduler, EulerDiscreteScheduler or FlowMatchEulerDiscreteScheduler"


def require_first_order(program: Trajectory, who: str) -> None:
    """Raise UnsupportedError unless the run's steps are x' = alpha x + beta prediction.

    Found out by trying every step, so that clipping, thresholding and odd spacings count too.
    """
    generator = torch.Generator().manual_seed(0)
    # In float32, so that what is off is not taken for rounding.
    x = torch.randn(1, *program.latents.shape[1:], generator=generator).to(program.latents.device)
    solver = program.solver
    solver.enter(0)
    plain = all(len(entries) == 1 for entries in solver.entries)
    for i in range(program.steps) if plain else ():
        prediction = torch.randn(x.shape, generator=generator).to(x)
        x = program.levels[i].size * x / x.std()
        alpha, beta = program.factors(i)
        got = solver.step(prediction, i, x, eta=program.eta, generator=generator)
        error = (got - (alpha * x + beta * prediction)).norm()
        plain &= bool(error <= 1e-3 * got.norm())
        x = got
    if not plain:
        raise UnsupportedError(
            f"{who} needs a deterministic first-order scheduler without clipping, which "
            f"{type(solver.scheduler).__name__} with these settings is not; use {_FIRST_ORDER}, "
            f"e.g. pipe.scheduler = {_example(program)}"
        )


def _example(program: Trajectory) -> str:
    """A first-order scheduler in the place of a program's."""
    if not program.noise.flow:
        return "DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)"
    config = program.solver.scheduler.config
    shift = config.get("flow_shift", config.get("shift", 1.0))
    return f"FlowMatchEulerDiscreteScheduler(shift={shift:g})"


def require_deterministic(program: Trajectory, who: str) -> None:
    """Raise UnsupportedError if the run's steps draw noise."""
    x, solver = program.latents, program.solver
    got = []
    for seed in (0, 1):
        solver.enter(0)
        generator = torch.Generator(x.device).manual_seed(seed)
        got.append(solver.step(x, 0, x, eta=program.eta, generator=generator))
    if not torch.equal(*got):
        raise UnsupportedError(
            f"{who} needs a scheduler whose steps draw no noise, which "
            f"{type(solver.scheduler).__name__} does; use {_FIRST_ORDER}, or a deterministic solver"
        )


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)
