"""Trained modules follow their model: in its precision and where it is offloaded to."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookctl
from hookctl import Editor
from hookctl.errors import InputError
from hookctl.learned.collaborative import CollaborativeDiffusion, Collaborator
from hookctl.learned.instant_id import InstantID
from hookctl.learned.ip_adapter import IPAdapter
from hookctl.learned.lora import LoRA
from hookctl.learned.modules.gated_attention import GatedSelfAttention
from hookctl.learned.people import Person
from tests.families.subjects import error
from tests.hookctl.drawing import SD15, TWO
from tests.hookctl.learned import identity
from tests.hookctl.learned.identity import adapter, identity_net
from tests.hookctl.learned.test_collaborative import network
from tests.hookctl.learned.test_copies import LEARNED, POINTS
from tests.hookctl.learned.test_instance_diffusion import parts
from tests.hookctl.learned.test_ip_adapter import encoder, picture, vector

CPU = torch.device("cpu")


def stack(pipe: Any) -> list[Editor]:
    """All of them at once; the same weights each time."""
    return [make(pipe) for make in LEARNED.values()]


def noise(images: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same in every precision, as a generator's is not."""
    return vector(5, images, 4, 16, 16).to(dtype)


def run(pipe: Any, editors: list[Editor], dtype: torch.dtype = torch.float32) -> Tensor:
    with hookctl.control(pipe, *editors):
        return SD15.run(pipe, TWO, steps=2, latents=noise(2, dtype))


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
    """Also if it changes inside the session."""
    pipe = SD15.make()
    editors = stack(pipe)
    with hookctl.control(pipe, *editors):
        assert torch.equal(SD15.run(pipe, TWO, steps=2, latents=noise(2)), wanted)
        assert not doubles()
        pipe.to(torch.float64)
        got = SD15.run(pipe, TWO, steps=2, latents=noise(2, torch.float64))
        assert doubles()
    assert got.dtype == torch.float64 and error(got, wanted.double()) < 1e-4
    assert not doubles()
    adapters = [one.adapter for one in editors if isinstance(one, IPAdapter)]
    assert len(adapters) == 3  # as they were given
    assert all(p.dtype == torch.float32 for one in adapters for p in one.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 4e-2), (torch.float16, 6e-3)], ids=str
)
@pytest.mark.parametrize("name", LEARNED)
def test_half_precision(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """The rounding is about that of the model alone (2e-2, 3e-3)."""
    pipe = SD15.make()
    editor = LEARNED[name](pipe)
    full = run(pipe, [editor])
    plain = run(pipe, [])
    pipe.to(dtype)
    got = run(pipe, [editor], dtype)
    assert got.dtype == dtype
    assert error(got.float(), full) < tolerance < error(plain, full)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNED)
def test_an_editor_and_its_weights_are_freed(name: str) -> None:
    """With the last that the user holds, though the pipeline lives on."""
    pipe = SD15.make()
    editor = LEARNED[name](pipe)
    run(pipe, [editor])
    held = [weakref.ref(editor), *(weakref.ref(p) for p in parameters_of(editor))]
    assert len(held) > 1
    del editor
    parts.cache_clear()  # of InstanceDiffusion's tests
    gc.collect()
    assert not any(one() is not None for one in held)


def parameters_of(editor: Editor) -> Iterator[Any]:
    """The weights that an editor holds, also in lists, tables and records."""
    waiting, seen = [vars(editor)], set[int]()
    while waiting:
        one: Any = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, nn.Module):
            yield from one.parameters()
        elif isinstance(one, Tensor) and type(editor) is LoRA:  # which holds no modules
            yield one
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one
        elif type(one).__module__.startswith("hookctl.learned"):
            waiting.append(vars(one))


# -- offloading ------------------------------------------------------------------------------------


def by_model(pipe: Any, folder: Path) -> None:
    pipe.enable_model_cpu_offload(device=CPU)


def by_layer(pipe: Any, folder: Path) -> None:
    """Parameters are on the meta device until a layer runs.

    What `enable_sequential_cpu_offload` does for each model; towards the CPU that fails in the text
    encoder, also without hookctl.
    """
    from accelerate import cpu_offload

    cpu_offload(pipe.unet, CPU, offload_buffers=True)
    assert any(p.device.type == "meta" for p in pipe.unet.parameters())


def by_group(pipe: Any, folder: Path) -> None:
    pipe.enable_group_offload(onload_device=CPU, offload_type="leaf_level")


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
    "model": by_model,
    "sequential": by_layer,
    "group": by_group,
    "disk": to_disk,
}


@pytest.mark.slow
@pytest.mark.parametrize("how", OFFLOADS)
def test_an_offloaded_model(how: str, wanted: Tensor, tmp_path: Path) -> None:
    """diffusers' own ways, towards the CPU: weights come and go, and the same is drawn."""
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


@pytest.mark.slow
def test_networks_of_the_users_that_are_offloaded() -> None:
    """IdentityNet, an image encoder, a dynamic diffuser, another pipeline: away until asked."""
    from accelerate import cpu_offload

    pipe = SD15.make()
    net, seeing, diffuser, beside = identity_net(pipe.unet), encoder(), network(1), SD15.make()
    editors: list[Editor] = [
        InstantID(adapter("instantid", pipe.unet), Person(vector(0, 6), POINTS), net),
        IPAdapter(adapter("base", pipe.unet), picture(40, 28), image_encoder=seeing),
        CollaborativeDiffusion([Collaborator("text", diffuser), Collaborator("two", None, beside)]),
    ]
    want = run(pipe, editors)
    for model in (net, seeing, diffuser, beside.unet):
        cpu_offload(model, CPU, offload_buffers=True)
        assert any(p.is_meta for p in model.parameters())
    assert torch.equal(run(pipe, editors), want)


# -- the meta device -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNED)
def test_a_model_without_values_is_told(name: str) -> None:
    pipe = SD15.make()
    editor = LEARNED[name](pipe)
    pipe.unet.to("meta")
    with pytest.raises(InputError, match="weights such as conv_in.weight are on the meta device"):
        run(pipe, [editor])
    with pytest.raises(InputError, match="UNet2DConditionModel: weights such as"):
        run(pipe, [])


def test_a_module_without_values_is_told() -> None:
    pipe = SD15.make()
    net = copy.deepcopy(identity_net(pipe.unet)).to("meta")
    editor = InstantID(adapter("instantid", pipe.unet), Person(vector(0, 6), POINTS), net)
    with pytest.raises(InputError, match="ControlNetModel: weights such as .* on the meta device"):
        run(pipe, [editor])
