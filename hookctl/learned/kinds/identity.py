"""The IP-Adapter family and InstantID by their names and shapes."""

from __future__ import annotations

import re

from hookctl.errors import InputError
from hookctl.learned.kinds.kind import Kind, Shapes, base_of, has, length

_IDENTITY_WIDTH = 512  # of an ArcFace vector
_CLIP_WIDTHS = (1024, 1280, 1664)  # of CLIP's hidden states: ViT-L, ViT-H, ViT-bigG
_FACE_CHOICE = "FaceID-Plus v1 and v2 have the same weights: say which it is, shortcut=True for v2"


def adapter(shapes: Shapes) -> Kind | None:
    projected = _below(shapes, ("image_proj.", "image_proj_model."))
    text = length(shapes, r"(^|\.)to_k_ip\.weight$")
    if not projected and text is None:
        return None
    if not projected or text is None:
        missing = "ip_adapter.*.to_k_ip.weight" if projected else "image_proj.*"
        raise InputError(f"looks like an IP-Adapter but has no {missing}; give the whole file")
    numbers = {m[1] for key in shapes if (m := re.search(r"(.+\.)to_k_ip\.weight$", key))}
    # A training file may hold each layer twice, by number and by place.
    placed = sum(number.startswith("unet.") for number in numbers)
    layers = max(placed, len(numbers) - placed)
    low_rank = length(shapes, r"to_q_lora\.down\.weight$", 0)
    name, facts, needs, out = _image_projection(projected)
    if out != text:
        raise InputError(
            f"looks like an IP-Adapter but its image tokens are {out} wide, and its layers read "
            f"{text}: two halves of different adapters"
        )
    facts = [f"layers: {layers}", *facts]
    facts += [f"low-rank weights: rank {low_rank}"] * (low_rank is not None)
    if name.startswith("ip-adapter faceid") and low_rank is None:
        facts.append("low-rank weights: none in this file (FaceID has them in a file of its own)")
    raw = has(shapes, r"^(image_proj_model|adapter_modules)\.")
    facts += ["names: those of training (accelerate); they are converted when it is loaded"] * raw
    return Kind(name, base_of(text, layers), tuple(facts), needs)


def _image_projection(own: Shapes) -> tuple[str, list[str], tuple[str, ...], int | None]:
    """(name, facts, needs, width of its tokens) by the order that settles it."""
    needs: tuple[str, ...]
    out: int | None
    if "proj.weight" in own and "norm.weight" in own:
        out = own["norm.weight"][0]
        read = own["proj.weight"][1]
        tokens = own["proj.weight"][0] // out
        encoder = {1024: "ViT-H", 1280: "ViT-bigG"}.get(read, "another one")
        facts = [f"image tokens: {tokens} of a CLIP embedding of width {read} ({encoder})"]
        return "ip-adapter", facts, ("a reference image, and a CLIP image encoder",), out
    if "proj.3.weight" in own:
        facts = ["image tokens: one for each hidden state of CLIP (257)"]
        needs = ("a reference image, and a CLIP image encoder",)
        return "ip-adapter full", facts, needs, own["proj.3.weight"][0]
    if "perceiver_resampler.proj_in.weight" in own:
        needs = (
            "a face embedding of width 512 (ArcFace, normalised)",
            "an image of the face, and a CLIP image encoder",
        )
        out = length(own, r"^(perceiver_resampler\.norm_out|norm)\.weight$", 0)
        return "ip-adapter faceid-plus", [_FACE_CHOICE], needs, out
    if "proj.0.weight" in own and "norm.weight" in own:
        out = own["norm.weight"][0]
        tokens = own["proj.2.weight"][0] // out if "proj.2.weight" in own else 0
        facts = [f"image tokens: {tokens} of a face embedding of width {own['proj.0.weight'][1]}"]
        needs = ("a face embedding of width 512 (ArcFace, normalised)",)
        return "ip-adapter faceid", facts, needs, out
    if "latents" in own and "proj_in.weight" in own and "norm_out.weight" in own:
        return _resampled(own)
    raise InputError(
        "looks like an IP-Adapter but its image_proj is none that is known: it holds "
        f"{', '.join(list(own)[:4])}"
    )


def _resampled(own: Shapes) -> tuple[str, list[str], tuple[str, ...], int]:
    out, read = own["norm_out.weight"][0], own["proj_in.weight"][1]
    count, width = own["latents"][-2:]
    needs: tuple[str, ...]
    facts = [f"image tokens: {count} by a resampler of width {width}, from inputs of {read}"]
    if read == _IDENTITY_WIDTH:
        needs = (
            "a face embedding of width 512 (ArcFace, as it is)",
            "IdentityNet, a ControlNet in a folder of its own, and five key points of the face",
        )
        return "instantid", facts, needs, out
    if read not in _CLIP_WIDTHS:
        raise InputError(
            f"looks like an IP-Adapter plus but its resampler reads inputs of width {read}; known "
            f"are 512 (InstantID) and {', '.join(map(str, _CLIP_WIDTHS))} (hidden states of CLIP)"
        )
    needs = ("a reference image, and a CLIP image encoder (its hidden states)",)
    return "ip-adapter plus", facts, needs, out


def _below(shapes: Shapes, prefixes: tuple[str, ...]) -> Shapes:
    return {
        key.removeprefix(prefix): shape
        for key, shape in shapes.items()
        for prefix in prefixes
        if key.startswith(prefix)
    }
