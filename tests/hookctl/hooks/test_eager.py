"""Attention that a model spells out is followed only where it is one softmax over scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hookctl.attention.sdpa_call import SDPACall
from hookctl.hooks.eager import EagerFollower
from tests.hookctl.attention.calls import random

BIAS = random(4, 3, 3, seed=9)
Spelled = Callable[[Tensor, Tensor, Tensor], Tensor]


class Following(TorchFunctionMode):
    def __init__(self, follower: EagerFollower) -> None:
        super().__init__()
        self.follower = follower

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.follower.follow(func, args, kwargs or {})


def followed(spelled: Spelled) -> list[tuple[Tensor, Tensor]]:
    """(what the call that was made out gives, what the model's own way does), once for each."""
    found = []

    def attend(call: SDPACall, original: Callable[[], Tensor]) -> Tensor:
        found.append((call.attend(), original()))
        return found[-1][1]

    q, k, v = (random(4, 3, 8, seed=seed) for seed in (1, 2, 3))
    with Following(EagerFollower(2, 2, attend)):
        spelled(q, k, v)
    return found


def _added_in_place(scores: Tensor) -> Tensor:
    scores += BIAS
    return scores


UNDERSTOOD: dict[str, Spelled] = {
    "scaled": lambda q, k, v: (q @ k.mT * 0.3).softmax(-1) @ v,
    "biased": lambda q, k, v: (BIAS + q @ k.mT).softmax(-1) @ v,
    "biased, then scaled": lambda q, k, v: ((q @ k.mT + BIAS) * 0.3).softmax(-1) @ v,
    "biased in place": lambda q, k, v: _added_in_place(q @ k.mT * 0.3).softmax(-1) @ v,
    "without dropout": lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.1, training=False) @ v,
    "by einsum": lambda q, k, v: torch.einsum(
        "b i j, b j d -> b i d", torch.einsum("b i d, b j d -> b i j", q, k).softmax(-1), v
    ),
}
OTHER: dict[str, Spelled] = {
    "divided in place": lambda q, k, v: (q @ k.mT).div_(3).softmax(-1) @ v,
    "less something in place": lambda q, k, v: (q @ k.mT).sub_(BIAS).softmax(-1) @ v,
    "biased twice as much": lambda q, k, v: torch.add(q @ k.mT, BIAS, alpha=2).softmax(-1) @ v,
    "over queries": lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
    "halved probabilities": lambda q, k, v: ((q @ k.mT).softmax(-1) * 0.5) @ v,
    "weighed probabilities": lambda q, k, v: (q @ k.mT).softmax(-1).mul_(BIAS) @ v,
    "by transposed einsum": lambda q, k, v: torch.einsum(
        "b j i, b j d -> b i d", torch.einsum("b i d, b j d -> b i j", q, k).softmax(-1), v
    ),
}


@pytest.mark.parametrize("spelled", UNDERSTOOD)
def test_what_is_followed_is_what_the_model_does(spelled: str) -> None:
    ((ours, own),) = followed(UNDERSTOOD[spelled])
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=0)


@pytest.mark.parametrize("spelled", OTHER)
def test_what_is_not_one_softmax_is_left_alone(spelled: str) -> None:
    """The site then has a hole, which is an error; to be edited as something else would be none."""
    assert followed(OTHER[spelled]) == []
