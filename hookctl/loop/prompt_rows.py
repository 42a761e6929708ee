"""Other prompts for rows of a denoiser call, of any number of tokens.

The texts are encoded one by one, as the pipeline would encode each alone. Where rows of one call
have texts of several lengths they are padded under the model's mask, as the pipeline pads a batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from hookctl.address import families, pipelines
from hookctl.address.latent import text_tokens
from hookctl.errors import UnsupportedError
from hookctl.hooks.caches import TEXTS, cache_of
from hookctl.loop.prompts import encode
from hookctl.loop.state import State
from hookctl.loop.text_lengths import (
    ADDED,
    MASKS,
    POOLED,
    Batch,
    RowText,
    padded,
    put_texts,
    repeats_of,
)

_FROM_TEXTS = re.compile(r"encoder_|text|pooled|caption|prompt|byt5|llama")
_CLOSE = 1e-2  # relative: batches of other sizes are summed in other orders, in half precision too


class PromptRows:
    """Prompts of a run, to be put in rows of its calls.

    who: the editor, for errors. Raises UnsupportedError for a pipeline that can't encode them.
    """

    def __init__(self, state: State, texts: Iterable[str], who: str) -> None:
        self.who, self._name = who, type(state.pipe).__name__
        if state.text is None:
            raise self._unsupported(f"{self._name} gives its denoiser no text")
        self._texts: dict[str, RowText] = {
            text: encode(state.pipe, [text], state.encoding).row(0) for text in dict.fromkeys(texts)
        }

    def check(self, state: State, rows: Mapping[int, str]) -> None:
        """Raise UnsupportedError unless these are what the pipeline itself gave some rows."""
        self._check_names(state)
        self._check_kept(state)
        for row, text in rows.items():
            for batch, value in self._parts(state, self._texts[text]):
                given = batch[row * repeats_of(batch, len(state.rows))]
                if given.shape != value.shape and len(given) > len(value):
                    value = padded(value, len(given))  # to its neighbours
                if given.shape != value.shape or _far(value, given):
                    raise self._unsupported(
                        f"{self._name} does not give its denoiser what its encode_prompt makes of "
                        f"{text!r}; leave out prompt_2= and its kin, and embeddings"
                    )

    def _check_names(self, state: State) -> None:
        """Refuse what is made of the texts and is not known to be, or is of their length."""
        told = pipelines.encoded_places(state.pipe)
        known = {
            state.text,
            *(MASKS if "mask" in told else ()),
            *((POOLED,) if "pooled" in told else ()),
        }
        for name, value in state.kwargs.items():
            if name not in known and isinstance(value, Tensor | list) and _FROM_TEXTS.search(name):
                raise self._unsupported(
                    f"{self._name} makes {name} of its texts too, in a way not declared"
                )

    def _check_kept(self, state: State) -> None:
        """Refuse a model that reads its texts in the first step alone."""
        cache = cache_of(families.uncompiled(state.denoiser))
        if state.kwargs.get("kv_cache") is not None:
            cure = "pass use_kv_cache=False to it"
        elif cache is not None and cache.name == TEXTS:
            cure = cache.cure
        else:
            return
        raise UnsupportedError(
            f"{self.who}: the model of {self._name} keeps the keys and values of its texts from "
            f"the first step on, so its prompts can't be exchanged on the way; {cure}"
        )

    def put(self, state: State, rows: Mapping[int, str]) -> None:
        """Make these the texts of some rows of a call, pooled forms and masks included."""
        kwargs = state.kwargs
        try:
            put_texts(state, kwargs, {row: self._texts[text] for row, text in rows.items()})
        except UnsupportedError as error:
            raise self._unsupported(str(error)) from error
        state.own_text = text_tokens(kwargs[str(state.text)], kwargs, state.denoiser)
        state.other_texts = True

    def _parts(self, state: State, encoded: RowText) -> list[tuple[Batch, Tensor]]:
        """(what a call has of all rows, what one of them would be given), part by part."""
        kwargs = state.kwargs
        parts: list[tuple[Batch, Tensor]] = [(kwargs[str(state.text)], encoded.sequence)]
        added = kwargs.get(ADDED)
        pooled = added.get("text_embeds") if isinstance(added, Mapping) else kwargs.get(POOLED)
        if encoded.pooled is not None and isinstance(pooled, Tensor):
            parts.append((pooled, encoded.pooled))
        return parts

    def _unsupported(self, said: str) -> UnsupportedError:
        return UnsupportedError(f"{self.who}: {said}, so its prompts can't be exchanged on the way")


def _far(one: Tensor, other: Tensor) -> bool:
    one, other = one.float().cpu(), other.float().cpu()
    return float((one - other).norm()) > _CLOSE * max(float(other.norm()), 1e-6)
