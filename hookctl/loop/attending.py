"""What the hooks inside a model catch, handed to the editors of the denoiser call in progress."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hookctl.attention.sdpa_call import SDPACall
from hookctl.editor import overrides
from hookctl.hooks.attention import SitePort
from hookctl.hooks.skips import Concat
from hookctl.loop import around
from hookctl.loop.calls import calls
from hookctl.loop.missed import is_strict
from hookctl.loop.state import FeatureCall
from hookctl.run_state import remembering


class Attending:
    """The handler of every attention site, whoever controls its model."""

    def watching(self, port: SitePort) -> bool:
        """Whether anything wants this site's calls now; notes that the site ran."""
        call = calls.current
        if call is None:
            return False
        path = port.site.path
        call.ran.add(path)
        return path in call.by_site

    def batch(self) -> int:
        """Rows of the denoiser call in progress."""
        call = calls.current
        return len(call.state.rows) if call is not None else 1

    def is_strict(self) -> bool:
        """Whether attention that could not be caught is an error."""
        call = calls.current
        return call is None or is_strict(call)

    def attend(
        self,
        port: SitePort,
        index: int,
        given: SDPACall,
        original: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Show one caught call to its editors and evaluate what they made of it."""
        call = calls.current
        assert call is not None  # `watching` said so
        edited = call.by_site[port.site.path]
        repeated = calls.repeats(call)
        with remembering(call.owner.memory):  # a backward pass comes from elsewhere
            return edited.output(given, original, call.state, index=index, repeated=repeated)


def edit_features(concat: Concat, backbone: Tensor, skip: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both parts of a concat after its editors, or None if nobody changed any."""
    current = calls.current
    edits = [] if current is None else current.acting
    edits = [a for a in edits if overrides(a.editor, "features")]
    if current is None or not edits:
        return None
    state = current.state
    place = concat.block, concat.place, concat.order, concat.resolution
    call = FeatureCall(backbone, skip, state.rows, state.clock, *place)
    with remembering(current.owner.memory):
        for a in edits:
            around.features(a, call)
    unchanged = call.backbone is backbone and call.skip is skip
    return None if unchanged else (call.backbone, call.skip)
