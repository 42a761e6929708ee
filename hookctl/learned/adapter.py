"""An IP-Adapter's trained modules, with the names and shapes of its official file.

    image_proj.*                            what makes tokens of images (`image_projection`)
    ip_adapter.{i}.to_{k,v}_ip.weight       W'_k, W'_v of cross-attention i, [channels, text]
    ip_adapter.{i}.to_{q,k,v,out}_lora.{down,up}.weight    FaceID's deltas of attention i

i counts the attention layers of the UNet in the order down, up, middle; cross-attention is odd.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hookctl.address.families import denoiser_of, uncompiled
from hookctl.errors import InputError
from hookctl.learned.fit import load_into
from hookctl.learned.modules.image_projection import projection_of
from hookctl.learned.names import adapter_layers

Shapes = Mapping[str, tuple[int, ...]]


class Adapter(nn.Module):
    """The modules of an IP-Adapter: image_proj reads images, ip_adapter holds layers by number."""

    def __init__(self, image_proj: nn.Module, ip_adapter: nn.ModuleDict) -> None:
        super().__init__()
        self.image_proj: Any = image_proj
        self.ip_adapter = ip_adapter

    def layer(self, i: str) -> Any:
        """The layers at attention i, by name: to_k_ip, to_v_ip, ..."""
        return self.ip_adapter[i]


def adapter_of(
    tensors: Mapping[str, Tensor], *, shortcut: bool | None = None, strength: float = 1.0
) -> Adapter:
    """The adapter in a file.

    tensors: of the file, by name. shortcut, strength: of FaceID-Plus (`FacePlusProjection`).
    Raises InputError that names what is missing or of another shape.
    """
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    parts = {
        part: {n.removeprefix(f"{part}."): s for n, s in shapes.items() if n.startswith(f"{part}.")}
        for part in ("image_proj", "ip_adapter")
    }
    for part, found in parts.items():
        if not found:
            raise InputError(f"IP-Adapter: the file has no {part}.*; it may be of another kind")
    image_proj = projection_of(parts["image_proj"], shortcut=shortcut, strength=strength)
    adapter = Adapter(image_proj, layers_of(parts["ip_adapter"]))
    own = {name: x for name, x in tensors.items() if name.split(".")[0] in parts}
    load_into(adapter, own, who="IP-Adapter")
    return adapter


def layers_of(shapes: Shapes) -> nn.ModuleDict:
    """Linear layers without biases of the shapes of `ip_adapter`, on the meta device."""
    root = nn.ModuleDict()
    for name, shape in shapes.items():
        *path, kind = name.split(".")
        if kind != "weight" or len(shape) != 2 or len(path) < 2:
            raise InputError(f"IP-Adapter: ip_adapter.{name} {tuple(shape)} is not known")
        place: Any = root
        for word in path[:-1]:
            if word not in place:
                place[word] = nn.ModuleDict()
            place = place[word]
        place[path[-1]] = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    return root


def adapter_for(denoiser: nn.Module, image_proj: nn.Module) -> Adapter:
    """An untrained adapter of a UNet: W'_k and W'_v are copies of its own W_k and W_v."""
    layers = nn.ModuleDict()
    for i, path in adapter_layers(denoiser).items():
        attention: Any = denoiser.get_submodule(path)
        if not attention.is_cross_attention:
            continue
        pair = nn.ModuleDict()
        for name in ("k", "v"):
            weight: Tensor = getattr(attention, f"to_{name}").weight
            copied = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            copied.weight.data = weight.detach().float().clone()
            pair[f"to_{name}_ip"] = copied
        layers[str(i)] = pair
    return Adapter(image_proj, layers)


def fitting(checkpoint: Any, pipe: Any, who: str, **options: Any) -> Adapter:
    """The adapter in a file, for a pipeline; InputError if it does not fit.

    options: of `adapter_of`.
    """
    adapter = adapter_of(checkpoint.tensors, **options)
    check_fit(adapter, uncompiled(denoiser_of(pipe)), who)
    return adapter


def low_rank_of(adapter: Adapter) -> nn.ModuleDict:
    """FaceID's deltas alone, by number and name, of the same parameters."""
    found = nn.ModuleDict()
    for i, layer in adapter.ip_adapter.named_children():
        deltas = {name: part for name, part in layer.named_children() if name.endswith("_lora")}
        if deltas:
            found[i] = nn.ModuleDict(deltas)
    return found


def check_fit(adapter: Adapter, denoiser: nn.Module, who: str) -> None:
    """Raise InputError unless an adapter is of a model like this one.

    The message has the first layer that does not fit, both shapes and the likely cause.
    """
    layers = adapter_layers(denoiser)
    given = {name: tuple(x.shape) for name, x in adapter.ip_adapter.state_dict().items()}
    wanted: dict[str, tuple[int, ...]] = {}
    for i, path in layers.items():
        attention: Any = denoiser.get_submodule(path)
        if attention.is_cross_attention:
            shape: tuple[int, ...] = (attention.inner_dim, attention.cross_attention_dim)
            wanted |= {f"{i}.to_{name}_ip.weight": shape for name in ("k", "v")}
        wanted |= _deltas(i, attention, given)
    name = type(denoiser).__name__
    cross = [key for key in given if key.endswith("_ip.weight")]
    expected = [key for key in wanted if key.endswith("_ip.weight")]
    for key, shape in wanted.items():
        if given.get(key) != shape:
            have = "missing" if key not in given else f"{given[key]}"
            raise InputError(
                f"{who}: ip_adapter.{key} is {have}, but this {name} needs {shape} at "
                f"{layers[int(key.partition('.')[0])]}; {_cause(adapter, expected, cross)}"
            )
    text = {x.shape[1] for key, x in adapter.ip_adapter.state_dict().items() if key in cross}
    made = _token_width(adapter.image_proj)
    if made is not None and text - {made}:
        raise InputError(
            f"{who}: image_proj makes tokens of {made} channels, but ip_adapter reads "
            f"{', '.join(map(str, sorted(text)))}; the two are of different files"
        )
    if further := sorted(set(given) - set(wanted)):
        raise InputError(
            f"{who}: ip_adapter.{further[0]} {given[further[0]]} is of no layer of this {name}; "
            f"{_cause(adapter, expected, cross)}"
        )


def _deltas(i: int, attention: Any, given: Shapes) -> dict[str, tuple[int, ...]]:
    """The shapes that the deltas of an attention layer must have, where the adapter has any."""
    layers = {
        "q": attention.to_q,
        "k": attention.to_k,
        "v": attention.to_v,
        "out": attention.to_out[0],
    }
    wanted: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.items():
        start = f"{i}.to_{name}_lora"
        if f"{start}.down.weight" in given:
            rank = given[f"{start}.down.weight"][0]
            wanted[f"{start}.down.weight"] = (rank, layer.in_features)
            wanted[f"{start}.up.weight"] = (layer.out_features, rank)
    return wanted


def _token_width(image_proj: nn.Module) -> int | None:
    """Channels of the tokens that a projection makes: those of the last of its layer norms."""
    for name in ("norm_out", "norm", "proj.3"):
        try:
            norm: Any = image_proj.get_submodule(name)
        except AttributeError:
            continue
        return int(norm.weight.shape[0])
    return None


_TEXTS = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL"}


def _cause(adapter: Adapter, expected: list[str], given: list[str]) -> str:
    shapes = adapter.ip_adapter.state_dict()
    widths = {shapes[key].shape[1] for key in given}
    made = ", ".join(_TEXTS.get(width, f"a text of {width} channels") for width in sorted(widths))
    return (
        f"the adapter is of {len(given) // 2} cross-attention layers for {made or 'nothing'}, the "
        f"model has {len(expected) // 2}; give one that was trained for this base model"
    )
