"""APG, CFGZeroStar, TCFG and FDG: what they promise, family by family."""

from __future__ import annotations

from threading import Thread
from typing import Any

import pytest
import torch
from diffusers.guiders import (
    TangentialClassifierFreeGuidance,
)

import hookctl
from hookctl import Editor
from hookctl.errors import ConflictError, InputError, UnsupportedError
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes import APG, FDG, PAG, TCFG, CFGZeroStar, ProximalGuidance
from tests import zoo
from tests.families.fingerprint import differences, fingerprint
from tests.families.subjects import error
from tests.recipes.rules import RULES, Watch
from tests.recipes.runs import TWO, made
from tests.recipes.runs import draw_two as draw

SD15 = zoo.PIPELINES["sd15"]


# -- laws ----------------------------------------------------------------------------------------

IDLE = [
    *(rule(strength=0.0) for rule in RULES),
    APG(1.0, 0.0, None),
    FDG((None, None)),
    FDG((4.0, None)),  # the pipeline's own, in numbers
    *(rule(start=0.5, stop=0.5) for rule in RULES),
]


@pytest.mark.slow  # a run for each
@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_nothing_to_do(name: str) -> None:
    case = zoo.PIPELINES[name]
    pipe = case.make()
    plain, before = case.run(pipe, TWO, guidance=4.0), fingerprint(pipe)
    for idle in IDLE:
        with hookctl.control(pipe, idle, strict=False):
            assert torch.equal(case.run(pipe, TWO, guidance=4.0), plain), idle.name
    for rule in RULES:
        assert error(draw(case, pipe, rule(), guidance=4.0), plain) > 1e-4
    assert not differences(before, fingerprint(pipe))
    assert torch.equal(case.run(pipe, TWO, guidance=4.0), plain)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_windows(rule: type[Any]) -> None:
    pipe, plain, half = made("sd15"), Watch(), Watch()
    draw(SD15, pipe, plain, steps=4)
    draw(SD15, pipe, rule(start=0.5), half, steps=4)
    same = [torch.equal(a[1], b[1]) for a, b in zip(plain.steps, half.steps, strict=True)]
    assert same == [True, True, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "wan", "flux2_klein"])
def test_two_calls_are_guided_as_one_is(name: str) -> None:
    """With a guidance of its own or none."""
    case = zoo.PIPELINES[name]
    pipe, before, after = case.make(), Watch(), Watch()
    draw(case, pipe, before, TCFG(), after, guidance=4.0)
    guider = TangentialClassifierFreeGuidance(4.0)
    for i, ((parts, _), (_, got)) in enumerate(zip(before.steps, after.steps, strict=True)):
        guider.set_state(i, 2, torch.tensor(0))
        assert error(got, guider.forward(parts["cond"], parts["uncond"]).pred) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_what_is_refused(rule: type[Any]) -> None:
    edits = zoo.PIPELINES["instruct_pix2pix"]
    with pytest.raises(UnsupportedError, match=rf"{rule.__name__} is a rule of guidance.*none"):
        draw(SD15, made("sd15"), rule(), guidance=1.0)
    with pytest.raises(UnsupportedError, match=f"{rule.__name__} .*makes something else"):
        draw(edits, edits.make(), rule(), guidance=4.0)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_guidance_by_image(rule: type[Any]) -> None:
    """Each image of a program is guided at its own scale."""
    pipe, found = made("sd15"), []
    for guidance in ([3.0, 6.0], [3.0, 3.0], [6.0, 6.0]):
        with hookctl.control(pipe, rule()):
            program = Trajectory(
                pipe, TWO, steps=2, guidance=3.0, generator=torch.Generator().manual_seed(0)
            )
            for i in range(2):
                program.denoise(i, guidance=guidance)
        found.append(program.latents)
    each, low, high = found
    assert error(each[0], low[0]) < 1e-4
    assert error(each[1], high[1]) < 1e-4
    assert rule is FDG or error(each[1], low[1]) > 1e-4  # whose scales are its own


@pytest.mark.slow
def test_threads_have_momenta_of_their_own() -> None:
    rule, found = APG(momentum=-0.7), {}

    def run(seed: int) -> None:
        pipe = SD15.make()
        with hookctl.control(pipe, rule):
            found[seed] = SD15.run(pipe, TWO, steps=3, seed=seed)

    threads = [Thread(target=run, args=(seed,)) for seed in (0, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (0, 7):
        together = found[seed]
        run(seed)
        assert torch.equal(found[seed], together)


@pytest.mark.slow  # thirty runs
def test_together_with_others() -> None:
    """What others add stays, in any order; two rules, or a rule and a limit, exclude each other."""
    pipe = made("sd15", torch.float64)
    for rule in RULES:
        added = [draw(SD15, pipe, *pair) for pair in ((rule(), pag()), (pag(), rule()))]
        assert error(added[0], added[1]) < 1e-10
        assert all(error(added[0], draw(SD15, pipe, one)) > 1e-4 for one in (rule(), pag()))
        for other in (ProximalGuidance(), *(r() for r in RULES)):
            with pytest.raises(ConflictError, match=f"{rule.__name__} and {other.name} both"):
                draw(SD15, pipe, rule(), other)
        draw(SD15, pipe, rule(stop=0.5), TCFG(start=0.5))
        draw(SD15, pipe, rule(strength=0.0), ProximalGuidance())


def pag() -> Editor:
    return PAG(sites="self @1/2")


def test_bad_input() -> None:
    for make, match in (
        (lambda: APG(eta="0"), "APG: eta"),  # type: ignore[arg-type]
        (lambda: APG(rho=0.0), "APG: rho=0"),
        (lambda: APG(rho=-1.0), "APG: rho"),
        (lambda: APG(space="x0"), "APG: space"),
        (lambda: TCFG(strength=-1.0), "TCFG: strength"),
        (lambda: CFGZeroStar(-1), "CFGZeroStar: zero_steps"),
        (lambda: FDG(()), "FDG: scales"),
        (lambda: FDG(5.0), "FDG: scales"),  # type: ignore[arg-type]
        (lambda: FDG((5.0, "x")), "FDG: scales"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=match):
            make()
    with pytest.raises(InputError, match=r"\(16, 16\) are too small for 5 levels"):
        draw(SD15, made("sd15"), FDG([5.0] * 5))
    with pytest.raises(UnsupportedError, match=r"zero_steps=1.*none of flow matching"):
        draw(SD15, made("sd15"), CFGZeroStar(1))
