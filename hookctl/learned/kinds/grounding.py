"""GLIGEN and InstanceDiffusion by their names and shapes."""

from __future__ import annotations

from collections.abc import Iterable

from hookctl.errors import InputError
from hookctl.learned.kinds.kind import Kind, Shapes, base_of, count, has, length


def grounding(shapes: Shapes) -> Kind | None:
    parts = {
        "a position net (position_net.*)": has(shapes, r"^position_net\."),
        "fusers (*.fuser.*)": has(shapes, r"\.fuser\."),
    }
    scaled = has(shapes, r"^scaleu_[bs]_\d+$")
    if not any(parts.values()) and not scaled:
        return None
    instance = scaled or has(shapes, r"^position_net\.linears_list\.")
    missing = [part for part, there in parts.items() if not there]
    if instance:
        missing += ["ScaleU vectors (scaleu_b_0 ...)"] * (not scaled)
    looks = "InstanceDiffusion" if instance else "GLIGEN"
    if missing:
        hint = (
            "; if it is one of the files that ComfyUI splits it into, give the folder of all three"
            if instance
            else ""
        )
        raise InputError(f"looks like {looks} but lacks {' and '.join(missing)}{hint}")
    widths = [s[0] for key, s in shapes.items() if key.endswith(".fuser.linear.weight")]
    tokens = length(shapes, r"\.fuser\.linear\.weight$")
    stem = length(shapes, r"^(input_blocks\.0\.0|conv_in)\.weight$")
    facts = [f"fusers: {len(widths)}, of {_spans(widths)} channels, tokens of width {tokens}"]
    if instance:
        return _instance_diffusion(shapes, widths, facts)
    name, more, needs = _gligen(shapes, stem)
    return Kind(name, _unet_base(shapes, widths), (*facts, *more), needs)


def _instance_diffusion(shapes: Shapes, widths: list[int], facts: list[str]) -> Kind:
    formats = ("boxes", "points", "scribbles", "mask points", "mask rasters")
    there = [
        f for k, f in enumerate(formats) if f"position_net.linears_list.{k}.0.weight" in shapes
    ]
    if len(there) < len(formats):
        raise InputError(
            f"looks like InstanceDiffusion but its position net reads {', '.join(there) or 'none'} "
            f"of {', '.join(formats)}; give the whole file"
        )
    slots = length(shapes, r"^position_net\.in_conv\.weight$")
    facts.append(f"locations: {', '.join(formats)}; at most {slots} instances")
    facts.append(f"ScaleU: {count(shapes, r'^scaleu_b_')} places")
    needs = ("captions and locations of instances",)
    return Kind("instance-diffusion", _unet_base(shapes, widths), tuple(facts), needs)


def _gligen(shapes: Shapes, stem: int | None) -> tuple[str, list[str], tuple[str, ...]]:
    """The form of a GLIGEN by its tokenizer and its first convolution."""
    inner = length(shapes, r"^position_net\.linears\.0\.weight$")
    phrase = length(shapes, r"^position_net\.null_positive_feature$", 0) or 768
    place = length(shapes, r"^position_net\.null_position_feature$", 0) or 64
    facts: list[str] = []
    needs: tuple[str, ...]
    if has(shapes, r"^position_net\.linears_text\."):
        name, needs = "gligen box+text+image", ("boxes with phrases, images or both",)
    elif has(shapes, r"^position_net\.convnext_tiny_backbone\."):
        classes = length(shapes, r"^position_net\.in_conv\.weight$")
        own = length(shapes, r"^downsample_net\.layers\.0\.weight$")
        form = {None: "HED edges", 1: "canny edges or depth", 3: "normals"}.get(own, "its own")
        form = f"classes ({classes})" if classes else form
        name, needs = "gligen spatial", (f"a map: {form}",)
        if form == "canny edges or depth":
            facts.append("canny and depth have the same shapes: the file's name says which it is")
    elif has(shapes, r"^position_net\.person_embeddings$"):
        people = length(shapes, r"^position_net\.person_embeddings$", 0)
        name, needs = "gligen keypoints", (f"key points of at most {people} people",)
    elif inner == phrase + place:
        name, needs = "gligen box+text", ("boxes with phrases",)
    else:
        raise InputError(
            f"looks like GLIGEN but its position net reads {inner} numbers per token; known are "
            f"{phrase + place} (box and text of its null features), 800 (key points), 768 (maps)"
        )
    if stem == 9:
        facts.append("stem: 9 channels (inpainting: latents, masked image, mask)")
        needs = (*needs, "an image and a mask to be painted in")
    elif stem not in (None, 4):
        facts.append(f"stem: {stem} channels (latents and {stem - 4} of the map)")
    return name, facts, needs


def _spans(widths: Iterable[int]) -> str:
    found = sorted(set(widths))
    return ", ".join(map(str, found)) or "no"


def _unet_base(shapes: Shapes, widths: list[int]) -> str:
    """Of weights inside a UNet whose own are left out: by the channels of its blocks."""
    text = length(shapes, r"attn2\.to_k\.weight$")
    if text is not None:
        return base_of(text, len(widths))
    if set(widths) == {320, 640, 1280} and len(widths) == 16:
        return "SD2.x" if length(shapes, r"\.fuser\.linear\.weight$") == 1024 else "SD1.x"
    if set(widths) == {640, 1280} and len(widths) == 70:
        return "SDXL"
    return f"other ({len(widths)} transformer blocks of {_spans(widths)} channels)"
