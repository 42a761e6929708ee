"""The opaque operators of compiled graphs are never replayed from a captured CUDA graph.

`mode="reduce-overhead"` records the kernels of a graph at its first run and replays them. A replay
runs no Python, so an edit behind an operator would be that of the first step for ever. What torch
does about operators with the tag is imitated here on a CPU: the kernels of every other operator are
recorded and replayed, those with the tag are called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import hookctl
from hookctl import Editor
from hookctl.address import families
from hookctl.errors import HoleError

UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)

pytestmark = pytest.mark.skipif(UNSAFE is None, reason="this torch captures no graphs in parts")


class Captured(fx.Interpreter):
    """Runs a graph as a captured one: untagged operators of ours by the kernels of their first
    call."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.kernels: dict[str, Callable[..., Any]] = {}
        self.ours: list[Any] = []

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function" or "hookctl" not in str(n.target):
            return super().run_node(n)
        operator: Any = n.target
        operator = getattr(operator, "default", operator)
        self.ours.append(operator)
        if UNSAFE in operator.tags:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        tensors = [x for x in args if isinstance(x, Tensor)]
        rest = args[len(tensors) :]
        if n.name not in self.kernels:
            self.kernels[n.name] = make_fx(lambda *given: operator(*given, *rest))(*tensors)
        return self.kernels[n.name](*tensors)


class OnlyTheSecond(Editor):
    """Edits the attention of the second step alone."""

    sites = "self"
    start, stop = 0.5, 1.0

    def attention(self, call: Any) -> None:
        call.skip(call.rows)


class Doubled(Editor):
    start, stop = 0.5, 1.0

    def features(self, call: Any) -> None:
        call.backbone = call.backbone * 2


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=8,
        norm_num_groups=4,
    ).eval()


class Pipeline:
    """Two steps of a denoiser."""

    def __init__(self, model: UNet2DConditionModel) -> None:
        self.unet, self.scheduler = model, DDIMScheduler()
        self.scheduler.set_timesteps(2)

    def __call__(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, text = (torch.randn(s, generator=generator) for s in ((1, 4, 8, 8), (1, 5, 8)))
        found = []
        for t in self.scheduler.timesteps:
            found.append(self.unet(x, t, text).sample)
            self.scheduler.step(found[-1], t, x)
        return found


@pytest.mark.parametrize("editor", (OnlyTheSecond, Doubled))
@pytest.mark.slow  # compiles
def test_an_edit_never_replays_stale(editor: type[Editor]) -> None:
    graphs: list[Captured] = []

    def captured(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(Captured(module))
        return graphs[-1].run

    with torch.no_grad():
        want = Pipeline(unet())
        with hookctl.control(want, editor(), rows=("cond",)):
            first, second = want()
        assert torch.equal(first, want()[0]) and not torch.equal(second, want()[1])
        got = Pipeline(unet())
        with hookctl.control(got, editor(), rows=("cond",)):
            got.unet = torch.compile(got.unet, backend=captured)
            for _ in range(2):
                for one, other in zip(got(), (first, second), strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    ours = [operator for graph in graphs for operator in graph.ours]
    assert ours and all(UNSAFE in operator.tags for operator in ours)


# -- code that was compiled before the hooks came --------------------------------------------------


class Skips(Editor):
    sites = "self"

    def attention(self, call: Any) -> None:
        call.skip(call.rows)


EAGERLY = {"backend": "eager"}


def compile_whole(pipe: Pipeline) -> None:
    pipe.unet = torch.compile(families.uncompiled(pipe.unet), **EAGERLY)


def compile_blocks(pipe: Pipeline) -> None:
    pipe.unet.compile_repeated_blocks(**EAGERLY)


def compile_forwards(pipe: Pipeline) -> None:
    for module in pipe.unet.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            module.forward = torch.compile(module.forward, **EAGERLY)


def nothing(pipe: Pipeline) -> None:
    pass


@pytest.mark.slow  # compiles
@pytest.mark.parametrize(
    ("before", "inside", "other"),  # other: whether another model of the class was compiled
    [
        (compile_whole, compile_whole, False),
        (nothing, compile_blocks, True),
        (compile_forwards, nothing, False),
    ],
)
def test_code_compiled_before_is_not_taken_for_the_edited_one(
    before: Callable[[Pipeline], None], inside: Callable[[Pipeline], None], other: bool
) -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        want = Pipeline(unet())
        plain = want()
        with hookctl.control(want, Skips(), rows=("cond",)):
            edited = want()
        if other:
            one = Pipeline(unet())
            (inside if inside is not nothing else before)(one)
            one()
        got = Checked(unet())
        before(got)
        _close(got(), plain)
        with hookctl.control(got, Skips(), rows=("cond",)):
            inside(got)
            _close(got(), edited)
        _close(got(), plain)
    torch._dynamo.reset()


class Checked(Pipeline):
    """Says that a run starts, as pipelines do."""

    def check_inputs(self) -> None:
        pass

    def __call__(self) -> list[Tensor]:
        self.check_inputs()
        return super().__call__()


def _close(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.slow  # compiles
def test_calls_inside_code_compiled_before_are_told() -> None:
    torch._dynamo.reset()
    pipe = Pipeline(unet())

    @torch.compile(**EAGERLY)
    def denoise(model: UNet2DConditionModel, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return model(x, t, text).sample

    def draw() -> None:
        x, text = torch.ones(1, 4, 8, 8), torch.ones(1, 5, 8)
        for t in pipe.scheduler.timesteps:
            pipe.scheduler.step(denoise(pipe.unet, x, t, text), t, x)

    with torch.no_grad():
        draw()
        with pytest.raises(HoleError, match=r"no call of the denoiser was seen.*_dynamo\.reset"):
            with hookctl.control(pipe, Skips(), rows=("cond",)):
                draw()
    torch._dynamo.reset()
