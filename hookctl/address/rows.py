"""Who: the branch, prompt, image and frame of every batch row of one denoiser call.

Pipelines lay their batches out in different orders, change them in mid-loop and tell nobody
(`Layout`). Rows are therefore resolved anew for every denoiser call, from the batch size, the
number of images that the pipeline is drawing and the layout of its family. A batch that fits no
known layout is an error, never a guess.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from hookctl.errors import LayoutError

COND, UNCOND, PERTURBED = "cond", "uncond", "perturbed"


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
    """

    groups: Mapping[int, tuple[str, ...]]
    sequential: tuple[str, ...] = ()
    unguided: Mapping[int, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))


class Rows(Sequence[Row]):
    """The rows of one denoiser call, in batch order: a sequence of `Row`.

    for row in call.rows.where(branch=COND): ...
    source = call.rows.twin(row, prompt=0)
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = tuple(rows)
        self._by_key = {(r.branch, r.prompt, r.image): r for r in self._rows}

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
        return tuple(
            r
            for r in self._rows
            if (branch is None or r.branch == branch)
            and (role is None or r.role == role)
            and (prompt is None or r.prompt == prompt)
            and (image is None or r.image == image)
        )

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
    draws (None: unknown, then each row of a group is a prompt of its own); guided, whether the
    pipeline says that classifier-free guidance is on (None: it does not say); branch, the name
    that the pipeline gave this call, where it gives one; call, how many calls came before in this
    step (families that guide by several calls).

    Raises LayoutError if the batch is not a known multiple of the images drawn.
    """
    images = None if prompts is None else prompts * images_per_prompt
    if branch is None and layout.sequential and (images is None or images == batch):
        branch = layout.sequential[min(call, len(layout.sequential) - 1)]
    if branch is not None:
        return _tag(batch, (branch,), images_per_prompt if images == batch else 1)
    known = dict(layout.groups)
    if guided is False:
        known |= dict(layout.unguided)
    if images is None:
        return _tag(batch, known.get(1, (COND,)), 1)
    if batch % images or batch // images not in known:
        raise LayoutError(
            f"a denoiser call has {batch} rows, but the pipeline draws {images} images "
            f"({prompts} prompts x {images_per_prompt}) and its family is known to call the "
            f"denoiser with {' or '.join(str(n * images) for n in sorted(known))} rows. Give "
            "the order yourself: control(..., rows=('uncond', 'cond'))."
        )
    return _tag(batch, known[batch // images], images_per_prompt)


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
