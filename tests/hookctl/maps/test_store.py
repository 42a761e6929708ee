"""Where maps are kept: once each, by themselves or as running means, and how they answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hookctl import Maps, control
from hookctl.address.rows import Row
from hookctl.address.sites import Grid, Site
from hookctl.errors import InputError, WordError
from hookctl.maps import MapKey, MapStore
from hookctl.recipes import PromptToPrompt
from tests import zoo

CAT = "a red cat above a blue square"
DOG = "a red dog above a blue square"
GRIDS = 4  # of the sites that see the text


def run(*editors: Any, prompts: Any = CAT, steps: int = 3) -> MapStore:
    case = zoo.PIPELINES["sd15"]
    pipe = case.make()
    with control(pipe, *editors) as session:
        case.run(pipe, prompts, steps=steps)
    return session.maps


def test_a_map_that_two_editors_read_is_kept_once() -> None:
    store = MapStore()
    site = Site("a.attn2", "cross", "down", 0, 0)
    for _ in range(2):
        store.note(MapKey("cat"), site, 0, Row(0, "cond", 0, 0), torch.ones(1, 4, 1), Grid(2, 2))
    store.note(MapKey("cat"), site, 1, Row(0, "cond", 0, 0), torch.ones(1, 4, 1), Grid(2, 2))
    assert [record.step for record in store["cat"].records] == [0, 1]
    store.clear()
    store.note(MapKey("cat"), site, 0, Row(0, "cond", 0, 0), torch.ones(1, 4, 1), Grid(2, 2))
    assert len(store.records) == 1


def test_stores_and_maps_in_one_line_and_as_a_picture() -> None:
    store, site = MapStore(), Site("x", "cross", "up", 0, 0)
    assert repr(store) == "<MapStore: 0 words, 0 steps, 0 sites>"
    assert "<img" not in store._repr_html_()
    for word in ("cat", "<b>"):
        for step in range(3):
            values = torch.rand(1, 8, 1)
            store.note(MapKey(word), site, step, Row(0, "cond", 0, 0), values, Grid(2, 4))
    assert repr(store) == "<MapStore: 2 words, 3 steps, 1 site>"
    assert repr(store["cat"]) == "<WordMaps 'cat': 1 prompt, 3 steps, 1 site, grids 2x4>"
    assert "tensor" not in repr(store.records[0])
    for shown, alt in ((store, "cat, &lt;b&gt;"), (store["<b>"], "&lt;b&gt;")):
        assert f'<img alt="{alt}" src="data:image/png;base64,' in shown._repr_html_()
    assert store["cat"].where(grid=Grid(2, 4)).grids == ((2, 4),)


# -- running means ---------------------------------------------------------------------------------


def test_means_are_those_of_every_step() -> None:
    """For every word by default; a map for each word and grid is all that is kept."""
    means, each = run(Maps()), run(Maps(mean=False))
    assert means.words == each.words == ("a", "red", "cat", "above", "blue", "square")
    for word in means.words:
        torch.testing.assert_close(means[word].mean(), each[word].mean())
        for grid in each[word].grids:
            torch.testing.assert_close(
                means[word].where(grid=grid).mean(), each[word].where(grid=grid).mean()
            )
        assert means[word].steps == each[word].steps == (0, 1, 2)
        assert set(means[word].sites) == set(each[word].sites)
    assert len(means.records) == len(means.words) * len(means["cat"].grids)
    assert sum(record.count for record in means.records) == len(each.records)
    assert not any(record.map.requires_grad for record in means.records)
    assert repr(means) == repr(each)


def test_what_is_named_is_kept_by_step() -> None:
    assert len(run(Maps("cat"))["cat"].where(steps=[1]).records) > 0
    assert len(run(Maps("cat", mean=True))["cat"].records) == GRIDS


def test_a_mean_does_not_tell_one_step_or_site() -> None:
    maps = run(Maps())["cat"]
    cure = r"running mean over 3 steps.*hookctl.Maps\('cat', mean=False\) keeps each"
    for ask in (lambda: maps.where(steps=[1]), maps.strip, lambda: maps.records[0].step):
        with pytest.raises(InputError, match=cure):
            ask()
    several = next(record for record in maps.records if len(record.sites) > 1)
    with pytest.raises(InputError, match=r"running mean over \d+ sites"):
        maps.where(site=several.sites[0].path)
    with pytest.raises(InputError, match="running mean"):
        _ = several.site
    assert torch.equal(maps.where(steps=range(3)).mean(), maps.mean())
    with pytest.raises(InputError, match="no map of 'cat' with"):
        maps.where(steps=[7])


@pytest.mark.parametrize("first", [True, False])
def test_a_reader_of_every_step_has_its_way(first: bool) -> None:
    """Whichever stands first; the other's means are of the same maps."""
    readers = [Maps("cat"), Maps()]
    maps = run(*readers if first else reversed(readers))
    assert maps["cat"].where(steps=[1]).steps == (1,)
    assert len(maps["red"].records) == GRIDS
    torch.testing.assert_close(maps["cat"].mean(), run(Maps("cat"))["cat"].mean())


def test_the_maps_of_a_blend_are_kept_by_step() -> None:
    edit = PromptToPrompt([CAT, DOG], blend=("cat", "dog"))
    maps = run(Maps(), edit, prompts=edit.prompts)
    assert maps["dog"].where(steps=[0]).prompts == (1,)
    assert len(maps["blue"].where(prompt=1).records) == GRIDS


def test_what_was_not_read() -> None:
    maps = run(Maps("cat", tokens=[2], patches=[(0.5, 0.25)]))
    known = r"recorded are: patch \(0.5, 0.25\), token 2, 'cat'"
    for ask, cure in (
        (lambda: maps["dog"], r"'dog'\)"),
        (lambda: maps.token(3), r"tokens=\[3\]\)"),
        (lambda: maps.patch(0, 1), r"patches=\[\(0.0, 1.0\)\]\)"),
        (lambda: maps.word("cat", negative=True), r"'cat', negative=True\)"),
    ):
        with pytest.raises(WordError, match=rf"{known}. Add hookctl.Maps\({cure}"):
            ask()
    assert repr(maps) == "<MapStore: 1 word, 2 others, 3 steps, 20 sites>"
    assert len(repr(maps.patch(0.5, 0.25)).splitlines()) == 1
    assert "patch (0.5, 0.25)" in maps._repr_html_()
