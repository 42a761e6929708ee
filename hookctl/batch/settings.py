"""The settings of a draw: those of the job, and over them those that are its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hookctl.batch.plan import Draw
from hookctl.errors import InputError
from hookctl.preset import SETTINGS, EditorSpec, Preset, parameters
from hookctl.preset.check import near, typed
from hookctl.preset.signature import hints_of
from hookctl.preset.stack import FILLED

if TYPE_CHECKING:
    from hookctl.batch.job.spec import Job


def settled(one: Draw, run: Mapping[str, Any], preset: Preset) -> tuple[dict[str, Any], Preset]:
    """The settings of a draw's call and its stack; run, preset: the job's.

    InputError for a value that can't be one.
    """
    own = {
        key: _setting(key, value, f"[vary.run] {key}")
        for key, value in one.settings.get("run", {}).items()
    }
    specs = [_with(spec, one.settings.get(spec.recipe, {})) for spec in preset.specs]
    return {**run, **own}, replace(preset, specs=tuple(specs))


def _with(spec: EditorSpec, settings: Mapping[str, Any]) -> EditorSpec:
    if not settings:
        return spec
    hints = hints_of(spec.cls)
    given = {
        key: typed(value, hints.get(key, Any), f"[vary.{spec.recipe}] {key}")
        for key, value in settings.items()
    }
    return replace(spec, arguments={**spec.arguments, **given})


def _setting(key: str, value: Any, where: str) -> Any:
    """A setting of a run; InputError if it can't be one."""
    value = typed(value, SETTINGS[key].hint, where)
    if wanted := SETTINGS[key].lacks(value):
        raise InputError(f"{where} = {value!r}; give {wanted}")
    return value


def check_vary(job: Job, preset: Preset) -> None:
    """InputError for a setting that is varied and that no editor has, or that can't be so."""
    for owner, table in job.vary.items():
        where = f"{job.path}: [vary.{owner}]"
        taken, hints = _taken(owner, preset, where)
        for key, varied in table.items():
            if key not in taken:
                raise InputError(
                    f"{where}: {key!r} is no setting of it{near(key, taken)}; there are: "
                    f"{', '.join(taken)}"
                )
            for value in varied.extremes():
                if owner == "run":
                    _setting(key, value, f"{where} {key}")
                else:
                    typed(value, hints.get(key, Any), f"{where} {key}")


def _taken(owner: str, preset: Preset, where: str) -> tuple[list[str], Mapping[str, Any]]:
    """The settings of an editor of the stack, or of the run, and their type hints."""
    if owner == "run":
        return [name for name, setting in SETTINGS.items() if setting.draws], {}
    named = [spec for spec in preset.specs if spec.recipe == owner]
    if len(named) != 1:
        what = "stands in the stack twice" if named else "is no editor of the stack"
        there = ", ".join(("run", *dict.fromkeys(spec.recipe for spec in preset.specs)))
        raise InputError(f"{where}: {what}; there are: {there}")
    taken = [name for name in parameters(named[0].cls) if name not in FILLED["editor"]]
    return taken, hints_of(named[0].cls)
