"""What the hooks inside a model catch, handed to the editors of the denoiser call in progress."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from hookctl.address import families
from hookctl.address.sites import Grid, Site, grid_of
from hookctl.attention.sdpa_call import SDPACall
from hookctl.editor import overrides
from hookctl.hooks.attention import SitePort
from hookctl.hooks.layers import BlockPort, Edit, InsertPort, LayerPort
from hookctl.hooks.rotary import RotaryPort, SiteTablePort
from hookctl.hooks.skips import Concat, ConcatPort, concats
from hookctl.loop import around
from hookctl.loop.attached import Modules
from hookctl.loop.calls import calls
from hookctl.loop.inserting import BlockCall, InsertCall, LinearCall, StemCall
from hookctl.loop.missed import is_strict
from hookctl.loop.positions import rotary_port, site_port
from hookctl.loop.state import FeatureCall, State
from hookctl.loop.text_rows import further_of, own_rows_of, rows_inside, with_further
from hookctl.run_state import remembering

InsidePort = BlockPort | ConcatPort | LayerPort | RotaryPort | SiteTablePort


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


# What an editor changes a layer by: the attribute of what its hook is shown.
_RESULTS = {"insert": "hidden", "linear": "output", "stem": "output"}


def ports_inside(
    model: nn.Module, modules: Modules, wanted: Collection[tuple[str, str]]
) -> Iterator[tuple[tuple[str, str], InsidePort]]:
    """Ports of some layers of a model, by hook and path."""
    blocks, rotary = families.plain_blocks(model), families.rotary_of(model)
    if rotary is not None and (key := ("positions", rotary[0])) in wanted:
        yield key, rotary_port(model, rotary[0])
    for concat in concats(model):
        if (key := ("features", concat.path)) in wanted:
            yield key, ConcatPort(concat, edit_features)
    for path, (site, module) in modules.items():
        if (key := ("insert", path)) in wanted:
            yield key, InsertPort(blocks[module], path, edit_inside("insert", path, site))
        if (key := ("positions", path)) in wanted:
            yield key, site_port(module, path)
    for path, block in families.blocks_of(model, [site for site, _ in modules.values()]).items():
        if (key := ("block", path)) in wanted:
            edit = partial(_passed, path, block.site)
            yield key, BlockPort(block.module, path, edit, block.streams, block.image)
    stem = families.stem_of(model)
    layers = {"linear": list(families.linears(model)), "stem": [] if stem is None else [stem]}
    for hook, found in layers.items():
        for path, module in found:
            if (key := (hook, path)) in wanted:
                yield key, LayerPort(module, path, edit_inside(hook, path, module))


def _passed(path: str, site: Site, hidden: Tensor) -> tuple[Tensor, list[int]]:
    """What goes into a block after its editors, and the places in the batch that pass it by."""
    current = calls.current
    edits = [] if current is None else current.acting
    edits = [a for a in edits if path in a.inside.get("block", ())]
    if current is None or not edits:
        return hidden, []
    state = current.state
    shown = own_rows_of(state, hidden)
    call = BlockCall(path, site, shown, state.rows, state.clock, *_image_in(site, shown, state))
    with remembering(current.owner.memory):
        for a in edits:
            around.block(a, call)
    if shown is hidden:
        return call.hidden, call.passed
    followed = hidden if call.hidden is shown else with_further(state, site, call.hidden, hidden)
    return followed, [*call.passed, *further_of(state, call.passing)]


def _image_in(
    site: Site, hidden: Tensor, state: State
) -> tuple[Grid | None, tuple[int, int] | None]:
    """The grid of the drawn image among the tokens that a block is given, and where it stands."""
    tokens = hidden.shape[-2]
    grid = grid_of(tokens, state.grid, len(hidden) // len(state.rows))
    if grid is not None:
        return grid, (0, tokens)
    images, order = state.images_in_sequence, families.joint_order(state.denoiser)
    if site.kind not in ("self", "joint") or images is None or images.count > tokens:
        return None, None
    # The image stands alone, or padded, or where the order of a joint sequence has it.
    start = tokens - images.count if site.kind == "joint" and order == "text_image" else 0
    start += sum(one.tokens for one in images.grids[: images.target])
    target = images.grids[images.target]
    return target, (start, start + target.tokens)


def edit_inside(hook: str, path: str, place: Site | nn.Module) -> Edit:
    """What the editors make, by a hook, of the output of the layer at a path.

    place: the site after which is inserted, or the layer itself.
    """
    return partial(_edited, hook, path, place)


def _edited(hook: str, path: str, place: Any, given: Tensor, output: Tensor) -> Tensor | None:
    current = calls.current
    edits = [] if current is None else current.acting
    edits = [a for a in edits if path in a.inside.get(hook, ())]
    if current is None or not edits:
        return None
    call = _shown(hook, path, place, current.state, given, output)
    with remembering(current.owner.memory):
        for a in edits:
            around.inside(a, hook, call, _RESULTS[hook], path)
    found: Tensor = getattr(call, _RESULTS[hook])
    return None if found is output else found


def _shown(
    hook: str, path: str, place: Any, state: State, given: Tensor, output: Tensor
) -> InsertCall | LinearCall | StemCall:
    rows, clock = rows_inside(state), state.clock
    if hook == "insert":
        grid = grid_of(output.shape[-2], state.grid, len(output) // len(rows))
        return InsertCall(place, output, rows, clock, grid)
    if hook == "linear":
        texts = [place.stop for place in state.extra_text.values()]
        texts += [state.text_rows.longest] if state.text_rows else []
        text = None if state.own_text is None else max([state.own_text, *texts])
        where = (state.images_in_sequence, text, state.own_text)
        return LinearCall(path, given, output, rows, clock, state.grid, place, *where)
    return StemCall(place, given, output, rows, clock)
