"""Energies: a scalar of each image's attention maps or latents, and its gradient.

    found = energies(state, scalar, reader=self, sites=paths, tokens={0: (2, 5)})
    state.latents = state.latents - step * found.gradient

The maps come from a denoiser call of the energy's own, of the rows that see the prompt alone. It
passes the hooks like any other, so every editor of the stack that changes the model acts in it, and
it ends as soon as the last site has been read: what lies behind that is neither computed nor
differentiated. Parameters are frozen meanwhile, whatever the pipeline's mode. Rows of a call do not
see each other (unless an editor makes them), so the gradient of the sum over images is each
image's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from hookctl.address.families import uncompiled
from hookctl.address.rows import COND, Row
from hookctl.address.sites import Grid, Selector, Site
from hookctl.attention.call import AttentionCall
from hookctl.editor import Editor
from hookctl.errors import HoleError, InputError, LayoutError
from hookctl.loop.arguments import narrow, take_rows
from hookctl.loop.calls import predict
from hookctl.loop.driven import Reading, reading_in
from hookctl.loop.state import State
from hookctl.run_state import RunState

# Gradients of float16 calls are multiplied by the first of these and divided again, or small ones
# would vanish; where large ones overflow, by the next.
_HALF_SCALES = tuple(2.0**n for n in range(10, -21, -5))

Key = tuple[int, int]  # prompt, image


@dataclass(frozen=True, eq=False)
class ImageMaps:
    """What an energy sees of one image.

    row: whose it is; latents: [channels, ...], in the scheduler's space; maps: for each site that
    was read [frames, heads, height, width, tokens], with heads = 1 for their mean.
    """

    row: Row
    latents: Tensor
    maps: Mapping[Site, Tensor]


Scalar = Callable[[ImageMaps], Tensor]


@dataclass(frozen=True, eq=False)
class Energies:
    """The energies of a call: one row of terms for each image, and the gradient.

    terms: [images, k]; the first is the energy, the others are what the scalar reports beside it.
    gradient: of the energy, in the shape of what it was taken to; None if none was asked for.
    """

    terms: Tensor
    gradient: Tensor | None

    @property
    def values(self) -> Tensor:
        """[images]"""
        return self.terms[:, 0]


class _AllRead(Exception):
    """Every map that was wanted has been read: the rest of the model need not run."""


@dataclass(eq=False)
class _Collection:
    """The maps of one call, as they come in."""

    sites: frozenset[str]
    tokens: Mapping[int, Sequence[int]]
    heads: bool
    pending: set[tuple[str, Key]]
    early: bool
    who: str = "energy"
    maps: dict[Key, dict[Site, Tensor]] = field(default_factory=dict)

    def ask(self, call: AttentionCall) -> None:
        if call.site.path not in self.sites:
            return
        grid = call.require_grid(self.who)
        for row in call.rows.where(branch=COND):
            if tokens := self.tokens.get(row.prompt):
                call.read(row, tokens, partial(self._keep, call.site, grid), heads=self.heads)

    def _keep(self, site: Site, grid: Grid, row: Row, values: Tensor) -> None:
        """values: [sub-batch, (heads,) N, tokens]."""
        if not self.heads:
            values = values[:, None]
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        laid = values.unflatten(2, (grid.frames, grid.height, grid.width))
        key = (row.prompt, row.image)
        self.maps.setdefault(key, {})[site] = laid.movedim(2, 1).flatten(0, 1)
        self.pending.discard((site.path, key))
        if self.early and not self.pending:
            raise _AllRead


class MapReader(Editor):
    """An editor that reads maps by denoiser calls of its own; the pipeline's calls it leaves alone.

    sites: those that it may read; heads: whether it wants a map of each head.
    """

    sites: Selector = "cross, joint"
    heads = False
    _collection: RunState[_Collection | None] = RunState(None)

    def attention(self, call: AttentionCall) -> None:
        collection = self._collection
        if collection is not None:
            collection.ask(call)


def energies(
    state: State,
    scalar: Scalar,
    *,
    reader: MapReader | None = None,
    sites: Collection[str] = (),
    tokens: Mapping[int, Sequence[int]] | None = None,
    latents: Tensor | None = None,
    text: Tensor | None = None,
    wrt: str | Tensor | None = "latents",
    heads: bool | None = None,
    early_exit: bool = True,
) -> Energies:
    """The energy of each image of a denoiser call, and its gradient.

    Receives: the call; the energy of one image, a number or [k] whose first entry counts; the
    editor of the stack that reads, the paths of the sites and the text positions of each prompt
    (none of these for an energy of the latents alone); other latents [images, ...] in the
    scheduler's space, or another text [1 | images, tokens, channels], in place of the call's;
    wrt, what to differentiate to: "latents", "text", None, or a tensor on which the latents or the
    text that were given depend; heads, whether maps are of each head (by default as the reader
    says).
    Returns: float32 or finer, in the order of `state.images`.
    Raises InputError inside `torch.inference_mode()`, LayoutError without rows that see the prompt.
    """
    if torch.is_inference_mode_enabled():
        raise InputError("an energy has no gradient in torch.inference_mode(); use torch.no_grad()")
    rows = state.rows.where(branch=COND)
    if not rows:
        raise LayoutError(
            f"no row of this call sees the prompt; its rows are: {state.rows!r}. A pipeline that "
            "guides by a call for each branch has its energies in the prompt's own"
        )
    with frozen(state.denoiser), torch.set_grad_enabled(wrt is not None):
        x = _fine(state.latents if latents is None else latents)
        words = _text_of(state, rows) if text is None and wrt == "text" else text
        if wrt == "latents":
            x = x.detach().requires_grad_()
        elif wrt == "text" and words is not None:
            words = _fine(words).detach().requires_grad_()
        leaf = {"latents": x, "text": words}.get(wrt) if isinstance(wrt, str) else wrt
        if wrt is not None and leaf is None:
            raise InputError(f"wrt={wrt!r}; give 'latents', 'text' (if there is one) or a tensor")
        each = reader is not None and reader.heads if heads is None else heads
        collection = _collection(rows, sites, tokens or {}, reader, each, early_exit)
        # Open until the gradient is there: a backward pass may recompute parts of the call.
        reading = Reading(uncompiled(state.denoiser), reader)
        with _collecting(reader, collection), reading_in(reading):
            if collection.pending:
                with suppress(_AllRead):
                    predict(state, rows, latents=x, text=words)
            if collection.pending:
                raise HoleError(
                    f"the maps of {min(collection.pending)[0]!r} were wanted, but a whole denoiser "
                    "call didn't show them; is the reader in the stack of control(...)?"
                )
            terms = torch.stack(
                [
                    torch.atleast_1d(scalar(ImageMaps(row, one, collection.maps.get(key, {}))))
                    for row, one in zip(rows, x, strict=True)
                    for key in [(row.prompt, row.image)]
                ]
            )
            gradient = None
            if leaf is not None:
                dtype = state.dtype
                (gradient,) = gradients(terms[:, 0].sum(), [leaf], dtype)
    return Energies(terms.detach(), gradient)


def gradients(total: Tensor, leaves: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Of a scalar that a model of this dtype led to, zeros where it does not depend on a leaf.

    Not finite only if no scale keeps a float16 model's so.
    """
    if not total.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    scales = _HALF_SCALES if dtype == torch.float16 else (1.0,)
    for scale in scales:
        found = torch.autograd.grad(
            total * scale,
            leaves,
            retain_graph=scale != scales[-1],
            allow_unused=True,
            materialize_grads=True,
        )
        if scale == scales[-1] or all(one.isfinite().all() for one in found):
            break
    return tuple(one / scale for one in found)


def _collection(
    rows: Sequence[Row],
    sites: Collection[str],
    tokens: Mapping[int, Sequence[int]],
    reader: MapReader | None,
    heads: bool,
    early: bool,
) -> _Collection:
    keys = [(row.prompt, row.image) for row in rows if tokens.get(row.prompt)]
    pending = {(path, key) for path in sites for key in keys} if reader is not None else set()
    who = "energy" if reader is None else reader.name
    return _Collection(frozenset(sites), tokens, heads, pending, early, who)


@contextmanager
def _collecting(reader: MapReader | None, collection: _Collection) -> Iterator[None]:
    """The reader asks for maps meanwhile: in the call, and where a backward recomputes it."""
    if reader is None:
        yield
        return
    reader._collection = collection
    try:
        yield
    finally:
        reader._collection = None


def _text_of(state: State, rows: Sequence[Row]) -> Tensor | None:
    """The text of some rows of the call, without what editors appended."""
    arguments = take_rows(state, [(rows[0].index, rows[-1].index + 1)])
    narrow(state, arguments)
    found = arguments.get(str(state.text))
    return found if isinstance(found, Tensor) else None


def _fine(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradient to parameters and no dropout meanwhile."""
    learning = [p for p in model.parameters() if p.requires_grad]
    training = [m for m in model.modules() if m.training]

    def back() -> None:
        for parameter in learning:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True

    try:
        try:
            for parameter in learning:
                parameter.requires_grad_(False)
            for module in training:
                module.training = False
            yield
        finally:
            back()
    finally:
        back()  # what an interrupt of the first time left out
