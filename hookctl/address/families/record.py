"""What is declared of a family: one record for a class of denoisers, one for a class of pipelines.

A record says what `families.prove` can measure. The tables stand beside this file, in groups of
kin; a class that stands in none is looked up by its bases. Nothing is read out of a name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from torch import nn

from hookctl.address.families.handing import Handing
from hookctl.address.rows import Layout

T = TypeVar("T")
Order = Literal["image_text", "text_image"]


@dataclass(frozen=True)
class TextStream:
    """A stretch of the text sequence: which tokenizer fills it, from which position on.

    length: tokens that the pipeline pads to by default (None: the tokenizer's maximum); prompts:
    the arguments whose texts are in it. Where there are two, two encoders share the positions.
    wrap: what the pipeline makes of a prompt before it is tokenized; dropped: how many tokens of
    that are cut off in front; behind: how many are put behind the padding; wraps_negative: whether
    it does all that to the negative prompts too; side: where the pipeline pads, None for the
    tokenizer's own side; longest: it pads to the longest prompt of a call, so that the length is
    known in a call alone.
    """

    tokenizer: Any
    start: int = 0
    length: int | None = None
    prompts: tuple[str, ...] = ("prompt",)
    wrap: Callable[[str], str] | None = None
    dropped: int = 0
    behind: int = 0
    wraps_negative: bool = True
    side: Literal["left", "right"] | None = None
    longest: bool = False


@dataclass(frozen=True)
class Model:
    """What is declared of a class of denoisers.

    order: of text and image in one sequence, None where the text is attended to separately.
    kinds: (glob of a module's path, kind of its attention); the first that fits counts, and where
        none does the module itself says whether it crosses. "none": no site at all.
    softmax_free: globs of attention without a softmax, which no edit can reach.
    attending: globs of modules that attend for another one, which has no processor; those of them
        that do so without a softmax no edit can reach.
    axes: of a latent of five dimensions, b rows, c channels, f frames, h and w sides.
    parts: the argument that tells the images of the sequence apart: "img_ids" (the axis of ids
        that numbers them), "img_shapes", or None where there is one image.
    target: the number that the target has there; a sequence without it has no reference. None
        where it is the lowest one.
    text_block: the texts are padded to a multiple of this, inside the model.
    hides_padding: the argument that hides padding behind a row's text, where a text that is padded
        under it is as good as alone.
    text_masked: each row's text stands without its padding right before its image.
    several_texts: the sequence holds more texts than the one argument that the call names.
    widens: a joint sequence may hold more text than the pipeline gave.
    text_rows: further texts stand in batch rows of their own, since the model refines each row's
        text by itself.
    text_moves_image: the image's positions are counted from the end of its row's text.
    rotations: the module whose table of rotations, `pos_freqs`, has those of a text's positions,
        where the model numbers them itself (`text_rotations`).
    texts_apart: each text token's keys and values are made of itself alone, so that it does not
        matter in which row of a batch it stands.
    loose_text: text tokens have no positions, so that single ones may be taken out of a text.
    placeless: the image's tokens form no grid over the latent; why.
    counts_up: the time it is told is the share of the image, 1 - t / 1000.
    as_videos: it takes a list of images, each as a video of one frame, [channels, 1, height,
        width], which the latents of its pipelines are without.
    """

    order: Order | None = None
    kinds: tuple[tuple[str, str], ...] = ()
    softmax_free: tuple[str, ...] = ()
    attending: tuple[str, ...] = ()
    axes: str = "bcfhw"
    parts: str | None = None
    target: int | None = None
    text_block: int = 1
    hides_padding: str | None = None
    text_masked: bool = False
    several_texts: bool = False
    widens: bool = False
    text_rows: bool = False
    text_moves_image: bool = False
    rotations: str | None = None
    texts_apart: bool = False
    loose_text: bool = False
    placeless: str | None = None
    counts_up: bool = False
    as_videos: bool = False


@dataclass(frozen=True)
class Pipeline:
    """What is declared of a class of pipelines.

    calls: name of each denoiser -> its rows and calls in a step, in their order.
    text: how the text sequence that the attention sees is made up of tokenizers, or why words
        can't be addressed.
    encoded: where `encode_prompt` returns the pooled text and the mask of the tokens.
    handing: what the pipeline hands the scheduler of a branch's prediction, where it is neither
        that nor its own part (`handing.own_part`).
    schedulers: name of a denoiser -> the attribute that holds its scheduler, where not "scheduler".
    inner: attributes that hold the pipelines which the call is handed on to, one after another.
    joins_channels: behind the channels of the latents, of which the model predicts as many, its
        input has those of images and masks.
    estimate: the argument of the scheduler's step that is given in the step which counts, where it
        is first called for the estimate of a clean image alone.
    """

    calls: Mapping[str, Layout]
    text: Callable[[Any], tuple[TextStream, ...]] | str
    encoded: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    handing: Handing | None = None
    schedulers: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    inner: tuple[str, ...] = ()
    joins_channels: bool = False
    estimate: str | None = None


MODELS: dict[str, Model] = {}
PIPELINES: dict[str, Pipeline] = {}


def declare_models(record: Model, names: Iterable[str] | str) -> None:
    """Declare classes of denoisers, by name; a record of a name that is there is replaced."""
    MODELS.update(dict.fromkeys(_names(names), record))


def declare_pipelines(record: Pipeline, names: Iterable[str] | str) -> None:
    """Declare classes of pipelines, by name; a record of a name that is there is replaced."""
    PIPELINES.update(dict.fromkeys(_names(names), record))


def _names(names: Iterable[str] | str) -> list[str]:
    return names.split() if isinstance(names, str) else list(names)


def model_of(denoiser: nn.Module) -> Model | None:
    """The record of a denoiser, or of the first of its bases that has one."""
    return _found(MODELS, type(uncompiled(denoiser)))


def pipeline_of(pipe: Any) -> Pipeline | None:
    """The record of a pipeline, or of the first of its bases that has one."""
    return None if pipe is None else _found(PIPELINES, type(pipe))


def _found(table: Mapping[str, T], kind: type) -> T | None:
    return next((table[name] for name in names_of(kind) if name in table), None)


def names_of(thing: Any) -> tuple[str, ...]:
    """Names of a class, or of an object's, and of its bases: what somebody makes of a known class
    is known too."""
    kind = thing if isinstance(thing, type) else type(thing)
    return tuple(base.__name__ for base in kind.__mro__)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside a `torch.compile` wrapper, or the module itself."""
    return getattr(module, "_orig_mod", module)
