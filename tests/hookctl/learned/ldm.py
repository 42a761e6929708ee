"""The weights of LDM's UNets and ControlNets by name and shape, at their official sizes.

Written from the layout of the files alone: blocks are made in the order in which they run and
numbered as they are made. Nothing here knows diffusers' names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


@dataclass(frozen=True)
class Layout:
    """depths: transformer blocks at each level, 0 for no attention; middle: those in the middle."""

    channels: int
    multiples: tuple[int, ...]
    depths: tuple[int, ...]
    middle: int
    context: int
    linear: bool = False  # projections of a transformer; else convolutions of 1 x 1
    labels: int = 0
    inputs: int = 4
    outputs: int = 4
    fusers: int = 0  # width of grounding tokens
    layers: int = 2


SD15 = Layout(320, (1, 2, 4, 4), (1, 1, 1, 0), 1, 768)
SDXL = Layout(320, (1, 2, 4), (0, 2, 10), 10, 2048, linear=True, labels=2816)
GLIGEN = replace(SD15, fusers=768)
FACES = Layout(192, (1, 2, 3, 5), (0, 1, 1, 1), 1, 640, inputs=3, outputs=3)
PREDICTOR = replace(FACES, channels=32, outputs=1)


def _both(name: str, out: int, *into: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, *into)
    yield f"{name}.bias", (out,)


def _attention(name: str, width: int, context: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.to_q.weight", (width, width)
    yield f"{name}.to_k.weight", (width, context)
    yield f"{name}.to_v.weight", (width, context)
    yield from _both(f"{name}.to_out.0", width, width)


def _feed_forward(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield from _both(f"{name}.net.0.proj", 8 * width, width)
    yield from _both(f"{name}.net.2", width, 4 * width)


def _fuser(name: str, width: int, tokens: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.alpha_attn", ()
    yield f"{name}.alpha_dense", ()
    yield from _both(f"{name}.linear", width, tokens)
    yield from _attention(f"{name}.attn", width, width)
    yield from _feed_forward(f"{name}.ff", width)
    yield from _both(f"{name}.norm1", width)
    yield from _both(f"{name}.norm2", width)


def _transformer(name: str, width: int, depth: int, of: Layout) -> Iterator[tuple[str, Shape]]:
    edge = () if of.linear else (1, 1)
    yield from _both(f"{name}.norm", width)
    yield from _both(f"{name}.proj_in", width, width, *edge)
    for k in range(depth):
        block = f"{name}.transformer_blocks.{k}"
        yield from _attention(f"{block}.attn1", width, width)
        yield from _attention(f"{block}.attn2", width, of.context)
        yield from _feed_forward(f"{block}.ff", width)
        for norm in ("norm1", "norm2", "norm3"):
            yield from _both(f"{block}.{norm}", width)
        if of.fusers:
            yield from _fuser(f"{block}.fuser", width, of.fusers)
    yield from _both(f"{name}.proj_out", width, width, *edge)


def _resnet(name: str, into: int, out: int, of: Layout) -> Iterator[tuple[str, Shape]]:
    yield from _both(f"{name}.in_layers.0", into)
    yield from _both(f"{name}.in_layers.2", out, into, 3, 3)
    yield from _both(f"{name}.emb_layers.1", out, 4 * of.channels)
    yield from _both(f"{name}.out_layers.0", out)
    yield from _both(f"{name}.out_layers.3", out, out, 3, 3)
    if into != out:
        yield from _both(f"{name}.skip_connection", out, into, 1, 1)


def _encoder(of: Layout, skips: list[int]) -> Iterator[tuple[str, Shape]]:
    time = 4 * of.channels
    yield from _both("time_embed.0", time, of.channels)
    yield from _both("time_embed.2", time, time)
    if of.labels:
        yield from _both("label_emb.0.0", time, of.labels)
        yield from _both("label_emb.0.2", time, time)
    yield from _both("input_blocks.0.0", of.channels, of.inputs, 3, 3)
    skips.append(of.channels)
    width = of.channels
    for level, multiple in enumerate(of.multiples):
        for _ in range(of.layers):
            name, out = f"input_blocks.{len(skips)}", multiple * of.channels
            yield from _resnet(f"{name}.0", width, out, of)
            if of.depths[level]:
                yield from _transformer(f"{name}.1", out, of.depths[level], of)
            width = out
            skips.append(width)
        if level + 1 < len(of.multiples):
            yield from _both(f"input_blocks.{len(skips)}.0.op", width, width, 3, 3)
            skips.append(width)
    yield from _resnet("middle_block.0", width, width, of)
    yield from _transformer("middle_block.1", width, of.middle, of)
    yield from _resnet("middle_block.2", width, width, of)


def unet(of: Layout) -> dict[str, Shape]:
    skips: list[int] = []
    found = dict(_encoder(of, skips))
    width, number = of.channels * of.multiples[-1], 0
    for level in reversed(range(len(of.multiples))):
        for layer in range(of.layers + 1):
            name, out = f"output_blocks.{number}", of.channels * of.multiples[level]
            found.update(_resnet(f"{name}.0", width + skips.pop(), out, of))
            if of.depths[level]:
                found.update(_transformer(f"{name}.1", out, of.depths[level], of))
            if level and layer == of.layers:
                slot = 2 if of.depths[level] else 1
                found.update(_both(f"{name}.{slot}.conv", out, out, 3, 3))
            width = out
            number += 1
    found.update(_both("out.0", of.channels))
    found.update(_both("out.2", of.outputs, of.channels, 3, 3))
    return found


def controlnet(of: Layout) -> dict[str, Shape]:
    skips: list[int] = []
    found = dict(_encoder(of, skips))
    for k, width in enumerate(skips):
        found.update(_both(f"zero_convs.{k}.0", width, width, 1, 1))
    found.update(_both("middle_block_out.0", skips[-1], skips[-1], 1, 1))
    widths = (3, 16, 16, 32, 32, 96, 96, 256, of.channels)
    for k, (into, out) in enumerate(zip(widths, widths[1:], strict=False)):
        found.update(_both(f"input_hint_block.{2 * k}", out, into, 3, 3))
    return found


# -- what is learned beside them, as it is published -----------------------------------------------


def _perceptron(name: str, *widths: int) -> Iterator[tuple[str, Shape]]:
    for k, (into, out) in enumerate(zip(widths, widths[1:], strict=False)):
        yield from _both(f"{name}.{2 * k}", out, into)


def _convnext(name: str) -> Iterator[tuple[str, Shape]]:
    widths = (96, 192, 384, 768)
    yield from _both(f"{name}.downsample_layers.0.0", 96, 3, 4, 4)
    yield from _both(f"{name}.downsample_layers.0.1", 96)
    for k in (1, 2, 3):
        yield from _both(f"{name}.downsample_layers.{k}.0", widths[k - 1])
        yield from _both(f"{name}.downsample_layers.{k}.1", widths[k], widths[k - 1], 2, 2)
    for stage, (width, count) in enumerate(zip(widths, (3, 3, 9, 3), strict=True)):
        for k in range(count):
            block = f"{name}.stages.{stage}.{k}"
            yield f"{block}.gamma", (width,)
            yield from _both(f"{block}.dwconv", width, 1, 7, 7)
            yield from _both(f"{block}.norm", width)
            yield from _both(f"{block}.pwconv1", 4 * width, width)
            yield from _both(f"{block}.pwconv2", width, 4 * width)


def _position_net(form: str) -> Iterator[tuple[str, Shape]]:
    if form in ("canny", "semantic"):
        yield "position_net.pos_embedding", (1, 64, 768)
        yield "position_net.null_feature", (768,)
        yield from _perceptron("position_net.linears", 768, 512, 512, 768)
        yield from _convnext("position_net.convnext_tiny_backbone")
        if form == "semantic":
            yield from _both("position_net.in_conv", 3, 152, 3, 3)
        shape = (16, 152, 4, 4) if form == "semantic" else (4, 1, 4, 4)
        yield from _both("downsample_net.layers.0", *shape)
        yield from _both("downsample_net.layers.2", 8, shape[0], 4, 4)
    elif form == "keypoint":
        yield "position_net.person_embeddings", (8, 768)
        yield "position_net.keypoint_embeddings", (17, 768)
        yield "position_net.null_person_feature", (768,)
        yield "position_net.null_xy_feature", (32,)
        yield from _perceptron("position_net.linears", 800, 512, 512, 768)
    elif form == "text+image":
        yield "position_net.null_text_feature", (768,)
        yield "position_net.null_image_feature", (768,)
        yield "position_net.null_position_feature", (64,)
        yield from _perceptron("position_net.linears_text", 832, 512, 512, 768)
        yield from _perceptron("position_net.linears_image", 832, 512, 512, 768)
    else:
        yield "position_net.null_positive_feature", (768,)
        yield "position_net.null_position_feature", (64,)
        yield from _perceptron("position_net.linears", 832, 512, 512, 768)


def gligen(form: str = "text") -> dict[str, Shape]:
    """form: text, text+image, keypoint, canny, semantic, hed or inpainting."""
    inputs = {"canny": 12, "semantic": 12, "hed": 5, "inpainting": 9}.get(form, 4)
    net = dict(_position_net("canny" if form == "hed" else form))
    if form == "hed":
        net = {key: shape for key, shape in net.items() if not key.startswith("downsample_net")}
    return unet(replace(GLIGEN, inputs=inputs)) | net


def instance_diffusion() -> dict[str, Shape]:
    found = unet(GLIGEN)
    for k, width in enumerate((1280,) * 7 + (640,) * 3 + (320,) * 2):
        found[f"scaleu_b_{k}"] = (width,)
        found[f"scaleu_s_{k}"] = (1,)
    nulls = {"positive": 768, "position": 128, "point": 64, "scribble": 1280, "polygon": 16384}
    for name, width in {**nulls, "seg": 3072}.items():
        found[f"position_net.null_{name}_feature"] = (width,)
    for k, width in enumerate((896, 832, 2048, 17152, 3072)):
        found.update(_perceptron(f"position_net.linears_list.{k}", width, 3072, 3072, 768))
    found.update(_both("position_net.in_conv", 3, 30, 3, 3))
    found["position_net.pos_embedding"] = (1, 64, 3072)
    found.update(_convnext("position_net.convnext_tiny_backbone"))
    return found


def resampler(width: int, into: int, out: int, tokens: int = 16) -> dict[str, Shape]:
    found: dict[str, Shape] = {"latents": (1, tokens, width)}
    found.update(_both("proj_in", width, into))
    found.update(_both("proj_out", out, width))
    found.update(_both("norm_out", out))
    for k in range(4):
        found.update(_both(f"layers.{k}.0.norm1", width))
        found.update(_both(f"layers.{k}.0.norm2", width))
        found[f"layers.{k}.0.to_q.weight"] = (width, width)
        found[f"layers.{k}.0.to_kv.weight"] = (2 * width, width)
        found[f"layers.{k}.0.to_out.weight"] = (width, width)
        found.update(_both(f"layers.{k}.1.0", width))
        found[f"layers.{k}.1.1.weight"] = (4 * width, width)
        found[f"layers.{k}.1.3.weight"] = (width, 4 * width)
    return found


def adapter_widths(of: Layout) -> list[int]:
    """The width of each transformer block in the order down, up, middle."""
    blocks: list[tuple[str, int]] = []
    for key, shape in unet(of).items():
        if key.endswith("attn2.to_k.weight"):
            blocks.append((key.partition("_")[0], shape[0]))
    return [w for top in ("input", "output", "middle") for at, w in blocks if at == top]


def ip_adapter(of: Layout, image_proj: dict[str, Shape], rank: int = 0) -> dict[str, Shape]:
    """rank: of FaceID's low-rank weights."""
    found = {f"image_proj.{key}": shape for key, shape in image_proj.items()}
    for k, width in enumerate(adapter_widths(of)):
        for part in ("k", "v"):
            found[f"ip_adapter.{2 * k + 1}.to_{part}_ip.weight"] = (width, of.context)
        for number in (2 * k, 2 * k + 1) if rank else ():
            for part in ("q", "k", "v", "out"):
                wide = of.context if part in ("k", "v") and number % 2 else width
                found[f"ip_adapter.{number}.to_{part}_lora.down.weight"] = (rank, wide)
                found[f"ip_adapter.{number}.to_{part}_lora.up.weight"] = (width, rank)
    return found


def projection(into: int, out: int, tokens: int = 4) -> dict[str, Shape]:
    return dict(_both("proj", tokens * out, into)) | dict(_both("norm", out))


def full_projection(into: int, out: int) -> dict[str, Shape]:
    return {
        **dict(_both("proj.0", into, into)),
        **dict(_both("proj.2", out, into)),
        **dict(_both("proj.3", out)),
    }


def face_projection(out: int, tokens: int = 4) -> dict[str, Shape]:
    return {
        **dict(_both("proj.0", 1024, 512)),
        **dict(_both("proj.2", tokens * out, 1024)),
        **dict(_both("norm", out)),
    }


def face_plus_projection(out: int) -> dict[str, Shape]:
    inner = resampler(out, 1280, out)
    inner.pop("latents")
    return face_projection(out) | {f"perceiver_resampler.{k}": shape for k, shape in inner.items()}


def collaborative() -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for name in ("seg_mask", "text"):
        for part, of in (("unet", FACES), ("confidence_predictor", PREDICTOR)):
            prefix = f"model.{name}_{part}.diffusion_model"
            found |= {f"{prefix}.{key}": shape for key, shape in unet(of).items()}
    found.update(_both("cond_stage_model.seg_mask_cond_stage_model.linear", 640, 1024))
    found["cond_stage_model.text_cond_stage_model.transformer.token_emb.weight"] = (30522, 640)
    found.update(_both("first_stage_model.quant_conv", 6, 6, 1, 1))
    return found
