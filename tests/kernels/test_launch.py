"""How kernels are launched: on the device of their tensors, in grids that devices have room for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hookctl.evaluate import plan
from hookctl.kernels import fourier_gain, latent_mixing
from hookctl.kernels.common.launch import interpreting
from hookctl.kernels.map_readout import key_marginals, map_readout
from hookctl.kernels.map_readout import reference as of_maps
from hookctl.kernels.region_attention import region_attention
from hookctl.kernels.shared_probabilities import Group, shared_probabilities
from hookctl.kernels.sum_of_terms import Stretch, sum_of_terms
from tests.hookctl.attention.calls import Case
from tests.kernels.closeness import DEVICE, close, random

SEQUENCES = 40000  # of two heads each: the frames of every place of a latent of 200 x 200


def heads(rows: int = 1, sequences: int = 1) -> list[Tensor]:
    """q, k, v of two heads of eight channels for two tokens."""
    shape = (rows, sequences, 2, 2, 8)
    return [random(*shape, seed=i).requires_grad_() for i in range(3)]


def terms(sequences: int) -> Tensor:
    q, k, v = heads(2, sequences)
    both = [Stretch(0, 0, 0, 0), Stretch(1, 1, 1, 1, weight=0.5), Stretch(1, 1, 0, 1, weight=0.5)]
    return sum_of_terms([q], [k], [v], both, 0.5)[0]


def shared(sequences: int) -> Tensor:
    return shared_probabilities(*heads(2, sequences), [Group(0, 0, (0, 1))], 0.5)[0]


def regions(sequences: int) -> Tensor:
    bits = torch.ones(2, dtype=torch.long, device=DEVICE)
    return region_attention(*(x[0] for x in heads(1, sequences)), bits, bits)[0]


def maps(sequences: int) -> Tensor:
    q, k, _ = (x[0] for x in heads(1, sequences))
    return map_readout(q, k, torch.zeros(1, dtype=torch.long, device=DEVICE))


def marginals(sequences: int) -> Tensor:
    q, k, _ = (x[0] for x in heads(1, sequences))
    return key_marginals(q, k).requires_grad_()


def gain(_: int) -> Tensor:
    return fourier_gain.forward.fourier_gain(random(1, 2, 4, 4).requires_grad_(), 0.5)


def mixtures(_: int) -> Tensor:
    x, d = random(2, 2, 4, 4), random(2, 4, 4)
    sources = torch.zeros(2, dtype=torch.long, device=DEVICE)
    mix = latent_mixing.forward
    found = [mix.local_blend(x, sources, d), mix.mix_predictions(x, x, d)]
    found += [mix.merge_instances(x, d[1:]), mix.update_difference(d, x, x, x, 0.1)]
    return torch.cat([y.flatten() for y in found]).requires_grad_()


ATTENTION = (terms, shared, regions, maps, marginals)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], bool]]:
    """Of every launch its grid, and whether the device of its tensors was the current one; nothing
    runs. (On a GPU launches would fail by themselves.)"""
    if not interpreting():
        pytest.skip("launches are watched in the interpreter")
    from triton.runtime.interpreter import GridExecutor

    seen: list[tuple[tuple[int, ...], bool]] = []
    guards: list[Any] = []

    @contextmanager
    def guard(like: Tensor) -> Iterator[None]:
        guards.append(like)
        yield
        guards.pop()

    monkeypatch.setattr(torch.cuda, "device_of", guard)
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda self, *_, **__: seen.append((self.grid, bool(guards)))
    )
    return seen


@pytest.mark.parametrize("form", [*ATTENTION, gain, mixtures])
def test_every_launch_is_on_the_device_of_its_tensors(
    form: Callable[[int], Tensor], launched: list[tuple[tuple[int, ...], bool]]
) -> None:
    form(1).sum().backward()
    assert launched and all(guarded for _, guarded in launched)


@pytest.mark.parametrize("form", ATTENTION)
def test_more_sequences_than_a_grid_has_room_for(form: Callable[[int], Tensor]) -> None:
    with pytest.raises(ValueError, match="40000 x 2 sequences and heads; one launch takes 65535"):
        form(SEQUENCES)


@pytest.mark.parametrize("script", ["borrow", "extend", "regions", "maps"])
def test_more_than_that_are_left_to_sdpa(
    script: str, launched: list[tuple[tuple[int, ...], bool]]
) -> None:
    case = Case("self", *(x.detach().float() for x in heads(4, SEQUENCES)), 0.5)
    bits = torch.tensor([1, 2], device=DEVICE)
    found: dict[str, list[Tensor]] = {}
    for backend in ("triton", "sdpa"):
        read: list[Tensor] = []
        call = case.call()
        if script == "extend":
            call.extend(3, 2, 2)
        else:
            call.borrow(3, q=2, k=2)
        if script == "regions":
            call.restrict(3, bits, bits)
        if script == "maps":
            call.read(3, [0], lambda row, values, to=read: to.append(values))
        found[backend] = [plan.evaluate(call, backend)[0], *read]
    for a, b in zip(*found.values(), strict=True):
        close(script, a, b, 1e-5)
    assert not launched


@pytest.mark.skipif(DEVICE != "cpu", reason="the memory between is there on a CPU only")
def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """Heads and channels so far apart that the third begins beyond 2 ** 31; a file with holes."""
    apart, near = 2**30 + 64, random(3, 2, 8)
    memory = torch.from_file(str(tmp_path / "holes"), True, 2 * apart + 16, dtype=torch.float32)
    far = memory.as_strided((1, 3, 2, 8), (0, apart, 8, 1))
    far.copy_(near)
    token = torch.zeros(1, dtype=torch.long)
    got = map_readout(far, near[None], token)
    exact = near[None].double()
    close("maps", got, of_maps.map_readout(exact, exact, token), 5e-6)
    close(
        "gain",
        fourier_gain.forward.fourier_gain(far, 0.5),
        fourier_gain.reference.fourier_gain(exact, 0.5),
        5e-6,
    )
