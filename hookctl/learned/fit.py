"""Weights into a module: all of them fit, or it is said which does not and why that may be."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hookctl.errors import InputError
from hookctl.learned.kinds.kind import BASES

# Buffers that older text encoders saved, and that newer ones have no place for.
_SPARE = (r"(^|\.)position_ids$", r"(^|\.)num_batches_tracked$")
_TRAINING = re.compile(r"^(unet|image_proj_model|adapter_modules)\.|\.processor\.")
_LDM = re.compile(r"^(model\.diffusion_model\.)?(input_blocks|middle_block|output_blocks)\.")
_CHANNELS = (320, 640, 1280)


@dataclass(frozen=True)
class Fit:
    """What became of the weights: how many are in the module, and the names of those left out."""

    used: int
    left_out: tuple[str, ...] = ()

    def lines(self, who: str) -> list[str]:
        """For the notes of a checkpoint."""
        lines = [f"{who}: {self.used} tensors"]
        if self.left_out:
            lines.append(f"{who}: left out {', '.join(self.left_out[:4])}")
        return lines


def load_into(
    module: nn.Module, tensors: Mapping[str, Tensor], *, who: str, spare: tuple[str, ...] = ()
) -> Fit:
    """Copy weights into a module, each in the dtype that it has there; a module on "meta" gets
    them on the CPU.

    who: what errors call the module; spare: patterns of names that may be left out.

    Raises InputError, before anything is copied, for the first weight that is missing, of another
    shape, not finite, or has no place in the module.
    """
    wanted = module.state_dict()
    left_out = [
        key
        for key in tensors
        if key not in wanted and any(re.search(one, key) for one in (*_SPARE, *spare))
    ]
    given = {key: tensor for key, tensor in tensors.items() if key not in left_out}
    for key, own in wanted.items():
        if key not in given:
            raise InputError(_missing(key, own, given, wanted, who))
        if given[key].shape != own.shape:
            have, want = tuple(given[key].shape), tuple(own.shape)
            raise InputError(
                f"{who}: {key!r} has the shape {have} in the file, and {want} is needed"
                f"{_because(key, have, want, given)}"
            )
        if given[key].is_floating_point() != own.is_floating_point():
            raise InputError(
                f"{who}: {key!r} is {given[key].dtype} in the file, and {own.dtype} is needed"
            )
    further = [key for key in given if key not in wanted]
    if further:
        raise InputError(
            f"{who}: {further[0]!r} of the file, of shape {tuple(given[further[0]].shape)}, has no "
            f"place in it ({len(further)} such){_because(further[0], (), (), given)}"
        )
    made = {key: given[key].to(own.dtype, copy=True) for key, own in wanted.items()}
    bad = next((k for k, t in made.items() if t.device.type != "meta" and not _finite(t)), None)
    if bad is not None:
        raise InputError(f"{who}: {bad!r} holds NaN or infinity; the file is damaged or overflowed")
    empty = any(tensor.is_meta for tensor in wanted.values())
    module.load_state_dict(made, assign=empty)
    return Fit(len(made), tuple(left_out))


def _finite(tensor: Tensor) -> bool:
    # The sum of many is finite where all are, and is taken without a mask of all; a sum that is
    # not may be of finite ones.
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
        return True
    return bool(torch.isfinite(tensor).all())


def _missing(
    key: str, own: Tensor, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], who: str
) -> str:
    count = sum(one not in given for one in wanted)
    has = ", ".join(repr(one) for one in [k for k in given if k not in wanted][:3])
    held = f"; it holds {has}" if has else ""
    return (
        f"{who}: {key!r}, of shape {tuple(own.shape)}, is not in the file ({count} of "
        f"{len(wanted)} are missing){held}{_because(key, (), tuple(own.shape), given)}"
    )


def _because(
    key: str, have: tuple[int, ...], want: tuple[int, ...], given: Mapping[str, Tensor]
) -> str:
    """The likely cause, led by a colon; "" if none is known."""
    found = _cause(key, have, want, given)
    return f": {found}" if found else ""


def _cause(
    key: str, have: tuple[int, ...], want: tuple[int, ...], given: Mapping[str, Tensor]
) -> str:
    if any(_TRAINING.search(one) for one in given):
        return (
            "it is a training checkpoint in accelerate's layout; hookctl.learned.load converts it"
        )
    if any(_LDM.match(one) for one in given):
        return "its names are those of LDM; hookctl.learned.load maps them to diffusers'"
    if have and want and len(have) == len(want):
        return _other_model(key, have, want)
    if "lora" in key:
        return "FaceID's low-rank weights; FaceID has them in its file, or in one beside it"
    if "perceiver_resampler" in key or "perceiver_resampler" in "".join(given):
        return "of FaceID and FaceID-Plus one has a resampler, the other has none"
    if re.search(r"to_[kv]_ip\b|\.attn2\b", key):
        return "the base model may lack layers (a distilled one), or be another"
    if not have and not want and re.search(r"(^|\.)(exp_avg|step)\b", key):
        return "it is an optimizer's state"
    return ""


def _other_model(key: str, have: tuple[int, ...], want: tuple[int, ...]) -> str:
    """Why two shapes differ, by what their lengths stand for."""
    pairs = [(h, w) for h, w in zip(have, want, strict=True) if h != w]
    for h, w in pairs:
        if {h, w} == {512, 1280} and "proj_in" in key:
            inputs = {512: "face vectors (InstantID)", 1280: "CLIP's hidden states (IP-Adapter)"}
            return f"the file's resampler reads {inputs[h]}, and one of {inputs[w]} is needed"
        if h in BASES and w in BASES:
            return f"the file is for {BASES[h]} (text of {h}), the model is {BASES[w]} ({w})"
        if h in _CHANNELS and w in _CHANNELS:
            return "another base model, or its layers are in another order"
    if "person_embeddings" in key or "pos_embedding" in key or "in_conv" in key:
        return "the file has another number of slots, which is a part of its model"
    return "another base model" if pairs else ""
