"""When a preset has done what its method is for: read off its images by the detector.

A judge is given what one noise drew: the plain image, and the images of the preset.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from hookctl.demos.figures import NEAR
from hookctl.demos.layouts import overlap
from hookctl.demos.placing import IN_PLACE
from hookctl.demos.shapes.captions import parse
from hookctl.demos.shapes.detect import Detection, Found, detect
from hookctl.demos.shapes.evaluate import relation_holds
from hookctl.demos.shapes.hooks.looks import Look, hue_apart, read_look
from hookctl.demos.shapes.world import BACKGROUNDS, IMAGE_SIZE

SAME_PLACE = 22.0  # dB, from which on a given image is still there; the autoencoder alone: 33
WHOLE = 0.88  # intersection over union with its shape of an object that nobody would call broken
NEAR_HUE, NEAR_DEPTH = 20.0, 0.2  # degrees; depth of bars
Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Drawn:
    """What one noise drew.

    prompts: of the preset; plain: the first prompt, without the preset; edited: an image for every
    prompt, or for every one that a program draws; given: the image that a preset takes, if any;
    striped: by an adapter, whatever the prompt says.
    """

    prompts: Sequence[str]
    plain: Image.Image
    edited: Sequence[Image.Image]
    given: Image.Image | None = None
    striped: bool = False


Judge = Callable[[Drawn], bool]


def as_said(image: Image.Image, text: str, patterns: bool = True) -> bool:
    """Whether an image shows what its text says and nothing else: shapes, colours, patterns (if
    they count), where they are to one another, and the background."""
    wanted, found = parse(text), detect(image)

    def kinds(things: Sequence[object]) -> Counter[tuple[str, ...]]:
        names = ("shape", "colour", *(["pattern"] if patterns else []))
        return Counter(tuple(getattr(thing, name) for name in names) for thing in things)

    return (
        not found.extras
        and all(thing.fit >= WHOLE for thing in found.objects)
        and kinds(found.objects) == kinds(wanted.mentions)
        and relation_holds(found, text) is not False
        and wanted.background in (None, found.background)
    )


def plain_right(drawn: Drawn) -> bool:
    """The plain model drew what the first prompt says, under an adapter that stripes everything
    as much as it says."""
    return as_said(drawn.plain, drawn.prompts[0], patterns=not drawn.striped)


def said(drawn: Drawn) -> bool:
    """Every image shows what its prompt says."""
    return all(as_said(i, p) for i, p in zip(drawn.edited, drawn.prompts, strict=True))


def edited_in_place(drawn: Drawn) -> bool:
    """The edits show what they ask for, object by object where the source has them."""
    source = detect(drawn.edited[0])
    for image, prompt in zip(drawn.edited[1:], drawn.prompts[1:], strict=True):
        if not as_said(image, prompt) or not _in_place(source, detect(image), drawn.prompts):
            return False
    return True


def _in_place(source: Detection, edited: Detection, prompts: Sequence[str]) -> bool:
    for before, after in zip(parse(prompts[0]).mentions, parse(prompts[1]).mentions, strict=True):
        a = source.find(before.shape, before.colour)
        b = edited.find(after.shape, after.colour)
        if a is None or b is None:
            return False
        if not _near(a, b):
            return False
    return True


def _near(a: Found, b: Found) -> bool:
    return bool(np.hypot(*np.subtract(a.centre, b.centre)) <= NEAR * IMAGE_SIZE)


def without_one(drawn: Drawn) -> bool:
    """Edit k shows the source but for its object k, of which nothing is left."""
    source = detect(drawn.edited[0])
    things = [source.find(m.shape, m.colour) for m in parse(drawn.prompts[0]).mentions]
    for k, image in enumerate(drawn.edited[1:]):
        found = detect(image)
        rest = [thing for i, thing in enumerate(things) if i != k and thing is not None]
        if found.extras or found.pairs != Counter((t.shape, t.colour) for t in rest):
            return False
        twins = [found.find(t.shape, t.colour) for t in rest]
        if not all(b and _near(a, b) for a, b in zip(rest, twins, strict=True)):
            return False
    return True


def resized(drawn: Drawn) -> bool:
    """The edit shows the source's object in the size it asks for, with the source's looks."""
    source, edited = (detect(image) for image in drawn.edited)
    if len(source.objects) != 1 or len(edited.objects) != 1 or edited.extras:
        return False
    a, b, wanted = source.objects[0], edited.objects[0], parse(drawn.prompts[1]).mentions[0]
    alike = (a.shape, a.colour, a.pattern) == (b.shape, b.colour, b.pattern)
    return alike and b.size == wanted.size and source.background == edited.background


def in_the_style(drawn: Drawn) -> bool:
    """The others show what they ask for, on the background that only the first prompt names."""
    background = parse(drawn.prompts[0]).background
    return all(
        as_said(image, f"{prompt} on a {background} background")
        for image, prompt in zip(drawn.edited[1:], drawn.prompts[1:], strict=True)
    )


def in_boxes(*boxes: Box) -> Judge:
    """Every object of the prompt, and nothing else, each in its box."""

    def judge(drawn: Drawn) -> bool:
        found, (prompt,) = detect(drawn.edited[0]), drawn.prompts
        if not as_said(drawn.edited[0], prompt):
            return False
        things = [found.find(m.shape, m.colour) for m in parse(prompt).mentions]
        return all(
            thing is not None and overlap(thing, box) >= IN_PLACE
            for thing, box in zip(things, boxes, strict=True)
        )

    return judge


def in_regions(*regions: Box) -> Judge:
    """Every object of the prompt, and nothing else, each with its middle in its region."""

    def judge(drawn: Drawn) -> bool:
        found, (prompt,) = detect(drawn.edited[0]), drawn.prompts
        if not as_said(drawn.edited[0], prompt):
            return False
        for mention, region in zip(parse(prompt).mentions, regions, strict=True):
            thing = found.find(mention.shape, mention.colour)
            assert thing is not None  # `as_said` looked
            x, y = np.divide(thing.centre, drawn.edited[0].size)
            if not (region[0] <= x <= region[2] and region[1] <= y <= region[3]):
                return False
        return True

    return judge


def grown_round(box: tuple[int, int, int, int], background: str) -> Judge:
    """The given image is there, the wanted object outside it, all on one background."""

    def judge(drawn: Drawn) -> bool:
        (image,), given = drawn.edited, drawn.given
        assert given is not None
        a, b = (np.asarray(one, float) for one in (image.crop(box), given))
        psnr = 10 * np.log10(255.0**2 / max(((a - b) ** 2).mean(), 1e-10))
        prompt = drawn.prompts[0].partition(" on a ")[0]
        outside = np.ones((IMAGE_SIZE, IMAGE_SIZE), bool)
        outside[box[1] : box[3], box[0] : box[2]] = False
        around = np.asarray(image, float)[outside]
        apart = np.linalg.norm(around - BACKGROUNDS[background], axis=1)
        return bool(psnr >= SAME_PLACE and np.median(apart) <= 40.0 and as_said(image, prompt))

    return judge


def by_degrees(drawn: Drawn) -> bool:
    """The last image shows what is asked for where the given one has its objects; and each of the
    others as many objects as that."""
    given, *others = (detect(image) for image in drawn.edited)
    count = len(given.objects)
    whole = all(len(found.objects) == count and not found.extras for found in others)
    there = as_said(drawn.edited[-1], drawn.prompts[1])
    return whole and there and _in_place(given, others[-1], drawn.prompts)


def shown(shape: str, look: Look, box: Box) -> Judge:
    """One object of this shape and look, whatever the prompt says of its colour, in a box."""

    def judge(drawn: Drawn) -> bool:
        seen = read_look(drawn.edited[0])
        return (
            seen is not None
            and seen.found.shape == shape
            and seen.found.fit >= WHOLE
            and hue_apart(seen.look, look) <= NEAR_HUE
            and abs(seen.look.depth - look.depth) <= NEAR_DEPTH
            and overlap(seen.found, box) >= IN_PLACE
        )

    return judge


HALVES: tuple[Box, Box] = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
THIRDS: tuple[Box, ...] = tuple((i / 3, 0.0, (i + 1) / 3, 1.0) for i in range(3))
BOXES: tuple[Box, Box] = ((0.1, 0.1, 0.4, 0.4), (0.55, 0.55, 0.9, 0.9))
TOP = (32, 0, 96, 64)  # px: where the one-way presets put their image

JUDGES: Mapping[str, Judge] = {
    "attend_and_excite": said,
    "box_diff": in_boxes(*BOXES),
    "collaboration": in_boxes((0.12, 0.43, 0.51, 0.82), (0.59, 0.1, 0.91, 0.36)),
    "cyclic_one_way": grown_round(TOP, "gray"),
    "ddim_inversion": edited_in_place,
    "edit_friendly_ddpm": edited_in_place,
    "flow_edit": edited_in_place,
    "freeu": said,
    "grounding": in_boxes((0.11, 0.11, 0.39, 0.39), (0.625, 0.625, 0.875, 0.875)),
    "identity": shown("circle", Look(185, 0.5), (0.1, 0.6, 0.4, 0.9)),
    "imagic": by_degrees,
    "instances": in_regions(*HALVES),
    "inverted_edit": edited_in_place,
    "layout_guidance": in_boxes(*BOXES),
    "masactrl": resized,
    "masked_self_attention": in_regions(*HALVES),
    "multi_diffusion": in_regions(*THIRDS),
    "multi_instance_sampler": in_regions(*HALVES),
    "negative_prompt_inversion": edited_in_place,
    "null_text": edited_in_place,
    "one_way_flow": in_regions(*HALVES),
    "pag": said,
    "plug_and_play": edited_in_place,
    "prompt_to_prompt": edited_in_place,
    "proximal_guidance": edited_in_place,
    "real_compo": in_boxes(*BOXES),
    "recolour": edited_in_place,
    "reference_only": in_the_style,
    "refine": edited_in_place,
    "regional_prompts": in_regions(*HALVES),
    "reweight": without_one,
    "rf_inversion": edited_in_place,
    "sag": said,
    "scale_u": said,
    "seg": said,
    "selective_one_way": grown_round(TOP, "white"),
    "stack_edit_freeu": edited_in_place,
    "stack_excite_pag": said,
    "stack_inverted_prompt_to_prompt": edited_in_place,
    "stack_masactrl_lora": resized,
    "stack_real_compo_freeu": in_boxes(*BOXES),
    "stack_regions": in_regions(*HALVES),
    "style_aligned": in_the_style,
}
