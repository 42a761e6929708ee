"""Images and faces as prompts: how they are given, where they act, and what an adapter reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hookctl.address.pixels import mask_values
from hookctl.address.regions import Region, RegionLike, region_of
from hookctl.address.rows import Rows
from hookctl.arguments import is_list, number, opened, refusal, shown
from hookctl.errors import InputError
from hookctl.learned.tables import Faces, names_tensor, region_in, tensor_in


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """One image, or a face, that an adapter shows to a denoiser.

    image: a PIL image, or what the adapter reads of one: its embedding [channels], its features
        [tokens, channels].
    face: a face's embedding [channels], for adapters that read one.
    scale: factor of this image beside the adapter's own.
    region: where it acts, None for everywhere: anything that `Region`s are made of. A mask, an
        array or image of the shape of the run's images, is shrunk to each grid by bicubic
        interpolation, as diffusers does; of the others the share of every token is exact.
    """

    image: Any = None
    face: Any = None
    scale: float = 1.0
    region: RegionLike | None = None


# -- tables of a file ------------------------------------------------------------------------------

_KEYS = ("image", "embedding", "face", "scale", "region")


def image_prompts_of(given: Any, reads: Sequence[str], analysis: Any, name: str) -> Any:
    """What was given as images, in lists or not, with an `ImagePrompt` for every table and file.

    A table has the keys of `ImagePrompt`: image, the file of a picture, or in its place embedding,
    what the adapter reads of one; face, an embedding, or a picture in which analysis finds the face
    (`tables.Faces`); scale; region, also the file of a mask. Embeddings are numbers, or a file of
    them (`tables.tensor_in`). A file alone is the first of what the adapter reads. Raises
    InputError.
    """
    return _with_prompts(given, reads, Faces(analysis), name)


def _with_prompts(given: Any, reads: Sequence[str], faces: Faces, name: str) -> Any:
    if isinstance(given, str | Path):
        word = "embedding" if names_tensor(given) else "image"
        return _prompt({"face" if reads[0] == "face" else word: given}, faces, name)
    if isinstance(given, Mapping):
        return _prompt(given, faces, name)
    if not is_list(given):
        return given
    return [_with_prompts(one, reads, faces, f"{name}[{i}]") for i, one in enumerate(given)]


def _prompt(table: Mapping[str, Any], faces: Faces, name: str) -> ImagePrompt:
    if not set(table) <= set(_KEYS):
        raise refusal(name, dict(table), f"a table of {', '.join(_KEYS)}")
    given = dict(table)
    if "image" in given and "embedding" in given:
        raise InputError(f"{name}: give either image, a picture, or embedding")
    if "image" in given:
        given["image"] = opened(given["image"], f"{name}.image")
    elif "embedding" in given:
        given["image"] = _tensor(given.pop("embedding"), f"{name}.embedding")
    face = given.get("face")
    if isinstance(face, str | Path) and not names_tensor(face):
        found = faces.find(face, f"{name}.face").embedding
        given["face"] = F.normalize(found, dim=0)  # as FaceID was trained
    elif face is not None:
        given["face"] = _tensor(face, f"{name}.face")
    given["region"] = region_in(given.get("region"))
    return ImagePrompt(**given)


def _tensor(given: Any, name: str) -> Tensor:
    """Numbers, or those in a file, as a tensor."""
    found = tensor_in(given, name)
    try:
        return found if isinstance(found, Tensor) else torch.as_tensor(np.asarray(found))
    except (TypeError, ValueError):
        raise refusal(name, given, "a list of numbers, or a file of one tensor") from None


# -- where they act --------------------------------------------------------------------------------


class Place:
    """Where an image prompt acts, on any grid.

    region: as it was given; name: of the argument, for errors.
    """

    def __init__(self, region: Any, name: str) -> None:
        self.name = name
        self.mask: Tensor | None = None
        self.region: Region | None = None
        if isinstance(region, Tensor | Image.Image | np.ndarray):
            try:
                self.mask = torch.from_numpy(mask_values(region)).float()
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
        else:
            self.region = region_of(region, name)

    def check_canvas(self, height: int, width: int) -> None:
        """Raise InputError if a mask is of another shape than the latent of these sides."""
        if self.mask is None:
            return
        rows, columns = self.mask.shape
        # Either may have been rounded by a pixel on each side.
        if abs(rows * width - columns * height) > max(rows + columns, height + width):
            raise InputError(
                f"{self.name}: a mask of {columns} x {rows} px, but the images drawn have "
                f"{width} x {height} latent pixels; give a mask of the shape of the images"
            )

    def share(self, height: int, width: int) -> Tensor:
        """How much it acts at each token of a grid, float32 [height, width]."""
        if self.mask is None:
            assert self.region is not None
            return self.region.coverage(height, width)
        shrunk = F.interpolate(self.mask[None, None], size=(height, width), mode="bicubic")
        return shrunk[0, 0]


@dataclass(frozen=True, eq=False)
class Part:
    """Images that share a softmax: each with the name of its argument, and where they act."""

    prompts: tuple[tuple[str, ImagePrompt], ...]
    place: Place | None
    scale: float


def parts_of(prompts: Sequence[tuple[str, ImagePrompt]]) -> Iterator[Part]:
    """Images without a region, in one part for each scale; the others alone."""
    shared: dict[float, list[tuple[str, ImagePrompt]]] = {}
    for name, prompt in prompts:
        if prompt.region is None:
            shared.setdefault(float(prompt.scale), []).append((name, prompt))
        else:
            place = Place(prompt.region, f"{name}.region")
            yield Part(((name, prompt),), place, float(prompt.scale))
    for scale, images in shared.items():
        yield Part(tuple(images), None, scale)


# -- one by one ------------------------------------------------------------------------------------


def for_each_prompt(
    given: Any, read: Callable[[Any, str], ImagePrompt], name: str
) -> list[list[tuple[str, ImagePrompt]]]:
    """The image prompts of every prompt of a run or, of a list of lists, of each.

    read: makes one of an item, given the name of its argument. An item alone is a list of one.
    """
    items = list(given) if is_list(given) else [given]
    nested = bool(items) and all(is_list(item) for item in items)
    found = []
    for p, own in enumerate(items if nested else [items]):
        names = [f"{name}[{p}][{i}]" if nested else f"{name}[{i}]" for i in range(len(own))]
        found.append([(n, read(item, n)) for n, item in zip(names, own, strict=True)])
    if not any(found):
        raise refusal(name, given, "at least one")
    return found


def check_prompts(lists: Sequence[Any], rows: Rows, name: str) -> None:
    """Raise InputError unless there is one list, or one for each prompt that is drawn."""
    drawn = 1 + max(row.prompt for row in rows)
    if len(lists) not in (1, drawn):
        raise InputError(
            f"{name} is for {len(lists)} prompts, but the pipeline draws {drawn}; give one list "
            "for all, or one for each"
        )


_ARGUMENT = {"embedding": "image=...", "features": "image=...", "face": "face=..."}
_WORDS = {
    "embedding": "an image or its embedding",
    "features": "an image or its features",
    "face": "a face's embedding",
}


def read_prompt(given: Any, name: str, reads: Sequence[str]) -> ImagePrompt:
    """An image prompt, however it is given: an `ImagePrompt`, a PIL image, or a tensor of what the
    adapter reads. reads: "embedding", "features", "face"."""
    prompt = given
    if not isinstance(given, ImagePrompt):
        prompt = ImagePrompt(face=given) if reads[0] == "face" else ImagePrompt(image=given)
    number(prompt.scale, f"{name}.scale")
    wants = {_ARGUMENT[kind].partition("=")[0] for kind in reads}
    has = {word for word in ("image", "face") if getattr(prompt, word) is not None}
    if wants != has:
        raise InputError(
            f"{name}: {' and '.join(sorted(has)) or 'nothing'} given, but this adapter reads "
            f"{' and '.join(_WORDS[kind] for kind in reads)}; give "
            f"ImagePrompt({', '.join(_ARGUMENT[kind] for kind in reads)})"
        )
    return prompt


def features_at(reads: Sequence[str], name: str) -> int:
    """Which input of an adapter is an image's features; InputError if it reads none."""
    if "features" not in reads:
        raise InputError(
            f"{name} is given, but it stands for features, and this adapter reads "
            f"{' and '.join(_WORDS[kind] for kind in reads)}; leave it out"
        )
    return list(reads).index("features")


def image_in(value: Any, name: str) -> Image.Image | None:
    """The PIL image that a value is, None if it is a tensor; InputError for anything else."""
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, Tensor | np.ndarray):
        return None
    raise InputError(f"{name}: {shown(value)} given; a PIL image or a tensor expected")


def vectors(given: Any, name: str, channels: int, *, several: bool) -> Tensor:
    """An embedding as [1, channels], or several or features as [1, tokens, channels], in float32.

    several: whether it is the latter, of which one vector is one token. Raises InputError for
    another width, or values that are not finite.
    """
    wanted = f"[tokens, {channels}]" if several else f"[{channels}]"
    try:
        x = given if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given))
    except (TypeError, ValueError):
        raise refusal(name, given, f"a tensor {wanted}") from None
    if x.dtype == torch.bool or x.dtype.is_complex:
        raise refusal(name, given, f"a tensor {wanted} of numbers")
    while x.dim() > 1 + several and x.shape[0] == 1:  # as pipelines have it: a row for each image
        x = x[0]
    if not 1 <= x.dim() <= 1 + several or x.shape[-1] != channels or not x.numel():
        raise InputError(
            f"{name}: {shown(given)} given, but this adapter reads {wanted}; another width is of "
            "another encoder"
        )
    if not bool(x.isfinite().all()):
        raise InputError(f"{name}: not all values are finite; give an embedding as it was computed")
    x = x if x.dtype == torch.float64 else x.float()
    return x.reshape(1, -1, channels) if several else x[None]
