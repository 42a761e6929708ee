"""Weights that fit go in; of those that don't the first is named, with both shapes and a cause."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hookctl.errors import InputError
from hookctl.learned.fit import load_into


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Linear(512, 320, dtype=torch.float16)
        self.to_k_ip = nn.Linear(768, 320, bias=False)
        self.gate = nn.Parameter(torch.tensor(0.0))
        self.register_buffer("count", torch.tensor(3))


def weights(**changes: Tensor | None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    made: dict[str, Tensor | None] = {
        "proj_in.weight": torch.randn(320, 512),
        "proj_in.bias": torch.randn(320),
        "to_k_ip.weight": torch.randn(320, 768).half(),
        "gate": torch.tensor(0.5, dtype=torch.bfloat16),
        "count": torch.tensor(7),
    }
    made |= {key.replace("__", "."): tensor for key, tensor in changes.items()}
    return {key: tensor for key, tensor in made.items() if tensor is not None}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_keep_the_modules_dtypes(device: str) -> None:
    with torch.device(device):
        module = Module()
    given = weights(text__position_ids=torch.arange(77), spared=torch.ones(2))
    fit = load_into(module, given, who="the adapter", spare=("^spared$",))
    found = module.state_dict()
    assert {tensor.device.type for tensor in found.values()} == {"cpu"}
    assert [t.dtype for t in found.values()] == [
        torch.float32, torch.int64, torch.float16, torch.float16, torch.float32,
    ]  # fmt: skip
    for key, tensor in found.items():
        assert torch.equal(tensor, given[key].to(tensor.dtype))
    assert fit.used == 5 and fit.left_out == ("text.position_ids", "spared")
    assert fit.lines("the adapter") == [
        "the adapter: 5 tensors",
        "the adapter: left out text.position_ids, spared",
    ]
    with torch.no_grad():
        found["proj_in.bias"].zero_()
    assert given["proj_in.bias"].any()  # the file's own stay as they are


WRONG: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "another base": (
        lambda: weights(to_k_ip__weight=torch.ones(320, 2048)),
        r"the adapter: 'to_k_ip.weight' has the shape \(320, 2048\) in the file, and \(320, 768\) "
        r"is needed: the file is for SDXL \(text of 2048\), the model is SD1.x \(768\)",
    ),
    "another layer": (
        lambda: weights(to_k_ip__weight=torch.ones(640, 768)),
        "another base model, or its layers are in another order",
    ),
    "another resampler": (
        lambda: weights(proj_in__weight=torch.ones(320, 1280)),
        r"reads CLIP's hidden states \(IP-Adapter\), and one of face vectors \(InstantID\) is",
    ),
    "a layer is missing": (
        lambda: weights(to_k_ip__weight=None),
        r"'to_k_ip.weight', of shape \(320, 768\), is not in the file \(1 of 5 are missing\): the "
        "base model may lack layers",
    ),
    "training": (
        lambda: {f"adapter_modules.1.{key}": tensor for key, tensor in weights().items()},
        r"'gate', of shape \(\), is not in the file \(5 of 5 are missing\); it holds "
        "'adapter_modules.1.proj_in.weight'.*: it is a training checkpoint in accelerate's layout",
    ),
    "LDM": (
        lambda: {f"input_blocks.1.1.{key}": tensor for key, tensor in weights().items()},
        "its names are those of LDM",
    ),
    "FaceID-Plus": (
        lambda: weights(perceiver_resampler__proj_in__weight=torch.ones(3)),
        r"'perceiver_resampler.proj_in.weight' of the file, of shape \(3,\), has no place in it "
        r"\(1 such\): of FaceID and FaceID-Plus one has a resampler",
    ),
    "FaceID": (
        lambda: weights(**{"0__to_q_lora__down__weight": torch.ones(3)}),
        "has no place in it.*: FaceID's low-rank weights",
    ),
    "more": (lambda: weights(more=torch.ones(3)), r"has no place in it \(1 such\)$"),
    "another dtype": (
        lambda: weights(gate=torch.tensor(1)), "'gate' is torch.int64 in the file, and torch.float",
    ),
    "NaN": (
        lambda: weights(gate=torch.tensor(math.nan)), "'gate' holds NaN or infinity; the file is",
    ),
    "overflow": (
        lambda: weights(proj_in__bias=torch.full((320,), 1e9)), "'proj_in.bias' holds NaN or inf",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit(name: str) -> None:
    make, says = WRONG[name]
    module = Module()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with pytest.raises(InputError, match=says) as raised:
        load_into(module, make(), who="the adapter")
    assert "\n" not in str(raised.value)
    assert all(torch.equal(before[key], t) for key, t in module.state_dict().items())


def test_large_numbers_are_finite() -> None:
    module = nn.Linear(2, 2, bias=False)
    load_into(module, {"weight": torch.full((2, 2), 3e38)}, who="it")
    double = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    load_into(double, {"weight": torch.full((2, 2), 1e308, dtype=torch.float64)}, who="it")
