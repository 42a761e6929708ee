"""The part of a training file that is the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from hookctl.errors import InputError
from hookctl.learned.files import Checkpoint


def choose(checkpoint: Checkpoint, weights: str | None = None) -> Checkpoint:
    """The part of a training file that is the model, without the prefix of its names.

    weights: "model" or "ema", where a file has both; None for the averaged ones if they are whole.
    What is left out is noted.
    """
    if weights not in (None, "model", "ema"):
        raise InputError(f"weights={weights!r}; give 'model' or 'ema'")
    found = checkpoint
    while found.tensors and all(key.startswith("module.") for key in found.tensors):
        found = replace(found, tensors=_below(found.tensors, "module."))
    tops = {key.partition(".")[0] for key in found.tensors}
    part = None
    if "state_dict" in tops:
        part = "state_dict"
    elif tops & {"model", "ema"} and not any(".diffusion_model." in key for key in found.tensors):
        averaged, trained = _below(found.tensors, "ema."), _below(found.tensors, "model.")
        whole = bool(averaged) and averaged.keys() >= trained.keys()
        part = weights or ("ema" if whole else "model")
        if part not in tops:
            raise InputError(f"{found.path}: weights={part!r}, and the file holds none of these")
    elif weights is not None and weights != "model":
        raise InputError(f"{found.path}: weights={weights!r}, and the file holds one set of them")
    if part is not None:
        found = _kept(found, f"{part}.")
    for prefix in ("control_model.", "model.diffusion_model."):
        if any(key.startswith(prefix) for key in found.tensors):
            return _kept(found, prefix)
    return found


def _kept(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    """What stands under a prefix; the rest is noted."""
    kept = _below(checkpoint.tensors, prefix)
    rest = [key for key in checkpoint.tensors if not key.startswith(prefix)]
    notes = [f"of the file, {prefix.rstrip('.')!r} is used: {len(kept)} tensors"]
    counts: dict[str, int] = {}
    for key in rest:
        top = key.partition(".")[0]
        counts[top] = counts.get(top, 0) + 1
    if counts:
        shown = ", ".join(f"{top} ({count})" for top, count in counts.items())
        notes.append(f"left out: {shown}")
    return checkpoint.noting(*notes, tensors=kept)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
