"""Transformer blocks: rows that pass one by, and another input, as hooks by hand would have it."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import textwrap
from typing import Any

import pytest
import torch
from diffusers.models import transformers
from torch import Tensor, nn

import hookctl
from hookctl import COND, Editor
from hookctl.address import families
from hookctl.address.families import inside
from hookctl.address.families.inside import IMAGE_STREAMS, streams_of
from hookctl.errors import InputError, UnsupportedError
from tests import zoo
from tests.families.subjects import error
from tests.families.wild import drawn, same
from tests.hookctl.drawing import draw
from tests.recipes.runs import TWO
from tests.zoo.wild import WILD

NAMES = ["sd15", "sd3", "flux", "qwen_image", "wan", "pixart", "flux2_klein", "z_image"]


class Blocks(Editor):
    """Hands a function what its blocks are given."""

    def __init__(self, act: Any, sites: Any = None, start: float = 0.0) -> None:
        self.act, self.sites, self.start = act, sites, start

    def block(self, call: Any) -> Any:
        return self.act(call)


def some_block(model: nn.Module) -> tuple[str, families.Block]:
    """One in the middle of those that hold the image's attention."""
    sites = list(families.sites_of(model))
    blocks = list(families.blocks_of(model, sites).items())
    return blocks[len(blocks) // 2]


def by_hand(pipe: Any, case: Any) -> Tensor:
    """The same block as the identity for the rows of the second prompt."""
    model = case.denoiser_of(pipe)
    _, block = some_block(model)
    forward = block.module.forward

    def passed(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        names = ("x",) if block.image == "x" else ("hidden_states", "encoder_hidden_states")
        named = dict(zip(names, args, strict=False)) | kwargs
        alone = isinstance(out, Tensor)
        given = [named[name] for name in ((block.image,) if alone else block.streams)]
        outs = [out] if alone else list(out)
        made = []
        for x, y in zip(given, outs, strict=True):
            if y is not None:
                y = y.clone()
                y[1::2] = x[1::2]
            made.append(y)
        return made[0] if alone else tuple(made)

    block.module.forward = passed
    try:
        return case.run(pipe, TWO)
    finally:
        del block.module.forward


@pytest.mark.slow  # three runs of each family
@pytest.mark.parametrize("name", [name for name in NAMES if name in zoo.PIPELINES])
def test_rows_pass_a_block_by(name: str) -> None:
    case = zoo.PIPELINES[name]
    pipe = case.make()
    path, block = some_block(case.denoiser_of(pipe))
    own = block.site.path

    def skip(call: Any) -> None:
        assert call.name == path
        call.skip(call.rows.where(prompt=1))

    got = draw(case, pipe, Blocks(skip, [own]))
    assert error(got, by_hand(pipe, case)) < 1e-5
    assert error(got, case.run(pipe, TWO)) > 1e-4
    idle = draw(case, pipe, Blocks(lambda call: call.skip([]), [own]))
    assert torch.equal(idle, case.run(pipe, TWO))


@pytest.mark.parametrize("name", ["Kandinsky5T2VPipeline", "Kandinsky6TI2VAPipeline"])
def test_blocks_with_other_names_for_their_streams(name: str) -> None:
    case = WILD[name]
    pipe = case.make()
    path, block = some_block(pipe.transformer)

    def skip(call: Any) -> None:
        assert call.name == path
        call.skip(call.rows)

    plain = drawn(case, pipe)
    with hookctl.control(pipe, Blocks(skip, [block.site.path])):
        got = drawn(case, pipe)
    forward = block.module.forward
    own = len(block.streams)
    block.module.forward = lambda *streams: streams[0] if own == 1 else streams[:own]
    want = drawn(case, pipe)
    block.module.forward = forward
    assert same(got, want) and not same(got, plain)
    assert same(drawn(case, pipe), plain)


def test_what_a_block_is_given() -> None:
    case, pipe = zoo.PIPELINES["sd15"], zoo.PIPELINES["sd15"].make()
    path, block = some_block(pipe.unet)

    def other(call: Any) -> None:
        at = call.places(call.rows.where(branch=COND))
        changed = call.hidden.clone()
        changed[at] = changed[at].flip(1)
        call.hidden = changed
        assert call.grid is not None and call.grid.tokens == call.hidden.shape[1]

    got = draw(case, pipe, Blocks(other, [block.site.path]))
    handle = block.module.register_forward_pre_hook(
        lambda module, args: (torch.cat([args[0][:2], args[0][2:].flip(1)]), *args[1:])
    )
    want = case.run(pipe, TWO)
    handle.remove()
    assert error(got, want) < 1e-6
    assert error(got, case.run(pipe, TWO)) > 1e-4


def returned(kind: type[nn.Module]) -> tuple[str, ...]:
    """The names of what a block hands on, as its code says; none of what is not told by names."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    values = [one.value for one in ast.walk(tree) if isinstance(one, ast.Return)]
    if len(values) != 1 or not isinstance(values[0], ast.Tuple):
        return ()
    return tuple(part.id for part in values[0].elts if isinstance(part, ast.Name))


def test_every_block_of_diffusers_is_declared_in_its_order() -> None:
    """Those that hand on a text or a sound beside the image."""
    found = 0
    for info in pkgutil.iter_modules(transformers.__path__, f"{transformers.__name__}."):
        for name, kind in vars(importlib.import_module(info.name)).items():
            if not name.endswith("Block") or not issubclass(kind, nn.Module):
                continue
            names = returned(kind)
            if set(names) & set(IMAGE_STREAMS) and len(names) == 2:
                found += 1
                assert streams_of(kind) == names, name
    assert found > 10


def test_a_block_that_is_not_declared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case, pipe = zoo.PIPELINES["sd3"], zoo.PIPELINES["sd3"].make()
    monkeypatch.setattr(inside, "_TEXT_FIRST", [])
    path, block = some_block(pipe.transformer)
    skip = Blocks(lambda call: call.skip(call.rows), [block.site.path])
    with pytest.raises(UnsupportedError, match=f"block {path}: a JointTransformerBlock returns 2"):
        draw(case, pipe, skip)


def test_what_is_refused() -> None:
    pipe, case = zoo.PIPELINES["sd15"].make(), zoo.PIPELINES["sd15"]

    def narrow(call: Any) -> None:
        call.hidden = call.hidden[:1]

    with pytest.raises(InputError, match=r"block assigned .* to call.hidden; it is \(4, "):
        draw(case, pipe, Blocks(narrow))
    with pytest.raises(InputError, match=r"block.*use call.skip\(rows\)"):
        draw(case, pipe, Blocks(lambda call: call.hidden))
    with pytest.raises(UnsupportedError, match="changes transformer blocks .* has none"):
        draw(case, pipe, Blocks(lambda call: None, "cross"))
    assert hookctl.BlockCall.__name__ == "BlockCall"


@pytest.mark.slow
def test_in_compiled_code() -> None:
    """Blocks behind an operator that is looked into at every call."""
    case = zoo.PIPELINES["sd3"]
    pipe = case.make()
    own = some_block(pipe.transformer)[1].site.path
    late = Blocks(lambda call: call.skip(call.rows.where(prompt=1)), [own], 0.5)
    want = draw(case, pipe, late)
    plain = case.run(pipe, TWO)
    pipe.transformer.compile(backend="aot_eager")
    try:
        assert error(draw(case, pipe, late), want) < 1e-5
        assert error(want, plain) > 1e-5
        assert error(case.run(pipe, TWO), plain) < 1e-5
    finally:
        torch._dynamo.reset()
