"""Other prompts for rows of a denoiser call, of any number of tokens.

The texts are encoded one by one, as the pipeline would encode each alone. Where rows of one call
have texts of several lengths they are padded under the model's mask, as the pipeline pads a batch.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address import families, pipelines
from hookctl.address.latent import text_tokens
from hookctl.errors import UnsupportedError
from hookctl.hooks.caches import TEXTS, cache_of
from hookctl.loop.prompts import Encoded, encode
from hookctl.loop.state import State

_MASKS = ("encoder_hidden_states_mask", "encoder_attention_mask")
_POOLED, _ADDED = "pooled_projections", "added_cond_kwargs"
_FROM_TEXTS = re.compile(r"encoder_|text|pooled|caption|prompt|byt5|llama")
_CLOSE = 1e-2  # relative: batches of other sizes are summed in other orders, in half precision too

Batch = Tensor | list[Tensor]


class PromptRows:
    """Prompts of a run, to be put in rows of its calls.

    who: the editor, for errors. Raises UnsupportedError for a pipeline that can't encode them.
    """

    def __init__(self, state: State, texts: Iterable[str], who: str) -> None:
        self.who, self._name = who, type(state.pipe).__name__
        if state.text is None:
            raise self._unsupported("gives its denoiser no text")
        self._texts: dict[str, Encoded] = {
            text: encode(state.pipe, [text], state.encoding, with_images=True)
            for text in dict.fromkeys(texts)
        }

    def check(self, state: State, rows: Mapping[int, str]) -> None:
        """Raise UnsupportedError unless these are what the pipeline itself gave some rows."""
        self._check_names(state)
        self._check_kept(state)
        for row, text in rows.items():
            for batch, value in self._parts(state, self._texts[text]):
                given = batch[row * _repeats(batch, state)]
                if given.shape != value.shape and len(given) > len(value):
                    value = _padded(value, len(given))  # to its neighbours
                if given.shape != value.shape or _far(value, given):
                    raise self._unsupported(
                        f"does not give its denoiser what its encode_prompt makes of {text!r}; "
                        "leave out prompt_2= and its kin, and embeddings"
                    )

    def _check_names(self, state: State) -> None:
        """Refuse what is made of the texts and is not known to be, or is of their length."""
        told = pipelines.encoded_places(state.pipe)
        known = {
            state.text,
            *(_MASKS if "mask" in told else ()),
            *((_POOLED,) if "pooled" in told else ()),
        }
        for name, value in state.kwargs.items():
            if name not in known and isinstance(value, Tensor | list) and _FROM_TEXTS.search(name):
                raise self._unsupported(f"makes {name} of its texts too, in a way not declared")

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
        found = {row: self._texts[text] for row, text in rows.items()}
        before = kwargs[str(state.text)]
        text = _with(before, {row: _alone(one.sequence) for row, one in found.items()}, state)
        if text is None:
            raise self._unsupported("has texts of a form unknown here")
        kwargs[str(state.text)] = text
        pooled = {row: one.pooled[0] for row, one in found.items() if one.pooled is not None}
        if pooled and isinstance(kwargs.get(_POOLED), Tensor):
            kwargs[_POOLED] = _with(kwargs[_POOLED], pooled, state)
        added = kwargs.get(_ADDED)
        if pooled and isinstance(added, Mapping) and "text_embeds" in added:
            embeds = _with(added["text_embeds"], pooled, state)
            kwargs[_ADDED] = {**added, "text_embeds": embeds}
        if isinstance(text, Tensor) and isinstance(before, Tensor):
            if text.shape[1] != before.shape[1] and kwargs.get("txt_ids") is not None:
                raise self._unsupported("numbers the tokens of its texts")
            self._mask(state, found, before.shape[1], text.shape[1])
        state.own_text = text_tokens(text, kwargs, state.denoiser)
        state.other_texts = True

    def _mask(self, state: State, found: Mapping[int, Encoded], before: int, now: int) -> None:
        """Let the model see of each row's text what counts."""
        kwargs = state.kwargs
        name = next((one for one in _MASKS if isinstance(kwargs.get(one), Tensor)), None)
        lengths = {_alone(one.sequence).shape[0] for one in found.values()}
        lengths |= set() if len(found) == len(state.rows) else {before}
        hidden = any(one.mask is not None and not bool(one.mask.all()) for one in found.values())
        if name is None and len(lengths) == 1 and not hidden:
            return
        if name is None:
            forward = inspect.signature(type(families.uncompiled(state.denoiser)).forward)
            name = next((one for one in _MASKS if one in forward.parameters), None)
            # An encoder may tell of padding that the pipeline keeps to itself.
            if name is None or (len(lengths) == 1 and kwargs.get(name, name) == name):
                if len(lengths) == 1:
                    return
                raise self._unsupported("has no mask for texts of several lengths in one batch")
        own = kwargs.get(name)
        if not isinstance(own, Tensor):
            own = torch.ones(len(state.rows), before, dtype=torch.bool)
        if own.dim() != 2:
            raise self._unsupported("has a mask of a form unknown here")
        masks = {
            row: torch.ones(len(_alone(one.sequence))) if one.mask is None else one.mask[0]
            for row, one in found.items()
        }
        new = _with(F.pad(own, (0, now - before)) if now > before else own[:, :now], masks, state)
        assert isinstance(new, Tensor)
        device = kwargs[str(state.text)].device
        kwargs[name] = None if name == _MASKS[0] and bool(new.bool().all()) else new.to(device)

    def _parts(self, state: State, encoded: Encoded) -> list[tuple[Batch, Tensor]]:
        """(what a call has of all rows, what one of them would be given), part by part."""
        kwargs = state.kwargs
        parts: list[tuple[Batch, Tensor]] = [(kwargs[str(state.text)], _alone(encoded.sequence))]
        added = kwargs.get(_ADDED)
        pooled = added.get("text_embeds") if isinstance(added, Mapping) else kwargs.get(_POOLED)
        if encoded.pooled is not None and isinstance(pooled, Tensor):
            parts.append((pooled, encoded.pooled[0]))
        return parts

    def _unsupported(self, said: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.who}: {self._name} {said}, so its prompts can't be exchanged on the way"
        )


def _alone(sequence: Tensor) -> Tensor:
    """The text of a batch of one, [tokens, channels]."""
    return sequence[0]


def _repeats(batch: Batch, state: State) -> int:
    """How often a row stands in a batch: video models repeat it for every frame."""
    return max(1, len(batch) // len(state.rows))


def _with(batch: Batch, rows: Mapping[int, Tensor], state: State) -> Batch | None:
    """A batch with some rows replaced, as long as the longest; None if they are of another form."""
    repeats = _repeats(batch, state)
    places = {row * repeats + i: value for row, value in rows.items() for i in range(repeats)}
    every: Sequence[Tensor] = [places.get(i, own) for i, own in enumerate(batch)]
    like = batch[0]
    if any(one.dim() != like.dim() or one.shape[1:] != like.shape[1:] for one in every):
        return None
    every = [one.to(like) for one in every]
    if isinstance(batch, list):
        return list(every)
    if like.dim() < 2:
        return torch.stack(list(every)) if len({len(one) for one in every}) == 1 else None
    longest = max(len(one) for one in every)
    return torch.stack([_padded(one, longest) for one in every])


def _padded(text: Tensor, tokens: int) -> Tensor:
    return F.pad(text, (0, 0, 0, tokens - len(text)))


def _far(one: Tensor, other: Tensor) -> bool:
    one, other = one.float().cpu(), other.float().cpu()
    return float((one - other).norm()) > _CLOSE * max(float(other.norm()), 1e-6)
