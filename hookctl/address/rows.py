"""Who: the branch, prompt, image and frame of every batch row of one denoiser call.

Pipelines lay their batches out in different orders, change them in mid-loop and tell nobody
(`Layout`). Rows are therefore resolved anew for every denoiser call, from the batch size, the
number of images that the pipeline is drawing and the layout of its family. A batch that fits no
known layout is an error, never a guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from hookctl.errors import LayoutError

COND, UNCOND, PERTURBED, IMAGE = "cond", "uncond", "perturbed", "image"


@dataclass(frozen=True)
class Row:
    """One batch row of a denoiser call: `x[row.index]` is its part of a batch x.

    index: place in the batch, from 0.
    branch: what the row predicts: COND ("cond", with the prompt), UNCOND ("uncond", with the
        negative one), "perturbed" (of a guidance by perturbation), "image" (of an edit model), or
        the name that an editor's `branches` gave it.
    prompt: index of the run's prompt that it belongs to, from 0.
    image: which of that prompt's images it draws, from 0.
    copied: the branch that an added row copies with its text, None for a row of the pipeline's own
        or with a text of its own.
    """

    index: int
    branch: str
    prompt: int
    image: int
    copied: str | None = None

    @property
    def role(self) -> str:
        """The branch whose edits the row must have: a perturbed one differs by its perturbation
        alone."""
        return self.copied or self.branch


@dataclass(frozen=True)
class Layout:
    """How a family lays out guidance branches.

    groups: for each number of row groups in one call, the branch of each group in batch order.
    sequential: where guidance is several calls in one step, the branch of each call in order.
    unguided: as `groups`, while the pipeline reports that classifier-free guidance is off.
    whole: the one group of a call may be guided, since the model was taught its guidance.
    """

    groups: Mapping[int, tuple[str, ...]]
    sequential: tuple[str, ...] = ()
    unguided: Mapping[int, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    whole: bool = False

    def known(self, guided: bool | None) -> dict[int, tuple[str, ...]]:
        """The groups that a call may have; guided: whether the pipeline guides, None unknown."""
        known = dict(self.groups)
        if guided is False:
            known |= dict(self.unguided)
        if guided is None:  # what depends on it is not known
            known = {n: g for n, g in known.items() if self.unguided.get(n, g) == g}
        if guided and not self.whole and max(known) > 1 and known.get(1) == (COND,):
            del known[1]  # a guided call has more
        return known

    def images(self, batch: int, guided: bool | None) -> int | None:
        """How many images the rows of a call are, None where that depends on more than `guided`."""
        if self.sequential or len(self.groups) == 1:
            return batch // max(self.groups)
        if guided is None:
            return None
        sizes = self.known(guided)
        size = min(sizes) if guided is False else max(sizes)
        return batch // size if batch % size == 0 and (guided is False or len(sizes) == 1) else None


BATCHED = Layout({1: (COND,), 2: (UNCOND, COND)})
POSITIVE_FIRST = Layout({1: (COND,), 2: (COND, UNCOND)})
SEQUENTIAL = Layout({1: (COND,)}, sequential=(COND, UNCOND))
# One call of the conditional rows: guidance is embedded, distilled, or unknown to the model.
ALONE = Layout({1: (COND,)}, whole=True)
# A second call of the positive rows alone is skip-layer guidance.
BATCHED_THEN_SKIP = Layout({1: (PERTURBED,), 2: (UNCOND, COND)}, unguided={1: (COND,)})
PAG = Layout(
    {1: (COND,), 2: (UNCOND, COND), 3: (UNCOND, COND, PERTURBED)}, unguided={2: (COND, PERTURBED)}
)
PIX2PIX = Layout({1: (COND,), 3: (COND, IMAGE, UNCOND)})


class Rows(Sequence[Row]):
    """The rows of one denoiser call, in batch order: a sequence of `Row`.

    for row in call.rows.where(branch=COND): ...
    source = call.rows.twin(row, prompt=0)
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = tuple(rows)
        self._by_key = {(r.branch, r.prompt, r.image): r for r in self._rows}
        self._found: dict[tuple[object, ...], tuple[Row, ...]] = {}  # every site asks the same

    def __getitem__(self, index):
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def __repr__(self) -> str:
        return " ".join(f"{r.branch}[{r.prompt}.{r.image}]" for r in self._rows)

    def where(
        self,
        branch: str | None = None,
        prompt: int | None = None,
        image: int | None = None,
        role: str | None = None,
    ) -> tuple[Row, ...]:
        """The rows that have all the given tags, () if none has.

        role: as `branch`, but a perturbed row has that of the branch it copies.
        """
        tags = branch, prompt, image, role
        if tags not in self._found:
            self._found[tags] = tuple(
                r
                for r in self._rows
                if (branch is None or r.branch == branch)
                and (role is None or r.role == role)
                and (prompt is None or r.prompt == prompt)
                and (image is None or r.image == image)
            )
        return self._found[tags]

    def twin(self, row: Row, *, prompt: int | None = None, branch: str | None = None) -> Row:
        """The row with the same tags as `row` but for those given.

        Raises LayoutError if this call has no such row.
        """
        key = (
            row.branch if branch is None else branch,
            row.prompt if prompt is None else prompt,
            row.image,
        )
        try:
            return self._by_key[key]
        except KeyError:
            raise LayoutError(
                f"this denoiser call has no row branch={key[0]!r}, prompt={key[1]}, "
                f"image={key[2]}; its rows are: {self!r}"
            ) from None


def resolve_rows(
    batch: int,
    layout: Layout,
    *,
    prompts: int | None = None,
    images_per_prompt: int = 1,
    guided: bool | None = None,
    branch: str | None = None,
    call: int = 0,
) -> Rows:
    """Tag the rows of one denoiser call.

    Receives: batch, the rows of the call; layout, of the family; prompts, how many the pipeline
    draws (None: unknown); guided, whether the pipeline says that classifier-free guidance is on
    (None: it does not say); branch, the name that the pipeline gave this call, where it gives one;
    call, how many calls came before in this step (families that guide by several calls).

    Raises LayoutError if the number of images is unknown, if the batch is not a known multiple of
    it, or if a call that must have several branches has one.
    """
    if prompts is None:
        prompts, images_per_prompt = layout.images(batch, guided), 1
    if prompts is None:
        raise LayoutError(
            f"a denoiser call has {batch} rows, and how many images the pipeline draws is unknown, "
            f"so whose they are can't be told. {_CURE}"
        )
    images = prompts * images_per_prompt
    calls = () if guided is False else layout.sequential
    if branch is None and calls and images == batch:
        branch = calls[min(call, len(calls) - 1)]
    if branch is not None and images == batch:
        return _tag(batch, (branch,), images_per_prompt)
    known = layout.known(guided)
    if batch % images or batch // images not in known:
        said = {True: " with guidance", False: " without guidance", None: ""}[guided]
        raise LayoutError(
            f"a denoiser call has {batch} rows, but the pipeline draws {images} images"
            f"{said} ({prompts} prompts x {images_per_prompt}) and its family is known to call the "
            f"denoiser with {' or '.join(str(n * images) for n in sorted(known))} rows. {_CURE}"
        )
    return _tag(batch, known[batch // images], images_per_prompt)


_CURE = "Give the order yourself: control(..., rows=('uncond', 'cond'))."


def copied(sample: Tensor, sizes: Iterable[int]) -> int | None:
    """How many images a model input holds, where guidance repeats the latents of all of them.

    sizes: how many groups of rows a call may have. Latents begin as noise, so groups are equal
    because they are copies. None if the input is no tensor.
    """
    if not isinstance(sample, Tensor):
        return None
    for size in sorted(sizes, reverse=True):
        if len(sample) % size == 0:
            first, *others = sample.chunk(size)
            if all(torch.equal(first, other) for other in others):
                return len(first)
    return None


# What pipelines call the calls of a step (`cache_context`).
_CALLS: dict[str, str | None] = {
    "cond": COND,
    "pred_cond": COND,
    "uncond": UNCOND,
    "pred_uncond": UNCOND,
    **dict.fromkeys(["pred_cond_skip", "pred_cond_seg", "pred_cond_stg", "uncond_stg"], PERTURBED),
    **dict.fromkeys(["pred_cond_modality", "uncond_modality"], "modality"),
    "cond_uncond": None,
}


def branch_of(name: str | None) -> str | None:
    """The branch that a pipeline's name for a call means; None if it names several or none.

    Raises LayoutError for a name that is not known.
    """
    if name is not None and name not in _CALLS:
        raise LayoutError(
            f"the pipeline calls its denoiser for {name!r}, and what that predicts is not known. "
            f"{_CURE}"
        )
    return None if name is None else _CALLS[name]


def _tag(batch: int, branches: tuple[str, ...], per_prompt: int) -> Rows:
    size = batch // len(branches)
    return Rows(
        [
            Row(
                g * size + i,
                branch,
                i // per_prompt,
                i % per_prompt,
                COND if branch == PERTURBED else None,
            )
            for g, branch in enumerate(branches)
            for i in range(size)
        ]
    )
