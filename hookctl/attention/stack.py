"""Which editors can stand together: claims are compared before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hookctl.address.sites import Site, matcher
from hookctl.errors import ConflictError


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
            for other, their_claim, their_paths in held:
                common = paths & their_paths
                if claim.what == their_claim.what and common and _meet(claim, their_claim):
                    start = max(claim.window.start, their_claim.window.start)
                    stop = min(claim.window.stop, their_claim.window.stop)
                    raise ConflictError(
                        f"{other.name} and {editor.name} both claim the {claim.what} of "
                        f"{len(common)} sites (such as {min(common)!r}) between {start:g} and "
                        f"{stop:g} of the schedule. Give one of them other sites=, or windows "
                        "that do not overlap"
                    )
            new.append((editor, claim, paths))
        held += new


def _meet(a: Any, b: Any) -> bool:
    prompts = a.prompts is None or b.prompts is None or bool(set(a.prompts) & set(b.prompts))
    return prompts and a.window.overlaps(b.window)
