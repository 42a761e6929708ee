"""Which editors can't be under control together."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from hookctl.address.sites import Site, matcher
from hookctl.errors import ConflictError

CURE = "Give one of them other sites=, or windows that do not overlap"


def check_conflicts(editors: Sequence[tuple[Any, Iterable[Site]]]) -> None:
    """Raise ConflictError if two editors claim the same thing at the same place and time.

    editors: (editor, all sites of its model) pairs, in list order.
    """
    held: list[tuple[Any, Any, frozenset[str]]] = []
    for editor, sites in editors:
        new = []
        for claim in editor.claims():
            test = matcher(claim.sites)
            paths = frozenset(site.path for site in sites if test(site))
            for other, theirs, their_paths in held:
                common = paths & their_paths
                if claim.what == theirs.what and _meet(claim, theirs, common):
                    raise ConflictError(
                        f"{other.name} and {editor.name} both claim the {claim.what}"
                        f"{_where(claim, theirs, common)}. {claim.cure or theirs.cure or CURE}"
                    )
            new.append((editor, claim, paths))
        held += new


def _meet(a: Any, b: Any, common: Collection[str]) -> bool:
    """Whether two claims to one thing can't both be held."""
    prompts = a.prompts is None or b.prompts is None or bool(set(a.prompts) & set(b.prompts))
    places = bool(common) or (a.sites is None and b.sites is None)
    return places and prompts and a.window.overlaps(b.window) and not (a.shared and b.shared)


def _where(a: Any, b: Any, common: Collection[str]) -> str:
    start, stop = max(a.window.start, b.window.start), min(a.window.stop, b.window.stop)
    time = f" between {start:g} and {stop:g} of the schedule"
    if a.sites is None and b.sites is None:
        return time
    return f" of {len(common)} sites (such as {min(common)!r}){time}"
