"""What a launch must know of the device, the dtype and the head width. Needs no Triton."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

# Bytes of shared memory that one block may have. sm_80 also stands for sm_86, sm_89 and sm_120,
# which have less than an A100: what ships for it must fit them.
SHARED_LIMIT = {"sm_80": 101_376, "sm_90": 232_448, "gfx942": 65_536}

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Launch(NamedTuple):
    """One entry of a launch table: the tile, and what the compiler makes of it.

    block_m, block_n: sides of a tile, of queries and keys where there are such.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int

    @property
    def sides(self) -> dict[str, int]:
        return {"BM": self.block_m, "BN": self.block_n}

    @property
    def options(self) -> dict[str, int | bool]:
        """For the compiler. Fused products and sums are no default of Triton from 3.10 on."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


# Head widths in the field: SD1.5 (40, 80, 160), SDXL and SD3 (64), PixArt (72), Flux (128). One of
# each split of a head is shipped and compiled ahead of time; others run on the nearest.
WIDTHS = (64, 80, 96, 128, 160)
WIDEST = 160

# (element, width) of what is compiled ahead of time of the kernels over maps and of gradients over
# regions.
FORMS = tuple((element, width) for element in ("fp16", "fp32") for width in (64, 128, 160))

# Programs on the second axis of a grid, where a pair of sequence and head is one.
MOST_PAIRS = 65_535

# Under the interpreter tiles cost time only; several of them in each direction test more.
INTERPRETED = Launch(16, 16, 4, 1)


@dataclass(frozen=True)
class Specimen:
    """One compiled form of a kernel, as the tests compile it ahead of time for `arch`.

    arguments: by name, a type ("*fp16", "i32", "fp32"; with ":16" where the value is a multiple of
    16) or the value of a constexpr; dots: whether it must use the tensor cores.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, Any]
    launch: Launch
    arch: str
    dots: bool = True


_INSTALLED = find_spec("triton") is not None  # looked for once: every edited call asks


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU; set before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def available(device: torch.device | str) -> str | None:
    """Why the kernels can't run on a device; None if they can."""
    device = torch.device(device)
    if not _INSTALLED:
        return "Triton is not installed; it has wheels for Linux only (pip install 'hookctl[gpu]')"
    if interpreting():
        return None
    if device.type != "cuda":
        return f"the kernels need a CUDA or ROCm device, and the tensors are on {device.type}"
    if not torch.cuda.is_available():
        return "the kernels need a CUDA or ROCm device, and this torch sees none"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"the kernels need compute capability 8.0 or more, and {device} has {major}.{minor}"
    return None


def in_one_grid(like: torch.Tensor) -> bool:
    """Whether a grid has room for attention over [..., sub-batch, heads, tokens, channels]."""
    return like.shape[-4] * like.shape[-3] <= MOST_PAIRS


def check_launch(name: str, like: torch.Tensor) -> None:
    """Raise ValueError where the kernels can't run, or where `in_one_grid` is False."""
    why = available(like.device)
    if why:
        raise ValueError(f"{name}: {why}")
    if not in_one_grid(like):
        raise ValueError(
            f"{name}: {like.shape[-4]} x {like.shape[-3]} sequences and heads; one launch takes "
            f"{MOST_PAIRS}, so give it parts of the sequences"
        )


def arch_of(device: torch.device) -> str:
    """The row of the launch tables for a device: the newest that it is known to satisfy."""
    if torch.version.hip is not None:
        return "gfx942"
    return "sm_90" if torch.cuda.get_device_capability(device)[0] == 9 else "sm_80"


def cdiv(count: int, size: int) -> int:
    """How many tiles of a size hold so many."""
    return -(-count // size)


def pieces(width: int) -> tuple[int, int]:
    """The tiles of channels of a head: powers of two of at least 16 whose sum is the width or more.

    80 is 64 + 16, not 128; the second is 0 where one tile is as good (40 channels are 64).
    """
    whole = max(16, 1 << (width - 1).bit_length())
    first = whole // 2
    rest = max(16, 1 << (width - first - 1).bit_length())
    return (whole, 0) if first < 64 or first + rest >= whole else (first, rest)


def sizes(width: int) -> dict[str, int]:
    """A head's channels and their two tiles, as kernels are compiled for them."""
    first, second = pieces(width)
    return {"D": width, "D0": first, "D1": second}


def strides(name: str, x: torch.Tensor, axes: str) -> dict[str, int]:
    """A kernel's arguments for the strides of a tensor, an axis a letter, the first ones."""
    return {f"{name}_stride_{axis}": s for axis, s in zip(axes, x.stride(), strict=False)}


def side_by_side(*stacks: torch.Tensor) -> int:
    """For the loads of tiles: above 1 where all channels lie side by side."""
    return 2 if all(x.stride(-1) == 1 for x in stacks) else 1


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether every token of every stack starts on 16 bytes and has its channels side by side."""
    return all(
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
        for x in tensors
    )


def empty_output(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Empty, [..., heads, tokens, channels], the heads of a token beside each other in memory, so
    that merging them, as the model does, copies nothing."""
    *outer, heads, tokens, channels = shape
    return like.new_empty(*outer, tokens, heads, channels).transpose(-3, -2)
