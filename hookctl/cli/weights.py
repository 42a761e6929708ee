"""`hookctl inspect FILE`: what a file of weights is, and how it would be attached."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookctl.cli.trust import INDEX
from hookctl.errors import InputError
from hookctl.learned.reading.located import ENDINGS

if TYPE_CHECKING:
    from hookctl.learned.files import Checkpoint
    from hookctl.learned.recognise import Kind

_SHOWN = 6  # names of tensors of a file that is not known


def is_weights(given: str) -> bool:
    """Whether weights were typed in place of a model: a file by its ending, on the disk or of a
    repository (owner/name/FILE), or a folder that holds some and is no model."""
    path = Path(given).expanduser()
    if path.is_dir():
        held = {one.name for one in path.iterdir()}
        return not held & {INDEX, "config.json"} and any(n.endswith(ENDINGS) for n in held)
    return given.endswith(ENDINGS)


def show_weights(given: str, as_json: bool) -> None:
    """Print what a file is; InputError for one that can't be read."""
    from hookctl.learned.loading import open_checkpoint
    from hookctl.learned.recognise import recognise

    checkpoint = open_checkpoint(given)
    try:
        kind, reason = recognise(checkpoint.shapes), ""
    except InputError as error:  # of what is not known there is something to say, too
        kind, reason = None, str(error)
    data = _data(given, checkpoint, kind, reason)
    if as_json:
        print(json.dumps(data, indent=2, ensure_ascii=False))
    else:
        print("\n".join(_lines(data, checkpoint, kind)))


def _data(given: str, checkpoint: Checkpoint, kind: Kind | None, reason: str) -> dict[str, Any]:
    from hookctl.learned.loading import BUILDERS, options_of

    tensors = checkpoint.tensors.values()
    dtypes: dict[str, int] = {}
    for tensor in tensors:
        name = str(tensor.dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + tensor.numel()
    options = None
    if kind is not None and kind.name in BUILDERS:
        options = _options(kind, options_of)
    return {
        "file": given,
        "kind": None if kind is None else kind.name,
        "reason": reason or None,
        "base": None if kind is None else kind.base or None,
        "facts": [] if kind is None else list(kind.facts),
        "needs": [] if kind is None else list(kind.needs),
        "options": options,
        "tensors": len(checkpoint.tensors),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "dtypes": dtypes,
        "bytes": sum(tensor.numel() * tensor.itemsize for tensor in tensors),
        "notes": list(checkpoint.notes),
    }


def _options(kind: Kind, of: Any) -> list[str] | None:
    """Those that a kind takes; None if it can't be attached."""
    try:
        return [*of(kind), "weights"]
    except InputError:
        return None


def _lines(data: dict[str, Any], checkpoint: Checkpoint, kind: Kind | None) -> Iterator[str]:
    yield f"{data['file']}\n"
    if kind is None:
        yield f"kind: not known. {data['reason'][:1].upper()}{data['reason'][1:]}"
        for key, tensor in list(checkpoint.tensors.items())[:_SHOWN]:
            yield f"  {key} {tuple(tensor.shape)}"
    else:
        yield from kind.summary
    dtypes = ", ".join(data["dtypes"])
    yield (
        f"tensors: {data['tensors']}, {_millions(data['parameters'])} parameters in {dtypes}, "
        f"{data['bytes'] / 1e6:,.1f} MB"
    )
    yield from data["notes"]
    if data["options"]:
        yield f"options: {', '.join(data['options'])}"
        yield f"attach it: hookctl run STACK --hook {data['file']}[:STRENGTH]"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M" if count >= 10_000 else str(count)
