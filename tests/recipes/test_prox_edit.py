"""ProxEdit with paper=True against the official loops: every option, alone and with MasaCtrl."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hookctl import control
from hookctl.errors import InputError
from hookctl.loop.images import encode
from hookctl.recipes import MasaCtrl, NegativePromptInversion, ProximalGuidance
from tests import zoo
from tests.marks import examples
from tests.recipes.images import PROMPT, TARGET, image
from tests.recipes.literal_appearance import Call, Literal
from tests.recipes.literal_prox_edit import Loop
from tests.recipes.runs import SD15, made, relative

STEPS = 5
OTHER = "a red dog above a cat"
TOLERANCE = 1e-10  # float64, guided by 7.5
PAPER_MODES = {"l0": "hard", "l1": "soft"}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "quantile": ({}, {}),
    "fixed threshold": ({"threshold": 0.02}, {"quantile": -0.02}),
    "towards the path": (
        {"rate": 0.5, "dilate": 0, "on_path": {}},
        {"rate": 0.5, "dilate": 0, "inversion": True},
    ),
    "earlier": (
        {"quantile": 0.9, "path_start": 0.4, "dilate": 2, "on_path": {}},
        {"quantile": 0.9, "recon_t": 600, "dilate": 2, "inversion": True},
    ),
    "towards the image": (
        {"on_path": {"inversion": False, "reconstruction": True}},
        {"reconstruction": True},
    ),
    "towards both": (
        {"on_path": {"inversion": True, "reconstruction": True}, "rate": 1.0},
        {"reconstruction": True, "inversion": True, "rate": 1.0},
    ),
    "interpolated": ({"npi_interp": 0.3}, {"interp": 0.3}),
    "the empty text": ({"npi_interp": 1.0}, {"interp": 1.0}),
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    """In float64, the scheduler's numbers too."""
    pipe = SD15.make().to(torch.float64)
    for name in ("alphas_cumprod", "final_alpha_cumprod"):
        setattr(pipe.scheduler, name, getattr(pipe.scheduler, name).double())
    return pipe


@pytest.mark.parametrize("prox", examples(["l0", "l1"], ["l1"]))
@pytest.mark.parametrize("case", CASES)
def test_equals_the_official_loop(pipe: Any, case: str, prox: str) -> None:
    prompts = [PROMPT, TARGET, OTHER]
    ours, theirs = CASES[case]
    given = dict(ours)
    found = NegativePromptInversion(
        pipe, image(), PROMPT, steps=STEPS, npi_interp=given.pop("npi_interp", 0.0)
    ).run()
    if "on_path" in given:
        given |= {"path": found.path, **given.pop("on_path")}
    edit = ProximalGuidance(given.pop("quantile", 0.7), PAPER_MODES[prox], paper=True, **given)
    got = found.edit(pipe, edit, prompts=prompts, output_type="latent")
    want = Loop(pipe, STEPS).run(encode(pipe, image()), prompts, prox=prox, **theirs)
    assert relative(got, want) < TOLERANCE
    plain = found.edit(pipe, prompts=prompts, output_type="latent")
    assert relative(got[1:], plain[1:]) > 1e-4


class Injected:
    """MutualSelfAttentionControl of the ProxEdit repository."""

    def __init__(self, uncond: str, cond: str, first: int) -> None:
        self.modes, self.first = (uncond, cond), first

    def __call__(self, call: Call) -> Tensor:
        fine = call.path.startswith(("up_blocks.2", "up_blocks.3"))
        if call.cross or call.step < self.first or not fine:
            return call.plain()
        out = []
        for mode, q, k, v in zip(self.modes, *(x.chunk(2) for x in call.qkv), strict=True):
            keys = {
                "src": (k[:1], v[:1]),
                "joint": (torch.cat([k[:1], k[1:]], 2), torch.cat([v[:1], v[1:]], 2)),
                "none": (k[1:], v[1:]),
            }[mode]
            out.append(call.probabilities(q[:1], k[:1]) @ v[:1])
            out.append(call.probabilities(q[1:], keys[0]) @ keys[1])
        return torch.cat(out)


WITH_MASACTRL = [("joint", "src", 1.0), ("none", "src", 0.4), ("src", "joint", 0.0),
                 ("src", "src", 1.0)]  # fmt: skip


@pytest.mark.parametrize(("uncond", "cond", "interp"), examples(WITH_MASACTRL, WITH_MASACTRL[1:3]))
def test_with_masactrl(pipe: Any, uncond: str, cond: str, interp: float) -> None:
    prompts = [PROMPT, TARGET]
    names = {"src": "source"}
    found = NegativePromptInversion(
        pipe, image(), PROMPT, steps=STEPS, npi_interp=interp, interp_source=False
    ).run()
    masactrl = MasaCtrl(
        prompts,
        start=0.4,
        inject_uncond=names.get(uncond, uncond),
        inject_cond=names.get(cond, cond),
        paper=True,
    )
    limits = ProximalGuidance(0.6, "hard", edits_only=True, start=0.2, paper=True)
    got = found.edit(pipe, limits, masactrl, prompts=prompts, source_guidance=1.0,
                     output_type="latent")  # fmt: skip
    loop = Loop(pipe, STEPS)
    # The inversion before counts no steps.
    injected = Literal(Injected(uncond, cond, first=2))
    injected.step = -1 - STEPS
    with injected.instead(pipe.unet):
        want = loop.masactrl(
            encode(pipe, image()), prompts, quantile=0.6, prox_step=1, interp=interp
        )
    assert relative(got, want) < TOLERANCE
    plain = found.edit(pipe, prompts=prompts, source_guidance=1.0, output_type="latent")
    assert relative(got[1:], plain[1:]) > 1e-4


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_guided_cells_are_widened_where_they_are(name: str) -> None:
    """In packed latents a cell's neighbours are in other tokens; frames are apart."""
    pipe, seen = made(name), []

    class Seen(ProximalGuidance):
        def _places(self, free: Tensor, state: Any) -> Tensor:
            found: Tensor = super()._places(free, state)
            seen.append((free, found))
            return found

    case = zoo.PIPELINES[name]
    path = torch.zeros(3, *case.run(pipe, steps=1, guidance=1.0).shape)
    with control(pipe, Seen(0.99, path=list(path), path_start=0.0)):
        case.run(pipe, steps=2, guidance=4.0)
    for free, drawn in seen:
        if name == "flux":
            free, drawn = (pipe._unpack_latents(x, 128, 128, 8) for x in (free, drawn))
        planes, got = (x.flatten(0, -3) for x in (free, drawn))
        places = planes.nonzero()
        assert len(places)
        for plane, row, column in places.tolist():
            block = got[plane, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            assert not block.any()
        assert int((~got).sum()) <= 9 * len(places)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="inject_uncond='all'"):
        MasaCtrl([PROMPT, TARGET], inject_uncond="all")
    with pytest.raises(InputError, match="union=True or inject_cond='none'"):
        MasaCtrl([PROMPT, TARGET], union=True, inject_cond="none")
    with pytest.raises(InputError, match="give path="):
        ProximalGuidance(reconstruction=True)
    with pytest.raises(InputError, match="inversion=False, reconstruction=False"):
        ProximalGuidance(path=[torch.zeros(4, 8, 8)] * 3, inversion=False)
    with pytest.raises(InputError, match="threshold=-1"):
        ProximalGuidance(threshold=-1)
    with pytest.raises(InputError, match="npi_interp=2"):
        NegativePromptInversion(made("sd15"), image(), PROMPT, npi_interp=2)
