"""SkipLayerGuidance, STG and TPG: as diffusers and the published code have them, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from diffusers.guiders import SkipLayerGuidance as Guider
from diffusers.hooks import HookRegistry, LayerSkipConfig
from diffusers.hooks.layer_skip import apply_layer_skip
from torch import Tensor, nn

import hookctl
from hookctl import Editor
from hookctl.address import families
from hookctl.errors import HookctlError, InputError
from hookctl.recipes import STG, TPG, SkipLayerGuidance
from tests import zoo
from tests.families.fingerprint import differences, fingerprint
from tests.families.subjects import error
from tests.recipes.rules import Watch
from tests.recipes.runs import TWO, made
from tests.recipes.runs import draw_two as draw

SD3, WAN, SD15 = (zoo.PIPELINES[name] for name in ("sd3", "wan", "sd15"))
ALWAYS = {"start": 0.0, "stop": 1.0}


# -- SLG -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("window", [(0.01, 0.2), (0.01, 0.5), (0.3, 0.8)])
def test_slg_is_that_of_the_pipeline(window: tuple[float, float]) -> None:
    """SD3's own, latents and all: strictly inside the window."""
    pipe, (start, stop) = made("sd3", torch.float64), window
    own = {
        "skip_guidance_layers": [0, 2],
        "skip_layer_guidance_scale": 2.8,
        "skip_layer_guidance_start": start,
        "skip_layer_guidance_stop": stop,
    }
    want = SD3.run(pipe, TWO, steps=6, **own)
    editor = SkipLayerGuidance(2.8, (0, 2), paper=True, start=start, stop=stop)
    assert error(draw(SD3, pipe, editor, steps=6), want) < 1e-12
    assert error(want, SD3.run(pipe, TWO, steps=6)) > 1e-4


def test_a_strict_window_may_hold_no_step() -> None:
    """As published, N stop <= 1 is never: that is told, and no silent nothing."""
    editor = SkipLayerGuidance(2.8, (0, 2), paper=True)
    with pytest.raises(HookctlError, match="SkipLayerGuidance changed nothing"):
        draw(SD3, made("sd3"), editor, steps=4)


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_slg_is_that_of_the_guider(guidance: float) -> None:
    """Over the predictions of a run; without guidance in the guider's original formulation."""
    pipe, before, after = made("sd3", torch.float64), Watch(), Watch()
    editor = SkipLayerGuidance(2.0, (1,), **ALWAYS)
    draw(SD3, pipe, before, editor, after, steps=3, guidance=guidance)
    guider = Guider(
        guidance,
        skip_layer_guidance_scale=2.0,
        skip_layer_guidance_stop=1.0,
        skip_layer_guidance_layers=[1],
        use_original_formulation=guidance == 1.0,
        stop=0.0 if guidance == 1.0 else 1.0,
    )
    for i, ((parts, _), (_, got)) in enumerate(zip(before.steps, after.steps, strict=True)):
        guider.set_state(max(i, 1), 3, torch.tensor(0))  # in step 0 it never guides
        want = guider.forward(parts["cond"], parts.get("uncond"), parts["skipped"]).pred
        assert error(got, want) < 1e-12
        assert error(parts["skipped"], parts["cond"]) > 1e-4


@pytest.mark.slow
def test_a_skipped_block_is_that_of_diffusers() -> None:
    """Wan's blocks, as its hooks skip them."""
    pipe, watch = made("wan", torch.float64), Watch()
    draw(WAN, pipe, watch, SkipLayerGuidance(2.0, (1,), **ALWAYS), guidance=1.0)
    skipped: list[Tensor] = []
    apply_layer_skip(pipe.transformer, LayerSkipConfig([1]))
    handle = pipe.transformer.register_forward_hook(lambda *given: skipped.append(given[-1][0]))
    WAN.run(pipe, TWO, guidance=1.0)
    handle.remove()
    for module in pipe.transformer.modules():
        if hasattr(module, "_diffusers_hook"):
            HookRegistry.check_if_exists_or_initialize(module).remove_hook("layer_skip_hook", False)
    assert error(watch.steps[0][0]["skipped"], skipped[0]) < 1e-12


# -- STG -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_stg_by_its_formula(rescale: float) -> None:
    """Video by video, of which the published code draws one."""
    pipe, before, after = made("wan", torch.float64), Watch(), Watch()
    draw(WAN, pipe, before, STG(1.5, [1], rescale=rescale), after, steps=3, guidance=4.0)
    for (parts, own), (_, got) in zip(before.steps, after.steps, strict=True):
        u, c, p = (parts[name] for name in ("uncond", "cond", "skipped"))
        for i in range(len(c)):
            noise_pred = u[i] + 4.0 * (c[i] - u[i]) + 1.5 * (c[i] - p[i])
            if rescale:
                factor = rescale * (c[i].std() / noise_pred.std()) + (1 - rescale)
                noise_pred = noise_pred * factor
            assert error(got[i], noise_pred) < 1e-12
        assert error(got, own) > 1e-4


def test_stg_at_the_published_block() -> None:
    """The middle one where none is published."""
    pipe = made("wan")
    assert error(draw(WAN, pipe, STG()), draw(WAN, pipe, STG(layers=[1]))) < 1e-5
    assert error(draw(WAN, pipe, STG(sites=["blocks.0.attn1"])), draw(WAN, pipe, STG())) > 1e-5


# -- TPG -------------------------------------------------------------------------------------------


@contextmanager
def shuffled(blocks: list[nn.Module], rows: slice, seed: int) -> Iterator[None]:
    """The published block: tokens of the last rows in another order, drawn at every call."""
    orders = torch.Generator().manual_seed(seed)

    def before(module: nn.Module, args: Any) -> Any:
        hidden = args[0].clone()
        perm = torch.randperm(hidden.shape[1], generator=orders)
        hidden[rows] = hidden[rows][:, perm]
        return hidden, *args[1:]

    handles = [block.register_forward_pre_hook(before) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Third(Editor):
    """A third branch that is a copy of the prompt's rows, combined as published."""

    def __init__(self, scale: float, guidance: float) -> None:
        self.scale, self.guidance = scale, guidance

    def branches(self, state: Any) -> Any:
        return {"third": hookctl.Branch("cond")}

    def combine(self, predictions: Any) -> Tensor:
        c, p = predictions["cond"], predictions["third"]
        if self.guidance == 1:
            made: Tensor = c + self.scale * (c - p)
            return made
        u = predictions["uncond"]
        return c + (self.guidance - 1) * (c - u) + self.scale * (c - p)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_tpg_as_published(name: str, guidance: float) -> None:
    case, pipe = zoo.PIPELINES[name], made(name, torch.float64)
    sites = [site for site in families.sites_of(pipe) if site.kind == "self"]
    found = families.blocks_of(pipe.unet, sites)
    down = [block.module for path, block in found.items() if path.startswith("down_blocks")]
    chosen = down[len(down) // 4 :]
    rows = slice(2, 4) if guidance == 1 else slice(4, 6)
    with shuffled(chosen, rows, seed=5):
        want = draw(case, pipe, Third(3.0, guidance), guidance=guidance)
    got = draw(case, pipe, TPG(seed=5), guidance=guidance)
    assert error(got, want) < 1e-12
    assert error(got, case.run(pipe, TWO, guidance=guidance)) > 1e-4
    assert torch.equal(draw(case, pipe, TPG(seed=5), guidance=guidance), got)
    assert error(draw(case, pipe, TPG(seed=6), guidance=guidance), got) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in ("flux2_klein", "z_image", "flux") if name in zoo.PIPELINES]
)
def test_tpg_where_text_and_image_are_one_sequence(name: str) -> None:
    """The text's tokens stay, before the image's or behind them."""
    case, pipe = zoo.PIPELINES[name], made(name, torch.float64)
    sites = [site for site in families.sites_of(pipe) if site.kind in ("self", "joint")]
    blocks = families.blocks_of(pipe.transformer, sites)
    latents = case.run(pipe, TWO)
    tokens = latents.shape[1] if latents.dim() == 3 else latents.shape[2:].numel() // 4
    orders = torch.Generator().manual_seed(5)

    def before(module: nn.Module, args: Any, kwargs: Any, image: str) -> Any:
        hidden = args[0] if args else kwargs[image]
        rows = slice(4, 6) if name == "z_image" else slice(2, 4)  # or of guidance by two calls
        if len(hidden) < rows.stop:
            return None
        changed = hidden.clone()
        start = 0 if name == "z_image" else hidden.shape[1] - tokens
        order = torch.randperm(tokens, generator=orders)
        changed[rows, start : start + tokens] = hidden[rows, start : start + tokens][:, order]
        return ((changed, *args[1:]), kwargs) if args else ((), {**kwargs, image: changed})

    with ExitStack() as hooks:
        for block in blocks.values():
            handle = block.module.register_forward_pre_hook(
                partial(before, image=block.image), with_kwargs=True
            )
            hooks.callback(handle.remove)
        want = draw(case, pipe, Third(3.0, 4.0), guidance=4.0)
    got = draw(case, pipe, TPG(seed=5, sites="self, joint"), guidance=4.0)
    assert error(got, want) < 1e-6
    assert error(got, case.run(pipe, TWO, guidance=4.0)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [n for n in ("sd3", "flux", "qwen_image", "pixart", "wan", "z_image") if n in zoo.PIPELINES],
)
def test_all_three_on_transformers(name: str) -> None:
    """Whether the image's tokens are a stream of their own or stand with the text's."""
    case = zoo.PIPELINES[name]
    pipe = case.make()
    plain = case.run(pipe, TWO)
    for editor in (TPG(), STG(), SkipLayerGuidance(layers=[0], **ALWAYS)):
        with hookctl.control(pipe, editor) as session:
            assert error(case.run(pipe, TWO), plain) > 1e-5
        assert "block" in session.report()


# -- laws ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_nothing_to_do(name: str) -> None:
    case = zoo.PIPELINES[name]
    pipe = case.make()
    plain, before = case.run(pipe, TWO), fingerprint(pipe)
    nothing = [TPG(0.0), STG(0.0), STG(0.0, rescale=0.7), SkipLayerGuidance(0.0, [0])]
    for idle in (*nothing, TPG(start=0.5, stop=0.5)):
        with hookctl.control(pipe, idle, strict=False):
            assert torch.equal(case.run(pipe, TWO), plain)
    for editor in (TPG(), STG()):
        draw(case, pipe, editor)
    assert not differences(before, fingerprint(pipe))
    assert torch.equal(case.run(pipe, TWO), plain)


def test_what_is_refused() -> None:
    for layers, match in (
        ((0, 3), r"SkipLayerGuidance: layers=\(0, 3\); this model has blocks 0 to 2"),
        ((), r"layers=\(\)"),
        ((-1,), "SkipLayerGuidance: layers"),
    ):
        with pytest.raises(InputError, match=match):
            draw(SD3, made("sd3"), SkipLayerGuidance(layers=layers))
    with pytest.raises(InputError, match="STG: rescale=1.5"):
        STG(rescale=1.5)
    with pytest.raises(InputError, match="TPG: seed"):
        TPG(seed=-1)


def test_blocks_of_somebodys_own_class_are_known_by_their_base() -> None:
    case, drawn = zoo.PIPELINES["flux"], []
    for own in (False, True):
        pipe = case.make()
        for block in pipe.transformer.transformer_blocks if own else ():
            block.__class__ = type("Mine", (type(block),), {})
        with hookctl.control(pipe, SkipLayerGuidance(layers=[0], **ALWAYS)):
            drawn.append(case.run(pipe))
    assert torch.equal(*drawn)
