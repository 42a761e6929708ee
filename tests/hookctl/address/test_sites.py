"""Which layer: names, selectors and grids."""

from __future__ import annotations

from fractions import Fraction

import pytest

from hookctl.address.families import describe_sites
from hookctl.address.sites import Grid, Site, grid_of, matcher, select
from hookctl.errors import SelectorError
from tests import zoo

SITES = tuple(s for s, _ in describe_sites(zoo.PIPELINES["sd15"].make().unet))


def chosen(selector: object) -> set[str]:
    return {site.label for site in select(SITES, selector)}  # type: ignore[arg-type]


def test_places_and_resolutions() -> None:
    by_path = {site.path: site for site in SITES}
    down = by_path["down_blocks.2.attentions.0.transformer_blocks.0.attn2"]
    assert (down.kind, down.place, down.block, down.resolution) == (
        "cross",
        "down",
        2,
        Fraction(1, 4),
    )
    assert down.label == "down2.cross0@1/4"
    assert {s.resolution for s in SITES if s.place == "mid"} == {Fraction(1, 8)}
    assert {s.resolution for s in SITES if s.block == 3} == {Fraction(1)}
    assert {site.heads for site in SITES} == {2, 4}
    order = [site.place for site in SITES]
    assert order == sorted(order, key=["down", "mid", "up"].index)


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("self mid", {"mid0.self0@1/8"}),
        ("cross down @<=1/4", {"down2.cross0@1/4"}),
        ("mid", {"mid0.self0@1/8", "mid0.cross0@1/8"}),
        ("cross down1, self down0", {"down1.cross0@1/2", "down0.self0@1"}),
        ("self down !@1", {"down1.self0@1/2", "down2.self0@1/4"}),
        (["mid_block.*attn1"], {"mid0.self0@1/8"}),
        ("mid_block.*.attn2", {"mid0.cross0@1/8"}),
        (lambda site: site.block == 2 and site.place == "down" and site.kind == "self", None),
    ],
)
def test_selectors(selector: object, expected: set[str] | None) -> None:
    assert chosen(selector) == (expected or {"down2.self0@1/4"})


def test_all() -> None:
    assert chosen(None) == chosen("all") == {site.label for site in SITES}


@pytest.mark.parametrize("bad", ["", "  ,", "@x", "@1/"])
def test_bad_selectors(bad: str) -> None:
    with pytest.raises(SelectorError):
        matcher(bad)


def test_a_controlnet_is_not_hooked_and_the_message_says_so() -> None:
    sites = (Site("down_blocks.0.attentions.0.attn1", "self", "down", 0, 0, Fraction(1), 2),)
    with pytest.raises(SelectorError, match="ControlNet's own attention is not hooked"):
        select(sites, "controlnet.down_blocks.*")


def test_no_match_says_what_there_is() -> None:
    with pytest.raises(SelectorError, match="Edit: sites='joint' matches none of the 20 sites"):
        select(SITES, "joint", who="Edit")
    assert select((), "joint") == ()


@pytest.mark.parametrize(
    ("tokens", "latent", "grid"),
    [
        (256, (16, 16), Grid(16, 16)),
        (64, (16, 16), Grid(8, 8)),
        (8 * 12, (16, 24), Grid(8, 12)),
        (5 * 7, (17, 25), Grid(5, 7)),  # strided convolutions round up
        (3 * 16, (3, 8, 8), Grid(4, 4, 3)),
        (16, (3, 8, 8), Grid(4, 4)),
        (7, (16, 16), None),
    ],
)
def test_grids(tokens: int, latent: tuple[int, ...], grid: Grid | None) -> None:
    assert grid_of(tokens, latent) == grid
    if grid is not None:
        assert grid.tokens == tokens


def test_grids_of_videos_depend_on_how_frames_stand() -> None:
    """Four frames of 8 x 8 latents hold as many patches of 2 x 2 as one has latents."""
    assert grid_of(64, (4, 8, 8)) == Grid(4, 4, 4)
    assert grid_of(64, (4, 8, 8), sequences=4) == Grid(8, 8)
    assert grid_of(4, (4, 8, 8), sequences=64) is None  # through time, place by place
    assert grid_of(64, ()) is None


def test_labels_without_resolution() -> None:
    assert Site("a.b", "self", "other", 0, 3).label == "other0.self3"


def test_the_fusers_of_gligen_are_a_kind_of_their_own() -> None:
    from diffusers import UNet2DConditionModel

    from hookctl.recipes.common.sites import middle_sites

    model = UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_type="gated",
        attention_head_dim=2,
        norm_num_groups=2,
    )
    kinds = {site.path: site.kind for site, _ in describe_sites(model)}
    assert {kind for path, kind in kinds.items() if "fuser" in path} == {"gated"}
    assert {kind for path, kind in kinds.items() if "fuser" not in path} == {"self", "cross"}
    assert all("fuser" not in path for path in middle_sites("PAG", model))
