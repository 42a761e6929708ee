"""A wrong argument is named, with what was given and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hookctl.attention.call import AttentionCall
from hookctl.attention.token_map import Routing
from hookctl.errors import InputError, UnsupportedError
from tests.hookctl.attention.calls import Case, make, random

WRONG: dict[str, tuple[Callable[[AttentionCall], Any], str]] = {
    "row": (lambda c: c.borrow(7, k=2), r"rows: row 7 is not in this call of 5 rows"),
    "source": (lambda c: c.borrow(3, k=-1), r"borrow: k: row -1 is not in this call of 5"),
    "no source": (lambda c: c.borrow(3), r"borrow: give at least one of q=, k=, v="),
    "where": (lambda c: c.borrow(3, k=2, where=random(5)), r"borrow: where is \(5,\).* 12 queries"),
    "nothing to replace": (lambda c: c.replace(3), r"replace: give at least one of q=, k=, v="),
    "replace, tokens": (
        lambda c: c.replace(3, k=random(2, 7, 8)),
        r"replace: k has 7 tokens; the own one of a.site has 6",
    ),
    "replace, rows": (
        lambda c: c.replace((3, 4), q=random(3, 1, 2, 12, 8)),
        r"replace: q is \(3, 1, 2, 12, 8\); these 2 rows of a.site have \(2, 1, 2, 12, 8\)",
    ),
    "replace, heads": (
        lambda c: c.replace(3, q=random(3, 12, 8)),
        r"replace: q of a.site is \(3, 12, 8\); give \[heads=2, tokens, channels=8\]",
    ),
    "k": (
        lambda c: c.extend(3, random(3, 4, 8), random(3, 4, 8)),
        r"extend: k of a.site is \(3, 4, 8\); give \[heads=2, tokens, channels=8\]",
    ),
    "unequal": (
        lambda c: c.extend(3, random(2, 4, 8), random(2, 5, 8)),
        r"extend: k has 4 tokens and v has 5",
    ),
    "shift": (
        lambda c: c.extend(3, random(2, 4, 8), random(2, 4, 8), shift=random(3)),
        r"extend: shift is \(3,\); the new keys are 4",
    ),
    "share": (
        lambda c: c.extend(3, 2, 2, share=1.5),
        r"extend: share=1.5; give a weight from 0 to 1",
    ),
    "sub-batch": (
        lambda c: c.add(3, random(3, 2, 4, 8), random(3, 2, 4, 8)),
        r"add: k of a.site has a sub-batch of 3; give 1 or 1",
    ),
    "add, unequal": (
        lambda c: c.add(3, random(2, 4, 8), random(2, 5, 8)),
        r"add: k has 4 tokens and v has 5",
    ),
    "mask": (
        lambda c: c.add(3, random(2, 4, 8), random(2, 4, 8), mask=random(3)),
        r"add: mask is \(3,\); a.site has 12 queries",
    ),
    "regions": (
        lambda c: c.restrict(3, random(12), torch.ones(6, dtype=torch.int64)),
        r"restrict: query_regions is torch.float64 \(12,\); give int64 \[12\]",
    ),
    "key regions": (
        lambda c: c.restrict(3, *(torch.ones(12, dtype=torch.int64),) * 2),
        r"restrict: key_regions is torch.int64 \(12,\); give int64 \[6\]",
    ),
    "key factors": (
        lambda c: c.bias(3, key_factors=random(5)),
        r"bias: key_factors is \(5,\); a.site has 6 keys, so give \[6\] or \[6, r\]",
    ),
    "query factors": (
        lambda c: c.bias(3, key_factors=random(6, 2), query_factors=random(12, 3)),
        r"bias: query_factors is \(12, 3\); .* so give \[12, 2\]",
    ),
    "infinite bias": (
        lambda c: c.bias(3, key_factors=torch.full((6,), -torch.inf)),
        r"bias: the factors are not all finite; to forbid keys use restrict",
    ),
    "blend": (lambda c: c.route(3, 2, blend=random(4)), r"route: blend is \(4,\); .* give \[6\]"),
    "token map": (
        lambda c: c.route(3, 2, token_map=random(4, 6)),
        r"route: token_map is \(4, 6\); the text has 6 tokens, so give \[6, 6\]",
    ),
    "routing": (
        lambda c: c.route_by(3, 2, Routing.of(77)),
        r"route: the token map is for 77 tokens; the text of this call \(a.site\) has 6",
    ),
    "tokens": (
        lambda c: c.read(3, [1, 6], print),
        r"read: tokens=\(1, 6\) are not among the 6 keys of a.site",
    ),
    "context": (lambda c: c.context("style"), r"context 'style' is not in this call; .* none"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    use, message = WRONG[case]
    call = make("cross").call()
    with pytest.raises(InputError, match=message):
        use(call)
    assert not call.operations and not call.read_outs


def test_skip_needs_as_many_keys_as_queries() -> None:
    with pytest.raises(UnsupportedError, match="has 12 queries and 6 keys"):
        make("cross").call().skip(3)


def test_a_joint_site_of_unknown_text() -> None:
    call = make("text_image").call()
    call.sequence = (None, call.sequence[1])
    with pytest.raises(UnsupportedError, match="the length of the text .* is unknown"):
        call.route(3, 2)


def test_too_many_kinds_of_queries() -> None:
    many = torch.arange(12)
    x = random(5, 1, 2, 144, 8)
    call = Case("self", x, x, x, 1.0).call()
    ones = torch.ones(144, dtype=torch.int64)
    call.restrict(3, many.repeat(12), ones)
    call.restrict(3, many.repeat_interleave(12), ones)
    with pytest.raises(UnsupportedError, match="into 144 kinds, and at most 64"):
        call.fold()


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_tensors_can_not_be_assigned(name: str) -> None:
    call = make("self").call()
    with pytest.raises(InputError, match=rf"a.site: {name} can't be assigned; use call.replace"):
        setattr(call, name, call.q * 0)


def test_the_grid() -> None:
    call = make("self").call()
    call.latent = ()
    assert call.grid is None
    with pytest.raises(
        UnsupportedError, match="Mine: the queries of a.site form no grid .* sites="
    ):
        call.require_grid("Mine")
    call = make("self").call()
    height, width = call.require_grid("Mine")
    assert (height, width) == (3, 4) and call.grid is not None and call.grid.tokens == 12
