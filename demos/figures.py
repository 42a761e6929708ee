"""What an edit did, measured: success, what was kept, and how much the background moved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from hookctl.demos.cases import EditCase
from hookctl.demos.shapes.detect import Detection, Found, detect, to_pixels

NEAR = 0.1  # of the canvas: how far a kept object may have moved
MARGIN = 3  # px round the edited object that count as part of it


@dataclass(frozen=True)
class EditFigures:
    """Of one edited image: bools for success and kept, PSNR in dB outside the edited object."""

    edit_success: bool
    kept: bool
    background_psnr: float


def source_is_right(case: EditCase, source: Detection) -> bool:
    """Whether the source shows both objects as its prompt says, and nothing else."""
    wanted = {case.before[:2], case.other[:2]}
    edited = source.find(*case.before[:2])
    return (
        not source.extras
        and set(source.pairs) == wanted
        and sum(source.pairs.values()) == len(wanted)
        and edited is not None
        and edited.pattern == case.before[2]
    )


def measure(case: EditCase, source: Any, edited: Any) -> EditFigures:
    """Compare an edited image with its source (PIL images or arrays of equal size)."""
    a, b = detect(source), detect(edited)
    old, left = a.find(*case.before[:2]), b.find(*case.before[:2])
    new = left if case.after is None else b.find(*case.after[:2])
    if case.after is None:
        success = new is None
    else:
        replaced = case.before[:2] == case.after[:2] or left is None
        success = new is not None and new.pattern == case.after[2] and replaced
    other = a.find(*case.other[:2])
    twin = b.find(*case.other[:2])
    kept = other is not None and twin is not None and _near(other, twin, to_pixels(source).shape)
    changed = [found.mask for found in (old, new) if found is not None]
    return EditFigures(success, kept, background_psnr(source, edited, changed))


def _near(a: Found, b: Found, shape: Sequence[int]) -> bool:
    height, width = shape[:2]
    dx, dy = (a.centre[0] - b.centre[0]) / width, (a.centre[1] - b.centre[1]) / height
    return bool(np.hypot(dx, dy) <= NEAR)


def background_psnr(source: Any, edited: Any, changed: Iterable[np.ndarray]) -> float:
    """PSNR in dB (peak 255) of the pixels outside all `changed` masks, at most 100."""
    a, b = to_pixels(source), to_pixels(edited)
    outside = np.ones(a.shape[:2], bool)
    for mask in changed:
        outside &= ~ndimage.binary_dilation(mask, iterations=MARGIN)
    error = float(((a - b)[outside] ** 2).mean())
    return min(100.0, 10 * float(np.log10(255.0**2 / max(error, 1e-10))))


def summary(figures: Sequence[EditFigures]) -> dict[str, float]:
    """Shares and the mean PSNR of several cases."""
    if not figures:
        return {}
    return {
        "edit_success": round(float(np.mean([f.edit_success for f in figures])), 4),
        "kept": round(float(np.mean([f.kept for f in figures])), 4),
        "background_psnr": round(float(np.mean([f.background_psnr for f in figures])), 2),
    }
