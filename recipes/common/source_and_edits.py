"""A source and its edits, drawn in one batch from one noise: what such recipes share."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from hookctl.address.rows import COND, Row, Rows
from hookctl.arguments import checked, is_list, is_text, refusal
from hookctl.attention.call import AttentionCall
from hookctl.editor import Editor
from hookctl.errors import HookctlWarning, InputError, UnsupportedError
from hookctl.loop.run import check_batch
from hookctl.loop.state import State
from hookctl.run_state import RunState
from hookctl.session import control


class SourceAndEdits(Editor):
    """Base of recipes whose prompts are the source's, then those of its edits.

    least: how many prompts there must be; one_noise: whether an edit is meant to start from its
    source's noise.
    """

    least = 2
    one_noise = True
    _pairs: RunState[tuple[Rows, list[tuple[Row, Row]]] | None] = RunState(None)

    @checked(own=("prompts",))
    def __init__(self, prompts: Sequence[str]) -> None:
        texts = list(prompts) if is_list(prompts) else []
        if len(texts) < self.least or not all(map(is_text, texts)):
            wanted = "the source prompt" + " and at least one edit" * (self.least > 1)
            raise refusal(f"{self.name}: prompts", prompts, f"{wanted}, as a list of texts")
        self.prompts = texts

    @property
    def edits(self) -> range:
        """Indices of the edits among the prompts."""
        return range(1, len(self.prompts))

    @property
    def needs_words(self) -> bool:
        """Whether the words of the prompts are looked for; else embeddings will do."""
        return False

    def begin(self, state: State) -> None:
        if not state.prompts and not self.needs_words:
            check_batch(state, len(self.prompts), self.name)
        elif list(state.prompts) != self.prompts:
            given, cure = f"{list(state.prompts)}", f"call {state.call_with('edit.prompts')}"
            if not state.prompts:
                given = "embeddings instead of prompts"
                cure += ", or say what they mean: control(pipe, edit, texts=edit.prompts)"
            raise InputError(
                f"{self.name} edits {self.prompts}, but the pipeline was called with {given}; "
                f"{cure}"
            )
        self._check_noise(state)

    def _check_noise(self, state: State) -> None:
        """Warn if an edit starts from another noise than its source: it shows another image."""
        if not self.one_noise:
            return
        try:
            latents = state.latents
        except UnsupportedError:  # images of several sizes, which have no noise in common
            return
        images = state.images
        for row in images:
            source = images.twin(row, prompt=0)
            if not torch.equal(latents[row.index], latents[source.index]):
                warnings.warn(
                    f"{self.name}: prompt {row.prompt} starts from another noise than prompt 0, so "
                    "its image differs from the source's everywhere; call the pipeline with "
                    "generator=edit.generators(seed=0), which is one generator for each image",
                    HookctlWarning,
                    stacklevel=2,
                )
                return

    @staticmethod
    def paired(rows: Rows) -> list[tuple[Row, Row]]:
        """(row, its source's row) for every row of an edit, the unconditional ones included."""
        return [(row, rows.twin(row, prompt=0)) for row in rows if row.prompt > 0]

    def edited(self, call: AttentionCall) -> list[tuple[Row, Row]]:
        """(row, its source's row) for every row of an edit that sees the prompt.

        Rows of a perturbed guidance are edited as their prompt's are: they must differ by the
        perturbation alone.
        """
        # The rows are the same at every site of a denoiser call.
        if self._pairs is None or self._pairs[0] is not call.rows:
            pairs = [(row, source) for row, source in self.paired(call.rows) if row.role == COND]
            self._pairs = call.rows, pairs
        return self._pairs[1]

    @checked()
    def generators(self, seed: int = 0, images: int = 1, device: str = "cpu") -> list[Any]:
        """One generator for each image: every prompt starts from the same noises, and image j of
        each is seeded with seed + j; or every image from a noise of its own (`one_noise`)."""
        count = len(self.prompts)
        offsets = [*range(images)] * count if self.one_noise else range(count * images)
        return [torch.Generator(device).manual_seed(seed + i) for i in offsets]

    @checked()
    def run(
        self, pipe: Any, *editors: Editor, seed: int = 0, images: int = 1, **arguments: Any
    ) -> Any:
        """Draw the source and its edits: prompt by prompt, `images` images (or videos) of each.

        editors: further editors, after this one; arguments: of the pipeline's own call.
        Returns what the pipeline does: a list of images, or as output_type= has it. Raises
        InputError for several images of a pipeline that draws one for each prompt.
        """
        known = inspect.signature(type(pipe).__call__).parameters
        count = next((n for n in known if n.startswith("num_") and n.endswith("_per_prompt")), None)
        if count is not None:
            arguments[count] = images
        elif images != 1:
            raise InputError(f"images={images}; {type(pipe).__name__} draws one for each prompt")
        generators = self.generators(seed, images)
        with control(pipe, self, *editors):
            given = {**arguments, "return_dict": False}
            return pipe(prompt=self.prompts, generator=generators, **given)[0]
