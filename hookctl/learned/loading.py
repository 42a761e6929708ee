"""`load`: from a file of learned weights to an editor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from hookctl.address.families import denoiser_of
from hookctl.errors import InputError
from hookctl.learned.files import Checkpoint, read
from hookctl.learned.names import adapter_layers, official
from hookctl.learned.reading.located import located
from hookctl.learned.reading.parts import choose
from hookctl.learned.recognise import BLOCKS, Kind, base_of, recognise

if TYPE_CHECKING:
    from hookctl.editor import Editor

# What makes the editor of a kind: "module:function", imported when it is wanted. A builder is
# called as builder(checkpoint, pipe, **options); its keyword parameters are the kind's options.
BUILDERS: dict[str, str] = {
    "gligen box+text": "hookctl.learned.gligen:build",
    "gligen box+text+image": "hookctl.learned.gligen:build",
    "gligen keypoints": "hookctl.learned.gligen:build",
    "gligen spatial": "hookctl.learned.gligen:build",
    "instance-diffusion": "hookctl.learned.instance_diffusion:build",
    "ip-adapter": "hookctl.learned.ip_adapter:from_checkpoint",
    "ip-adapter full": "hookctl.learned.ip_adapter:from_checkpoint",
    "ip-adapter plus": "hookctl.learned.ip_adapter:from_checkpoint",
    "ip-adapter faceid": "hookctl.learned.face_id:from_checkpoint",
    "ip-adapter faceid-plus": "hookctl.learned.face_id:from_checkpoint",
    "instantid": "hookctl.learned.instant_id:from_checkpoint",
    "collaborative": "hookctl.learned.collaborative:from_checkpoint",
    "LoRA": "hookctl.learned.lora:from_checkpoint",
}


@dataclass(frozen=True)
class Source:
    """What a file is and what it holds, under the names by which it is attached."""

    kind: Kind
    checkpoint: Checkpoint

    @property
    def notes(self) -> tuple[str, ...]:
        """What was used of the file, and what was left out."""
        return self.checkpoint.notes


def load(path_or_repo_id: Path | str, pipe: Any, **options: Any) -> Editor:
    """The editor that a file of learned weights is for, to be given to `hookctl.control`.

    path_or_repo_id: a file, a folder that holds one, or "owner/name/FILE" of a repository that the
    hub's cache holds (nothing is downloaded); pipe: a diffusers pipeline or its denoiser; options:
    those of the kind (`options_of`), and `weights`: "model" or "ema" of a training file.

    Raises InputError for a file that can't be read, is none that is known, is for another base
    model or does not fit, and for an option that the kind lacks; FileNotFoundError without a file.
    """
    source = open_source(path_or_repo_id, pipe, weights=options.pop("weights", None))
    return attach(source, pipe, **options)


def attach(source: Source, pipe: Any, **options: Any) -> Editor:
    """The editor of a file that is open; raises as `load` does."""
    with _naming(source.checkpoint.path):
        builder = builder_of(source.kind)
        _check_base(source.kind, pipe)
        _check_options(source.kind, builder, options)
        return builder(source.checkpoint, pipe, **options)


def open_source(
    path_or_repo_id: Path | str, pipe: Any = None, *, weights: str | None = None
) -> Source:
    """A file, read and recognised; raises as `load` does."""
    checkpoint = open_checkpoint(path_or_repo_id, pipe, weights=weights)
    with _naming(checkpoint.path):
        return Source(recognise(checkpoint.shapes), checkpoint)


def open_checkpoint(
    path_or_repo_id: Path | str, pipe: Any = None, *, weights: str | None = None
) -> Checkpoint:
    """What is learned in a file, under official names, whatever kind it is.

    pipe: tells the layers of an adapter whose training file does not number them.
    """
    checkpoint = choose(read(located(path_or_repo_id)), weights)
    with _naming(checkpoint.path):
        layers, depth = None, 2
        if pipe is not None:
            denoiser = denoiser_of(pipe)
            if any(key.startswith("unet.") for key in checkpoint.tensors):
                layers = adapter_layers(denoiser)
            depth = _layers_per_block(denoiser)
        tensors, notes = official(checkpoint.tensors, layers, depth)
    return checkpoint.noting(*notes, tensors=tensors)


def _layers_per_block(denoiser: Any) -> int:
    """By which LDM numbers a UNet's blocks; 2 where a model does not say, or has several."""
    found = getattr(getattr(denoiser, "config", None), "layers_per_block", None)
    return found if isinstance(found, int) else 2


def options_of(kind: Kind) -> dict[str, inspect.Parameter]:
    """The options that `load` takes for a kind besides `weights`: its builder's parameters."""
    return _parameters(builder_of(kind))


def builder_of(kind: Kind) -> Callable[..., Editor]:
    """The function that makes the editor of a kind; InputError for what is no hook."""
    named = BUILDERS.get(kind.name)
    if named is None:
        use = f"; it is for: {kind.needs[0]}" if kind.needs and not kind.hook else ""
        raise InputError(f"is of the kind {kind.name}, which can't be attached as a hook{use}")
    module, _, function = named.partition(":")
    if find_spec(module) is None:
        raise InputError(f"is of the kind {kind.name}, which can't be attached yet")
    found: Callable[..., Editor] = getattr(import_module(module), function)
    return found


def _parameters(builder: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword parameters of a builder: all behind the checkpoint and the pipeline.

    What goes on to the editor as **options are the keywords of the editor's class.
    """
    found: dict[str, inspect.Parameter] = {}
    for name, one in list(inspect.signature(builder).parameters.items())[2:]:
        if one.kind is one.VAR_KEYWORD:
            found |= {k: v for k, v in _keywords(builder).items() if k not in found}
        else:
            found[name] = one
    return found


def _keywords(builder: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Those of the class that a builder says it returns, and of the bases that it hands on to."""
    made = get_type_hints(builder)["return"]
    found: dict[str, inspect.Parameter] = {}
    for owner in made.__mro__:
        if "__init__" not in vars(owner) or owner is object:
            continue
        taken = inspect.signature(owner.__init__).parameters
        found = {k: v for k, v in taken.items() if v.kind is v.KEYWORD_ONLY} | found
        if all(one.kind is not one.VAR_KEYWORD for one in taken.values()):
            break
    return found


def _check_options(kind: Kind, builder: Callable[..., Any], options: dict[str, Any]) -> None:
    """InputError for an option that a kind lacks, or lacks a value."""
    known = _parameters(builder)
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            listed = ", ".join((*known, "weights"))
            raise InputError(f"{name!r} is no option of {kind.name}{hint}; there are: {listed}")
    lacking = [
        name
        for name, one in known.items()
        if one.default is one.empty and one.kind is not one.VAR_POSITIONAL and name not in options
    ]
    if lacking:
        why = "".join(f" ({fact})" for fact in kind.facts if "say which" in fact)
        raise InputError(f"{kind.name} needs the option {', '.join(lacking)}{why}")


def _check_base(kind: Kind, pipe: Any) -> None:
    """InputError for a file that is for another base model than the pipeline's."""
    if kind.base not in BLOCKS:
        return
    denoiser = denoiser_of(pipe)
    text = getattr(getattr(denoiser, "config", None), "cross_attention_dim", None)
    if not isinstance(text, int):
        return
    paths = [path for path, _ in denoiser.named_modules() if path.endswith(".attn2")]
    blocks = sum("motion_modules" not in path for path in paths)  # those between frames are added
    own = base_of(text, blocks)
    if own != kind.base:
        raise InputError(
            f"is of the kind {kind.name} for {kind.base}, and the pipeline's model is {own}"
        )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """The errors inside, led by the file's name if they lack it."""
    try:
        yield
    except InputError as error:
        if str(error).startswith(str(path)):
            raise
        raise type(error)(f"{path}: {error}") from error.__cause__
