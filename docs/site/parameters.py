"""What a docstring says of arguments, as a table.

The house writes `name: text`, several to a paragraph, in prose:

    scale: s; the paper takes 3. 0 costs nothing.
    start, stop: fractions of the schedule.

mkdocstrings makes tables of Google's sections, so such paragraphs become these. Types and defaults
are the signature's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

# Classes whose instances are handed to editors: what is named are attributes, to be read.
_HANDED = {"AttentionCall"}
# What recipes pass on to their bases, so that signatures do not show it.
_PASSED_ON = {"sites", "start", "stop", "paper"}


class ParameterLines(griffe.Extension):
    """Gives every docstring of a package its sections."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for one in _every(pkg):
            if one.docstring is not None:
                one.docstring.value = rewritten(one.docstring.value, *_names(one))


def _every(one: griffe.Object) -> Iterator[griffe.Object]:
    yield one
    for member in one.members.values():
        if not member.is_alias and isinstance(member, griffe.Object):
            yield from _every(member)


def _names(one: griffe.Object) -> tuple[set[str], str, set[str]]:
    """What may be explained, under which heading, and what further arguments may be."""
    if isinstance(one, griffe.Function):
        return {p.name for p in one.parameters}, "Parameters", set()
    if isinstance(one, griffe.Class):
        dataclass = any("dataclass" in str(d.value) for d in one.decorators)
        attributes = {name for name, member in one.members.items() if member.is_attribute}
        init = one.members.get("__init__")
        given = {p.name for p in init.parameters} if isinstance(init, griffe.Function) else set()
        if dataclass or one.name in _HANDED or not given:
            return attributes | given | _at_line_starts(one.docstring), "Attributes", set()
        return given, "Parameters", _PASSED_ON - given
    return set(), "", set()


def _at_line_starts(docstring: griffe.Docstring | None) -> set[str]:
    """Names of attributes that are inherited, so that the class itself does not have them."""
    text = docstring.value if docstring else ""
    found = re.findall(r"^(\w+(?:, \w+)*): ", text, re.MULTILINE)
    return {one.strip() for names in found for one in names.split(",")}


def rewritten(text: str, names: set[str], section: str, further: set[str]) -> str:
    """A docstring with its `name: text` paragraphs as one section, at their first place.

    further: names whose defaults the signature does not show, which get a section of their own.
    """
    if not names:
        return text
    kept: list[str] = []
    rows: list[tuple[str, str]] = []
    place = None
    for paragraph in re.split(r"\n[ \t]*\n", text):
        found = None if paragraph.startswith("    ") else _rows(paragraph, names | further)
        if found is None:
            kept.append(paragraph)
            continue
        if place is None:
            place = len(kept)
            kept.append("")
        rows += [row for row in found if row[0] not in dict(rows)]
    if place is not None:
        tables = []
        for title, known in ((section, names), ("Other Parameters", further)):
            lines = [f"    {name}: {said}" for name, said in rows if name in known]
            tables += ["\n".join([f"{title}:", *lines])] if lines else []
        kept[place] = "\n\n".join(tables)
    return "\n\n".join(kept)


def _rows(paragraph: str, names: set[str]) -> list[tuple[str, str]] | None:
    """Name and text of each argument of a paragraph, None if it is none of arguments."""
    name = r"`?\w+`?(?:, `?\w+`?)*"
    text = " ".join(line.strip() for line in paragraph.splitlines())
    starts = [
        match
        for match in re.finditer(rf"(?:(?<=^)|(?<=[;.)] ))({name}): ", text)
        if all(one.strip("` ") in names for one in match[1].split(","))
    ]
    if not starts or starts[0].start() != 0:
        return None
    ends = [match.start() for match in starts[1:]] + [len(text)]
    return [
        (one.strip("` "), text[match.end() : end].rstrip("; "))
        for match, end in zip(starts, ends, strict=True)
        for one in match[1].split(",")
    ]
