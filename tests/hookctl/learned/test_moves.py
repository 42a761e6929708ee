"""Trained modules follow their model: in its precision and where it is offloaded to."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hookctl
from hookctl import Editor
from hookctl.learned.ip_adapter import IPAdapter
from hookctl.learned.modules.gated_attention import GatedSelfAttention
from tests.families.subjects import error
from tests.hookctl.drawing import SD15, TWO
from tests.hookctl.learned import identity
from tests.hookctl.learned.test_copies import LEARNED
from tests.hookctl.learned.test_ip_adapter import vector

CPU = torch.device("cpu")


def stack(pipe: Any) -> list[Editor]:
    """All of them at once; the same weights each time."""
    return [make(pipe) for make in LEARNED.values()]


def noise(images: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same in every precision, as a generator's is not."""
    return vector(5, images, 4, 16, 16).to(dtype)


def run(pipe: Any, editors: list[Editor]) -> Tensor:
    with hookctl.control(pipe, *editors):
        return SD15.run(pipe, TWO, steps=2, latents=noise(2))


@pytest.fixture(scope="module")
def wanted() -> Tensor:
    pipe = SD15.make()
    return run(pipe, stack(pipe))


# -- precision -------------------------------------------------------------------------------------


def doubles() -> list[Any]:
    """The gated layers in float64 that are alive."""
    gc.collect()
    layers = [one for one in gc.get_objects() if type(one) is GatedSelfAttention]
    return [one for one in layers if one.linear.weight.dtype == torch.float64]


@pytest.mark.slow
def test_precision_is_the_models_and_copies_end_with_the_session(wanted: Tensor) -> None:
    pipe = SD15.make()
    editors = stack(pipe)
    pipe.to(torch.float64)
    assert not doubles()
    with hookctl.control(pipe, *editors):
        got = SD15.run(pipe, TWO, steps=2, latents=noise(2, torch.float64))
        assert doubles()
    assert got.dtype == torch.float64 and error(got, wanted.double()) < 1e-4
    assert not doubles()
    adapters = [one.adapter for one in editors if isinstance(one, IPAdapter)]
    assert len(adapters) == 3  # as they were given
    assert all(p.dtype == torch.float32 for one in adapters for p in one.parameters())


# -- offloading ------------------------------------------------------------------------------------


def by_layer(pipe: Any, folder: Path) -> None:
    """Parameters are on the meta device until a layer runs."""
    from accelerate import cpu_offload

    cpu_offload(pipe.unet, CPU, offload_buffers=True)
    assert any(p.device.type == "meta" for p in pipe.unet.parameters())


def by_group(pipe: Any, folder: Path) -> None:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(pipe.unet, onload_device=CPU, offload_type="leaf_level")


def to_disk(pipe: Any, folder: Path) -> None:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        pipe.unet,
        onload_device=CPU,
        offload_type="block_level",
        num_blocks_per_group=1,
        offload_to_disk_path=str(folder),
    )


OFFLOADS: dict[str, Callable[[Any, Path], None]] = {
    "sequential": by_layer,
    "group": by_group,
    "disk": to_disk,
}


@pytest.mark.slow
@pytest.mark.parametrize("how", OFFLOADS)
def test_an_offloaded_model(how: str, wanted: Tensor, tmp_path: Path) -> None:
    """Editors are made for a model that is already offloaded, and draw the same."""
    pipe = SD15.make()
    editors = stack(pipe)
    OFFLOADS[how](pipe, tmp_path)
    assert torch.equal(run(pipe, editors), wanted)


@pytest.mark.slow
def test_made_for_an_offloaded_model(tmp_path: Path) -> None:
    """A file is loaded while the model's own weights are away."""
    pipe = SD15.make()
    tensors = identity.tensors("base", pipe.unet)
    torch.save(tensors, tmp_path / "ip-adapter.bin")
    face = vector(0, 10)
    want = run(pipe, [hookctl.learned.load(tmp_path / "ip-adapter.bin", pipe, images=face)])
    by_layer(pipe, tmp_path)
    got = run(pipe, [hookctl.learned.load(tmp_path / "ip-adapter.bin", pipe, images=face)])
    assert torch.equal(got, want)
