"""What GLIGEN's tokenizers are given: objects in boxes, joints of persons, maps of the picture.

Each holds what a user gave, for every prompt or for each, checked; and makes of it the arguments of
its tokenizer, one row [1, ...] for a layout. An empty layout is all zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hookctl.address.per_prompt import PerPrompt, is_box
from hookctl.address.rows import Rows
from hookctl.arguments import is_list, opened, refusal
from hookctl.errors import InputError
from hookctl.learned import locations
from hookctl.learned.clip_features import (
    features_of,
    finite,
    image_feature,
    phrase_features,
    phrase_of,
)
from hookctl.learned.grounding import Layout
from hookctl.learned.modules.gligen_tokens import BoxText, BoxTextImage, Keypoints, SpatialMap
from hookctl.run_state import RunState

STYLE = (0.0, 1.0, 0.0, 1.0)  # the box of a slot that tells a style: no box at all


class Inputs(Protocol):
    """What a tokenizer is given."""

    def check_prompts(self, rows: Rows) -> None: ...

    def begin(self, pipe: Any) -> None:
        """Encode what needs an encoder, once a run."""

    def arguments(self, layout: Layout, like: Tensor) -> tuple[Tensor, ...]:
        """Of the tokenizer, for one row."""


@dataclass(frozen=True, eq=False)
class Given:
    """What `GLIGEN` is given to draw by, unchecked; None for what it is not given."""

    boxes: Any = None
    phrases: Any = None
    images: Any = None
    style: Any = None
    clip: Any = None
    keypoints: Any = None
    maps: Any = None
    inpaint: Any = None

    @property
    def present(self) -> set[str]:
        """The names of what is given."""
        return {name for name, value in vars(self).items() if value is not None}


class Objects:
    """Boxes, each with a phrase, an image or both: of all that is given boxes, phrases, images,
    style and clip."""

    _encoded: RunState[dict[str, Tensor]] = RunState(factory=dict)

    def __init__(
        self,
        who: str,
        net: BoxText | BoxTextImage,
        slots: int,
        given: Given,
    ) -> None:
        self.who, self.net, self.slots, self.clip = who, net, slots, given.clip
        if not isinstance(net, BoxTextImage) and given.present & {"images", "style"}:
            raise InputError(
                f"{who}: this checkpoint reads boxes with phrases; leave images= and style= out"
            )
        self.boxes = PerPrompt(given.boxes, f"{who}: boxes", locations.box_of, is_box)
        self.phrases = self._beside(given.phrases, f"{who}: phrases", phrase_of)
        self.images = self._beside(given.images, f"{who}: images", self._image)
        self.style = None
        if given.style is not None:
            self.style = self._image(given.style, f"{who}: style")
        most = slots - (self.style is not None)
        for p, boxes_of_prompt in enumerate(self.boxes.lists):
            if len(boxes_of_prompt) > most:
                raise InputError(
                    f"{who}: {len(boxes_of_prompt)} boxes of a prompt; the checkpoint was trained "
                    f"with {most} at most"
                )
            for i in range(len(boxes_of_prompt)):
                if self.phrases.lists[p][i] is None and self.images.lists[p][i] is None:
                    raise InputError(f"{who}: box {i} has no phrase and no image; give one of them")

    def _image(self, given: Any, name: str) -> Tensor:
        image = given if isinstance(given, Tensor) else opened(given, name)
        return image_feature(image, self.clip, name)

    def _beside(self, given: Any, name: str, read: Any) -> PerPrompt[Any]:
        """What comes with the boxes, one for each; None for none."""
        optional = given is None or isinstance(self.net, BoxTextImage)
        if given is None:
            empty = [[None] * len(boxes) for boxes in self.boxes.lists]
            given = empty[0] if self.boxes.shared else empty
        found = PerPrompt(
            given, name, lambda one, at: None if one is None and optional else read(one, at)
        )
        if not self.boxes.items:  # [] and [[], []] look alike to both
            found.shared = self.boxes.shared
        sizes, own = [len(x) for x in found.lists], [len(x) for x in self.boxes.lists]
        if sizes != own or found.shared != self.boxes.shared:
            raise InputError(
                f"{name} has {_sizes(found)} and boxes has {_sizes(self.boxes)}; give as many of "
                "both, for each prompt"
            )
        return found

    def check_prompts(self, rows: Rows) -> None:
        self.boxes.check_prompts(rows)

    def begin(self, pipe: Any) -> None:
        texts = [phrase for phrase in self.phrases.items if isinstance(phrase, str)]
        self._encoded = phrase_features(pipe, texts, self.who)
        for phrase in self.phrases.items:
            if phrase is not None:
                features_of(phrase, self._encoded, self.net.text, self.who)

    def arguments(self, layout: Layout, like: Tensor) -> tuple[Tensor, ...]:
        width = self.net.text
        boxes, phrases, images = (like.new_zeros(1, self.slots, n) for n in (4, width, width))
        masks, texts, pictures = (like.new_zeros(1, self.slots) for _ in range(3))

        def put(slot: int, box: locations.Box, phrase: Any, image: Any) -> None:
            boxes[0, slot], masks[0, slot] = like.new_tensor(box), 1
            if phrase is not None:
                phrases[0, slot] = features_of(phrase, self._encoded, width, self.who).to(like)
                texts[0, slot] = 1
            if image is not None:
                images[0, slot], pictures[0, slot] = image.to(like), 1

        if layout.prompt is not None:
            each = (part[layout.prompt] for part in (self.boxes, self.phrases, self.images))
            found = list(zip(*each, strict=True))
            if layout.instance is not None:
                found = found[layout.instance : layout.instance + 1]
            for slot, one in enumerate(found):
                put(slot, *one)
            if self.style is not None:
                put(len(found), STYLE, None, self.style)
        if isinstance(self.net, BoxTextImage):
            return boxes, masks, phrases, images, texts, pictures
        return boxes, masks, phrases


class Persons:
    """Joints of persons, each (x, y) or None for one that is not seen."""

    def __init__(self, who: str, net: Keypoints, keypoints: Any) -> None:
        self.persons, width = net.person_embeddings.shape
        self.joints = net.keypoint_embeddings.shape[0]
        self.keypoints = PerPrompt(keypoints, f"{who}: keypoints", self._person, _is_person)
        if not self.keypoints.items:
            raise refusal(f"{who}: keypoints", keypoints, "at least one person")
        most = self.keypoints.longest
        if most > self.persons:
            raise InputError(
                f"{who}: {most} persons of a prompt; the checkpoint was trained with "
                f"{self.persons} at most"
            )

    def _person(self, given: Any, name: str) -> list[locations.Point | None]:
        if not is_list(given) or len(given) != self.joints:
            raise refusal(name, given, f"{self.joints} joints, (x, y) or None for each")
        return [
            None if joint is None else locations.point_of(joint, f"{name}[{i}]")
            for i, joint in enumerate(given)
        ]

    def check_prompts(self, rows: Rows) -> None:
        self.keypoints.check_prompts(rows)

    def begin(self, pipe: Any) -> None: ...

    def arguments(self, layout: Layout, like: Tensor) -> tuple[Tensor, ...]:
        points = like.new_zeros(1, self.persons, self.joints, 2)
        found = [] if layout.prompt is None else self.keypoints[layout.prompt]
        if layout.instance is not None:
            found = found[layout.instance : layout.instance + 1]
        for person, joints in enumerate(found):
            for j, joint in enumerate(joints):
                if joint is not None:
                    points[0, person, j] = like.new_tensor(joint)
        points = points.flatten(1, 2)
        # A joint in the very corner is none, as in the official code.
        return points, (points != 0).any(-1).to(like)


class Maps:
    """A map of the whole picture, of edges, depth, normals or classes."""

    def __init__(self, who: str, net: SpatialMap, maps: Any) -> None:
        self.classes = net.classes
        several = is_list(maps)
        given = list(maps) if several else [maps]
        names = [f"{who}: maps[{i}]" if several else f"{who}: maps" for i in range(len(given))]
        self.maps: list[Tensor] = [self._map(one, at) for one, at in zip(given, names, strict=True)]
        self.shared, self.name = not several, f"{who}: maps"

    def _map(self, given: Any, name: str) -> Tensor:
        """[3 | classes, height, width], from -1 to 1, or one-hot."""
        channels = self.classes or 3
        if isinstance(given, Tensor) and given.dim() == 3 and given.shape[0] == channels:
            found = finite(given, name).float()
            if found.abs().max() > 2:  # what was resized may overshoot 1; bytes go to 255
                raise refusal(name, given, f"values from -1 to 1; its largest is {found.max():g}")
            return found
        if self.classes is not None:
            given = _numbers_in(given) if isinstance(given, str | Path) else given
            ids = np.array(given) if isinstance(given, Image.Image | np.ndarray) else np.zeros(0)
            if ids.ndim == 2 and ids.dtype.kind in "iu" and 0 <= ids.min() <= ids.max() < channels:
                return F.one_hot(torch.from_numpy(ids).long(), channels).permute(2, 0, 1).float()
            raise refusal(
                name, given, f"an image of class numbers [height, width], 0 to {channels - 1}"
            )
        if isinstance(given, Image.Image | str | Path):
            given = opened(given, name)
            pixels = torch.from_numpy(np.array(given.convert("RGB"))).permute(2, 0, 1)
            return pixels / 127.5 - 1
        raise refusal(name, given, "a PIL image, or a tensor [3, height, width] from -1 to 1")

    def check_prompts(self, rows: Rows) -> None:
        drawn = len({row.prompt for row in rows})
        if not self.shared and len(self.maps) != drawn:
            raise InputError(
                f"{self.name} are {len(self.maps)}, but the pipeline draws {drawn} prompts; give "
                "one for all, or one for each"
            )

    def begin(self, pipe: Any) -> None: ...

    def of(self, prompt: int) -> Tensor:
        """The map of a prompt."""
        return self.maps[0 if self.shared else prompt]

    def arguments(self, layout: Layout, like: Tensor) -> tuple[Tensor, ...]:
        if layout.prompt is None:
            return like.new_zeros(1, *self.maps[0].shape), like.new_zeros(1)
        return self.of(layout.prompt).to(like)[None], like.new_ones(1)


def _numbers_in(file: str | Path) -> Any:
    """The class numbers in an image file, which are no colours; what is given if there are none."""
    try:
        with Image.open(file) as image:
            return np.array(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return file


def _is_person(item: Any) -> bool:
    """A person is a list of joints, not of persons."""
    if not is_list(item):
        return True
    return any(joint is None or (is_list(joint) and is_box(joint)) for joint in item)


def _sizes(lists: PerPrompt[Any]) -> str:
    sizes = [len(items) for items in lists.lists]
    return f"{sizes[0]} items" if lists.shared else f"{sizes} items"
