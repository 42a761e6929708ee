"""Trained modules on a model of SDXL's layout: blocks without attention, and two blocks deep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hookctl
from hookctl.errors import InputError
from hookctl.learned.files import Checkpoint
from hookctl.learned.gligen import GLIGEN, build
from hookctl.learned.grounding import Layout
from hookctl.learned.instance_diffusion import InstanceDiffusion, InstanceNetwork
from hookctl.learned.instances import Instance
from hookctl.learned.instant_id import InstantID
from hookctl.learned.ip_adapter import IPAdapter
from hookctl.learned.modules.convnext import ConvNeXt
from hookctl.learned.modules.scale_u import ScaleU
from hookctl.learned.modules.unifusion import UniFusion
from hookctl.learned.people import Person
from tests.families.subjects import error
from tests.hookctl.drawing import SD15
from tests.hookctl.learned import identity
from tests.hookctl.learned.gated_models import fusers_of, gated_like, gated_unet, network_of
from tests.hookctl.learned.identity import adapter, apart, drawn, embeds, load_into_diffusers
from tests.hookctl.learned.literal_grounding import randomise
from tests.hookctl.learned.test_copies import POINTS
from tests.hookctl.learned.test_ip_adapter import ROUNDING, vector

TEXT = 56  # channels of both text encoders together
BOXES = [(0.1, 0.2, 0.5, 0.6), (0.5, 0.4, 0.9, 1.0)]
CONCATS = (32, 32, 32, 32, 32, 16)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return identity.pipeline("sdxl")


def call_of(unet: Any, **options: Any) -> Tensor:
    """A prediction for two rows, double precision."""
    sample, text = vector(0, 2, 4, 16, 16).double(), vector(1, 2, 9, TEXT).double()
    added = {"text_embeds": vector(2, 2, 20).double(), "time_ids": vector(3, 2, 6).double()}
    with torch.no_grad():
        found: Tensor = unet(sample, 500, text, added_cond_kwargs=added, **options).sample
    return found


# -- images and people -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["base", "plus"])
def test_an_adapter_is_diffusers(pipe: Any, kind: str) -> None:
    several = () if kind == "base" else (7,)
    shown, none = vector(0, *several, 10), vector(1, *several, 10)
    told: dict[str, Any] = {} if kind == "base" else {"negative": none}
    edit = IPAdapter(adapter(kind, pipe.unet), shown, scale=0.7, **told)
    theirs = identity.pipeline("sdxl")
    load_into_diffusers(theirs, identity.tensors(kind, theirs.unet))
    theirs.set_ip_adapter_scale(0.7)
    given = embeds(shown[None]) if kind == "base" else embeds(shown, negative=none)
    wanted = drawn(theirs, ip_adapter_image_embeds=[given])
    assert apart(drawn(pipe, edit), wanted) < ROUNDING
    assert apart(wanted, drawn(pipe)) > 1e-2


@pytest.mark.slow
def test_an_image_and_a_person_each_keep_their_effect(pipe: Any) -> None:
    unet = pipe.unet
    net = identity.identity_net(unet)
    person = Person(vector(1, 6), POINTS)
    editors = [
        IPAdapter(adapter("base", unet), vector(0, 10), scale=0.7),
        InstantID(adapter("instantid", unet), person, net, control_scale=0.01),
    ]
    both = drawn(pipe, *editors)
    assert all(apart(drawn(pipe, one), both) > 1e-2 for one in editors)


# -- grounding -------------------------------------------------------------------------------------


class Given(nn.Module):
    """A tokenizer that makes the same tokens of anything."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, **_: Any) -> Tensor:
        return self.tokens


def gligen_row() -> dict[str, Tensor]:
    """The second of two rows with objects, as diffusers' tokenizer reads them."""
    slots, features, masks = torch.zeros(2, 30, 4), torch.zeros(2, 30, TEXT), torch.zeros(2, 30)
    slots[1, :2], features[1, :2], masks[1, :2] = torch.tensor(BOXES), vector(4, 2, TEXT), 1
    given = {"boxes": slots, "positive_embeddings": features, "masks": masks}
    return {name: x.double() for name, x in given.items()}


def test_gligen_is_diffusers() -> None:
    plain = identity.pipeline("sdxl").unet
    net = gated_like(plain)
    edit = GLIGEN(network_of(net), boxes=BOXES, phrases=list(vector(4, 2, TEXT)), stop=1.0)
    net.double()
    wanted = call_of(net, cross_attention_kwargs={"gligen": gligen_row()})
    plain.double()
    with hookctl.control(plain, edit, rows=("uncond", "cond")):
        got = call_of(plain)
    assert error(got, wanted) < 1e-7  # diffusers has its frequencies in single precision
    assert error(call_of(plain), wanted) > 1e-2


def instances(net: Any, gains: Any = None) -> InstanceDiffusion:
    tokenizer: Any = UniFusion(
        ConvNeXt((1, 1), (4, 6)), text=TEXT, hidden=16, out=TEXT, slots=3, frequencies=2,
        scribble_points=2, mask_points=4, raster_tokens=4, features=6,
    )  # fmt: skip
    network = InstanceNetwork(randomise(tokenizer, 0), fusers_of(net), gains)
    given = [Instance(f, box=b) for f, b in zip(vector(4, 2, TEXT), BOXES, strict=True)]
    return InstanceDiffusion(network, given, stop=1.0)


def test_instance_diffusion_is_diffusers_with_its_tokens() -> None:
    plain = identity.pipeline("sdxl").unet
    net = gated_like(plain)
    edit = instances(net)
    like = torch.zeros((), dtype=torch.float64)
    plain.double()
    with hookctl.control(plain, edit, rows=("uncond", "cond")):
        got = call_of(plain)
        tokens = torch.stack([edit._tokens(one, like) for one in (Layout(), Layout(0))])
    net.double().position_net = Given(tokens)
    wanted = call_of(net, cross_attention_kwargs={"gligen": {}})
    assert error(got, wanted) < 1e-10
    scaled = instances(net, randomise(ScaleU(CONCATS), 1))
    with hookctl.control(plain, scaled, rows=("uncond", "cond")):
        assert error(call_of(plain), got) > 1e-3


# -- files for another model -----------------------------------------------------------------------


def test_a_grounding_of_sd15_is_refused(pipe: Any) -> None:
    network = network_of(gated_unet())
    features = list(vector(4, 2, 32))
    with pytest.raises(InputError, match=r"GLIGEN: .*; the checkpoint is for another model"):
        with hookctl.control(pipe, GLIGEN(network, boxes=BOXES, phrases=features)):
            pass
    tensors = {f"position_net.{k}": x for k, x in network.tokenizer.state_dict().items()}
    for path, layer in network.fusers.items():
        tensors |= {f"{path}.fuser.{k}": x for k, x in layer.state_dict().items()}
    file = Checkpoint("gligen.bin", tensors)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="down_blocks.0.attentions.0.* has no such block; it is f"):
        build(file, pipe, boxes=BOXES, phrases=features)


def test_gains_of_another_decoder_are_refused(pipe: Any) -> None:
    edit = instances(gated_like(pipe.unet), randomise(ScaleU((32,) * 6), 1))
    with pytest.raises(InputError, match=r"ScaleU is for .* the model has \(32, .*16\); the check"):
        with hookctl.control(pipe, edit):
            pass


def test_an_adapter_of_sd15_is_refused(pipe: Any) -> None:
    edit = IPAdapter(adapter("base", SD15.make().unet), vector(0, 10))
    with pytest.raises(InputError, match="the adapter is of 10 cross-attention layers for a text"):
        with hookctl.control(pipe, edit):
            pass


@pytest.mark.slow
def test_phrases_as_text_need_a_tokenizer_for_them(pipe: Any) -> None:
    """Which of two encoders a file was trained with is told by the width."""
    network = network_of(gated_like(pipe.unet))
    edit = GLIGEN(network, boxes=BOXES, phrases=["a cat", "a dog"], stop=1.0)
    with pytest.raises(InputError, match="features and the checkpoint was trained with 56"):
        drawn(pipe, edit)
