"""Stable Flow: the official code in float64, its laws, real images, the search for vital layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hookctl import Editor, control
from hookctl.errors import ConflictError, InputError, SelectorError, UnsupportedError
from hookctl.recipes import MasaCtrl, StableFlow
from hookctl.recipes.common.vital_layers import correlation, layer_similarities, vital_sites
from hookctl.recipes.stable_flow import PUBLISHED
from tests import zoo
from tests.hookctl.loop.families import BY_NAME
from tests.recipes.images import image
from tests.recipes.literal_flow import TOKENS, FlowMatchExact, Flux
from tests.recipes.literal_stable_flow import inversion, stable_flow
from tests.recipes.runs import made, plain, relative
from tests.recipes.test_inversions_of_families import given
from tests.recipes.test_inversions_of_families import made as of_first_order

THREE = ["a red cat", "a blue dog", "a green tree"]
VITAL = ["transformer_blocks.1.attn", "single_transformer_blocks.0.attn"]
CALL: dict[str, Any] = {"max_sequence_length": TOKENS}
TOLERANCE = 1e-10  # float64


def exact() -> Any:
    """A pipeline in float64 whose steps are too."""
    pipe = BY_NAME["flux"].make().to(torch.float64)
    pipe.scheduler = FlowMatchExact.from_config(pipe.scheduler.config)
    return pipe


def drawn(name: str, edit: StableFlow, *editors: Editor) -> Tensor:
    with control(made(name, torch.float32), edit, *editors):
        return plain(name, edit, steps=3)


def test_it_is_the_official_code() -> None:
    pipe = exact()
    model = Flux(pipe, 5, 64)
    edit = StableFlow(THREE, sites=VITAL)
    noise = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = noise.repeat(3, 1, 1)
    call = {"num_inference_steps": 5, "guidance_scale": 3.5, "output_type": "latent", **CALL}
    with control(pipe, edit) as session:
        found = pipe(THREE, latents=x, height=128, width=128, return_dict=False, **call)[0]
    want = stable_flow(model, x, THREE, [3.5] * 3, [1], [0])
    assert relative(found, want) < TOLERANCE
    assert relative(want[1:], stable_flow(model, x, THREE, [3.5] * 3, [], [])[1:]) > 1e-3
    assert "replace" in session.report()


def test_a_real_image_by_the_official_code() -> None:
    pipe = exact()
    model = Flux(pipe, 5, 64)
    x = model.encode(image())
    reached = inversion(model, x, THREE[0], 1.15)
    start = reached[-1].repeat(3, 1, 1)
    want = stable_flow(model, start, THREE, [1.0, 3.0, 3.0], [1], [0], reached)
    options: dict[str, Any] = {"steps": 5, "arguments": CALL, "output_type": "latent"}
    found = StableFlow(THREE, sites=VITAL, paper=True).edit(pipe, image(), **options)
    assert relative(found, want) < TOLERANCE
    ours = StableFlow(THREE, sites=VITAL).edit(pipe, image(), **options)
    torch.testing.assert_close(ours[:1], x, atol=1e-12, rtol=0)  # the image, the nudge undone
    assert relative(ours[1:], want[1:]) > 1e-3


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_a_real_image_of_other_families(name: str) -> None:
    """With classifier-free guidance; the source is the image."""
    family = BY_NAME[name]
    pipe = of_first_order(family)
    source, more = given(family)
    sites = "joint blocks1" if name == "sd3" else "self blocks1"
    edit = StableFlow(THREE[:2], sites=sites)
    found = edit.edit(pipe, source, steps=3, arguments=more, output_type="latent")
    clean = edit.edit(pipe, source, steps=1, nudge=1.0, arguments=more, output_type="latent")
    torch.testing.assert_close(found[0], clean[0], atol=1e-5, rtol=1e-4)
    assert relative(found[1:], found[:1]) > 1e-3


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_laws(name: str) -> None:
    sites = "joint blocks1"
    edit = StableFlow(THREE[:2], sites=sites)
    bare, found = plain(name, edit, steps=3), drawn(name, edit)
    assert torch.equal(found[:1], bare[:1]) and relative(found[1:], bare[1:]) > 1e-4
    idle = StableFlow(THREE[:2], sites=sites, stop=0.0)
    assert idle.neutral() and torch.equal(drawn(name, idle), bare)
    same = StableFlow(THREE[:1] * 2, sites=sites)
    both = drawn(name, same)
    torch.testing.assert_close(both[1], both[0], atol=1e-5, rtol=1e-4)


def test_the_published_layers() -> None:
    assert len(PUBLISHED) == 9 and StableFlow(THREE).sites == list(PUBLISHED)
    with pytest.raises(InputError, match=r"StableFlow: sites: the vital layers .*vital_sites"):
        drawn("sd3", StableFlow(THREE[:2]))


def test_masactrl_claims_the_same() -> None:
    with pytest.raises(ConflictError, match="StableFlow and MasaCtrl both claim the substitution"):
        drawn("sd3", StableFlow(THREE[:2], sites="joint"), MasaCtrl(THREE[:2], sites="joint"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompts": THREE[:1]}, "the source prompt and at least one edit"),
        ({"nudge": 0.0}, "StableFlow: nudge=0.0; give"),
        ({"start": 0.9, "stop": 0.1}, "StableFlow: start=0.9, stop=0.1; give a start before"),
        ({"path": []}, "StableFlow: path holds no latents"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        StableFlow(options.pop("prompts", THREE), **options)


def test_wrong_places_and_models() -> None:
    with pytest.raises(SelectorError, match="StableFlow: sites='cross' matches none"):
        drawn("sd3", StableFlow(THREE[:2], sites="cross"))
    short = StableFlow(THREE[:2], sites="joint", path=torch.zeros(2, 4, 16, 16))
    with pytest.raises(InputError, match="StableFlow: path has 2 levels and this run 3"):
        drawn("sd3", short)
    with pytest.raises(UnsupportedError, match="StableFlow follows the velocities .* is not"):
        StableFlow(THREE, sites="self").edit(made("sd15"), image())


# -- the search --------------------------------------------------------------------------------


def test_the_layer_that_decides_is_found() -> None:
    """A block that gives most of the stream is the vital one."""
    pipe = zoo.PIPELINES["flux"].make()
    block = pipe.transformer.single_transformer_blocks[1]
    with torch.no_grad():
        block.proj_out.weight *= 30
    call = {"num_inference_steps": 2, "height": 64, "width": 64, **CALL}
    seen: list[tuple[int, int]] = []
    found = layer_similarities(pipe, THREE[:2], progress=lambda *done: seen.append(done), **call)
    assert list(found) == [
        "transformer_blocks.0.attn",
        "transformer_blocks.1.attn",
        "single_transformer_blocks.0.attn",
        "single_transformer_blocks.1.attn",
    ]
    assert min(found, key=lambda path: found[path]) == "single_transformer_blocks.1.attn"
    for wrong in (torch.zeros(0), 3):
        with pytest.raises(InputError, match="similarity=.*; give a function"):
            vital_sites(pipe, THREE[:2], similarity=wrong, **call)  # type: ignore[arg-type]
    assert vital_sites(pipe, THREE[:2], **call) == ["single_transformer_blocks.1.attn"]
    assert seen == [(i, 4) for i in range(1, 5)]
    flat = {"similarity": lambda a, b: float(len(seen)), "count": 2}
    assert vital_sites(pipe, THREE[:2], **flat, **call) == list(found)[:2]


def test_wrong_searches() -> None:
    with pytest.raises(InputError, match="layer_similarities: prompts="):
        layer_similarities(made("flux"), "a cat")
    with pytest.raises(InputError, match="vital_sites: count=9; give a whole number from 1 to 3"):
        vital_sites(made("sd3"), THREE[:1], count=9, num_inference_steps=1, height=64, width=64)


def test_correlation() -> None:
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert correlation(x, x) == pytest.approx(1) and correlation(x, 1 - x) == pytest.approx(-1)
