"""Further prompts through a pipeline's own encoder, as it encoded the prompts that it draws."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookctl.address import families
from hookctl.errors import UnsupportedError

# What says which text is meant, or how often; the rest (clip_skip, max_sequence_length, device ...)
# says how to encode it.
_WHICH = re.compile(r"prompt|negative|embeds|^num_|guidance|image|self")


@dataclass(frozen=True)
class Encoded:
    """Prompts as a denoiser takes them.

    sequence: [prompts, tokens, channels]; pooled: [prompts, channels] where the family has such
    (SDXL, SD3, Flux); mask: which tokens count, bool [prompts, tokens], where the family says.
    """

    sequence: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None


@torch.no_grad()
def encode(pipe: Any, texts: Sequence[str], like: Mapping[str, Any] | None = None) -> Encoded:
    """Encode prompts by the pipeline's own `encode_prompt`, every text encoder included.

    like: the arguments of the pipeline's own call (`State.encoding`), so that clip_skip,
    max_sequence_length and their kin are the run's. Raises UnsupportedError if the pipeline has no
    encoder of prompts.
    """
    check_encoder(pipe)
    # Of the class: the hook on the instance would take these texts for the run's prompts.
    method = type(pipe).encode_prompt
    known = inspect.signature(method).parameters
    given = {k: v for k, v in (like or {}).items() if k in known and not _WHICH.search(k)}
    given["prompt"] = list(texts)
    for name, parameter in known.items():
        if name.startswith("num_"):
            given[name] = 1
        elif name == "do_classifier_free_guidance":
            given[name] = False
        elif name == "device":
            given.setdefault(name, pipe._execution_device)
        elif parameter.default is parameter.empty and parameter.kind is (
            parameter.POSITIONAL_OR_KEYWORD
        ):
            given.setdefault(name, None)
    del given["self"]
    found = method(pipe, **given)
    found = found if isinstance(found, tuple) else (found,)
    places = families.encoded_places(pipe)
    pooled, mask = (found[places[n]] if n in places else None for n in ("pooled", "mask"))
    return Encoded(found[0], pooled, None if mask is None else mask.bool())


def check_encoder(pipe: Any) -> None:
    """Raise UnsupportedError unless the pipeline can encode prompts."""
    if not hasattr(type(pipe), "encode_prompt"):
        raise UnsupportedError(
            f"{type(pipe).__name__} has no encode_prompt, so further prompts can't be encoded; "
            "give embeddings [tokens, channels] instead of texts"
        )
