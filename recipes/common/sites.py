"""The attention sites that recipes choose, and the grids of their calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

from hookctl.address import families
from hookctl.address.latent import finest_within
from hookctl.address.sites import Grid, Selector, Site, select
from hookctl.attention.call import AttentionCall
from hookctl.errors import InputError, UnsupportedError

IMAGE_KINDS = ("self", "joint")  # where the image attends to itself
TEXT_KINDS = ("cross", "joint")  # where it attends to the text


def sites_of(target: Any) -> list[Site]:
    """Every attention site of a pipeline or denoiser."""
    return list(families.sites_of(target))


def image_sites(
    who: str, target: Any, selector: Selector, kinds: Sequence[str] = IMAGE_KINDS
) -> tuple[Site, ...]:
    """The selected sites of a pipeline; InputError if the image does not attend to itself there."""
    wanted = "where the image attends to itself, such as 'self up'"
    return _sites_of_kinds(who, target, selector, kinds, wanted)


def text_sites(who: str, target: Any, selector: Selector) -> tuple[Site, ...]:
    """The selected sites of a pipeline; InputError if the image does not see the text there."""
    wanted = "where the image attends to the text, such as 'cross, joint'"
    return _sites_of_kinds(who, target, selector, TEXT_KINDS, wanted)


def _sites_of_kinds(
    who: str, target: Any, selector: Selector, kinds: Sequence[str], wanted: str
) -> tuple[Site, ...]:
    chosen = select(sites_of(target), selector, who=who)
    for site in chosen:
        if site.kind not in kinds:
            raise InputError(
                f"{who}: sites={selector!r} holds {site.path}, a {site.kind} site; give sites "
                f"{wanted}"
            )
    return chosen


def middle_sites(who: str, target: Any) -> list[str]:
    """The paths of the self-attention in a UNet's middle block, or in a transformer's (self or
    joint); UnsupportedError without any self-attention."""
    sites = sites_of(target)
    middle = [site.path for site in sites if site.place == "mid" and site.kind == "self"]
    if middle:
        return middle
    image = [site for site in sites if site.kind in IMAGE_KINDS]
    if not image:
        raise UnsupportedError(f"{who}: this model has no self-attention")
    block = image[len(image) // 2].path.rpartition(".")[0]
    return [site.path for site in image if site.path.rpartition(".")[0] == block]


def two_stream_sites(target: Any) -> list[str]:
    """The paths of the joint sites where the text has projections of its own (of FLUX, those of
    the double blocks)."""
    model = families.uncompiled(families.denoiser_of(target))
    joint = [site.path for site in sites_of(target) if site.kind == "joint"]
    return [path for path in joint if getattr(model.get_submodule(path), "add_q_proj", None)]


def sites_of_layers(who: str, target: Any, layers: Iterable[int]) -> list[str]:
    """The paths of the image's attention in some transformer blocks, counted from 0.

    They are counted in each denoiser, in its list `transformer_blocks`, in the longest one where
    there is none, and over all of a UNet. InputError for a block that is not there.
    """
    models = families.denoisers_of(target)
    first = families.uncompiled(models[0][1])
    every = list(families.blocks_of(first, sites_of(first)))
    lists: dict[str, list[str]] = {}
    for path in every:
        lists.setdefault(path.rpartition(".")[0], []).append(path)
    if not lists:
        raise UnsupportedError(f"{who}: this model has no transformer blocks with attention")
    if any("." in name for name in lists):
        blocks = every
    else:
        blocks = lists.get("transformer_blocks") or max(lists.values(), key=len)
    wanted = list(layers)
    if not wanted or any(not 0 <= i < len(blocks) for i in wanted):
        raise InputError(
            f"{who}: layers={tuple(wanted)}; this model has blocks 0 to {len(blocks) - 1}"
        )
    paths = {f"{name}.{blocks[i]}" if name else blocks[i] for name, _ in models for i in wanted}
    image = [s.path for s in sites_of(target) if s.kind in (*IMAGE_KINDS, "temporal")]
    return [path for path in image if path.rpartition(".")[0] in paths]


def layout_resolution(
    who: str, sites: Iterable[Site], grid: tuple[int, ...], cure: str
) -> Fraction:
    """The resolution, relative to the latent, of the sites whose maps hold the layout.

    grid: of the latent. Raises UnsupportedError, with the cure, where the sites' grids are unknown.
    """
    found = finest_within(sites, grid) if grid else None
    if found is None:
        raise UnsupportedError(
            f"{who}: this model does not tell the grid of its attention sites, so no site's maps "
            f"can be laid over its latents; {cure}"
        )
    return found


def grid_of(call: AttentionCall, who: str) -> Grid:
    """The grid of a call's image queries; UnsupportedError if they form none."""
    if call.grid is None:
        raise UnsupportedError(
            f"{who}: the queries of {call.site.path} form no grid over the latent, so they have no "
            "places in the image; leave it out with sites="
        )
    return call.grid
