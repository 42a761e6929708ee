"""Features of one pass of a model, kept for another: keys and values by moment and site.

A program says at which moment its pass is, a level of its run and which of the calls made there;
`FeatureKeeper` keeps what attention has then, and `FeatureInjector` puts it in the place of what
another pass has. The store belongs to one run, and ends with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hookctl.address import families
from hookctl.address.rows import COND, Row
from hookctl.address.sites import Selector, Site
from hookctl.arguments import number
from hookctl.attention.call import AttentionCall
from hookctl.editor import Claim, Editor
from hookctl.errors import InputError, UnsupportedError
from hookctl.loop.trajectory import Trajectory
from hookctl.recipes.common.features.size import bytes_of_sites, free_bytes
from hookctl.recipes.common.image_tokens import with_image
from hookctl.recipes.common.sites import IMAGE_KINDS, image_sites

Moment = tuple[int, int]  # a level of the run, and which call of its step

GB = 1e9


class FeatureStore:
    """What attention had at some moments, [images, sub-batch, heads, tokens, channels] each.

    who: the recipe, for errors; sites: whose; names: of "q", "k", "v"; text: also of the text's
    tokens, not of the image's alone; on_cpu: keep them there, not where the model is; memory: GB
    that they may take, None for what is free.
    """

    def __init__(
        self,
        who: str,
        sites: Sequence[Site],
        names: Sequence[str],
        *,
        text: bool = False,
        on_cpu: bool = True,
        memory: float | None = None,
    ) -> None:
        self.who, self.sites, self.names = who, tuple(sites), tuple(names)
        self.text, self.on_cpu, self.memory = text, on_cpu, memory
        self._kept: dict[tuple[Moment, str, str], Tensor] = {}

    @property
    def bytes(self) -> int:
        """What is kept takes."""
        return sum(x.nbytes for x in self._kept.values())

    @property
    def moments(self) -> set[Moment]:
        """At which something is kept."""
        return {moment for moment, _, _ in self._kept}

    # -- beforehand ----------------------------------------------------------------------------

    def expected_bytes(self, program: Trajectory, moments: int) -> int:
        """What so many moments of a program's prompts will take."""
        one = bytes_of_sites(program, self.sites, text=self.text)
        kept = round(one * self.share(program))
        return kept * len(self.names) * moments * len(program.prompts)

    def share(self, program: Trajectory) -> float:
        """Of the tokens that are kept."""
        return 1.0

    def check_fits(self, program: Trajectory, moments: int) -> None:
        """Raise InputError if so many moments of a program's prompts take more than there is."""
        needed = self.expected_bytes(program, moments)
        device = torch.device("cpu") if self.on_cpu else program.latents.device
        free = free_bytes(device) if self.memory is None else self.memory * GB
        if needed > free:
            limit = "memory=" if self.memory is not None else "free there"
            move = "" if self.on_cpu or device.type == "cpu" else "on_cpu=True, "
            raise InputError(
                f"{self.who}: {'/'.join(self.names)} of {len(self.sites)} sites at {moments} "
                f"moments take {needed / GB:.3g} GB on {device.type}, and {free / GB:.3g} GB are "
                f"{limit}; give {move}fewer sites=, fewer steps or a smaller image"
            )

    # -- a run ---------------------------------------------------------------------------------

    def keep(self, call: AttentionCall, moment: Moment) -> None:
        """Of the rows that see their prompt."""
        rows = [row.index for row in call.rows if row.role == COND]
        if not rows or call.index:
            return
        for name in self.names:
            x = getattr(call, name)[rows]
            if not self.text:
                x = self.select(call, x[..., slice(*_image_span(call, name, x)), :])
            kept = x.detach().to("cpu") if self.on_cpu else x.detach().clone()
            self._kept[moment, call.site.path, name] = kept

    def taken(
        self,
        call: AttentionCall,
        moment: Moment,
        row: Row,
        mix: Callable[[str, Tensor, Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """q, k or v of a row with what was kept in it, [sub-batch, heads, tokens, channels];
        nothing where nothing is kept.

        The text's are those of the prompt of the pass that was kept, so a row that sees another
        text, the unconditional one, has the image's alone. mix: makes of a name, the row's own and
        the kept tokens what the row gets.
        """
        found = {}
        for name in self.names:
            kept = self._kept.get((moment, call.site.path, name))
            if kept is None or call.index:
                continue
            own = getattr(call, name)[row.index]
            x = kept[row.prompt if len(kept) > 1 else 0].to(own, non_blocking=True)
            span = _image_span(call, name, own)
            if self.text:
                self._check(call, x, own.shape[-2], "give text=False, or prompts of one length")
                if row.role == COND:
                    found[name] = mix(name, own, x)
                    continue
                x = x[..., slice(*span), :]
            image = own[..., slice(*span), :]
            x = self.restore(call, image, x)
            self._check(call, x, span[1] - span[0], "draw the size that was inverted")
            found[name] = with_image(own, mix(name, image, x), span)
        return found

    def select(self, call: AttentionCall, x: Tensor) -> Tensor:
        """The part that is kept of the image's tokens, [images, sub-batch, heads, tokens, ...]."""
        return x

    def restore(self, call: AttentionCall, own: Tensor, kept: Tensor) -> Tensor:
        """The image's tokens of which such a part was kept, the others being the row's own."""
        return kept

    def _check(self, call: AttentionCall, x: Tensor, tokens: int, cure: str) -> None:
        if x.shape[-2] != tokens:
            raise InputError(
                f"{self.who}: {x.shape[-2]} tokens were kept of {call.site.path}, which has "
                f"{tokens} now; {cure}"
            )


def storing(who: str, on_cpu: bool, memory: float | None) -> dict[str, Any]:
    """The options of a store as a recipe is given them; InputError for no memory."""
    if memory is not None:
        memory = number(memory, f"{who}: memory", low=0)
    return {"on_cpu": on_cpu, "memory": memory}


class FeatureKeeper(Editor):
    """Keeps what attention has, while `moment` is one; changes nothing."""

    def __init__(self, store: FeatureStore) -> None:
        self.store, self.sites = store, [site.path for site in store.sites]
        self.moment: Moment | None = None

    @property
    def name(self) -> str:
        return f"{self.store.who} (keeps)"

    def attention(self, call: AttentionCall) -> None:
        if self.moment is not None:
            self.store.keep(call, self.moment)


class FeatureInjector(Editor):
    """Puts what was kept at `moment` in the place of what attention has, while there is one."""

    def __init__(self, store: FeatureStore) -> None:
        self.store, self.sites = store, [site.path for site in store.sites]
        self.moment: Moment | None = None

    @property
    def name(self) -> str:
        return f"{self.store.who} (shares)"

    def claims(self) -> Sequence[Claim]:
        return (Claim("substitution", self.sites),)

    def attention(self, call: AttentionCall) -> None:
        if self.moment is not None:
            mix = partial(self.mix, call)
            for row in call.rows:
                if taken := self.store.taken(call, self.moment, row, mix):
                    call.replace(row, **taken)

    def mix(self, call: AttentionCall, name: str, own: Tensor, kept: Tensor) -> Tensor:
        """What a row gets: of q, k or v (`name`) its own tokens and those that were kept,
        [sub-batch, heads, tokens, channels]."""
        return kept


def late_sites(who: str, target: object, sites: Selector | None) -> tuple[Site, ...]:
    """The selected sites where the image attends to itself; by default the later half.

    Of models with single-stream blocks, such as FLUX, it is their half (20 to 37 of FLUX.1's 38).
    """
    if sites is not None:
        return image_sites(who, target, sites)
    late = []
    for every in _single(who, target):
        late += every[min(len(every) // 2 + 1, len(every) - 1) :]
    return tuple(late)


def single_sites(who: str, target: object) -> tuple[Site, ...]:
    """Those of single-stream blocks; of models without, all where the image attends to itself."""
    return tuple(site for every in _single(who, target) for site in every)


def _single(who: str, target: object) -> list[list[Site]]:
    """For each of the denoisers of a pipeline."""
    found = []
    for name, denoiser in families.denoisers_of(target):
        every = [site for site, _ in families.describe_sites(denoiser, name)]
        every = [site for site in every if site.kind in IMAGE_KINDS]
        found.append([site for site in every if "single" in site.path] or every)
    if not all(found):
        raise UnsupportedError(f"{who}: the image attends to itself nowhere in this model")
    return found


def _image_span(call: AttentionCall, name: str, x: Tensor) -> tuple[int, int]:
    """Where the image that is drawn stands among queries or keys."""
    spans = call.spans
    span = spans.image_queries if name == "q" else spans.image_keys
    return span or (0, x.shape[-2])
