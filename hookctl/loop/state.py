"""What an editor sees of the denoising loop: one denoiser call, and the step it belongs to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from hookctl.address import families
from hookctl.address.clock import Clock
from hookctl.address.latent import latent_axes
from hookctl.address.rows import COND, Rows
from hookctl.address.sites import ImageTokens
from hookctl.attention.query_lists import TextPlace
from hookctl.attention.text_rows import TextRows
from hookctl.errors import InputError, LayoutError, UnsupportedError
from hookctl.evaluate.one_call import Reader
from hookctl.loop.driven import Reading, Scaling
from hookctl.loop.model_input import dtype_of, latents_of, with_latents

Proceed = Callable[[], Any]
Handed = Callable[[Tensor, Tensor], Tensor]  # (a branch's prediction, the latents that it is of)


@dataclass(eq=False)
class State:
    """One denoiser call. An editor may assign `latents`, and change `kwargs` before `proceed`.

    latents: [images, channels, [frames,] height, width] in the scheduler's space: in `before` and
        `denoise` the noisy ones of this step, in `after` what the step made of them.
    images: whose they are, a `Row` for each.
    rows: whose the batch rows of the call are (`Rows`); a guided call has several for each image.
    clock: when (`Clock`): the step, of how many.
    prompts: the texts of the run, `prompts[row.prompt]`; () if the pipeline was given embeddings.
    images_per_prompt: how many images each prompt gets.
    encoding: how the pipeline encoded the prompts: arguments of its `encode_prompt` by name.
    kwargs: every argument of the call by its name in the denoiser's `forward`.
    sample: which of them is the model input, [rows, channels, [frames,] height, width], or a list
        of one for each row; dtype: of it.
    text: which of them has the text embeddings, [rows, tokens, channels], or a list of one for each
        row; None if none has.
    grid: sides of the latent, ([frames,] height, width), in latent pixels.
    denoiser, pipe: the model, and its pipeline (None for a bare denoiser).
    maps: the `MapStore` of the session that the editor belongs to (in `begin`).
    nested: whether an editor made this call, inside another.

    For those who make calls of their own (`loop.calls.predict`):
    scaling: how the scheduler made the model input from the latents, None where it is the latents.
    images_in_sequence: the images that stand in one sequence, where the arguments tell them.
    own_text: tokens of the pipeline's own text; extra_text: where texts that editors added stand
        behind it, by name; text_rotations: how positions rotate it (`latent.text_rotations`).
        text_rows: where further texts stand in rows of their own, and further_texts: those.
    own_rows: how many rows are the pipeline's own, None for all.
    asking: the rows of a call that an editor makes inside this one, None for this one's.
    reading: whose maps the call is made for, None for an ordinary one (`energy`).
    residuals: what editors add to the encoder (`Residuals`), None for nothing.
    other_texts: whether an editor put other prompts in the place of the pipeline's; part: whether
    one shows the model a part of the image, whose sides `grid` has, or a region's text for it.
    assigned: latents that an editor gave the step, None for none; noisy: those that the step is of,
    once it is taken; stepped: its result.
    added_guidance: what editors have added to the step's guided sum, [images, ...], None for none.
    """

    denoiser: nn.Module
    pipe: Any
    rows: Rows
    clock: Clock
    kwargs: dict[str, Any]
    sample: str
    text: str | None = None
    prompts: tuple[str, ...] = ()
    images_per_prompt: int = 1
    encoding: Mapping[str, Any] = field(default_factory=dict)
    scaling: Scaling | None = None
    grid: tuple[int, ...] = ()
    nested: bool = False
    extra_text: dict[str, TextPlace] = field(default_factory=dict)
    own_text: int | None = None
    text_rotations: Tensor | None = None
    text_rows: TextRows | None = None
    further_texts: Sequence[Tensor] = ()
    images_in_sequence: ImageTokens | None = None
    own_rows: int | None = None
    asking: Rows | None = None
    reading: Reading | None = None
    maps: Any = None
    residuals: Any = None
    other_texts: bool = False
    part: bool = False
    assigned: Tensor | None = None
    noisy: Tensor | None = None
    stepped: Tensor | None = None
    added_guidance: Tensor | None = None

    @property
    def reader(self) -> Reader | None:
        """Whose read-outs alone are served in this call, None for everyone's."""
        return None if self.reading is None else Reader(self.reading.reader)

    def call_with(self, prompts: str) -> str:
        """How the pipeline is called with prompts, for errors: by name where they don't come first
        (klein and edit pipelines, which would take them for images)."""
        known = [] if self.pipe is None else inspect.signature(type(self.pipe).__call__).parameters
        return f"pipe({prompts if list(known)[1:2] == ['prompt'] else f'prompt={prompts}'}, ...)"

    @property
    def dtype(self) -> torch.dtype:
        """Of the model input."""
        return dtype_of(self.kwargs[self.sample])

    @property
    def axes(self) -> str:
        """Of `latents`, in order (`latent_axes`)."""
        return latent_axes(self.denoiser, self.latents.dim())

    @property
    def projects_texts_alone(self) -> bool:
        """Whether the denoiser makes keys and values of each text token for itself, so that it
        does not matter in which batch row a text stands."""
        record = families.model_of(self.denoiser)
        return record is not None and record.texts_apart

    @property
    def latents(self) -> Tensor:
        """[images, channels, ...] in the scheduler's own space.

        Before the step: the noisy latents of this step; in `after`: the step's result.
        """
        if self.stepped is not None:
            return self.stepped
        if self.assigned is not None:
            return self.assigned
        if self.noisy is not None:
            return self.noisy
        first = self.rows[0].branch
        rows = [row.index for row in self.rows.where(branch=first)]
        source = self.kwargs[self.sample] if self.scaling is None else self.scaling.latents
        images = latents_of(source[rows[0] : rows[-1] + 1], self.denoiser)
        span = self.own_span if self.scaling is None else None
        return images if span is None else images.narrow(*span)

    @latents.setter
    def latents(self, value: Tensor) -> None:
        now = self.latents
        if value.shape != now.shape:
            raise InputError(
                f"state.latents = {tuple(value.shape)}; this run draws {tuple(now.shape)}"
            )
        if self.stepped is not None:
            self.stepped = value.to(now)
            return
        model_input = self.kwargs[self.sample]
        rows = value.repeat(len(self.rows) // value.shape[0], *([1] * (value.dim() - 1)))
        self.kwargs[self.sample] = self.model_input(rows, model_input)
        self.assigned = value

    def model_input(self, latents: Tensor, like: Any) -> Any:
        """What the denoiser is given of some latents, [rows, ...], in the place of `like`."""
        rows = latents if self.scaling is None else self.scaling.again(latents)
        return self.with_latents(rows, like)

    def with_latents(self, rows: Tensor, like: Any) -> Any:
        """A model input with latents, [rows, ...] and as the model sees them, in the place of the
        own ones of `like`, behind which joined images stay as they are."""
        span = self.own_span
        if span is None or rows.shape[span[0]] != span[2]:
            own = self.noisy if self.scaling is None else None
            return with_latents(like, rows, self.denoiser, own)
        dim, start, size = span
        stop = start + size
        behind = like.narrow(dim, stop, like.shape[dim] - stop)
        return torch.cat([like.narrow(dim, 0, start), rows.to(like), behind], dim)

    @property
    def own_span(self) -> tuple[int, int, int] | None:
        """(dim, start, length) of the latents in a model input to which the pipeline joins images:
        along the sequence, as its arguments tell, or along the channels, where that is declared;
        None where nothing is joined, or it is not known what."""
        given, images = self.kwargs[self.sample], self.images_in_sequence
        if not isinstance(given, Tensor):
            return None
        if given.dim() == 3 and images is not None and images.references:
            start, stop = images.span
            return 1, start, stop - start
        channels = families.own_channels(self.pipe, self.denoiser)
        at = latent_axes(self.denoiser, given.dim()).index("c")
        return (at, 0, channels) if channels is not None and channels < given.shape[at] else None

    @property
    def images(self) -> Rows:
        """The rows of `latents`: one for each image, with its prompt and image."""
        first = self.rows[0].branch
        return Rows(
            [
                type(row)(i, row.branch, row.prompt, row.image)
                for i, row in enumerate(self.rows.where(branch=first))
            ]
        )


@dataclass(eq=False)
class Predictions:
    """What the denoiser predicted in one step: `predictions[COND]` is a branch of it.

    guided: what the scheduler would be given, [images, channels, [frames,] height, width]: what
        the pipeline made of the branches, and the editors before this one of that.
    branches: branch -> the predictions of its rows, shaped like `guided`, those of rows that
        editors added among them.
    state: the denoiser call; the last one, where a step has several.
    own: what the pipeline alone made of the branches, None if unknown.
    options: of the scheduler's step that follows, by name, such as eta and generator.
    handed: what the pipeline hands the scheduler of a branch's prediction, of those latents, which
        is what `branches` has.
    """

    guided: Tensor
    branches: Mapping[str, Tensor]
    state: State
    own: Tensor | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    handed: Handed = lambda prediction, of: prediction

    def __getitem__(self, branch: str) -> Tensor:
        try:
            found = self.branches[branch]
        except KeyError:
            raise LayoutError(
                f"this step has no predictions of branch {branch!r}; it has: "
                f"{', '.join(self.branches)}"
            ) from None
        if found.shape[1:] != self.guided.shape[1:]:
            raise UnsupportedError(
                f"{type(self.state.pipe).__name__} makes {tuple(self.guided.shape)} of its "
                f"denoiser's prediction {tuple(found.shape)} before the scheduler's step, in a way "
                "unknown here, so predictions can't be combined anew"
            )
        return found


def split_branches(rows: Rows, prediction: Tensor) -> dict[str, Tensor]:
    """Branch -> the predictions of its rows, in batch order."""
    order: dict[str, list[int]] = {}
    for row in rows:
        order.setdefault(row.branch or COND, []).append(row.index)
    return {branch: prediction[index[0] : index[-1] + 1] for branch, index in order.items()}


@dataclass(eq=False)
class FeatureCall:
    """One skip connection of a UNet, where a decoder block joins encoder features to its own.

    backbone: the decoder's own features, [rows, channels, height, width]; assign to change them.
    skip: the encoder's, [rows, their channels, height, width]; assign to change them.
    rows: whose the batch rows are (`Rows`).
    clock: when (`Clock`).
    block: index of the decoder block, from 0, the coarsest.
    place: which connection of that block, from 0.
    order: which connection of the decoder, from 0.
    resolution: of the features, relative to the latent, such as 1/4.
    """

    backbone: Tensor
    skip: Tensor
    rows: Rows
    clock: Clock
    block: int
    place: int
    order: int
    resolution: Fraction
