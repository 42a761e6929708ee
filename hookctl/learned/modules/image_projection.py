"""What IP-Adapters make tokens of: an image's embedding, its features, or a face's embedding.

Ye et al., "IP-Adapter", arXiv 2308.06721, and the official files:

    base           CLIP image embedding e                LN(W e)                             4
    full           CLIP features, token by token         LN(W' GELU(W x))                  257
    plus           CLIP features                         `Resampler`                        16
    FaceID         face embedding f                      LN(W' GELU(W f))                    4
    FaceID-Plus    f, and CLIP features x of the face    t = FaceID's tokens, r = what they  4
                                                         find in x; v1: r, v2: t + s r

LN is over the channels of a token. `projection_of` builds the module that a file's shapes are of.
Every module says what it `reads` ("embedding", "features" or "face"), and of how many channels
(`widths`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hookctl.errors import InputError
from hookctl.learned.modules.resampler import HEAD, Resampler, perceiver_layers, through

FACE = 512  # channels of an ArcFace embedding


class ImageProjection(nn.Module):
    """Base: one embedding [rows, features] -> tokens [rows, tokens, output]."""

    reads: tuple[str, ...] = ("embedding",)

    def __init__(self, features: int, output: int, tokens: int = 4) -> None:
        super().__init__()
        self.widths: tuple[int, ...] = (features,)
        self.proj = nn.Linear(features, tokens * output)
        self.norm = nn.LayerNorm(output)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).unflatten(-1, (-1, self.norm.weight.shape[0])))


class FullProjection(nn.Module):
    """Full: every feature token for itself, [rows, n, features] -> [rows, n, output]."""

    reads: tuple[str, ...] = ("features",)

    def __init__(self, features: int, output: int) -> None:
        super().__init__()
        self.widths: tuple[int, ...] = (features,)
        self.proj = nn.Sequential(
            nn.Linear(features, features),
            nn.GELU(),
            nn.Linear(features, output),
            nn.LayerNorm(output),
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.proj(x)
        return found


class FaceProjection(nn.Module):
    """FaceID: a face's embedding [rows, features] -> tokens [rows, tokens, output]."""

    reads: tuple[str, ...] = ("face",)

    def __init__(self, features: int, output: int, tokens: int = 4, factor: int = 2) -> None:
        super().__init__()
        self.widths: tuple[int, ...] = (features,)
        self.proj = nn.Sequential(
            nn.Linear(features, factor * features),
            nn.GELU(),
            nn.Linear(factor * features, tokens * output),
        )
        self.norm = nn.LayerNorm(output)

    def forward(self, face: Tensor) -> Tensor:
        return self.norm(self.proj(face).unflatten(-1, (-1, self.norm.weight.shape[0])))


class FaceResampler(nn.Module):
    """A resampler whose latents are given: [rows, n, features] asked by [rows, tokens, width]."""

    def __init__(
        self, width: int, features: int, *, heads: int, depth: int = 4, head_width: int = HEAD
    ) -> None:
        super().__init__()
        self.proj_in = nn.Linear(features, width)
        self.proj_out = nn.Linear(width, width)
        self.norm_out = nn.LayerNorm(width)
        self.layers = perceiver_layers(width, depth, heads, head_width)

    def forward(self, latents: Tensor, x: Tensor) -> Tensor:
        found = through(self.layers, self.proj_in(x), latents)
        return self.norm_out(self.proj_out(found))


class FacePlusProjection(FaceProjection):
    """FaceID-Plus: a face's embedding [rows, face] and CLIP features of its picture [rows, n,
    features] -> tokens [rows, tokens, output].

    shortcut: v2, whose tokens are FaceID's own plus `strength` times what they find in the picture;
    without it v1, which is what they find. The two have the same keys and shapes.
    """

    reads: tuple[str, ...] = ("face", "features")

    def __init__(
        self,
        face: int,
        features: int,
        output: int,
        *,
        heads: int,
        tokens: int = 4,
        factor: int = 2,
        depth: int = 4,
        head_width: int = HEAD,
        shortcut: bool = False,
        strength: float = 1.0,
    ) -> None:
        super().__init__(face, output, tokens, factor)
        self.widths: tuple[int, ...] = (face, features)
        self.perceiver_resampler = FaceResampler(
            output, features, heads=heads, depth=depth, head_width=head_width
        )
        self.shortcut, self.strength = shortcut, strength

    def forward(self, face: Tensor, x: Tensor | None = None) -> Tensor:
        assert x is not None  # an embedding alone is FaceID's
        tokens = super().forward(face)
        found: Tensor = self.perceiver_resampler(tokens, x)
        return tokens + self.strength * found if self.shortcut else found


def projection_of(
    shapes: Mapping[str, tuple[int, ...]], *, shortcut: bool | None = None, strength: float = 1.0
) -> nn.Module:
    """The module of a file's `image_proj`, on the meta device, without values.

    shapes: name -> shape, the names without "image_proj."; shortcut: True for a file of FaceID-Plus
    v2, False for v1. Raises InputError if the names are of none of the kinds, or if `shortcut` is
    not said of a FaceID-Plus file or said of another.
    """
    kind = kind_of(shapes)
    plus = kind == "faceid-plus"
    if plus and shortcut is None:
        raise InputError(
            "IP-Adapter FaceID-Plus: v1 and v2 can't be told apart by their files; give "
            "shortcut=True for v2 (plusv2 in the file's name), shortcut=False for v1"
        )
    if shortcut is not None and not plus:
        raise InputError(
            f"IP-Adapter: shortcut={shortcut}, but this file is {kind}; only FaceID-Plus has one"
        )
    try:
        with torch.device("meta"):
            return _built(kind, shapes, bool(shortcut), strength)
    except KeyError as error:
        raise InputError(f"IP-Adapter {kind}: image_proj has no {error.args[0]}") from None


def kind_of(names: Mapping[str, tuple[int, ...]]) -> str:
    """Which projection the names are of: base, full, faceid, faceid-plus or plus."""
    # In this order: the later names are in files of the earlier kinds, too.
    if "proj.weight" in names:
        return "base"
    if "proj.3.weight" in names:
        return "full"
    if "perceiver_resampler.proj_in.weight" in names:
        return "faceid-plus"
    if "norm.weight" in names and "proj.0.weight" in names:
        return "faceid"
    if "latents" in names:
        return "plus"
    raise InputError(
        f"IP-Adapter: image_proj has {', '.join(sorted(names)[:5]) or 'nothing'}, which is of no "
        "known kind; base, full, plus, FaceID, FaceID-Plus and InstantID are known"
    )


def _built(
    kind: str, shapes: Mapping[str, tuple[int, ...]], shortcut: bool, strength: float
) -> nn.Module:
    if kind == "base":
        (rows, features), (output,) = shapes["proj.weight"], shapes["norm.weight"]
        return ImageProjection(features, output, rows // output)
    if kind == "full":
        output, features = shapes["proj.2.weight"]
        return FullProjection(features, output)
    if kind == "plus":
        width, features = shapes["proj_in.weight"]
        resampler = Resampler(
            width,
            shapes["proj_out.weight"][0],
            features,
            heads=_heads(shapes, "layers.0.0.to_q.weight"),
            depth=_depth(shapes, "layers."),
            tokens=shapes["latents"][1],
        )
        if features == FACE:  # InstantID's: nothing else tells it from plus
            resampler.reads = ("face",)
        return resampler
    hidden, face = shapes["proj.0.weight"]
    (output,) = shapes["norm.weight"]
    tokens, factor = shapes["proj.2.weight"][0] // output, hidden // face
    if kind == "faceid":
        return FaceProjection(face, output, tokens, factor)
    inner = "perceiver_resampler."
    return FacePlusProjection(
        face,
        shapes[f"{inner}proj_in.weight"][1],
        output,
        heads=_heads(shapes, f"{inner}layers.0.0.to_q.weight"),
        tokens=tokens,
        factor=factor,
        depth=_depth(shapes, f"{inner}layers."),
        shortcut=shortcut,
        strength=strength,
    )


def _heads(shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    """Heads are 64 channels wide in every file."""
    return max(1, shapes[name][0] // HEAD)


def _depth(shapes: Mapping[str, tuple[int, ...]], start: str) -> int:
    found = {name[len(start) :].split(".")[0] for name in shapes if name.startswith(start)}
    return len(found)
