"""NAG once more as its published processors do it: further batch rows with the negative text.

The image stands in a row with the prompt and in a copy with the negative text. Wherever it attends
to the text, the outputs of both are put together by the published lines, and both rows go on with
the result. Nothing of `hookctl` is used here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SDPA = F.scaled_dot_product_attention
SHARED = ("img_ids", "txt_ids")


def guided(z_pos: Tensor, z_neg: Tensor, s: float, tau: float, alpha: float, p: int) -> Tensor:
    """[rows, tokens, heads x channels]"""
    z_tilde = z_pos * s - z_neg * (s - 1)
    norm_pos = torch.norm(z_pos, p=p, dim=-1, keepdim=True).expand(*z_pos.shape)
    norm_tilde = torch.norm(z_tilde, p=p, dim=-1, keepdim=True).expand(*z_tilde.shape)
    ratio = norm_tilde / norm_pos
    z_hat = z_tilde * torch.minimum(ratio, ratio.new_ones(1) * tau) / ratio
    return z_hat * alpha + z_pos * (1 - alpha)


@contextmanager
def drawn_with(
    model: nn.Module,
    negative: Tensor,
    mask: Tensor | None,
    image: tuple[int, int] | None,
    cond: slice,
    *settings: Any,
    calls: int = 1,
) -> Iterator[None]:
    """Have a denoiser guide its rows `cond`.

    negative, mask: texts of these rows; image: (start, stop) of the image's tokens in a joint
    sequence, None where texts are attended to separately; settings: s, tau, alpha, p; calls: how
    many the pipeline makes in a step, of which the first is guided.
    """
    forward, signature = model.forward, inspect.signature(type(model).forward)
    made = 0

    def doubled(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        made += 1
        if (made - 1) % calls:
            return forward(*args, **kwargs)
        given = dict(signature.bind(model, *args, **kwargs).arguments)
        del given["self"]
        rows = len(given["encoder_hidden_states"])
        for name, value in given.items():
            if name == "added_cond_kwargs" and value is not None:
                added = {k: x for k, x in value.items() if x is not None}
                given[name] = {**value, **{k: torch.cat([x, x[cond]]) for k, x in added.items()}}
            if name in SHARED or not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if name == "encoder_hidden_states":
                given[name] = torch.cat([value, negative.to(value)])
            elif name == "encoder_attention_mask":
                assert mask is not None
                given[name] = torch.cat([value, mask.to(value)])
            elif len(value) == rows:
                given[name] = torch.cat([value, value[cond]])
        with mock.patch.object(F, "scaled_dot_product_attention", attend(rows)):
            out = forward(**given)
        return (out[0][:rows],) if isinstance(out, tuple) else type(out)(out.sample[:rows])

    def attend(rows: int) -> Any:
        def sdpa(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            out, q, k = SDPA(query, key, value, *args, **kwargs), query, key
            if image is None and q.shape[-2] == k.shape[-2] and q.shape[-2] != negative.shape[1]:
                return out  # the image alone
            start, stop = image or (0, q.shape[-2])
            merged = out.transpose(1, 2).flatten(2)
            both = merged[:rows][cond], merged[rows:]
            new = guided(*(z[:, start:stop] for z in both), *settings)
            for part in both:
                part[:, start:stop] = new
            return merged.unflatten(2, (q.shape[1], -1)).transpose(1, 2)

        return sdpa

    with mock.patch.object(model, "forward", doubled):
        yield


@contextmanager
def drawn_in_rows(
    model: nn.Module, negatives: list[Tensor], image: tuple[int, int], *settings: Any
) -> Iterator[None]:
    """Have a denoiser that takes lists of images and texts (Z-Image) guide its first rows.

    negatives: texts of these rows, each at its own length; image: tokens of the image, which come
    first, without and with their padding, which goes on as in the prompt's row; settings: s, tau,
    alpha, p.
    """
    forward, count, (tokens, padded) = model.forward, len(negatives), image

    def doubled(x: Any, t: Tensor, texts: Any, **kwargs: Any) -> Any:
        rows, kept = len(x), list(x)
        many = [*texts, *(one.to(texts[0]) for one in negatives)]
        every = [layer.attention for layer in model.layers]
        with inside(every, rows):
            (out,) = forward([*kept, *kept[:count]], torch.cat([t, t[:count]]), many, **kwargs)
        return (out[:rows],)

    @contextmanager
    def inside(modules: Any, rows: int) -> Iterator[None]:
        """The joint layers alone guide, not the refiners."""
        joint: list[bool] = []

        def sdpa(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            out = SDPA(query, key, value, *args, **kwargs)
            if not joint:
                return out
            merged = out.transpose(1, 2).flatten(2)
            own, other = merged[:count], merged[rows:]
            own[:, :tokens] = guided(own[:, :tokens], other[:, :tokens], *settings)
            other[:, :padded] = own[:, :padded]
            return merged.unflatten(2, (query.shape[1], -1)).transpose(1, 2)

        handles = [m.register_forward_pre_hook(lambda *_: joint.append(True)) for m in modules]
        handles += [m.register_forward_hook(lambda *_: joint.remove(True)) for m in modules]
        try:
            with mock.patch.object(F, "scaled_dot_product_attention", sdpa):
                yield
        finally:
            for handle in handles:
                handle.remove()

    with mock.patch.object(model, "forward", doubled):
        yield
