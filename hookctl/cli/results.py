"""What a run leaves behind: images, a grid, a report, and a few lines on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookctl.cli.common import save_image, write_text
from hookctl.preset import Preset

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from hookctl.address.regions import Region
    from hookctl.session import Session

SHOWN_WORDS = 3


@dataclass(frozen=True, eq=False)
class Results:
    """What was drawn, prompt by prompt and image by image of each.

    edited: more than one for each plain one where a program draws several; sessions: the one round
    it all first; words: whose maps to show; image: that was given; titles: of the edited ones of a
    plain one, if a program draws several.
    """

    prompts: Sequence[str]
    images: int  # of each prompt
    plain: Sequence[Image]
    edited: Sequence[Image]
    sessions: Sequence[Session]
    words: Sequence[str] = ()
    image: Image | None = None
    titles: Sequence[str] = ()

    def save(self, out: Path) -> None:
        for name, drawn in (("plain", self.plain), ("edited", self.edited)):
            for i, one in enumerate(drawn):
                image = f"-{i % self.images}" if self.images > 1 else ""
                save_image(one, out / f"{name}-{i // self.images}{image}.png")
        reports = [session.report() for session in self.sessions if session.editors]
        write_text(out / "report.txt", "\n\n".join(reports) + "\n")
        for editor in self.sessions[0].editors:
            # What an editor has to show beside the attention maps, such as influence maps.
            if sheets := getattr(editor, "sheets", None):
                for name, sheet in sheets(self.edited).items():
                    save_image(sheet, out / f"{name}.png")
        save_image(self.grid(), out / "grid.png")

    def grid(self) -> Image:
        """An image a row: what was given, source (where there is an edit), plain, edited, maps.

        The maps of a row are on one scale, whose bar stands at its end; the regions of the editors
        are outlined on them, or on the edited image if there are none.
        """
        from hookctl.inspect import show

        several = len(self.prompts) > 1
        shown = [(p, j) for p in range(several, len(self.prompts)) for j in range(self.images)]
        each = len(self.edited) // len(self.plain)
        given: list[Image | None] = [] if self.image is None else [self.image]
        maps = [_maps_of(self.sessions[0], self.words, p, j) for p, j in shown]
        words = list(dict.fromkeys(word for found in maps for word in found))
        rows: list[list[Image | None]] = []
        scales = [show.scale_of(found.values()) if found else None for found in maps]
        titles = ["image"] * len(given)
        titles += ["source", "plain re-prompt"] if several else ["plain"]
        titles += self.titles if len(self.titles) == each else ["edited"] * each
        for (p, j), found, scale in zip(shown, maps, scales, strict=True):
            i = p * self.images + j
            here = self.edited[i * each : (i + 1) * each]
            row = [*given, *([self.plain[j]] if several else []), self.plain[i], *here]
            regions = _regions(self.sessions[0], p)
            if regions and not words:
                row.append(show.outlined(here[0], regions))
            for word in words:
                drawn = None
                if word in found:
                    drawn = show.overlay(here[0], found[word], scale=scale, regions=regions)
                row.append(drawn)
            rows.append(row)
        titles += [f"map of {word!r}" for word in words]
        titles += ["regions"] * (max(map(len, rows)) - len(titles))
        return show.grid(
            [row + [None] * (len(titles) - len(row)) for row in rows],
            column_titles=titles,
            row_titles=[self.prompts[p] for p, _ in shown],
            scales=scales,
            scaled_from=len(titles) - len(words),
        )


def _maps_of(session: Session, words: Sequence[str], prompt: int, place: int) -> dict[str, Tensor]:
    """The mean maps of the words in one image, of those that its prompt has."""
    found = {}
    for word in words:
        if word in session.maps and prompt in (maps := session.maps[word]).prompts:
            found[word] = maps.where(prompt=prompt, image=place).mean().detach().cpu()
    return dict(list(found.items())[:SHOWN_WORDS])


def _regions(session: Session, prompt: int) -> list[Region]:
    """The regions that the editors of a session are given for a prompt, each once."""
    from hookctl.address.regions import Region

    found: dict[Any, Region] = {}
    for editor in session.editors:
        held = getattr(editor, "regions", None) or ()
        if isinstance(held, Mapping):
            held = list(held.values())
        elif not all(isinstance(one, Region) for one in held):  # a list for each prompt
            held = held[min(prompt, len(held) - 1)]
        if isinstance(held, Region):
            held = [held]
        found |= {_key(one): one for one in held or () if isinstance(one, Region)}
    return list(found.values())


def _key(region: Region) -> Any:
    """What makes two regions alike."""
    try:
        hash(region)
    except TypeError:  # of a mask
        return id(region)
    return region


def say(out: Path, sessions: Sequence[Session], preset: Preset, times: Mapping[str, float]) -> None:
    """In short: what each editor did, and where to look."""
    if preset.program is not None:
        print(f"{preset.program.recipe}: draws by a loop of its own")
    for session in sessions:
        silent = dict(session.log.silent(session.editors))
        for editor in session.editors:
            mine = [row for row in session.log.rows() if row[0] == editor.name]
            hooks = [row[2] for row in session.log.hook_rows() if row[0] == editor.name]
            sites, plans = {row[1] for row in mine}, sorted({row[4] for row in mine})
            parts = [f"{len(sites)} of {len(session.sites)} sites, by {', '.join(plans)}"] * bool(
                sites
            )
            parts += dict.fromkeys(hooks)
            print(f"{editor.name}: {'; '.join(parts) or f'never acted: {silent[editor.name]}'}")
    print(f"edited in {times['edited']:.1f} s, plain in {times['plain']:.1f} s")
    print(f"look at {out / 'grid.png'}; also written: plain-*, edited-*, report.txt, run.json")
