"""`hookctl bench peers`: whole runs beside what a user would otherwise take, in one process.

Each pair draws the same latents, and must agree before it is timed. What diffusers itself or torch
offers is always there; packages of others are compared with where they are installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import hookctl
from hookctl import recipes
from hookctl.bench.calls import Bench
from hookctl.bench.measure import OURS, PLAIN, Case, Form
from hookctl.cli.bench_steps import OPTIONS
from hookctl.cli.peers import Controller, HandBatched

STEPS = 2
REGIONS = (4, 16)
MASKED = ((1024, 8, 80), (4096, 8, 40))  # tokens, heads, channels
PACKAGES = {"attention_map_diffusers": "attention-map-diffusers", "daam": "daam"}
SWAP = ("a red circle above a blue square", "a green circle above a blue square")
COLOURS = ["red", "green", "blue", "yellow"]
TOLERANCE = 1e-3  # of a whole run: its steps and sites add up
WINDOW = 64  # cells of diffusers' panorama

Around = Callable[[], AbstractContextManager[Any]]


def absent() -> list[str]:
    """Packages that the maps could be compared with too, if they were installed."""
    return [name for module, name in PACKAGES.items() if find_spec(module) is None]


def cases(bench: Bench, quick: bool) -> Iterator[Case]:
    """Every pair. quick: small latents."""
    for shape in MASKED[:1] if quick else MASKED:
        one = bench.regions(shape, 4, 1.0, group="peers")
        kept = {name: form for name, form in one.forms.items() if name in (OURS, "flex", PLAIN)}
        yield Case(
            "peers", "masked self-attention", one.shape, kept, one.truth, one.sample,
            one.tolerance, one.flops, one.traffic,
        )  # fmt: skip
    large = Runs(wide(bench, 32 if quick else 64), bench)
    yield large.prompt_to_prompt()
    for count in REGIONS:
        yield large.regional_prompts(count)
    yield large.maps()
    small = Runs(_shapes(bench), bench)
    yield small.perturbed_attention()
    yield small.freeu()
    yield small.panorama()


def _shapes(bench: Bench) -> Any:
    pipe: Any = hookctl.load_shapes(device=bench.device).to(bench.dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wide(bench: Bench, side: int, **other: Any) -> Any:
    """The embedded pipeline with a UNet of the size that a CPU can draw with; random weights.

    other: options of the UNet in place of its own.
    """
    from diffusers import UNet2DConditionModel

    pipe = _shapes(bench)
    given = pipe.unet.config
    options = OPTIONS["SD1.5" if bench.device.type == "cuda" else "reduced SD1.5"]
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(
        **{
            **options,
            "sample_size": side,
            "in_channels": given.in_channels,
            "out_channels": given.out_channels,
            "cross_attention_dim": given.cross_attention_dim,
            **other,
        }
    )
    unet = unet.to(bench.device, bench.dtype).eval().requires_grad_(False)
    return type(pipe)(**{**pipe.components, "unet": unet}, requires_safety_checker=False)


class Runs:
    """Runs of one pipeline as forms of cases."""

    group = "peers"

    def __init__(self, pipe: Any, bench: Bench) -> None:
        self.pipe, self.bench = pipe, bench
        self.side = pipe.unet.config.sample_size
        pipe.set_progress_bar_config(disable=True)

    def run(
        self, prompts: list[str] | str, pipe: Any = None, width: int = 0, **more: Any
    ) -> Tensor:
        """Latents that a run ends with; every image starts from the same noise."""
        pipe = pipe or self.pipe
        count = 1 if isinstance(prompts, str) else len(prompts)
        latents = self.noise(count, width)
        height, across = (side * pipe.vae_scale_factor for side in latents.shape[2:])
        images: Tensor = pipe(
            prompts, height=height, width=across, num_inference_steps=STEPS, latents=latents,
            output_type="latent", **more,
        ).images  # fmt: skip
        return images

    def noise(self, count: int, width: int = 0) -> Tensor:
        """What a run starts from, alike for every image."""
        shape = (1, self.pipe.unet.config.in_channels, self.side, width or self.side)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return noise.to(self.bench.device, self.bench.dtype).repeat(count, 1, 1, 1)

    def case(
        self,
        name: str,
        peer: str,
        forms: Mapping[str, Form],
        inside: Mapping[str, Around],
        **shape: int,
    ) -> Case:
        """peer: the form whose result is the truth."""

        def truth() -> Tensor:
            with inside.get(peer, nullcontext)():
                return forms[peer]()

        slack = self.bench.tolerance / 2e-5
        return Case(
            self.group, name, {"latent": self.side, **shape}, forms, truth,
            tolerance=TOLERANCE * slack, inside=inside, whole=True,
        )  # fmt: skip

    def ours(self, *editors: hookctl.Editor) -> Around:
        return lambda: hookctl.control(self.pipe, *editors)

    def processors(self, change: Callable[[str, Any], Any]) -> Around:
        """change: of a site's name and processor, what stands there meanwhile."""

        @contextmanager
        def around() -> Iterator[None]:
            before = dict(self.pipe.unet.attn_processors)
            self.pipe.unet.set_attn_processor({n: change(n, p) for n, p in before.items()})
            try:
                yield
            finally:
                self.pipe.unet.set_attn_processor(before)

        return around

    # -- the pairs -----------------------------------------------------------------------------

    def prompt_to_prompt(self) -> Case:
        """A word swapped in all steps, against a controller over explicit probabilities."""
        settings: Any = {"cross_replace": 1.0, "self_replace": 1.0, "self_resolution": 0.25}
        edit = recipes.PromptToPrompt(list(SWAP), **settings)
        most = (self.side // 4) ** 2
        inside = {
            OURS: self.ours(edit),
            "controller": self.processors(lambda *_: Controller(most)),
        }
        forms: dict[str, Form] = dict.fromkeys(
            (OURS, "controller", PLAIN), lambda: self.run(list(SWAP))
        )
        return self.case("P2P", "controller", forms, inside)

    def regional_prompts(self, count: int) -> Case:
        """Strips with texts of their own, against one SDPA over all regions put together by
        hand."""
        texts = [
            f"a {word} circle, {i}" for i, word in zip(range(count), 8 * COLOURS, strict=False)
        ]
        regions = [(i / count, 0.0, (i + 1) / count, 1.0) for i in range(count)]
        edit = recipes.RegionalPrompts(texts, regions)
        hand = HandBatched(self.pipe, texts, edit)
        inside = {
            OURS: self.ours(edit),
            "by hand": self.processors(lambda name, old: hand if "attn2" in name else old),
        }

        def by_hand() -> Tensor:
            hand.encode()
            return self.run(SWAP[0])

        def plain() -> Tensor:
            return self.run(SWAP[0])

        forms: dict[str, Form] = {OURS: plain, "by hand": by_hand, PLAIN: plain}
        return self.case("regional prompts", "by hand", forms, inside, regions=count)

    def maps(self) -> Case:
        """Maps of all words, beside the packages that are installed. What each returns has its own
        resolution and mean, so the images are what must agree."""

        def plain() -> Tensor:
            return self.run(SWAP[0])

        forms: dict[str, Form] = {OURS: plain, PLAIN: plain}
        inside: dict[str, Around] = {OURS: self.ours(hookctl.Maps())}
        if find_spec("daam") is not None:
            daam = import_module("daam")
            forms["daam"] = plain
            inside["daam"] = lambda: daam.trace(self.pipe)
        if find_spec("attention_map_diffusers") is not None:
            theirs = import_module("attention_map_diffusers")

            @contextmanager
            def captured() -> Iterator[None]:
                before = dict(self.pipe.unet.attn_processors)
                theirs.init_pipeline(self.pipe)
                try:
                    yield
                finally:
                    theirs.attn_maps.clear()
                    self.pipe.unet.set_attn_processor(before)

            forms["attention-map-diffusers"] = plain
            inside["attention-map-diffusers"] = captured
        return self.case("maps", PLAIN, forms, inside)

    def perturbed_attention(self) -> Case:
        from diffusers import StableDiffusionPAGPipeline

        theirs = StableDiffusionPAGPipeline(
            **self.pipe.components, requires_safety_checker=False, pag_applied_layers="mid"
        )
        theirs.set_progress_bar_config(disable=True)

        def by_diffusers() -> Tensor:
            before = dict(self.pipe.unet.attn_processors)
            try:
                return self.run(SWAP[0], theirs, pag_scale=3.0)
            finally:
                self.pipe.unet.set_attn_processor(before)

        forms: dict[str, Form] = {OURS: lambda: self.run(SWAP[0]), "diffusers": by_diffusers}
        forms[PLAIN] = forms[OURS]
        edit = recipes.PAG(3.0, sites="self mid")
        return self.case("PAG", "diffusers", forms, {OURS: self.ours(edit)})

    def freeu(self) -> Case:
        gains: Any = {"s1": 0.9, "s2": 0.2, "b1": 1.3, "b2": 1.4}

        @contextmanager
        def enabled() -> Iterator[None]:
            self.pipe.enable_freeu(**gains)
            try:
                yield
            finally:
                self.pipe.disable_freeu()

        edit = recipes.FreeU(**gains, rule="diffusers")
        forms: dict[str, Form] = dict.fromkeys(
            (OURS, "diffusers", PLAIN), lambda: self.run(SWAP[0])
        )
        inside: dict[str, Around] = {OURS: self.ours(edit), "diffusers": enabled}
        return self.case("FreeU", "diffusers", forms, inside)

    def panorama(self) -> Case:
        """Two tiles."""
        from diffusers import DDIMScheduler, StableDiffusionPanoramaPipeline

        runs = Runs(self.pipe, self.bench)
        runs.side, width = WINDOW, WINDOW + 8
        scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        theirs = StableDiffusionPanoramaPipeline(
            **{**self.pipe.components, "scheduler": scheduler}, requires_safety_checker=False
        )
        theirs.set_progress_bar_config(disable=True)
        forms: dict[str, Form] = {
            OURS: lambda: runs.run(SWAP[0], width=width),
            "diffusers": lambda: runs.run(SWAP[0], theirs, width),
        }
        edit = recipes.MultiDiffusion(tile=WINDOW, stride=8)
        return runs.case("panorama", "diffusers", forms, {OURS: runs.ours(edit)}, width=width)
