"""What an editor sees of the denoising loop: one denoiser call, and the turn it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hookctl.address.clock import Clock
from hookctl.address.rows import COND, Rows
from hookctl.errors import InputError, LayoutError

Proceed = Callable[[], Any]


@dataclass(eq=False)
class State:
    """One denoiser call.

    rows, clock: who and when. kwargs: every argument of the call by name (an editor's `denoise`
    may change them before it proceeds). prompts: the texts of the run, () if unknown.
    sample: name of the argument that holds the model input; scale: what the scheduler multiplied
    the latents with to make it; text: name of the argument with the text embeddings. maps: the
    store of the session whose editor is spoken to.
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
    scale: float = 1.0
    grid: tuple[int, ...] = ()
    nested: bool = False
    extra_text: dict[str, tuple[int, int]] = field(default_factory=dict)
    own_text: int | None = None
    changed: bool = False
    maps: Any = None
    _stepped: Tensor | None = None

    @property
    def latents(self) -> Tensor:
        """[pictures, channels, ...] in the scheduler's own space.

        Before the step: the noisy latents of this turn; in `after`: the step's result.
        """
        if self._stepped is not None:
            return self._stepped
        model_input = self.kwargs[self.sample]
        first = self.rows[0].branch
        rows = [row.index for row in self.rows.where(branch=first)]
        pictures = model_input[rows[0] : rows[-1] + 1]
        return pictures if self.scale == 1.0 else pictures / self.scale

    @latents.setter
    def latents(self, value: Tensor) -> None:
        now = self.latents
        if value.shape != now.shape:
            raise InputError(
                f"state.latents = {tuple(value.shape)}; this run draws {tuple(now.shape)}"
            )
        if self._stepped is not None:
            self._stepped = value.to(now)
        else:
            model_input = self.kwargs[self.sample]
            groups = model_input.shape[0] // value.shape[0]
            scaled = value if self.scale == 1.0 else value * self.scale
            repeats = (groups, *([1] * (value.dim() - 1)))
            self.kwargs[self.sample] = scaled.to(model_input).repeat(repeats)
        self.changed = True

    @property
    def pictures(self) -> Rows:
        """The rows of `latents`: one for each picture, with its prompt and image."""
        first = self.rows[0].branch
        return Rows(
            [
                type(row)(i, row.branch, row.prompt, row.image)
                for i, row in enumerate(self.rows.where(branch=first))
            ]
        )


@dataclass(eq=False)
class Predictions:
    """The predictions of one turn.

    guided: what the pipeline made of them and would hand to the scheduler, [pictures, ...];
    branches: branch -> its rows' predictions, [pictures, ...].
    """

    guided: Tensor
    branches: Mapping[str, Tensor]
    state: State

    def __getitem__(self, branch: str) -> Tensor:
        try:
            return self.branches[branch]
        except KeyError:
            raise LayoutError(
                f"this turn has no predictions of branch {branch!r}; it has: "
                f"{', '.join(self.branches)}"
            ) from None


def check_finite(latents: Any) -> None:
    """Raise InputError if the latents that a run starts from hold NaN or infinity."""
    if isinstance(latents, Tensor) and latents.is_floating_point():
        bad = int((~torch.isfinite(latents)).sum())
        if bad:
            raise InputError(
                f"latents hold {bad} values that are NaN or infinite (of {latents.numel()}); "
                "check the latents= given, or what produced them"
            )


def split_branches(rows: Rows, prediction: Tensor) -> dict[str, Tensor]:
    """Branch -> the predictions of its rows, in batch order."""
    order: dict[str, list[int]] = {}
    for row in rows:
        order.setdefault(row.branch or COND, []).append(row.index)
    return {branch: prediction[index[0] : index[-1] + 1] for branch, index in order.items()}
