"""Editors attached to a denoiser: which sites each is shown, and by whose session."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from torch import nn

from hookctl.address import families
from hookctl.address.clock import Clock
from hookctl.address.sites import Site, select
from hookctl.editor import Editor, overrides
from hookctl.errors import SelectorError, UnsupportedError
from hookctl.evaluate.plan import Plan
from hookctl.hooks.skips import concats
from hookctl.loop.residuals import residual_arguments

Modules = Mapping[str, tuple[Site, nn.Module]]


@dataclass(eq=False)
class Entry:
    """What one session brought along, for as long as it is entered, and what is kept for it.

    pipe: its pipeline, None for a bare denoiser; maps, log: its store of maps and its report;
    strict: an edited site that does not run is an error; check_finite: whether NaN and infinity are
    looked for at every step; texts: what embeddings in place of prompts say, None if untold.
    clock: of the last denoiser call, None before the first. called, elsewhere: whether the pipeline
    called its denoiser where the session was entered, and in another thread or task; seen: whether
    any call was made there, those of programs too; unseen: whether the scheduler stepped before;
    stepless: whether a call of the pipeline ended without any.
    expected, ran: the sites whose calls an editor was to be shown, and those that ran.
    places: where it is entered (`Denoising`); hooks: what is installed for it; refresh: looks after
    the hooks of its pipeline.
    """

    editors: Sequence[Editor]
    pipe: Any
    backend: str
    rows: tuple[str, ...] | None
    maps: Any  # the store of `hookctl.maps`, which stands above
    log: Any  # of `hookctl.report`
    strict: bool = True
    check_finite: bool = True
    texts: tuple[str, ...] | None = None
    clock: Clock | None = None
    called: bool = False
    elsewhere: bool = False
    seen: bool = False
    unseen: bool = False
    stepless: bool = False
    expected: set[str] = field(default_factory=set)
    ran: set[str] = field(default_factory=set)
    places: set[Any] = field(default_factory=set)
    hooks: list[Any] = field(default_factory=list)
    refresh: Callable[[], None] = lambda: None

    def silent_sites(self) -> tuple[str, ...]:
        """Sites that an editor was to be shown, but that never ran."""
        return tuple(sorted(self.expected - self.ran))


@dataclass(eq=False)
class Attached:
    """One editor of a session at one denoiser, with the sites it was resolved to.

    inside: for each of its hooks that change layers, their paths; shown: the sites whose calls it
    sees, of those that must be hooked for it.
    """

    editor: Editor
    entry: Entry
    model: nn.Module
    sites: frozenset[str]
    inside: Mapping[str, frozenset[str]] = field(default_factory=dict)
    shown: frozenset[str] = frozenset()

    def sees(self, path: str) -> bool:
        """Whether the editor is shown the calls of a site."""
        return path in self.shown

    @property
    def backend(self) -> str:
        return self.entry.backend

    def note(self, site: Site, step: int, verbs: set[str], plan: Plan) -> None:
        self.entry.log.note(self.editor, site, step, verbs, plan)

    def note_hook(self, hook: str, step: int, what: str, where: str) -> None:
        """Keep what a hook round the attention did, "" for nothing, for the session's report."""
        self.entry.log.note_hook(self.editor, hook, step, what, where)


def attach(entry: Entry, denoisers: Sequence[tuple[nn.Module, Modules]]) -> list[Attached]:
    """A session's editors at each of a pipeline's denoisers, in order.

    Raises what `sites_for` does; a selector may match nothing in some of the denoisers.
    """
    found = []
    for editor in entry.editors:
        missed: SelectorError | None = None
        for model, modules in denoisers:
            try:
                shown = sites_for(editor, model, modules)
                sites = shown | widened_sites_for(editor, model, modules)
                inside = layers_for(editor, model, modules)
            except SelectorError as error:
                missed = error
            else:
                found.append(Attached(editor, entry, model, sites, inside, shown))
        if missed is not None and not any(one.editor is editor for one in found):
            raise missed
    return found


def sites_for(editor: Editor, model: nn.Module, modules: Modules) -> frozenset[str]:
    """The paths of the sites whose calls an editor must be shown.

    Raises InputError or UnsupportedError, before any work, if it can't act on this model.
    """
    editor.window()
    paths: set[str] = set()
    if overrides(editor, "attention"):
        paths |= _selected(editor, model, modules)
    if overrides(editor, "features") and not any(True for _ in concats(model)):
        raise UnsupportedError(
            f"{editor.name} edits skip connections, and {type(model).__name__} has none"
        )
    return frozenset(paths)


def widened_sites_for(editor: Editor, model: nn.Module, modules: Modules) -> frozenset[str]:
    """The paths of all sites that attend to the text, if an editor widens it: the plain call must
    see nothing of that. Raises UnsupportedError where it can't be kept apart."""
    if not overrides(editor, "context"):
        return frozenset()
    return frozenset(_sites_of_text(editor, model, modules))


def layers_for(editor: Editor, model: nn.Module, modules: Modules) -> dict[str, frozenset[str]]:
    """The paths of the layers that an editor changes, for each of its hooks that do so.

    Raises UnsupportedError, before any work, if this model has none of them.
    """
    name = type(model).__name__
    found: dict[str, frozenset[str]] = {}
    if overrides(editor, "insert"):
        chosen = select([site for site, _ in modules.values()], editor.sites, who=editor.name)
        blocks = families.plain_blocks(model)
        found["insert"] = frozenset(s.path for s in chosen if modules[s.path][1] in blocks)
    if overrides(editor, "linear"):
        every = [path for path, _ in families.linears(model)]
        found["linear"] = frozenset(path for path in every if editor.linears(path))
    if overrides(editor, "block"):
        chosen = select([site for site, _ in modules.values()], editor.sites, who=editor.name)
        found["block"] = frozenset(families.blocks_of(model, chosen))
    if overrides(editor, "stem"):
        stem = families.stem_of(model)
        found["stem"] = frozenset(() if stem is None else (stem[0],))
    if overrides(editor, "positions"):
        found["positions"] = _tables(editor, model, modules)
    for hook, paths in found.items():
        if not paths:
            raise UnsupportedError(f"{editor.name} {_WANTS[hook]}, and this {name} has none")
    forward = type(model).forward
    if overrides(editor, "residuals") and not residual_arguments(signature(forward).parameters):
        raise UnsupportedError(
            f"{editor.name} adds to skip connections as a ControlNet does, and {name} takes none"
        )
    return found


def _tables(editor: Editor, model: nn.Module, modules: Modules) -> frozenset[str]:
    """The path of what makes a model's rotary table, and of the sites that alone are to see it."""
    found, name = families.rotary_of(model), type(model).__name__
    if found is None:
        raise UnsupportedError(
            f"{editor.name} rewrites rotary positions, and {name} has none that are known (UNets "
            "have no positions, SD3 and PixArt learned or added ones)"
        )
    if editor.sites is None:
        return frozenset((found[0],))
    if not found[2].shared:
        raise UnsupportedError(
            f"{editor.name}: {name} puts its rotary table together anew before its blocks, which "
            "all see the same; leave sites= out"
        )
    chosen = select([site for site, _ in modules.values()], editor.sites, who=editor.name)
    return frozenset((found[0], *(site.path for site in chosen)))


def _texts_in_rows(model: nn.Module) -> bool:
    record = families.model_of(model)
    return record is not None and record.text_rows


_WANTS = {
    "insert": "inserts between the self-attention of a transformer block and what follows it (of a "
    "BasicTransformerBlock whose norms do not scale)",
    "block": "changes transformer blocks in which the image attends to itself, at its `sites`",
    "linear": "changes linear layers that its `linears` selects",
    "stem": "changes the layer that takes the latents in",
}


def _selected(editor: Editor, model: nn.Module, modules: Modules) -> set[str]:
    if not modules:
        raise UnsupportedError(
            f"{type(model).__name__} has no attention that can be caught (softmax attention), so "
            f"{editor.name} can't act on it"
        )
    if getattr(model, "_parallel_config", None) is not None:
        raise UnsupportedError(
            f"{editor.name} edits attention, and this {type(model).__name__} spreads it over "
            "several devices (context or tensor parallel), none of which sees all of it; load it "
            "without enable_parallelism, by offloading where it is too large for one device"
        )
    chosen = select([site for site, _ in modules.values()], editor.sites, who=editor.name)
    for site in chosen:
        reason = families.uncatchable(modules[site.path][1])
        if reason:
            raise UnsupportedError(
                f"{editor.name} can't act on {site.path}: {reason}. Leave it out with sites="
            )
    return {site.path for site in chosen}


def _sites_of_text(editor: Editor, model: nn.Module, modules: Modules) -> set[str]:
    """The sites that attend to the text an editor widens."""
    name = type(model).__name__
    joint = families.joint_order(model) is not None
    if _texts_in_rows(model):
        return set(modules)  # all of them are given the rows of further texts
    if joint and not families.widens_joint(model):
        raise UnsupportedError(
            f"{editor.name} widens the text, which {name} holds in one sequence with the image; "
            "of such models, those of SD3, Flux, FLUX.2, Qwen-Image, Z-Image and HunyuanVideo can "
            "be"
        )
    kind = "joint" if joint else "cross"
    found = [pair for pair in modules.values() if pair[0].kind == kind]
    for site, module in found:
        if not joint and families.counts_text(module):
            raise UnsupportedError(
                f"{editor.name} widens the text, but {site.path} of this {name} tells text and "
                "image keys apart by their number"
            )
    return {site.path for site, _ in found}
