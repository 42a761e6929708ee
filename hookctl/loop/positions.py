"""Rotary positions of a denoiser call, and what editors make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hookctl.address import families
from hookctl.address.families.rotary import Rotary, RotaryTable
from hookctl.editor import tell
from hookctl.errors import InputError
from hookctl.hooks.rotary import RotaryPort, SiteTablePort
from hookctl.loop.around import Attached
from hookctl.loop.calls import Call, calls
from hookctl.loop.positions_call import PositionsCall
from hookctl.run_state import remembering

_PARTS = ("positions", "frequencies", "amplitudes")


@dataclass(eq=False)
class _Tables:
    """One table of a denoiser call: what the model made, and what editors make of it."""

    own: Any
    table: RotaryTable
    record: Rotary
    theta: float | None
    given: Any = None  # what the module hands the blocks
    made: dict[tuple[int, ...], Any] = field(default_factory=dict)

    def of(self, editors: Sequence[Attached], current: Call) -> Any:
        """The table after these editors, the model's own if they change nothing."""
        key = tuple(id(one) for one in editors)
        if key not in self.made:
            self.made[key] = self._edited(editors, current)
        return self.made[key]

    def _edited(self, editors: Sequence[Attached], current: Call) -> Any:
        state, table = current.state, self.table
        ones = torch.ones_like(table.frequencies)
        parts = {"positions": table.positions, "frequencies": table.frequencies, "amplitudes": ones}
        call = PositionsCall(
            **parts,
            axes=self.record.axes,
            axis=table.axis,
            theta=self.theta,
            rows=state.rows,
            clock=state.clock,
            words=table.words,
        )
        changed = False
        for one in editors:
            before = {name: getattr(call, name).clone() for name in _PARTS}
            with remembering(current.owner.memory):
                tell(one.editor, "positions", call)
            other = [name for name in _PARTS if _checked(one, call, name, before[name])]
            one.note_hook("positions", state.clock.step, ", ".join(other), "rotary table")
            changed |= bool(other)
        return table.build(*(getattr(call, name) for name in _PARTS)) if changed else self.own


def _checked(one: Attached, call: PositionsCall, name: str, before: Tensor) -> bool:
    """Whether an editor changed a part; InputError for one of another shape, or not finite."""
    found = getattr(call, name)
    if not isinstance(found, Tensor) or found.shape != before.shape:
        kind = tuple(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise InputError(
            f"{one.editor.name}.positions assigned {kind} to call.{name}; it is "
            f"{tuple(before.shape)}"
        )
    setattr(call, name, found.to(before))
    if not bool(torch.isfinite(found).all()):
        raise InputError(f"{one.editor.name}.positions assigned NaN or infinity to call.{name}")
    return not torch.equal(found.to(before), before)


def rotary_port(model: nn.Module, path: str) -> RotaryPort:
    """The port of what makes a model's table."""
    found = families.rotary_of(model)
    assert found is not None  # it was found when the editor was attached
    return RotaryPort(model, path, partial(_edited, path, found[1], found[2]))


def site_port(module: nn.Module, path: str) -> SiteTablePort:
    """The port of one site, whose table may be another."""
    return SiteTablePort(module, partial(_exchanged, path))


def _edited(path: str, module: Any, record: Rotary, args: Any, kwargs: Any, output: Any) -> Any:
    """What the model's table becomes for all sites."""
    current = calls.current
    acting = [] if current is None else [a for a in current.acting if "positions" in a.inside]
    if current is None or not acting:
        return None
    tables = _Tables(
        output, record.read(module, args, kwargs, output), record, record.theta(module)
    )
    everywhere = [a for a in acting if a.inside["positions"] == {path}]
    tables.given = tables.of(everywhere, current) if everywhere else output
    current.rotary = tables
    return tables.given


def _exchanged(path: str, given: Any) -> Any:
    """What the table of one site becomes, None for the same."""
    current = calls.current
    if current is None or current.rotary is None or given is not current.rotary.given:
        return None
    tables: _Tables = current.rotary
    acting = [a for a in current.acting if "positions" in a.inside]
    here = [a for a in acting if len(a.inside["positions"]) == 1 or path in a.inside["positions"]]
    return tables.of(here, current) if here else None
