"""Any value for any argument: an error of ours before the first denoiser call, or a run.

Values of every kind are given, one argument at a time, to every recipe, program, method of a
program, `control`, `load_shapes` and table of a preset. The denoiser is a stub that ends the run.
"""

from __future__ import annotations

import inspect
import json
import math
import random
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import hookctl
from hookctl import Editor, Maps, Trajectory, control, recipes
from hookctl.cli.known import editors_by_name
from hookctl.errors import InputError, UnsupportedError
from hookctl.preset import load_preset
from hookctl.preset.signature import parameters
from tests import zoo

SECONDS, GIBIBYTE = 5.0, 2**30
EACH = 3  # values for an argument in the short form

SIDE = 16  # px of the tiny pipeline's images
TWO = ["a red cat", "a red dog"]
BOXES = [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
LOOP: list[Any] = []
LOOP.append(LOOP)


class Reached(BaseException):
    """The denoiser was called."""


def values() -> list[Any]:
    """What a person, a file or a bug might give."""
    nan = math.nan
    return [
        *(None, True, False, 0, 1, -1, 2, 3, 63, 2**31, 2**63, 2**70, 10**400, -(2**70)),
        *(0.0, 0.25, 0.5, 1.0, 2.9, -0.5, 1e-320, 1e300, -1e300, nan, math.inf, -math.inf, 1j),
        *(Fraction(1, 3), Decimal("0.5"), np.float32(0.5), np.int64(3), np.bool_(True)),
        *("", " ", "abc", "false", "0.5", "3", "cat", "self", "cross", "@1/0", "box:0,0,1,1"),
        *("a\ud800", "a\0b", "x" * 10_000, "cat " * 500, b"cat", Path("no/such/file.png")),
        *([], [1], [nan], [0.5, 2.0], ["cat"], ["cat", 1], [[]], [None], [["cat"], ["dog"]]),
        *((0, 0, 1, 1), (0.5, 0.2), (1, 0), (2**40, 2**40), (nan, 1), [(0, 0, 1, 1)] * 70),
        *([BOXES, BOXES], ["cat"] * 70, ["a text"] * 2, [{}], range(3), {"cat"}, LOOP),
        *({}, {"cat": 1.0}, {"cat": nan}, {"cat": "much"}, {1: 2}, {"seed": (0, 0, 1, 1)}),
        *({"default": 0.5}, {None: 1}, {"cat": [0.9, 0.1]}, {"cat": {}}, {0.2: 2}, {"no": 0.1}),
        *(torch.zeros(2, 3), torch.tensor(nan), torch.zeros(0), torch.full((4, 32), nan)),
        *(torch.randn(77, 32), [torch.zeros(1, 4, 8, 8)] * 2, [torch.zeros(2), torch.ones(3)]),
        *(torch.zeros(2, dtype=torch.complex64), np.zeros((4, 4)), np.array(["a"]), torch.float32),
        *(Image.new("RGB", (SIDE, SIDE)), Image.new("L", (SIDE, SIDE)), Image.new("RGB", (3, 5))),
        *(object(), object, len, lambda site: 1 / 0, lambda: None, ..., (x for x in "ab")),
        *(torch.Generator(), [torch.Generator()] * 3, Editor(), Maps(), inspect),
    ]


# Programs of flow matching alone.
FLOW = (
    recipes.FireFlow,
    recipes.FlowEdit,
    recipes.KVEdit,
    recipes.RFInversion,
    recipes.RFSolver,
    recipes.UniEditFlow,
)


@cache
def pipeline(name: str = "sd15") -> Any:
    """A tiny pipeline whose denoiser ends the run."""
    pipe = zoo.PIPELINES[name].make()

    def reached(*args: Any, **kwargs: Any) -> Any:
        raise Reached

    first = pipe.unet.conv_in if name == "sd15" else pipe.transformer.pos_embed
    first.register_forward_pre_hook(reached)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image() -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), (200, 30, 30))


def needed(cls: type) -> dict[str, Any]:
    """Arguments that a recipe can't do without."""
    ready = {
        "pipe": pipeline("sd3") if cls in FLOW else pipeline(),
        "image": image(),
        "prompt": "a red cat",
        "prompts": TWO,
        "mask": (0, 0, 0.5, 1),
        "subject": "red",
        "edits": TWO,
        "parts": TWO,
        "words": ["cat"],
        "negative": "a dog",
        "concepts": ["cat", "background"],
        "texts": ["a cat", "a dog"],
        "change": "full",
        "schedule": ["a [red:blue:0.5] cat"] * 2,
        "regions": BOXES if "texts" in parameters(cls) else BOXES[:1],
    }
    if cls is recipes.OneWayFlow:
        ready |= {"regions": {"cat": (0, 0, 0.5, 1)}, "flows": [("cat", "rest", 1.0)]}
    taken = parameters(cls)
    return {n: v for n, v in ready.items() if n in taken and taken[n].default is taken[n].empty}


def used(cls: type, **given: Any) -> None:
    """Make a recipe and use it as far as the denoiser."""
    if cls is Maps:
        words = given.pop("words", ["cat"])
        made: Any = cls(*(words if isinstance(words, list) else [words]), **given)
    else:
        made = cls(**{**needed(cls), **given})
    if isinstance(made, Editor):
        prompts = getattr(made, "prompts", TWO)
        with control(pipeline(), made):
            pipeline()(prompts, num_inference_steps=2, height=SIDE, width=SIDE)
    elif isinstance(made, Trajectory):
        made.denoise(0)
    else:
        made.run()


@contextmanager
def little_memory() -> Iterator[None]:
    """Allocations fail that would take a gibibyte more than is taken now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + GIBIBYTE, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def complaint(call: Callable[[], object]) -> str | None:
    """What is wrong with how a call ends, None if it is a run or one of our errors."""
    start = time.process_time()
    found = None
    try:
        with little_memory(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except (InputError, UnsupportedError, Reached) as error:
        if len(str(error)) > 3000:
            found = f"a message of {len(str(error))} letters"
    except (Exception, KeyboardInterrupt) as error:
        found = f"{type(error).__name__}: {error}"[:200]
    took = time.process_time() - start
    return found or (f"{took:.1f} s" if took > SECONDS else None)


Case = tuple[str, str, Callable[[Any], object]]  # of what, which argument, and the call with it


def of_classes() -> Iterator[Case]:
    for cls in (*(getattr(recipes, name) for name in recipes.__all__), Maps, Trajectory):
        for name in parameters(cls):
            yield cls.__name__, name, lambda value, n=name, c=cls: used(c, **{n: value})


def of_functions() -> Iterator[Case]:
    def controlled(name: str, value: Any) -> None:
        with control(**{"target": pipeline(), name: value}):
            pipeline()(TWO[0], num_inference_steps=2, height=SIDE, width=SIDE)

    for name in ("target", "backend", "strict", "rows", "check_finite"):
        yield "control", name, partial(controlled, name)
    yield "control", "editors", lambda value: control(pipeline(), value)
    for name in ("device", "dtype", "weights"):
        if name != "weights":
            yield "load_shapes", name, lambda value, n=name: hookctl.load_shapes(**{n: value})


def of_methods() -> Iterator[Case]:
    pipe, size = pipeline(), {"height": SIDE, "width": SIDE}
    program = partial(Trajectory, pipe, TWO, steps=2, guidance=3.0, **size)
    for operation in ("denoise", "invert", "renoise", "write", "decode", "run"):
        method = getattr(Trajectory, operation)
        for name in list(inspect.signature(method).parameters)[1:]:

            def call(value: Any, operation: str = operation, name: str = name) -> None:
                made = program()
                ready = {"i": 1 if operation != "denoise" else 0, "latents": made.latents}
                ready |= {"j": 0, "generator": torch.Generator()}
                if operation in ("invert", "renoise"):
                    made.level = 2 if operation == "invert" else 1
                taken = inspect.signature(getattr(made, operation)).parameters
                given = {n: v for n, v in ready.items() if n in taken}
                if name == "options":
                    made.run(guidance=value)
                else:
                    getattr(made, operation)(**{**given, name: value})

            yield f"Trajectory.{operation}", name, call
    edit = recipes.StyleAligned(TWO)
    for name in ("pipe", "seed", "images"):
        yield (
            "SourceAndEdits.run",
            name,
            lambda value, n=name: edit.run(
                **{"pipe": pipe, "num_inference_steps": 2, **size, n: value}
            ),
        )
    yield "SourceAndEdits.run", "editors", lambda value: edit.run(pipe, value, **size)
    for name in ("seed", "images", "device"):
        yield "SourceAndEdits.generators", name, lambda value, n=name: edit.generators(**{n: value})
    tiles = recipes.MultiDiffusion()
    for name in ("pipe", "prompt", "height", "width", "output_type"):
        yield (
            "MultiDiffusion.run",
            name,
            lambda value, n=name: tiles.run(
                **{"pipe": pipe, "prompt": TWO[0], "num_inference_steps": 2, **size, n: value}
            ),
        )
    imagic = recipes.Imagic(pipe, image(), TWO[0], steps=2)
    for name in list(inspect.signature(imagic.draw).parameters):
        yield "Imagic.draw", name, lambda value, n=name: imagic.draw(**{n: value})
    cow = recipes.CyclicOneWay(pipe, image(), TWO[0], steps=4, size=(SIDE, SIDE))
    yield "CyclicOneWay.run", "output_type", lambda value: cow.run(output_type=value)
    yield "CyclicOneWay.run", "editors", lambda value: cow.run(value)
    for cls in FLOW:
        flow = cls(**needed(cls), steps=6)
        run = f"{cls.__name__}.run"
        yield run, "output_type", lambda value, one=flow: one.run(output_type=value)
        yield run, "editors", lambda value, one=flow: one.run(value)


def of_regions() -> Iterator[Case]:
    ready = {
        "box": {"x0": 0, "y0": 0, "x1": 1, "y1": 1},
        "point": {"x": 0.5, "y": 0.5, "radius": 0.1},
        "scribble": {"points": [(0, 0), (1, 1)], "width": 0.1},
        "polygon": {"points": [(0, 0), (1, 0), (1, 1)]},
        "mask": {"mask": np.ones((2, 2))},
    }
    for kind, given in ready.items():
        for name in given:
            yield (
                f"Region.{kind}",
                name,
                lambda value, kind=kind, given=given, name=name: getattr(hookctl.Region, kind)(
                    **{**given, name: value}
                ).tokens(4, 4),
            )


def of_presets(folder: Path) -> Iterator[Case]:
    """The tables of a file, with what a file can hold."""
    path = folder / "stack.toml"

    def loaded(value: Any, name: str, argument: str) -> None:
        table = {**needed_in_a_file(editors_by_name()[name]), argument: value}
        lines = [f"{key} = {toml(one)}" for key, one in table.items()]
        path.write_text("\n".join(["[[editor]]", f'recipe = "{name}"', *lines]), "utf-8")
        load_preset(path, editors_by_name()).editors(TWO, image())

    for name, cls in editors_by_name().items():
        for argument in parameters(cls):
            yield name, argument, partial(loaded, name=name, argument=argument)


def needed_in_a_file(cls: type) -> dict[str, Any]:
    filled = ("pipe", "image", "prompt", "prompts")
    return {name: value for name, value in needed(cls).items() if name not in filled}


def toml(value: Any) -> str:
    """A value as a file has it; as a text where a file has none like it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        try:
            return repr(value)
        except ValueError:  # of thousands of digits
            return "9" * 5000
    if isinstance(value, list | tuple) and value is not LOOP:
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))} = {toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(str(value).replace("\ud800", "?"))


CASES: tuple[Callable[[], Iterator[Case]], ...] = (of_classes, of_functions, of_methods, of_regions)


def chosen(what: str, argument: str, count: int | None) -> list[Any]:
    """Values for an argument; by a seed of its own, so that others' do not change them."""
    every = values()
    return every if count is None else random.Random(f"{what} {argument}").sample(every, count)


def complaints(count: int | None, folder: Path) -> list[str]:
    found = []
    for cases in (*CASES, partial(of_presets, folder)):
        for what, argument, call in cases():
            for value in chosen(what, argument, count):
                if why := complaint(partial(call, value)):
                    found.append(f"{what}({argument}={value!r:.60}): {why}")
    return found


@pytest.mark.slow
def test_some_values_for_every_argument(tmp_path: Path) -> None:
    found = complaints(EACH, tmp_path)
    assert not found, "\n".join(found)


@pytest.mark.long
def test_every_value_for_every_argument(tmp_path: Path) -> None:
    found = complaints(None, tmp_path)
    assert not found, "\n".join(found)
