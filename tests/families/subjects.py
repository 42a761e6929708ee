"""Pipelines and bare modules of the zoo behind one face, and an edit with its own reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import hookctl
from hookctl import AttentionCall, Editor
from hookctl.address.rows import Row
from tests import zoo

PROMPTS = ["a red cat", "a blue dog"]
MODULE_ROWS = ("uncond", "cond")
LETTERS = {"uncond": "N", "cond": "P", "image": "I", "perturbed": "X"}


@dataclass(frozen=True)
class Subject:
    """One member of the zoo."""

    case: Any

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def is_pipeline(self) -> bool:
        return isinstance(self.case, zoo.Case)

    def make(self) -> Any:
        return self.case.make()

    def denoiser(self, target: Any) -> nn.Module:
        module = self.case.denoiser_of(target) if self.is_pipeline else target
        return getattr(module, "_orig_mod", module)

    def run(self, target: Any, **kwargs: Any) -> Tensor:
        """Two prompts (or two rows), two steps."""
        if self.is_pipeline:
            return self.case.run(target, PROMPTS, **kwargs)
        with torch.no_grad():
            for _ in range(2):
                output = target(**self.case.inputs())
        return output

    def control(self, target: Any, *editors: Editor, **kwargs: Any) -> Any:
        if not self.is_pipeline:
            kwargs.setdefault("rows", MODULE_ROWS)
        return hookctl.control(target, *editors, **kwargs)

    @property
    def calls(self) -> list[list[str]]:
        """The labels of the rows of each denoiser call in a step."""
        if self.is_pipeline:
            return self.case.rows(len(PROMPTS), 1, self.case.guidance > 1)
        return [["P1", "P2"]]

    def attention(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """The modules that are to be sites, by path."""
        aside = getattr(self.case, "aside", None)
        modules = zoo.attention_modules(denoiser)
        return {p: m for p, m in modules.items() if aside is None or not p.startswith(aside)}

    def kinds(self) -> dict[str, int]:
        if self.is_pipeline:
            return dict(self.case.sites)
        values = list(self.case.sites.values())
        return {kind: values.count(kind) for kind in set(values)}


SUBJECTS = [
    Subject(case)
    for case in (*zoo.PIPELINES.values(), *zoo.MODULES.values())
    if case.name not in ("no_attention", "mha")  # what is refused has tests of its own
]


def label(row: Row) -> str:
    return f"{LETTERS[row.branch]}{row.prompt + 1}"


class Idle(Editor):
    """Is shown every call and does nothing."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def attention(self, call: AttentionCall) -> None:
        self.calls.append(call)


class Borrow(Editor):
    """The values of prompt 2 come from prompt 1 (of row 1 from row 0 in a bare module)."""

    sites = "self, joint"

    def __init__(self, start: float = 0.0, stop: float = 1.0) -> None:
        self.start, self.stop = start, stop

    def attention(self, call: AttentionCall) -> None:
        for row in call.rows:
            if {r.branch for r in call.rows} == set(MODULE_ROWS) and not call.prompts:
                if row.branch == "cond" and len(call.rows) == 2:
                    call.borrow(row, v=call.rows[0])
                    continue
            if row.prompt == 1:
                call.borrow(row, v=call.rows.twin(row, prompt=0))


@contextmanager
def borrowed_by_hand(subject: Subject, target: Any) -> Iterator[None]:
    """The same edit made with hooks on the value projections, knowing nothing of hookctl."""
    denoiser = subject.denoiser(target)
    seen = {"calls": 0}
    handles = [denoiser.register_forward_pre_hook(lambda *_: seen.update(calls=seen["calls"] + 1))]
    wanted = {"self", "joint"}

    def rows_of(module: nn.Module) -> list[str]:
        rows = subject.calls[(seen["calls"] - 1) % len(subject.calls)]
        if type(getattr(module, "processor", None)).__name__.startswith("PAG"):
            return [row for row in rows if row[0] != "X"]
        return rows

    def swap(values: Tensor, module: nn.Module) -> Tensor:
        rows = rows_of(module)
        if values.shape[0] % len(rows):
            return values  # the perturbed rows of PAG, by themselves
        stack = values.unflatten(0, (len(rows), -1))
        order = [rows.index(row.replace("2", "1")) for row in rows]
        return stack[order].flatten(0, 1)

    for path, module in subject.attention(denoiser).items():
        for name in ("to_v", "add_v_proj", "to_qkv", "to_added_qkv", "qkv", "to_qkv_mlp_proj"):
            part = getattr(module, name, None)
            if not isinstance(part, nn.Module) or kind_of(subject, path, module) not in wanted:
                continue

            def hook(
                part: nn.Module,
                args: Any,
                out: Tensor,
                module: nn.Module = module,
                name: str = name,
            ) -> Tensor:
                if "qkv" not in name:
                    return swap(out, module)
                # The single blocks of FLUX.2 project their MLP's input behind q, k and v.
                width = getattr(module, "inner_dim", out.shape[-1] // 3)
                q, k, v, rest = out.tensor_split([width, 2 * width, 3 * width], -1)
                return torch.cat([q, k, swap(v, module), rest], -1)

            handles.append(part.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def kind_of(subject: Subject, path: str, module: nn.Module) -> str:
    """The kind of an attention module as the zoo means it."""
    if not subject.is_pipeline:
        return str(subject.case.sites.get(path, ""))
    if "motion_modules" in path or "temporal" in path:
        return "temporal"
    if "joint" in subject.case.sites:
        return "self" if path.endswith("attn2") or "refiner" in path else "joint"
    return "self" if path.endswith("attn1") else "cross"


def error(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())
