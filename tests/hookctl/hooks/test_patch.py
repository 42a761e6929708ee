"""Attributes replaced for a while, in any order."""

from __future__ import annotations

import itertools

import pytest

from hookctl.hooks.patch import Patch


class Thing:
    value = "class"


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_patches_end_in_any_order(order: tuple[int, ...]) -> None:
    thing = Thing()
    patches = [Patch(thing, "value", i) for i in range(3)]
    for patch in patches:
        patch.install()
    left = [0, 1, 2]
    for which in order:
        patches[which].remove()
        left.remove(which)
        assert thing.value == (left[-1] if left else "class")
    assert thing.__dict__ == {}


def test_what_others_set_meanwhile_stays() -> None:
    thing = Thing()
    thing.value = "before"
    patch = Patch(thing, "value", "ours")
    patch.install()
    thing.value = "theirs"
    patch.remove()
    patch.remove()
    assert thing.value == "theirs"
    with_before = Patch(thing, "value", "ours")
    with_before.install()
    with_before.remove()
    assert thing.value == "theirs"
