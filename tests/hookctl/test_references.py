"""References of edit models: weight, region and mask, against explicit matrices and whole runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import hookctl
from hookctl import References, control
from hookctl.address.clock import Clock
from hookctl.address.rows import Row, Rows
from hookctl.address.sites import Grid, ImageTokens, Site
from hookctl.attention.call import AttentionCall
from hookctl.errors import InputError, UnsupportedError
from hookctl.evaluate import plan
from tests import zoo
from tests.zoo.edits import CAT, EDITS
from tests.zoo.wild import WILD

LEFT, TOP = (0, 0, 0.5, 1), "box:0,0,1,0.5"
WITHOUT = [name for name in ("klein", "kontext") if name in EDITS]  # they draw without references


def without(name: str, pipe: Any) -> Tensor:
    """The same run without its references."""
    if name == "klein":
        drawn: Tensor = EDITS[name].draw(pipe, image=None)
        return drawn
    common = {"height": 8, "width": 8, "max_area": 64, "max_sequence_length": 48}
    out: Tensor = pipe(
        prompt=CAT,
        negative_prompt="blurry",
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=2,
        guidance_scale=5.0,
        output_type="latent",
        _auto_resize=False,
        **common,
    ).images
    return out


@pytest.mark.parametrize("order", ["text_image", "image_text"])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_the_formula(order: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    target, first, second, text = Grid(4, 4), Grid(2, 2), Grid(4, 2), 5
    images = ImageTokens((target, first, second))
    n = text + images.count
    q, k, v = (
        torch.randn(2, 1, 2, n, 8, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    call = AttentionCall(
        Site("attn", "joint", "blocks", 0, 0), q, k, v,
        rows=Rows([Row(0, "uncond", 0, 0), Row(1, "cond", 0, 0)]),
        clock=Clock(0, 4, 999.0), scale=8**-0.5, latent=(4, 4), text_tokens=text,
        joint_order=order, images=images,
    )  # fmt: skip
    edit = References(
        {0: 0.25, "references[1]": 2.0}, regions=[LEFT], masks={1: TOP}, branch="cond"
    )
    edit.attention(call)
    out, _ = plan.evaluate(call, backend)

    start = text if order == "text_image" else 0
    drawn = slice(start, start + 16)
    at = [slice(start + 16, start + 20), slice(start + 20, start + 28)]
    factor = torch.ones(n, n, dtype=torch.float64)  # of exp(score), [queries, keys]
    factor[:, at[0]] *= 0.25
    factor[:, at[1]] *= 2.0
    right = [i for i in range(16) if i % 4 >= 2]
    for query in right:
        factor[drawn.start + query, at[0]] = 0
    factor[:, at[1].start + 4 : at[1].stop] = 0  # the lower half
    for span in at:
        factor[span, span] = 1  # they see themselves
    scores = (q @ k.mT * 8**-0.5).exp()
    wanted = (scores[1] * factor) / (scores[1] * factor).sum(-1, keepdim=True) @ v[1]
    assert (out[1] - wanted).abs().max() < 1e-6  # the bias is float32
    plain = scores[0] / scores[0].sum(-1, keepdim=True) @ v[0]
    assert (out[0] - plain).abs().max() < 1e-12


@pytest.mark.parametrize("name", WITHOUT)
def test_nothing_asked_is_bit_identical(name: str) -> None:
    model = EDITS[name]
    pipe = model.make()
    before = model.draw(pipe)
    for edit in (References(), References([1] * model.references), References({0: 0.0}, stop=0.0)):
        with control(pipe, edit, strict=False):
            assert torch.equal(model.draw(pipe), before)


@pytest.mark.parametrize("name", WITHOUT)
def test_hidden_references_are_none(name: str) -> None:
    """Nothing sees them, so the run is one that was not given them."""
    model = EDITS[name]
    pipe = model.make()
    wanted, shown = without(name, pipe), model.draw(pipe)
    with control(pipe, References([0.0] * model.references)) as session:
        found = model.draw(pipe)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (shown - wanted).abs().max() > 1e-3 * wanted.abs().max()
    assert "References" in session.report()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "qwen_edit" else n for n in EDITS]
)
def test_each_acts_and_is_seen_in_maps(name: str) -> None:
    model = EDITS[name]
    pipe = model.make()
    plain = model.draw(pipe)
    last = model.references - 1
    word = f"references[{last}]"
    with control(pipe, hookctl.Maps(word)) as session:
        model.draw(pipe)
    share = session.maps[word].mean().mean()
    for edit, more in (
        (References({word: 4.0}), True),
        (References({last: 0.1}), False),
        (References(regions={last: LEFT}), False),
        (References(masks={last: TOP}), False),
    ):
        with control(pipe, edit, hookctl.Maps(word)) as session:
            found = model.draw(pipe)
        assert (found - plain).abs().max() > 1e-6
        assert bool(session.maps[word].mean().mean() > share) == more
        if edit.regions:
            right = session.maps[word].mean()[:, model.grids[0][1] // 2 :]
            assert right.abs().max() == 0


def test_one_branch_alone() -> None:
    model = EDITS["klein"]
    pipe = model.make()
    plain = model.draw(pipe)
    found = []
    for branch in ("cond", "uncond", None):
        with control(pipe, References({0: 0.0}, branch=branch)):
            found.append(model.draw(pipe))
    assert all((x - plain).abs().max() > 1e-4 for x in found)
    assert (found[0] - found[1]).abs().max() > 1e-4
    with pytest.raises(InputError, match="no guidance and so no such rows"):
        with control(pipe, References({0: 0.0}, branch="uncond")):
            model.draw(pipe, guidance=1.0)


# -- errors ----------------------------------------------------------------------------------------


def test_a_reference_beyond_those_given() -> None:
    model, calls = EDITS["klein"], list[int]()
    pipe = model.make()
    pipe.transformer.x_embedder.register_forward_hook(lambda *_: calls.append(1))
    for edit in (
        References({2: 0.5}),
        References([1, 1, 1]),
        References(regions={"references[5]": LEFT}),
    ):
        with control(pipe, edit), pytest.raises(InputError, match="sees 2 reference images; give"):
            model.draw(pipe)
    with control(pipe, References({0: 0.5})), pytest.raises(InputError, match="sees 0 reference"):
        model.draw(pipe, image=None)
    assert not calls


def test_keys_that_are_kept() -> None:
    case = WILD["Flux2KleinKVPipeline"]
    pipe = case.make()
    with control(pipe, References({0: 0.5})), pytest.raises(UnsupportedError, match="keeps the"):
        case.draw(pipe, [CAT], [""], seeds=[0])


@pytest.mark.parametrize(
    ("given", "more", "text"),
    [
        ({0: -1}, {}, r"weights\['references\[0\]'\]=-1; give a number of 0 or more"),
        ({"cat": 1.0}, {}, "references\\[0\\]"),
        ({0: math.nan}, {}, "weights"),
        (0.5, {}, "a list with an entry for each reference"),
        ((), {"regions": {0: "circle:1"}}, r"regions\['references\[0\]'\]"),
        ((), {"masks": "full"}, "masks="),
        ((), {"branch": "both"}, "branch='both'"),
        ([0.0] * 32, {}, "at most 31"),
    ],
)
def test_bad_arguments(given: Any, more: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        References(given, **more)


def test_sites_that_see_no_reference() -> None:
    pipe = zoo.PIPELINES["sd15"].make()
    with pytest.raises(InputError, match="a cross site"):
        control(pipe, References({0: 0.5}, sites="cross")).__enter__()
