"""One short generation that notes which sites were really caught, and with which sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hookctl.address import families
from hookctl.attention.call import AttentionCall
from hookctl.editor import Editor
from hookctl.errors import HoleError
from hookctl.inspect.model import survey
from hookctl.session import control


@dataclass(eq=False)
class Seen:
    """The calls of one site: how many, and their largest numbers of queries and keys."""

    calls: int = 0
    rows: int = 0
    queries: int = 0
    keys: int = 0


@dataclass(eq=False)
class Probe(Editor):
    """Changes nothing, and counts the calls of the sites with these paths."""

    paths: frozenset[str]
    seen: dict[str, Seen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sites = lambda site: site.path in self.paths

    def attention(self, call: AttentionCall) -> None:
        seen = self.seen.setdefault(call.site.path, Seen())
        seen.calls += 1
        seen.rows = max(seen.rows, len(call.rows))
        seen.queries = max(seen.queries, call.q.shape[-2])
        seen.keys = max(seen.keys, call.k.shape[-2])


@dataclass(frozen=True, eq=False)
class Probed:
    """What a run showed: the calls by site, the holes with their reasons, and what never ran."""

    seen: dict[str, Seen]
    holes: dict[str, str]
    silent: tuple[str, ...]

    def data(self) -> dict[str, Any]:
        return {
            "caught": {path: vars(seen) for path, seen in self.seen.items()},
            "not_caught": self.holes,
            "never_ran": list(self.silent),
        }


def probe(pipe: Any, **arguments: Any) -> Probed:
    """Draw with a pipeline and note what was caught; a site that can't be caught is left out.

    arguments: of the pipeline's own call.
    """
    modules = dict(families.uncompiled(families.denoiser_of(pipe)).named_modules())
    facts = survey(pipe).sites
    described = {fact.site.path: modules[fact.site.path] for fact in facts}
    holes = {fact.site.path: fact.how for fact in facts if not fact.caught}
    left = set(described) - set(holes)
    while left:
        editor, finished = Probe(frozenset(left)), False
        try:
            with control(pipe, editor):
                pipe(**arguments)
                finished = True
        except HoleError as error:
            if finished:  # of sites that never ran: they are told below
                break
            path = next((p for p in left if str(error).startswith(f"{p} ran")), None)
            if path is None:
                raise
            alike = _alike(path, left, described)
            holes |= dict.fromkeys(alike, str(error).partition(": ")[2])
            left -= alike
            continue
        break
    else:
        return Probed({}, holes, ())
    silent = tuple(path for path in described if path in left and path not in editor.seen)
    return Probed(editor.seen, holes, silent)


def _alike(path: str, left: set[str], described: dict[str, nn.Module]) -> set[str]:
    """The sites that compute as this one does: their calls are lost in the same way."""

    def making(module: nn.Module) -> tuple[type, type]:
        return type(module), type(getattr(module, "processor", None))

    return {p for p in left if making(described[p]) == making(described[path])}
