"""Edited sites that a denoiser call leaves out: their edits would be lost without a word."""

from __future__ import annotations

from torch import nn

from hookctl.errors import HoleError
from hookctl.hooks.caches import cache_at
from hookctl.loop.calls import Call


class Missed:
    """Looks whether what a call was to show its editors is run, for sessions that are strict."""

    def __init__(self) -> None:
        self._ran: dict[tuple[object, ...], set[str]] = {}

    def before(self, model: nn.Module, call: Call) -> None:
        """Raise HoleError if a cache will skip edited sites."""
        if not call.by_site:
            return
        cache = cache_at(model, call.state.clock.step)
        if cache is None or not cache.effect or not (cache.blocks_edits or is_strict(call)):
            return
        rest = "" if cache.blocks_edits else ", or pass strict=False to do without the edits there"
        raise HoleError(
            f"edited attention: {cache.name} is on in {type(model).__name__} and {cache.effect} "
            f"({len(call.by_site)} sites); {cache.cure}{rest}"
        )

    def after(self, model: nn.Module, call: Call) -> None:
        """Raise HoleError if the call ran none of its edited sites, or fewer than one like it."""
        state = call.state
        if not call.by_site or not is_strict(call):
            return
        if not call.ran:
            raise HoleError(
                "none of the edited attention sites ran in a denoiser call: a compiled graph or a "
                "cache is bypassing the model. Call torch._dynamo.reset(), or compile inside "
                "control(); switch the cache off; or pass strict=False"
            )
        if state.nested or state.reading is not None:
            return
        ran = self._ran.setdefault((id(model), *[row.branch for row in state.rows]), set())
        lost = sorted((ran & set(call.by_site)) - call.ran)
        ran |= call.ran
        if lost:
            raise HoleError(
                f"{len(lost)} edited sites that ran before were skipped at step "
                f"{state.clock.step}, such as {lost[0]!r}: a cache (such as DeepCache) is reusing "
                "their block's output, so their edits would be lost. Switch it off, leave the "
                "sites out with sites=, or pass strict=False"
            )


def is_strict(call: Call) -> bool:
    """Whether a session whose editors act in a call wants to know."""
    return any(one.entry.strict for one in call.acting)
