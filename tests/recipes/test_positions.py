"""DyPE and RIFLEx: their official codes, told literally, in the models' own position modules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hookctl
from hookctl import Editor
from hookctl.errors import HookctlError, InputError, UnsupportedError
from hookctl.recipes import DyPE, RIFLEx
from tests import zoo
from tests.families.fingerprint import differences, fingerprint
from tests.families.subjects import error
from tests.hookctl.loop.families import BY_NAME, FAMILIES
from tests.recipes.runs import made

ROTARY = ("flux", "flux2_klein", "qwen_image", "z_image", "wan", "FluxKontextPipeline")
CLOSE = 1e-5


def drawn(name: str, pipe: Any, *editors: Editor, strict: bool = True, **more: Any) -> Tensor:
    family = BY_NAME[name]
    with hookctl.control(pipe, *editors, strict=strict):
        latents: Tensor = family.drawn(pipe, 2.0 if family.guides else 1.0, steps=3, **more)
    return latents


@contextmanager
def instead(module: Any, forward: Any) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


# -- DyPE ------------------------------------------------------------------------------------------


def correction(turns: float, dim: int, theta: float, base: int) -> float:
    return (dim * math.log(base / (turns * 2 * math.pi))) / (2 * math.log(theta))


def ramp(low: float, high: float, dim: int) -> Tensor:
    high = high + 0.001 if low == high else high
    return ((torch.arange(dim, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)


def literal_1d(pos: Tensor, dim: int, theta: float, base: int, t: float, kind: str) -> Any:
    """guyyariv/DyPE's get_1d_rotary_pos_embed."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    longest, amplitude = float(pos.max()) + 1, 1.0
    freqs = 1.0 / theta**exponents
    if longest > base:
        scale = longest / base
        if kind == "ntk":
            factor = max(scale ** (dim / (dim - 2) * 2 * t**2), 1.0)
            freqs = 1.0 / (theta * factor) ** exponents
        else:
            linear = 1.0 / (scale * theta**exponents)
            ntk = 1.0 / (theta * scale ** (dim / (dim - 2))) ** exponents
            plain = freqs
            freqs = linear
            for (first, last), other in (((1.25, 0.75), ntk), ((16, 2), plain)):
                first, last = first * t**2, last * t**2
                low = max(np.floor(correction(first, dim, theta, base)), 0)
                high = min(np.ceil(correction(last, dim, theta, base)), dim - 1)
                mask = 1 - ramp(low, high, dim // 2)
                freqs = freqs * (1 - mask) + other * mask
            amplitude = 0.1 * math.log(scale) + 1.0
    angles = torch.outer(pos.double(), freqs)
    return tuple(
        (one * amplitude).repeat_interleave(2, 1).float() for one in (angles.cos(), angles.sin())
    )


@pytest.mark.parametrize("method", ["yarn", "ntk"])
@pytest.mark.parametrize("base", [3, 7])
def test_dype_is_the_official_code(method: str, base: int) -> None:
    pipe = made("flux")
    module, now = pipe.transformer.pos_embed, {"t": 1.0}

    def forward(ids: Tensor) -> Any:
        parts = [
            literal_1d(ids[:, i].float(), dim, module.theta, base, now["t"], method if i else "no")
            for i, dim in enumerate(module.axes_dim)
        ]
        return tuple(torch.cat(one, -1) for one in zip(*parts, strict=True))

    def tell(_: Any, args: Any, kwargs: Any) -> None:
        now["t"] = float(kwargs["timestep"][0])

    plain = drawn("flux", pipe)
    handle = pipe.transformer.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        with instead(module, forward):
            want = drawn("flux", pipe)
    finally:
        handle.remove()
    found = drawn("flux", pipe, DyPE(base, method=method))
    assert error(found, want) < CLOSE
    assert error(want, plain) > 100 * CLOSE


def test_the_ranges_of_the_published_settings() -> None:
    """Four times 1024 px: which of FLUX's 28 pairs are between stretched and not."""
    j = torch.arange(28, dtype=torch.float64)
    edit = DyPE()
    for t, low, high in ((1.0, 0, 5), (0.5, 2, 10), (0.1, 12, 19)):
        share = edit._share((16.0, 2.0), 56, 10000.0, t**2, j)
        assert float(share[low]) == 1 and float(share[high]) == 0
        assert bool((share[low + 1 : high] > 0).all()) and bool((share[low + 1 : high] < 1).all())
    f = 10000.0 ** (-2 * j / 56)
    assert torch.equal(edit._stretched(f, 10000.0, 4.0, 0.0), f)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "flux" else pytest.mark.slow) for n in ROTARY]
)
def test_dype_acts_and_leaves_in_every_family(name: str) -> None:
    pipe = BY_NAME[name].make()
    plain = drawn(name, pipe, strict=False)
    before = fingerprint(pipe)
    if name == "wan":
        pipe.scheduler = BY_NAME["sd3"].make().scheduler
        plain = drawn(name, pipe)
        before = fingerprint(pipe)
        with pytest.raises(InputError, match="how large WanTransformer3DModel was trained.*base="):
            drawn(name, pipe, DyPE())
    assert error(drawn(name, pipe, DyPE(2)), plain) > 1e-4
    assert torch.equal(drawn(name, pipe, DyPE(512), strict=False), plain)
    with pytest.raises(HookctlError, match="DyPE changed nothing"):
        drawn(name, pipe, DyPE(512))
    assert not differences(before, fingerprint(pipe))
    assert torch.equal(drawn(name, pipe), plain)


def test_text_that_is_numbered_apart_goes_with_the_image() -> None:
    """FLUX.2: amplitudes of the text's pairs are those of the image's, as in one table."""
    seen: list[tuple[int, float]] = []

    class Look(Editor):
        def positions(self, call: Any) -> None:
            seen.append((len(call.positions), float(call.amplitudes[call.pairs("row")].max())))

    drawn("flux2_klein", made("flux2_klein"), DyPE(2), Look())
    assert {round(one, 6) for _, one in seen} == {round(0.1 * math.log(8 / 2) + 1, 6)}
    assert len({tokens for tokens, _ in seen}) == 2


# -- RIFLEx ----------------------------------------------------------------------------------------


def identify(theta: float, dim: int, repeats: int) -> int:
    """thu-ml/RIFLEx's identify_k, counted from 1."""
    periods = [round(2 * math.pi * theta ** (2 * (j - 1) / dim)) for j in range(1, dim // 2 + 1)]
    return min(range(len(periods)), key=lambda i: abs(periods[i] - repeats)) + 1


@pytest.mark.parametrize(
    ("theta", "dim", "repeats", "k"),
    [(256, 16, 48, 4), (10000, 16, 20, 2), (10000, 44, 21, 4), (10000, 44, 32, 5)],
)
def test_which_pair_it_is(theta: float, dim: int, repeats: int, k: int) -> None:
    frequencies = [theta ** (-2 * j / dim) for j in range(dim // 2)]
    assert RIFLEx(repeats)._pair(frequencies) + 1 == k == identify(theta, dim, repeats)
    assert RIFLEx(k=k)._pair(frequencies) + 1 == k


@pytest.mark.parametrize(("name", "k"), [("HunyuanVideoPipeline", 1), ("wan", 2)])
def test_riflex_is_the_official_code(name: str, k: int) -> None:
    pipe = BY_NAME[name].make()
    module = pipe.transformer.rope
    plain = drawn(name, pipe)

    def forward(hidden_states: Tensor) -> Any:
        frames, height, width = hidden_states.shape[-3:]
        if name == "wan":
            dims, theta = (module.t_dim, module.h_dim, module.w_dim), 10000.0
            patch = module.patch_size
        else:
            dims, theta = module.rope_dim, module.theta
            patch = (module.patch_size_t, module.patch_size, module.patch_size)
        sides = [frames // patch[0], height // patch[1], width // patch[2]]
        grid = torch.meshgrid(*(torch.arange(n).float() for n in sides), indexing="ij")
        cos, sin = [], []
        for i, dim in enumerate(dims):
            freqs = 1.0 / (theta ** (torch.arange(0, dim, 2).double() / dim))
            if i == 0:
                freqs[k - 1] = 0.9 * 2 * math.pi / sides[0]
            angles = torch.outer(grid[i].reshape(-1).double(), freqs)
            cos.append(angles.cos().repeat_interleave(2, 1).float())
            sin.append(angles.sin().repeat_interleave(2, 1).float())
        parts = torch.cat(cos, 1), torch.cat(sin, 1)
        return tuple(one[None, :, None] for one in parts) if name == "wan" else parts

    with instead(module, forward):
        want = drawn(name, pipe)
    assert error(drawn(name, pipe, RIFLEx(k=k, paper=True)), want) < CLOSE
    assert error(want, plain) > 10 * CLOSE


def test_riflex_leaves_short_videos() -> None:
    """Three frames are within any period; a share of a period that they are not makes it act."""
    plain = drawn("wan", made("wan"))
    assert torch.equal(drawn("wan", made("wan"), RIFLEx(k=2), strict=False), plain)
    with pytest.raises(HookctlError, match="RIFLEx changed nothing"):
        drawn("wan", made("wan"), RIFLEx(k=2))
    assert error(drawn("wan", made("wan"), RIFLEx(k=1, share=0.1)), plain) > 1e-4


# -- the hook --------------------------------------------------------------------------------------


class Turned(Editor):
    """Every pair turns by another share."""

    def __init__(self, share: float = 1.5, sites: Any = None) -> None:
        self.share, self.sites = share, sites

    def positions(self, call: Any) -> None:
        call.frequencies = call.frequencies * self.share


OF_ONE_BLOCK = ("BriaPipeline", "LTXPipeline", "HunyuanVideoPipeline", "FluxKontextPipeline")


def first_block(site: Any) -> bool:
    return ".0." in site.path or site.path.startswith("transformer_blocks.0")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(one.name, marks=() if one.name in ("flux", "wan") else pytest.mark.slow)
        for one in FAMILIES
        if one.name not in ("sd15", "sdxl", "sd3", "pixart")
    ],
)
def test_tables_are_put_together_as_the_models_are(name: str) -> None:
    pipe = BY_NAME[name].make()
    plain = drawn(name, pipe)
    again = drawn(name, pipe, Turned(1 + 1e-13))
    assert error(again, plain) < (1e-4 if name == "LTXPipeline" else 1e-6)
    other = drawn(name, pipe, Turned())
    assert error(other, plain) > 1e-3
    assert error(drawn(name, pipe, Turned(3.0), Turned(0.5)), other) < 1e-5
    if name in ("flux2_klein", "z_image", "Flux2Pipeline"):
        with pytest.raises(
            UnsupportedError, match="puts its rotary table together anew.*sites= out"
        ):
            drawn(name, pipe, Turned(sites=first_block))
        return
    part = drawn(name, pipe, Turned(sites=first_block))
    every = drawn(name, pipe, Turned(sites=lambda site: True))
    assert error(every, other) < 1e-6
    assert error(part, plain) > 1e-4
    if name not in OF_ONE_BLOCK:
        rest = Turned(sites=lambda site: not first_block(site))
        assert error(drawn(name, pipe, Turned(sites=first_block), rest), other) < 1e-6
    assert torch.equal(drawn(name, pipe), plain)


def test_windows_and_reports() -> None:
    late = Turned()
    late.start = 0.5
    with hookctl.control(made("flux"), late) as session:
        BY_NAME["flux"].drawn(made("flux"), 1.0, steps=4)
    assert "rotary table" in session.report() and "2-3" in session.report()


@pytest.mark.slow
def test_compiled_models() -> None:
    pipe = BY_NAME["flux"].make()
    want = drawn("flux", pipe, Turned())
    plain = drawn("flux", pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager")
    assert error(drawn("flux", pipe), plain) < CLOSE
    assert error(drawn("flux", pipe, Turned()), want) < CLOSE
    assert error(drawn("flux", pipe), plain) < CLOSE


@pytest.mark.parametrize(
    ("assign", "said"),
    [
        ({"frequencies": torch.zeros(3)}, r"assigned \(3,\) to call.frequencies; it is \(8,\)"),
        ({"positions": None}, "assigned a NoneType to call.positions"),
        ({"amplitudes": torch.full((8,), math.nan)}, "assigned NaN or infinity to call.amplitudes"),
    ],
)
def test_what_is_assigned_is_checked(assign: dict[str, Any], said: str) -> None:
    class Wrong(Editor):
        def positions(self, call: Any) -> None:
            for name, value in assign.items():
                setattr(call, name, value)

    with pytest.raises(InputError, match=said):
        drawn("flux", made("flux"), Wrong())


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sd3", "pixart"])
@pytest.mark.parametrize("edit", [DyPE(2), RIFLEx(k=1)], ids=["DyPE", "RIFLEx"])
def test_models_without_rotary_positions(name: str, edit: Editor) -> None:
    with pytest.raises(
        UnsupportedError, match=f"{edit.name} rewrites rotary positions, and .* has"
    ):
        hookctl.control(made(name), edit).__enter__()


def test_other_models() -> None:
    ltx = BY_NAME["LTXPipeline"].make()
    for edit, said in ((DyPE(2), "fractions of a size"), (RIFLEx(k=1), "fractions of a length")):
        with pytest.raises(UnsupportedError, match=f"{edit.name}.*{said}"):
            hookctl.control(ltx, edit).__enter__()
    with pytest.raises(UnsupportedError, match="RIFLEx is of videos, and FluxTransformer2DModel"):
        hookctl.control(made("flux"), RIFLEx(k=1)).__enter__()
    with pytest.raises(InputError, match="RIFLEx: k=99; .* pairs of WanTransformer3DModel turn"):
        hookctl.control(made("wan"), RIFLEx(k=99)).__enter__()
    with pytest.raises(UnsupportedError, match="DyPE follows the noise"):
        hookctl.control(made("flux").transformer, DyPE(2)).__enter__()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RIFLEx(), "give one of them"),
        (lambda: RIFLEx(48, k=4), "give one of them"),
        (lambda: RIFLEx(k=1, share=0.0), "share=0 would stop"),
        (lambda: DyPE(0), "DyPE: base"),
        (lambda: DyPE(method="linear"), "DyPE: method"),
    ],
)
def test_arguments(make: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()


def test_models_of_somebodys_own_class_are_known_by_their_base() -> None:
    case, drawn = zoo.PIPELINES["flux"], []
    for own in (False, True):
        pipe = case.make()
        for module in (pipe.transformer, pipe.transformer.pos_embed) if own else ():
            module.__class__ = type("Mine", (type(module),), {})
        with hookctl.control(pipe, DyPE(base=2)):
            drawn.append(case.run(pipe))
    assert torch.equal(*drawn)
