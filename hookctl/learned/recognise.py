"""What a file of weights is, seen by the names and shapes in it."""

from __future__ import annotations

from hookctl.errors import InputError
from hookctl.learned.kinds.grounding import grounding
from hookctl.learned.kinds.identity import adapter
from hookctl.learned.kinds.kind import BLOCKS, Kind, Shapes, base_of
from hookctl.learned.kinds.whole import collaborative, controlnet, other

__all__ = ["BLOCKS", "Kind", "Shapes", "base_of", "recognise"]


def recognise(shapes: Shapes) -> Kind:
    """The kind of a file by its tensors' names (those of `names.official`, or as they are in the
    file) and shapes.

    Raises InputError for what is not known, or looks like something and is not whole.
    """
    for find in (grounding, adapter, collaborative, controlnet, other):
        try:
            kind = find(shapes)
        except (IndexError, ValueError, ZeroDivisionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"looks like one for {find.__name__}, but its tensors have fewer dimensions"
            ) from None
        if kind:
            return kind
    some = ", ".join(repr(key) for key in list(shapes)[:4])
    raise InputError(
        f"none of the known kinds of weights: {len(shapes)} tensors, such as {some}. Known are "
        "GLIGEN, InstanceDiffusion, IP-Adapter, InstantID, ControlNet and Collaborative Diffusion"
    )
