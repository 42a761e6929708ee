"""MultiDiffusion where latents are packed into tokens: a tile is an image of its size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hookctl
from hookctl import Editor
from hookctl.address.rows import COND
from hookctl.errors import UnsupportedError
from hookctl.loop.packing import side_of_token
from hookctl.recipes import NAG, PAG, MultiDiffusion
from hookctl.recipes.common.canvas.tiles import tiles_of
from hookctl.recipes.common.canvas.token_canvas import as_canvas, as_tokens
from tests.families.subjects import error
from tests.hookctl.loop.families import BY_NAME, Family
from tests.zoo.wild import WILD

NAMES = [name for name in ("flux", "flux2_klein", "qwen_image") if name in BY_NAME]
EACH = pytest.mark.parametrize("name", NAMES)
HEIGHT, WIDTH, TILE, STRIDE = 4, 7, (4, 4), (4, 2)  # in tokens
PROMPTS = ["a red cat", "a blue dog"]


class Watch(Editor):
    """The first step's latents and conditional predictions, and the grids that sites see."""

    sites = "joint"

    def __init__(self) -> None:
        self.latents = self.prediction = torch.zeros(0)
        self.grids: list[Any] = []

    def begin(self, state: Any) -> None:
        self.latents = state.latents.clone()

    def attention(self, call: Any) -> None:
        self.grids.append(tuple(call.grid))

    def combine(self, predictions: Any) -> Tensor:
        if not len(self.prediction):
            self.prediction = predictions[COND].clone()
        guided: Tensor = predictions.guided
        return guided


def drawn(
    family: Family,
    pipe: Any,
    *editors: Editor,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    **more: Any,
) -> Tensor:
    side = side_of_token(pipe)
    more = {"height": size[0] * side, "width": size[1] * side, "steps": 2, **more}
    with hookctl.control(pipe, *editors, strict=False):
        found: Tensor = family.drawn(pipe, 2.0, **{"prompts": PROMPTS, **more})
    return found


def tokens(pipe: Any, size: tuple[int, int]) -> Tensor:
    """Noise, [images, channels, rows, columns] of tokens."""
    channels = pipe.transformer.config.in_channels
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(3))


def given(name: str, x: Tensor) -> Tensor:
    """Tokens as the pipeline is given its latents."""
    return x if name == "flux2_klein" else as_tokens(x)


@EACH
def test_one_tile_is_the_plain_run(name: str) -> None:
    family = BY_NAME[name]
    pipe = family.make()
    plain = drawn(family, pipe)
    for tile in (HEIGHT, WIDTH), 64:
        assert torch.equal(drawn(family, pipe, MultiDiffusion(tile=tile)), plain)
    assert error(drawn(family, pipe, MultiDiffusion(tile=TILE, stride=STRIDE)), plain) > 1e-4
    assert torch.equal(drawn(family, pipe), plain)


@EACH
@pytest.mark.parametrize("wrap", [False, True])
def test_a_canvas_is_the_average_of_images_of_the_tiles(name: str, wrap: bool) -> None:
    """Each of which the pipeline draws by itself; all schedules begin at one time."""
    family = BY_NAME[name]
    pipe, whole = family.make(), Watch()
    start = tokens(pipe, (HEIGHT, WIDTH))
    edit = MultiDiffusion(tile=TILE, stride=STRIDE, wrap=wrap)
    drawn(family, pipe, edit, whole, latents=given(name, start))
    want, count = torch.zeros_like(start), torch.zeros_like(start)
    tiles = tiles_of(HEIGHT, WIDTH, TILE, STRIDE, wrap=wrap)
    for tile in tiles:
        alone = Watch()
        drawn(family, pipe, alone, size=TILE, latents=given(name, tile.cut(start)))
        tile.add(as_canvas(alone.prediction, *TILE), want)
        tile.add(torch.ones(TILE).expand(*start.shape[:2], *TILE), count)
    assert len(tiles) > 2 and len(count.unique()) > 1
    assert error(as_canvas(whole.prediction, HEIGHT, WIDTH), want / count) < 1e-5
    plain = Watch()
    drawn(family, pipe, plain, latents=given(name, start))
    assert error(plain.prediction, whole.prediction) > 1e-3
    assert set(whole.grids) == {TILE}


@EACH
@pytest.mark.parametrize("bootstrap", [0.0, 1.0])
def test_one_full_region_is_a_run_of_its_text(name: str, bootstrap: float) -> None:
    """What is bootstrapped is outside of the region; the text is as long as it is."""
    family = BY_NAME[name]
    pipe, text = family.make(), "a green bird in the snow, wide"
    plain = drawn(family, pipe, prompts=[text, text])
    edit = MultiDiffusion([text], [(0, 0, 1, 1)], bootstrap=bootstrap, tile=8)
    found = drawn(family, pipe, edit)
    assert error(found, plain) < 1e-6
    half = MultiDiffusion([text], [(0, 0, 0.5, 1)], bootstrap=bootstrap, tile=8)
    assert error(drawn(family, pipe, half), plain) > 1e-4


@EACH
def test_others_act_in_every_tile(name: str) -> None:
    family = BY_NAME[name]
    pipe, edit = family.make(), MultiDiffusion(tile=TILE, stride=STRIDE)
    alone, pag = drawn(family, pipe, edit), PAG(sites="joint")
    both = drawn(family, pipe, edit, pag)
    assert error(both, alone) > 1e-5
    assert error(both, drawn(family, pipe, pag, edit)) < 1e-5


def test_tokens_of_a_tile_in_a_joint_sequence() -> None:
    """SD3's latents are no tokens, but its sites see those of the tile, and all of the text's."""

    class Spans(Editor):
        sites = "joint"

        def attention(self, call: Any) -> None:
            seen.append((call.grid, call.spans.image_queries, call.q.shape[-2]))

    seen: list[Any] = []
    family = BY_NAME["sd3"]
    for tile in (8, 64):
        pipe = family.make()
        with hookctl.control(pipe, MultiDiffusion(tile=tile), Spans()):
            family.drawn(pipe, 2.0, steps=1)
    for grid, (start, stop), tokens in seen:
        assert stop - start == grid.height * grid.width < tokens
    assert len({tokens - stop for _, (_, stop), tokens in seen}) == 1
    assert len({grid for grid, _, _ in seen}) == 2


@EACH
def test_the_whole_job(name: str) -> None:
    pipe = BY_NAME[name].make()
    side = side_of_token(pipe)
    size = {"height": HEIGHT * side, "width": WIDTH * side}
    more = BY_NAME[name].arguments() | size | {"num_inference_steps": 1}
    images = MultiDiffusion(tile=TILE).run(pipe, PROMPTS[0], **more)
    assert [image.size for image in images] == [(WIDTH * side, HEIGHT * side)]
    with pytest.raises(UnsupportedError, match='wrap=True.*give output_type="latent"'):
        MultiDiffusion(tile=TILE, wrap=True).run(pipe, PROMPTS[0], **more)


@pytest.mark.skipif("ChromaPipeline" not in WILD, reason="of newer diffusers")
def test_a_mask_of_the_whole_canvas_is_refused() -> None:
    case = WILD["ChromaPipeline"]
    pipe = case.make()
    with hookctl.control(pipe, MultiDiffusion(tile=2)):
        with pytest.raises(UnsupportedError, match="MultiDiffusion shows .* ChromaPipeline gives"):
            case.draw(pipe, PROMPTS[:1], ["blurry"], [0])


@pytest.mark.parametrize("name", ["sd15", *NAMES])
def test_texts_of_others_behind_the_prompt_are_refused(name: str) -> None:
    """They would be lost where a region has its own."""
    family = BY_NAME[name]
    pipe = family.make()
    edits = MultiDiffusion(["a dog"], [(0, 0, 0.5, 1)], tile=4, bootstrap=0), NAG("a tree")
    with hookctl.control(pipe, *edits):
        with pytest.raises(UnsupportedError, match="MultiDiffusion puts .* leave one of them out"):
            family.drawn(pipe, 2.0, steps=1)


@pytest.mark.parametrize("name", ["LTXPipeline", "FluxKontextPipeline"])
def test_videos_and_references_are_refused(name: str) -> None:
    family = BY_NAME[name]
    pipe = family.make()
    with hookctl.control(pipe, MultiDiffusion(tile=4)):
        with pytest.raises(UnsupportedError, match="MultiDiffusion cuts tiles .* (such|behind) t"):
            family.drawn(pipe, 2.0)
