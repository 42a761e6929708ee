"""Whole models, and files of weights that are no hooks, by their names and shapes."""

from __future__ import annotations

import re
from collections.abc import Callable

from hookctl.errors import InputError
from hookctl.learned.kinds.kind import Kind, Shapes, base_of, has, length


def collaborative(shapes: Shapes) -> Kind | None:
    named = re.compile(r"(?:^|\.)(\w+)_confidence_predictor\.")
    modalities = list(dict.fromkeys(m[1] for key in shapes if (m := named.search(key))))
    if not modalities:
        return None
    lacking = [one for one in modalities if not has(shapes, rf"(^|\.){one}_unet\.")]
    if len(lacking) == len(modalities):
        raise InputError(
            f"looks like Collaborative Diffusion but has no {lacking[0]}_unet.*: only predictors; "
            "give the composed checkpoint"
        )
    text = length(shapes, r"_unet\..*attn2\.to_k\.weight$")
    facts: tuple[str, ...] = (f"modalities: {', '.join(modalities)}", f"conditions of width {text}")
    facts += tuple(f"{one}: of the pipeline's own model" for one in lacking)
    return Kind("collaborative", "its own, with its autoencoder", facts, ("a condition for each",))


def controlnet(shapes: Shapes) -> Kind | None:
    forms = {
        "controlnet": (r"^controlnet_down_blocks\.", r"^controlnet_cond_embedding\."),
        "controlnet (LDM)": (r"(^|\.)zero_convs\.", r"(^|\.)input_hint_block\."),
    }
    for name, patterns in forms.items():
        there = [has(shapes, pattern) for pattern in patterns]
        if not any(there):
            continue
        if not all(there):
            raise InputError(
                f"looks like a ControlNet but has no {patterns[there.index(False)].strip('^')}: it "
                "may be a ControlNet of another design (Union, XS, SparseCtrl)"
            )
        base = base_of(length(shapes, r"attn2\.to_k\.weight$"))
        facts = ("IdentityNet of InstantID has this form too",) * (base == "SDXL")
        needs = (
            "a control image, in a pipeline with ControlNet; as an IdentityNet, to be given to the "
            "editor of InstantID's ip-adapter.bin",
        )
        return Kind(name, base, facts, needs, hook=False)
    return None


_OTHERS: tuple[tuple[str, Callable[[Shapes], bool], str], ...] = (
    (
        "LoRA",
        lambda s: has(s, r"(lora_(A|B|up|down)\b|\.lora\.(up|down)\.|^lora_unet_|_lora\.up\.)"),
        "hookctl run --lora FILE, or pipe.load_lora_weights, as trained; --hook FILE, or "
        "hookctl.learned.load, for a region or words",
    ),
    (
        "textual inversion",
        lambda s: "emb_params" in s or has(s, r"^(string_to_param\.|<|clip_[lg]$)"),
        "pipe.load_textual_inversion",
    ),
    (
        "T2I-Adapter",
        lambda s: has(s, r"^(adapter\.)?body\.\d+\.(resnets|block1|in_conv)"),
        "diffusers.T2IAdapter, in a pipeline of its own",
    ),
    (
        "whole model (LDM)",
        lambda s: has(s, r"^(model\.diffusion_model\.)?input_blocks\.0\.0\.weight$"),
        "StableDiffusionPipeline.from_single_file; it is a model, and no hook for one",
    ),
    (
        "UNet",
        lambda s: has(s, r"^conv_in\.weight$") and has(s, r"^down_blocks\.0\."),
        "the folder of its pipeline; it is a model, and no hook for one",
    ),
    (
        "optimizer's state",
        lambda s: has(s, r"(^|\.)exp_avg(_sq)?$"),
        "the file of the model beside it",
    ),
)  # fmt: skip


def other(shapes: Shapes) -> Kind | None:
    """What is known and is used in other ways than as a hook alone; needs: by what."""
    for name, found, use in _OTHERS:
        if found(shapes):
            base = "" if name == "optimizer's state" else base_of(length(shapes, r"attn2\.to_k\.w"))
            return Kind(name, base, (), (use,), hook=name == "LoRA")
    return None
