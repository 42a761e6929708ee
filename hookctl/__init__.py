"""Attention control for diffusion models: edits as algebra, evaluated fused.

    pipe = hookctl.load_shapes()                        # or any diffusers pipeline
    with hookctl.control(pipe, MyEditor(), hookctl.Maps("circle")) as session:
        image = pipe("a red circle above a blue square").images[0]
    session.maps["circle"].overlay(image)
    print(session.report())

Use it
    control, Session        a pipeline under editors, and what came of it
    Maps, MapStore, WordMaps    the attention maps of words
    Region, References      a part of the image; how much an edit model's references count
    load_shapes             the embedded pipelines: no download, seconds on a CPU
    errors                  what can go wrong
    hookctl.recipes         the published methods, ready made

Write an editor: a subclass of Editor that has the hooks it needs
    Editor, Claim           the hooks, when and where they act, and what is theirs alone
    AttentionCall           one attention call, and the verbs that rewrite it
        Routing, Division   what its verbs `route_by` and `divide` are given
    FeatureCall, BlockCall  one skip connection of a UNet; one block, which rows may pass by
    InsertCall, LinearCall, StemCall, PositionsCall, Residuals
                            further places: streams, layers, rotary positions, ControlNets' part
    State, Predictions      one denoiser call, and what it predicted
    Branch                  further rows for the denoiser to predict
    RunState                an attribute that each session, thread and task holds for itself
    Row, Rows, COND, UNCOND who: the batch rows of a call and the branches they belong to
    Clock, Window           when: the step of a call, and a span of the schedule
    Site, select_sites      where: an attention layer, and how some are selected
    Trajectory, Noise       a sampling loop of your own, and the scheduler's noise levels

help(hookctl.control), help(hookctl.Editor) and so on say more.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hookctl import errors

if TYPE_CHECKING:
    from hookctl.address.clock import Clock, Window
    from hookctl.address.regions import Region
    from hookctl.address.rows import COND, UNCOND, Row, Rows
    from hookctl.address.sites import Site
    from hookctl.address.sites import select as select_sites
    from hookctl.attention.call import AttentionCall
    from hookctl.attention.division import Division
    from hookctl.attention.token_map import Routing
    from hookctl.editor import Claim, Editor
    from hookctl.loop.branches import Branch
    from hookctl.loop.inserting import BlockCall, InsertCall, LinearCall, StemCall
    from hookctl.loop.noise import Noise
    from hookctl.loop.positions_call import PositionsCall
    from hookctl.loop.residuals import Residuals
    from hookctl.loop.state import FeatureCall, Predictions, State
    from hookctl.loop.trajectory import Trajectory
    from hookctl.maps import Maps, MapStore, WordMaps
    from hookctl.references import References
    from hookctl.run_state import RunState
    from hookctl.session import Session, control

__version__ = "0.2.0.dev0"

__all__ = [
    "control",
    "Session",
    "Maps",
    "MapStore",
    "WordMaps",
    "Region",
    "References",
    "load_shapes",
    "errors",
    "Editor",
    "Claim",
    "AttentionCall",
    "Routing",
    "Division",
    "FeatureCall",
    "BlockCall",
    "InsertCall",
    "LinearCall",
    "StemCall",
    "Residuals",
    "PositionsCall",
    "State",
    "Predictions",
    "Branch",
    "RunState",
    "Row",
    "Rows",
    "COND",
    "UNCOND",
    "Clock",
    "Window",
    "Site",
    "select_sites",
    "Trajectory",
    "Noise",
]

# Where each name is defined, and its name there if that is another. torch and diffusers take
# seconds to import: a command's help, or a wrong option, must not wait for them.
_HOMES = {
    "AttentionCall": "hookctl.attention.call",
    "BlockCall": "hookctl.loop.inserting",
    "Branch": "hookctl.loop.branches",
    "COND": "hookctl.address.rows",
    "Claim": "hookctl.editor",
    "Clock": "hookctl.address.clock",
    "Division": "hookctl.attention.division",
    "Editor": "hookctl.editor",
    "FeatureCall": "hookctl.loop.state",
    "InsertCall": "hookctl.loop.inserting",
    "LinearCall": "hookctl.loop.inserting",
    "MapStore": "hookctl.maps",
    "Maps": "hookctl.maps",
    "Noise": "hookctl.loop.noise",
    "PositionsCall": "hookctl.loop.positions_call",
    "Predictions": "hookctl.loop.state",
    "References": "hookctl.references",
    "Region": "hookctl.address.regions",
    "Residuals": "hookctl.loop.residuals",
    "Routing": "hookctl.attention.token_map",
    "Row": "hookctl.address.rows",
    "Rows": "hookctl.address.rows",
    "RunState": "hookctl.run_state",
    "Session": "hookctl.session",
    "Site": "hookctl.address.sites",
    "State": "hookctl.loop.state",
    "StemCall": "hookctl.loop.inserting",
    "Trajectory": "hookctl.loop.trajectory",
    "UNCOND": "hookctl.address.rows",
    "Window": "hookctl.address.clock",
    "WordMaps": "hookctl.maps",
    "control": "hookctl.session",
    "select_sites": "hookctl.address.sites:select",
}


# Packages that users reach as attributes, and that nothing imports before.
_PACKAGES = ("learned", "recipes")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, own_name = _HOMES[name].partition(":")
    value = globals()[name] = getattr(import_module(module), own_name or name)
    return value


def __dir__() -> list[str]:
    if sys._getframe(1).f_globals.get("__name__") == "inspect":
        # help() would print every class in full, many screens; the docstring lists them.
        return [name for name in __all__ if name not in _HOMES]
    return sorted({*globals(), *__all__})


def load_shapes(*, flow: bool = False, **options: Any) -> Any:
    """The embedded pipeline: a small, truly trained StableDiffusionPipeline (see its card).

    flow: its sibling of flow matching and joint attention, a StableDiffusion3Pipeline without a T5.
    options: `device` and `dtype`, as of `torch.Tensor.to`.
    """
    from hookctl.demos.shapes.load import load_shapes, load_shapes_flow

    return (load_shapes_flow if flow else load_shapes)(**options)
