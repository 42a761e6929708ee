"""Links of a page that moves: from its place in the checkout to that on the site."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def moved(text: str, folder: Path, page: str, moves: Mapping[Path, str]) -> str:
    """The text of a page of `folder` as the site's `page`.

    moves: path in the checkout -> name on the site. A link to what the site does not have keeps
    its words alone.
    """

    def link(match: re.Match[str]) -> str:
        mark, words, target = match.groups()
        name, _, anchor = target.partition("#")
        if re.match(r"\w+:", target) or not name:
            return match[0]
        path = Path(os.path.normpath(folder / name))
        if path not in moves:
            return words
        to = os.path.relpath(moves[path], Path(page).parent).replace(os.sep, "/")
        if anchor and path.name == "README.md" and moves[path] == "index.md":
            anchor = ""  # the front page is one of its own
        return f"{mark}[{words}]({to}{anchor and '#' + anchor})"

    return outside_code(text, lambda part: _LINK.sub(link, part))


def rebased(text: str, folder: Path, to: Path) -> str:
    """The text of a page of one folder for a page of another, both in the checkout."""

    def link(match: re.Match[str]) -> str:
        mark, words, target = match.groups()
        if re.match(r"\w+:", target) or target.startswith("#"):
            return match[0]
        path = os.path.relpath(folder / target, to).replace(os.sep, "/")
        return f"{mark}[{words}]({path})"

    return outside_code(text, lambda part: _LINK.sub(link, part))


def outside_code(text: str, change) -> str:
    """Change what stands outside of fenced blocks."""
    parts = _FENCE.split(text)
    return "".join(part if i % 2 else change(part) for i, part in enumerate(parts))


def section(text: str, anchor: str) -> str:
    """What stands under a heading, without it, up to the next of its level.

    Raises KeyError if there is no such heading.
    """
    found = None
    for match in re.finditer(r"^(#+) (.+)$", text, re.MULTILINE):
        if found is not None and len(match[1]) <= found[0]:
            return text[found[1] : match.start()].strip()
        if found is None and anchor_of(match[2]) == anchor:
            found = len(match[1]), match.end()
    if found is None:
        raise KeyError(anchor)
    return text[found[1] :].strip()


def anchor_of(heading: str) -> str:
    """What a heading is called in links."""
    return re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
