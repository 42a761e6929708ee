"""Stable Flow: edits that keep an image by its keys and values in the vital layers alone.

Avrahami et al., "Stable Flow: Vital Layers for Training-Free Image Editing", arXiv 2411.14430 (CVPR
2025). The source and its edits are drawn in one batch from one noise. In the few layers without
which the model draws another image the image's keys and values of an edit are the source's, the
text's its own. They are found by leaving out one at a time (`recipes.common.vital_layers`).

A real image is multiplied by 1.15 before it is inverted, against drifting. The official code never
undoes that, and after every step sets the source to a level of the inversion that is two levels too
noisy, after the first one to the cleanest: `paper=True`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hookctl.address.clock import Window
from hookctl.address.sites import Selector
from hookctl.arguments import checked, number
from hookctl.attention.call import AttentionCall
from hookctl.editor import Claim, Editor
from hookctl.errors import InputError
from hookctl.loop.inversion import with_unit_noise
from hookctl.loop.state import State
from hookctl.recipes.common.image_tokens import image_keys, with_image
from hookctl.recipes.common.real_images import flow
from hookctl.recipes.common.real_images.pinned import Path, Pinned
from hookctl.recipes.common.sites import image_sites, sites_of
from hookctl.recipes.common.source_and_edits import SourceAndEdits
from hookctl.recipes.ddim_inversion import DDIMInversion

# Of FLUX.1 dev, of 19 and 38 blocks.
PUBLISHED = (
    *(f"transformer_blocks.{i}.attn" for i in (0, 1, 17, 18)),
    *(f"single_transformer_blocks.{i}.attn" for i in (6, 9, 34, 35, 37)),
)


class StableFlow(SourceAndEdits):
    """Edit what is drawn, and keep the rest of the source.

        edit = StableFlow(["a photo of a cat", "a photo of a cat with a hat"])
        source, edited = edit.run(pipe, seed=0)
        again, edited = edit.edit(pipe, image)      # of a real image

    prompts: the source, then its edits. sites: the vital layers, by default those of FLUX.1 dev;
        `vital_sites` finds another's. start, stop: fractions of the schedule.
    path: latents of the source at every level, noisiest first, and then the image: those of an
        inverted image, as which it is drawn. nudge: by which these were multiplied. paper: the
        source's levels as in the official code, see above.

    Raises InputError for arguments that do not fit the prompts or the model.
    """

    @checked(own=("prompts",))
    def __init__(
        self,
        prompts: Sequence[str],
        *,
        sites: Selector | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        path: Path | None = None,
        nudge: float = 1.0,
        paper: bool = False,
    ) -> None:
        super().__init__(prompts)
        self.acts = Window.of((start, stop), "StableFlow: start, stop")
        self.given_sites, self.paper = sites, paper
        self.sites = list(PUBLISHED) if sites is None else sites
        self.nudge = number(nudge, "StableFlow: nudge", above=0)
        self.pin = None if path is None else Pinned("StableFlow", path, shared_start=True)

    def neutral(self) -> bool:
        return self.pin is None and (not self.claims() or len(set(self.prompts)) == 1)

    def claims(self) -> Sequence[Claim]:
        claim = Claim("substitution", self.sites, self.acts, tuple(self.edits))
        return [claim] if self.acts.start < self.acts.stop else []

    def attach(self, target: Any) -> None:
        known = [site.path for site in sites_of(target)]
        if self.given_sites is None and not set(PUBLISHED) <= set(known):
            raise InputError(
                f"StableFlow: sites: the vital layers of {type(target).__name__} are not known, "
                "only those of FLUX.1 dev; give sites=vital_sites(pipe, prompts), of "
                "hookctl.recipes.common.vital_layers"
            )
        image_sites(self.name, target, self.sites)

    def begin(self, state: State) -> None:
        super().begin(state)
        if self.pin is not None:
            self.pin.begin(state)

    def before(self, state: State) -> None:
        if self.pin is not None and (not self.paper or state.clock.step == 0):
            self.pin.before(state)

    def after(self, state: State) -> None:
        if self.pin is None:
            return
        step, last = state.clock.step, state.clock.steps - 1
        if self.paper:
            self.pin.set(state, step - 1 if step else last)
        elif step == last:
            if len(self.pin.path) > last + 1:
                self.pin.set(state, last + 1)
            state.latents = state.latents / self.nudge

    def attention(self, call: AttentionCall) -> None:
        if not self.acts.holds(call.clock):
            return
        for row, source in self.paired(call.rows):
            span, own = call.spans.image_keys, (call.k[row.index], call.v[row.index])
            k, v = (image_keys(x[source.index], call) for x in (call.k, call.v))
            call.replace(row, k=with_image(own[0], k, span), v=with_image(own[1], v, span))

    @checked(own=("arguments",))
    def edit(
        self,
        pipe: Any,
        image: Any,
        *editors: Editor,
        steps: int = 50,
        guidance: float = 3.0,
        nudge: float = 1.15,
        unit_noise: bool = False,
        arguments: Mapping[str, Any] | None = None,
        output_type: str = "pil",
    ) -> Any:
        """Invert a real image as the source, and draw it and its edits, as `Inverted.edit` does.

        guidance: scale of the edits, of classifier-free guidance or taught; the source's is 1.
        nudge: factor of the image's latents; unit_noise: bring the path's noise to mean 0 and
        variance 1, as of `DirectInversion`. arguments: further ones of the pipeline's call.
        """
        flow.require_flow(pipe, "StableFlow")
        one, taught = (1.0, guidance) if flow.is_taught_scale(pipe) else (None, None)
        given: dict[str, Any] = {"steps": steps, "embedded": one, "arguments": arguments}
        inversion = DDIMInversion(pipe, image, self.prompts[0], **given)
        inversion.clean = nudge * inversion.clean
        inverted = inversion.run()
        if unit_noise:
            levels = inverted.program(pipe, self.prompts[:1], 1.0).levels
            inverted = replace(inverted, path=tuple(with_unit_noise(inverted.path, levels)))
        own: dict[str, Any] = {"sites": self.given_sites, "nudge": nudge, "paper": self.paper}
        pinned = StableFlow(self.prompts, path=list(inverted.path), **own)
        pinned.acts = self.acts
        scale = guidance if taught is None else 1.0
        drawn: dict[str, Any] = {"embedded": taught, "output_type": output_type}
        return inverted.edit(pipe, pinned, *editors, guidance=scale, **drawn)
