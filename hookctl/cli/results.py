"""What a run leaves behind: images, a grid, a report, and a few lines on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hookctl.preset.stack import Preset

if TYPE_CHECKING:
    from PIL.Image import Image

    from hookctl.session import Session

SHOWN_WORDS = 3


@dataclass(frozen=True, eq=False)
class Results:
    """What was drawn, prompt by prompt and image by image of each.

    edited: more than one for each plain one where a program draws several; sessions: the one round
    it all first; image: that was given.
    """

    prompts: Sequence[str]
    images: int  # of each prompt
    plain: Sequence[Image]
    edited: Sequence[Image]
    sessions: Sequence[Session]
    image: Image | None = None

    def save(self, out: Path) -> None:
        for name, drawn in (("plain", self.plain), ("edited", self.edited)):
            for i, one in enumerate(drawn):
                image = f"-{i % self.images}" if self.images > 1 else ""
                one.save(out / f"{name}-{i // self.images}{image}.png")
        reports = [session.report() for session in self.sessions if session.editors]
        (out / "report.txt").write_text("\n\n".join(reports) + "\n", "utf-8")
        self.grid().save(out / "grid.png")

    def grid(self) -> Image:
        """An image a row: what was given, source (where there is an edit), plain, edited, maps."""
        from hookctl.inspect import show

        several = len(self.prompts) > 1
        shown = [(p, j) for p in range(several, len(self.prompts)) for j in range(self.images)]
        each = len(self.edited) // len(self.plain)
        given: list[Image | None] = [] if self.image is None else [self.image]
        rows = []
        for p, j in shown:
            i = p * self.images + j
            source = [self.plain[j]] if several else []
            here = self.edited[i * each : (i + 1) * each]
            maps = _overlays(self.sessions[0], p, j, here[0])
            rows.append([*given, *source, self.plain[i], *here, *maps])
        titles = ["image"] * len(given)
        titles += ["source", "plain re-prompt"] if several else ["plain"]
        titles += ["edited"] * each
        width = max(map(len, rows))
        titles += ["attention map"] * (width - len(titles))
        return show.grid(
            [row + [None] * (width - len(row)) for row in rows],
            column_titles=titles,
            row_titles=[self.prompts[p] for p, _ in shown],
        )


def _overlays(session: Session, prompt: int, place: int, image: Image) -> list[Image]:
    found = []
    for word in session.maps.words:
        maps = session.maps[word]
        if prompt in maps.prompts:
            chosen = maps.where(prompt=prompt, image=place)
            found.append(chosen.overlay(image, label=word))
    return found[:SHOWN_WORDS]


def say(out: Path, sessions: Sequence[Session], preset: Preset, times: Mapping[str, float]) -> None:
    """In short: what each editor did, and where to look."""
    if preset.program is not None:
        print(f"{preset.program.recipe}: draws by a loop of its own")
    for session in sessions:
        rows = session.log.rows()
        for editor in session.editors:
            mine = [row for row in rows if row[0] == editor.name]
            sites, plans = {row[1] for row in mine}, sorted({row[4] for row in mine})
            where = f"{len(sites)} of {len(session.sites)} sites, by {', '.join(plans)}"
            print(f"{editor.name}: {where if sites else 'acts round the attention'}")
    print(f"edited in {times['edited']:.1f} s, plain in {times['plain']:.1f} s")
    print(f"look at {out / 'grid.png'}; also written: plain-*, edited-*, report.txt, run.json")
