"""What is read while the page draws: the words' maps, and what each place looks at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

import hookctl
from hookctl.address.rows import COND, Row
from hookctl.address.sites import Grid
from hookctl.address.text import TextLayout
from hookctl.attention.call import AttentionCall
from hookctl.editor import Editor
from hookctl.errors import InputError, UnsupportedError, WordError

if TYPE_CHECKING:
    from torch import Tensor

    from hookctl.session import Session

PLACES = 16  # along each side of the picture, of which it is read what they look at


class Looks(Editor):
    """Reads what places of a picture look at in the picture itself.

    As `Maps(patches=...)`, but `PLACES` by `PLACES` places at once, whose lines are added up in one
    go: a record for each would take longer than a small model's step. Of several pictures, those of
    the last prompt.
    """

    def __init__(self) -> None:
        self.sums: dict[Grid, tuple[Tensor, int]] = {}

    def attention(self, call: AttentionCall) -> None:
        grid = call.grid
        if call.site.kind not in ("self", "joint") or grid is None or grid.frames > 1:
            return
        places = [(n + 0.5) / PLACES for n in range(PLACES)]
        cells = [cell for y in places for x in places for cell in grid.cells(y, x)]
        rows = call.rows.where(branch=COND)
        last = max((row.prompt for row in rows), default=0)
        for row in rows:
            if row.prompt == last:
                call.read_queries(row, cells, partial(self._add, grid))

    def _add(self, grid: Grid, row: Row, lines: Tensor) -> None:
        """lines: [sub-batch, places, image keys]."""
        found = lines.detach().float().mean(0)
        total, count = self.sums.get(grid, (torch.zeros_like(found), 0))
        self.sums[grid] = total + found, count + 1

    def looks(self) -> Tensor | None:
        """The share of each place's attention, over all steps and layers, on the finest grid:
        [PLACES * PLACES, height, width]. None if no layer sees the picture."""
        if not self.sums:
            return None
        size = max(((g.height, g.width) for g in self.sums), key=lambda size: size[0] * size[1])
        found = []
        for grid, (total, _) in self.sums.items():
            map = total.reshape(1, -1, grid.height, grid.width)
            found.append(F.interpolate(map, size=size, mode="bilinear")[0])
        return (torch.stack(found).sum(0) / sum(n for _, n in self.sums.values())).cpu()


def readers_of(pipe: Any) -> list[Editor]:
    """Those of words, where a pipeline's can be known, and of places."""
    return [*([hookctl.Maps(mean=False)] if _has_words(pipe) else []), Looks()]


def _has_words(pipe: Any) -> bool:
    try:
        TextLayout(pipe)
    except UnsupportedError:
        return False
    return True


def words(pipe: Any, prompt: str) -> list[str]:
    """The words of a prompt, whatever number of tokens each has; none without a text encoder."""
    try:
        found = TextLayout(pipe).read(prompt).streams[0][1].words
    except (UnsupportedError, InputError):
        return []
    return list(dict.fromkeys(word.text for word in found))


def words_of(pipe: Any) -> Callable[[str, str], bool]:
    """Whether a prompt has a word or phrase."""

    def has(prompt: str, word: str) -> bool:
        try:
            return bool(TextLayout(pipe).read(prompt).find(word))
        except (WordError, UnsupportedError):
            return False

    return has


def step_maps(session: Session, words: Sequence[str]) -> dict[str, Tensor]:
    """Of each word of the last prompt its maps, averaged over sites: [steps, height, width]."""
    found = {}
    for word in (word for word in words if word in session.maps):
        maps = session.maps[word]
        maps = maps.where(prompt=max(maps.prompts))
        size = max(maps.grids, key=lambda grid: grid[0] * grid[1])
        by_step = [maps.where(steps=[step]).mean(size) for step in maps.steps]
        found[word] = torch.stack(by_step).detach().float().cpu()
    return found
