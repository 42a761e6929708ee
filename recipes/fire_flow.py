"""FireFlow: the midpoint rule at the cost of Euler's, inverting and editing.

Deng et al., "FireFlow: Fast Inversion of Rectified Flow for Image Semantic Editing", arXiv
2412.07517 (ICML 2025). A step of RF-Solver whose first velocity is the last step's second one,

    x~ = x + (s' - s) / 2 v         v' = v(x~, (s + s') / 2)         x' = x + (s' - s) v'

so that only the first step of a direction makes two predictions; the error still falls with the
square of the number of steps. In the first `inject` steps of the edit queries, keys or values of
the single-stream blocks are those of the inversion, or those are added to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hookctl.address.sites import Selector
from hookctl.arguments import checked, is_list, number, refusal
from hookctl.attention.call import AttentionCall
from hookctl.recipes.common.features.store import FeatureInjector, FeatureStore, single_sites
from hookctl.recipes.common.real_images import flow
from hookctl.recipes.common.real_images.shared import Ask, SharedProgram, steps_of
from hookctl.recipes.common.sites import image_sites

STRATEGIES = tuple(f"{way}_{name}" for way in ("replace", "add") for name in "qkv")


class FireFlow(SharedProgram):
    """Draw an edit of a real image from its own noise, in few steps.

        edit = FireFlow(pipe, image, "a photo of a dog", source_prompt="a photo of a cat")
        edited = edit.run()[0]

    image, prompt, source_prompt, guidance, inversion_guidance, unit_noise, negative, text, on_cpu,
        memory, arguments, paper: as of `RFSolver`. steps: 8 as published, 10 to 15 for hard images.
    inject: in so many steps, the noisiest, features are shared; 0 not at all. The very first
        prediction of the edit has none, since the inversion makes none at its level.
    strategy: what is done, of "replace_q", "add_q" and likewise k and v, one for each of these.
        ratios: factors of the inversion's q, k and v.
    sites: where, by default all single-stream blocks, or all where the image attends to itself.

    Raises as `RFSolver` does.
    """

    @checked(own=("arguments", "strategy"))
    def __init__(
        self,
        pipe: Any,
        image: Any,
        prompt: str | Sequence[str],
        *,
        source_prompt: str | Sequence[str] = "",
        steps: int = 8,
        guidance: float = 2.0,
        inversion_guidance: float = 1.0,
        unit_noise: bool = False,
        negative: str | None = None,
        inject: int = 1,
        strategy: Sequence[str] = ("replace_v",),
        ratios: tuple[float, float, float] = (1.0, 1.0, 1.0),
        sites: Selector | None = None,
        text: bool | None = None,
        on_cpu: bool = True,
        memory: float | None = None,
        arguments: Mapping[str, Any] | None = None,
        paper: bool = False,
    ) -> None:
        flow.require_flow(pipe, "FireFlow")
        ways = [str(way) for way in strategy] if is_list(strategy) else [""]
        if any(way not in STRATEGIES for way in ways) or len({w[-1] for w in ways}) < len(ways):
            wanted = f"a list of {', '.join(STRATEGIES)}, one for each of q, k and v"
            raise refusal("FireFlow: strategy", strategy, wanted)
        factors = [number(ratio, "FireFlow: ratios") for ratio in ratios]
        self.ways = {way[-1]: way.startswith("add") for way in ways}
        self.ratios = dict(zip("qkv", factors, strict=True))
        where = single_sites("FireFlow", pipe)
        super().__init__(
            pipe,
            image,
            prompt,
            source_prompt=source_prompt,
            steps=steps,
            guidance=guidance,
            inversion_guidance=inversion_guidance,
            unit_noise=unit_noise,
            negative=negative,
            inject=inject if ways else 0,
            sites=where if sites is None else image_sites("FireFlow", pipe, sites),
            names=tuple(self.ways),
            text=paper if text is None else text,
            on_cpu=on_cpu,
            memory=memory,
            arguments=arguments,
            paper=paper,
        )

    def _walk(
        self, ask: Ask, x: Tensor, levels: Sequence[float], *, upwards: bool = False
    ) -> Tensor:
        v: Tensor | None = None
        for i, here, there, level in steps_of(levels, upwards):
            length = there - here
            v = ask(x, here, (level, 0)) if v is None else v
            v = ask(x + length / 2 * v, (here + there) / 2, (i, 1))
            x = x + length * v
        return x

    def _injector(self, store: FeatureStore) -> FeatureInjector:
        return _Weighted(store, self.ways, self.ratios)


class _Weighted(FeatureInjector):
    """Puts a share of what was kept in the place of what attention has, or adds it."""

    def __init__(
        self, store: FeatureStore, added: Mapping[str, bool], ratios: Mapping[str, float]
    ) -> None:
        super().__init__(store)
        self.added, self.ratios = added, ratios

    def mix(self, call: AttentionCall, name: str, own: Tensor, kept: Tensor) -> Tensor:
        kept = kept if self.ratios[name] == 1 else self.ratios[name] * kept
        return own + kept if self.added[name] else kept
