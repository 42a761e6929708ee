"""Regional prompts against explicit matrices, and their laws on every kind of text attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hookctl
from hookctl.address.clock import Clock
from hookctl.address.rows import Row, Rows
from hookctl.address.sites import Site
from hookctl.attention.call import AttentionCall
from hookctl.attention.division import Division
from hookctl.errors import HookctlWarning, InputError, UnsupportedError
from hookctl.evaluate import plan
from hookctl.loop.prompts import encode
from hookctl.recipes import RegionalPrompts
from tests import zoo

A, B = "a red cat above a blue square", "a dog"
CHATS = "flux2_klein", "qwen_image", "z_image"
FULL, LEFT, RIGHT = (0, 0, 1, 1), "box:0,0,0.5,1", (0.5, 0, 1, 1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


@pytest.mark.parametrize("kind", ["cross", "joint"])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_the_formula(kind: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    image, text, joint = 16, 5, kind == "joint"
    tokens = image + text if joint else image
    keys = tokens if joint else text
    q, k, v = random(2, 1, 2, tokens, 8), random(2, 1, 2, keys, 8), random(2, 1, 2, keys, 8)
    call = AttentionCall(
        Site("attn", kind, "mid", 0, 0),
        q,
        k,
        v,
        rows=Rows([Row(0, "uncond", 0, 0), Row(1, "cond", 0, 0)]),
        clock=Clock(0, 4, 999.0),
        scale=8**-0.5,
        latent=(4, 4),
        text_tokens=text,
        joint_order="image_text" if joint else None,
        context={"one": (0, 3), "two": (3, 7)},
    )
    more_k, more_v = random(2, 1, 2, 7, 8), random(2, 1, 2, 7, 8)
    call.set_context_source(more_k, more_v)
    one = torch.rand(image, generator=generator) * 0.5
    two = torch.rand(image, generator=generator) * 0.5 * (torch.arange(image) > 5)
    call.divide(1, Division({"one": one, "two": two}))
    out, _ = plan.evaluate(call, backend)

    full = [torch.nn.functional.pad(w.double(), (0, tokens - image)) for w in (one, two)]
    wanted = attend(q, k, v)
    row = wanted[1] * (1 - full[0] - full[1])[:, None]
    for weight, span in zip(full, (slice(0, 3), slice(3, 7)), strict=True):
        further_k, further_v = more_k[1][..., span, :], more_v[1][..., span, :]
        if joint:
            further_k = torch.cat([k[1][..., :image, :], further_k], -2)
            further_v = torch.cat([v[1][..., :image, :], further_v], -2)
        row = row + weight[:, None] * attend(q[1], further_k, further_v)
    # The weights are float32.
    assert (out[1] - row).abs().max() < 1e-6
    assert (out[0] - wanted[0]).abs().max() < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name
        for name in (
            "sd15",
            "sdxl",
            "sd3",
            "flux",
            "pixart",
            "flux2_klein",
            "qwen_image",
            "z_image",
        )
        if name in zoo.PIPELINES
    ],
)
def test_nothing_asked_is_bit_identical(name: str) -> None:
    case = zoo.PIPELINES[name]
    pipe = case.make()
    plain = case.run(pipe, [A])
    for edit in (
        RegionalPrompts([], []),
        RegionalPrompts([B], [LEFT], base=1.0),
        RegionalPrompts([B], [LEFT], stop=0.0),
    ):
        with hookctl.control(pipe, edit, strict=False):
            assert torch.equal(case.run(pipe, [A]), plain)
    with hookctl.control(pipe, RegionalPrompts([B], [LEFT], base=0.0)):
        assert not torch.equal(case.run(pipe, [A]), plain)
    assert torch.equal(case.run(pipe, [A]), plain)


@pytest.mark.parametrize(
    "name",
    [name for name in ("sd15", "sd15_pag", "pixart", "wan", *CHATS) if name in zoo.PIPELINES],
)
def test_one_full_region_is_a_run_of_its_text(name: str) -> None:
    """To rounding: edited rows are summed by another evaluator than the model's own call."""
    case = zoo.PIPELINES[name]
    pipe = case.make()
    wanted = case.run(pipe, [B])
    with hookctl.control(pipe, RegionalPrompts([B], [FULL], base=0.0)):
        found = case.run(pipe, [A])
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_one_full_region_but_for_the_pooled_text(name: str) -> None:
    case = zoo.PIPELINES[name]
    pipe = case.make()
    own, other = encode(pipe, [A]), encode(pipe, [B])
    common: dict[str, Any] = {
        "pooled_prompt_embeds": own.pooled,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "height": 128,
        "width": 128,
        "output_type": "latent",
        "return_dict": False,
    }

    def run(sequence: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(prompt_embeds=sequence, generator=generator, **common)[0]

    wanted = run(other.sequence)
    with hookctl.control(pipe, RegionalPrompts([other.sequence[0]], [FULL], base=0.0)):
        found = run(own.sequence)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (run(own.sequence) - wanted).abs().max() > 1e-3 * wanted.abs().max()


def test_the_unconditional_rows_keep_their_text() -> None:
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    seen: list[set[str]] = []

    class Watch(hookctl.Editor):
        sites = "cross"

        def attention(self, call: AttentionCall) -> None:
            noted = {row for o in call.operations if o.verb == "divide" for row in o.rows}
            seen.append({call.rows[row].branch for row in noted})

    with hookctl.control(pipe, RegionalPrompts([B], [LEFT]), Watch()):
        case.run(pipe, [A], n=2)
    assert seen and all(branches == {"cond"} for branches in seen)


def test_every_prompt_has_its_own_regions() -> None:
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    edit = RegionalPrompts([[B], [], [A, B]], [[LEFT], [], [LEFT, "point:0.7,0.3,0.2"]], edge=0.1)
    with hookctl.control(pipe, edit):
        found = case.run(pipe, [A, A, B], seed=3)
    plain = case.run(pipe, [A, A, B], seed=3)
    assert (found[1] - plain[1]).abs().max() < 1e-4 * plain.abs().max()
    assert (found[0] - plain[0]).abs().max() > 1e-3
    assert (found[2] - plain[2]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"texts": B, "regions": [LEFT]}, "texts="),
        ({"texts": [B], "regions": [LEFT, RIGHT]}, "as many"),
        ({"texts": [3], "regions": [LEFT]}, r"texts\[0\]"),
        ({"texts": [B], "regions": ["circle:1"]}, r"regions\[0\]"),
        ({"texts": [B], "regions": [(0.5, 0, 0.2, 1)]}, "x0 < x1"),
        ({"texts": [B], "regions": [LEFT], "base": 1.5}, "base=1.5"),
        ({"texts": [B], "regions": [LEFT], "weights": [-1]}, "weights"),
        ({"texts": [B], "regions": [LEFT], "edge": -0.1}, "edge=-0.1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        RegionalPrompts(**arguments)


def test_refused_before_anything_is_drawn() -> None:
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    with (
        pytest.raises(InputError, match="draws 1"),
        hookctl.control(pipe, RegionalPrompts([[B], [B]], [[LEFT], [LEFT]])),
    ):
        case.run(pipe, [A])
    with pytest.raises(InputError, match="bare denoiser"):
        hookctl.control(pipe.unet, RegionalPrompts([B], [LEFT])).__enter__()
    long = RegionalPrompts(["cat " * 90], [LEFT])
    with pytest.warns(HookctlWarning, match="takes 77 tokens, so the model does not see 'cat cat"):
        with hookctl.control(pipe, long):
            pass
    with pytest.raises(UnsupportedError):
        hookctl.control(zoo.PIPELINES["svd"].make(), RegionalPrompts([B], [LEFT])).__enter__()


def test_every_text_is_projected_once() -> None:
    """Three regions, two of one text, for two prompts: two texts in the four rows of a call."""
    pipe = zoo.PIPELINES["sd15"].make()
    widths: list[int] = []
    projection = next(m for n, m in pipe.unet.named_modules() if n.endswith("attn2.to_k"))
    hook = projection.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    regions = [LEFT, "box:0.5,0,1,0.5", "box:0.5,0.5,1,1"]
    with hookctl.control(pipe, RegionalPrompts([B, "a tree", B], regions)):
        zoo.PIPELINES["sd15"].run(pipe, [A, A])
    hook.remove()
    own = pipe.tokenizer.model_max_length
    assert set(widths) == {2 * own}


def test_a_text_in_two_regions_is_a_text_in_both() -> None:
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    found = []
    halves = ["box:0,0,0.5,0.5", "box:0,0.5,0.5,1"]
    for edit in (RegionalPrompts([B, B], halves), RegionalPrompts([B], [LEFT])):
        with hookctl.control(pipe, edit):
            found.append(case.run(pipe, [A]))
    assert torch.allclose(*found, rtol=0, atol=1e-5)


# -- texts in rows of their own --------------------------------------------------------------------


@pytest.mark.skipif("z_image" not in zoo.PIPELINES, reason="this diffusers lacks Z-Image")
def test_a_text_of_another_length_for_some_of_several_prompts() -> None:
    """Z-Image pads each text to a multiple of 32 and counts the image's positions from its end."""
    case = zoo.PIPELINES["z_image"]
    pipe = case.make()
    long = "a dog and a cat " * 7  # more than 32 tokens
    edit = RegionalPrompts([[long], []], [[FULL], []], base=0.0)

    def run(prompts: list[str], *editors: Any, seed: int = 0, n: int = 1) -> Tensor:
        with hookctl.control(pipe, *editors):
            return case.run(pipe, prompts, seed=seed, n=n, max_sequence_length=128)

    found = run([A, B], edit, n=2)
    close = 1e-4 * found.abs().max()
    assert (found[:2] - run([long], n=2)).abs().max() < close
    assert (found[2:] - run([B], seed=2, n=2)).abs().max() < close


@pytest.mark.skipif("z_image" not in zoo.PIPELINES, reason="this diffusers lacks Z-Image")
def test_other_editors_see_the_pipeline_s_own_rows() -> None:
    """Edits of every kind of site, maps and a low-rank change beside regions."""
    case = zoo.PIPELINES["z_image"]
    pipe = case.make()
    rows: list[int] = []

    class Watch(hookctl.Editor):
        sites = "self, joint, text"

        def attention(self, call: AttentionCall) -> None:
            rows.append(len(call.q))

        def linears(self, path: str) -> bool:
            return path.endswith("layers.0.attention.to_v")

        def linear(self, call: hookctl.LinearCall) -> None:
            torch.manual_seed(0)
            call.add(torch.randn(2, 32) * 0.1, torch.randn(32, 2) * 0.1)

    plain = case.run(pipe, [A])
    regions = RegionalPrompts([B], [LEFT], base=0.2)
    with hookctl.control(pipe, regions, hookctl.Maps("cat"), Watch()) as session:
        both = case.run(pipe, [A])
    with hookctl.control(pipe, Watch()):
        watched = case.run(pipe, [A])
    with hookctl.control(pipe, regions):
        alone = case.run(pipe, [A])
    assert set(rows) == {2} and session.maps["cat"].mean().shape == (8, 8)
    assert all((both - x).abs().max() > 1e-5 for x in (plain, watched, alone))
    paper = RegionalPrompts([B], [LEFT], paper=True)
    with hookctl.control(pipe, paper), pytest.raises(UnsupportedError, match="rows of their own"):
        case.run(pipe, [A])
    assert torch.equal(case.run(pipe, [A]), plain)
