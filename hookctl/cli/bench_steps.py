"""One denoiser step of a UNet with random weights: plain, edited, and under eager control."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import hookctl
from hookctl.attention.call import AttentionCall
from hookctl.bench.calls import READ, Bench
from hookctl.bench.edits import (
    BRANCHES,
    TEXT,
    Edit,
    adapter,
    cross,
    guided,
    masked,
    probabilities,
    regions_of,
    self_replacement,
    weigh,
)
from hookctl.bench.measure import OURS, PLAIN, Case, Form

SLACK = 5  # a step's tolerance over a call's: its errors add up

# (tokens, heads, channels, whether the site is cross-attention) -> the edit there
Choice = Callable[[int, int, int, bool], Edit | None]
Around = Callable[[], AbstractContextManager[Any]]


class Apply(hookctl.Editor):
    """Makes the edit that is chosen for each site."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice

    def attention(self, call: AttentionCall) -> None:
        heads, tokens, channels = call.q.shape[2:]
        edit = self.choice(tokens, heads, channels, call.site.kind == "cross")
        if edit is not None:
            edit.apply(call)


class Capture(hookctl.Editor):
    """Reads the maps of two words at every cross site."""

    sites = "cross"

    def __init__(self) -> None:
        self.maps: list[Tensor] = []

    def attention(self, call: AttentionCall) -> None:
        call.read(call.rows.where(branch="cond"), READ, lambda row, m: self.maps.append(m[0]))


class Sizes(hookctl.Editor):
    """Notes (rows, heads, queries, keys, channels, whether cross) of every attention call."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int, int, int, int, bool]] = []

    def attention(self, call: AttentionCall) -> None:
        rows, sub, heads, n, d = call.q.shape
        of_cross = call.site.kind == "cross"
        self.found.append((rows * sub, heads, n, call.k.shape[-2], d, of_cross))


class Eager:
    """A processor that does the same as the official code does it: on explicit matrices."""

    def __init__(self, choice: Choice, maps: list[Tensor] | None = None) -> None:
        self.choice, self.maps = choice, maps
        self.read: Tensor | None = None

    def __call__(
        self, attn: Any, hidden: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        text = hidden if encoder_hidden_states is None else encoder_hidden_states
        given = (attn.to_q(hidden), attn.to_k(text), attn.to_v(text))
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in given)
        is_cross = encoder_hidden_states is not None
        edit = self.choice(q.shape[2], q.shape[1], q.shape[3], is_cross)
        if edit is not None:
            out = edit.explicit(q, k, v)
        else:
            p = probabilities(q, k)
            if self.maps is not None and is_cross:
                self.read = torch.tensor(READ, device=q.device) if self.read is None else self.read
                self.maps += [row.mean(0)[:, self.read] for row in p[guided(p)]]
            out = weigh(p, v)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def steps(bench: Bench, quick: bool) -> Iterator[Case]:
    """Cases of whole steps: full size on a GPU, reduced on a CPU."""
    names = ("reduced SD1.5",) if bench.device.type == "cpu" else ("SD1.5", "SDXL")
    for name in names:
        model = Model(name, bench, 32 if quick else 64)
        yield model.edited("P2P", model.prompt_to_prompt)
        for count in (4,) if quick else (2, 4, 8):
            yield model.edited("masked self-attention", partial(model.regions, count), count)
        yield model.edited("adapter", model.adapter)
        yield model.captured("map capture", energy=False)
        yield model.captured("energy gradient", energy=True)


class Model:
    """A UNet with random weights and what it is called with: source and edit, guided."""

    def __init__(self, name: str, bench: Bench, side: int) -> None:
        from diffusers import UNet2DConditionModel

        self.name, self.bench = name, bench
        self.side = 128 if name == "SDXL" else side
        options = OPTIONS[name]
        torch.manual_seed(0)
        usual = torch.get_default_dtype()
        torch.set_default_dtype(bench.dtype)
        try:
            with bench.device:  # billions of random numbers, made where they are wanted
                unet = UNet2DConditionModel(sample_size=self.side, **options)
        finally:
            torch.set_default_dtype(usual)
        self.unet = unet.eval().requires_grad_(False)
        self.processors = dict(self.unet.attn_processors)
        to: dict[str, Any] = {"device": bench.device, "dtype": bench.dtype}
        self.sample = torch.randn(4, 4, self.side, self.side).to(**to)
        self.text = torch.randn(4, TEXT, options["cross_attention_dim"]).to(**to)
        self.more: dict[str, Any] = {}
        if name == "SDXL":
            added = {"text_embeds": torch.randn(4, 1280), "time_ids": torch.ones(4, 6)}
            self.more["added_cond_kwargs"] = {k: x.to(**to) for k, x in added.items()}
        self._made: dict[Any, Edit] = {}
        self.products, self.attention = self.counted()

    def counted(self) -> tuple[float, list[tuple[int, int, int, int, int, bool]]]:
        """Operations of one step outside attention, and the sizes of its attention calls."""
        sizes, counter = Sizes(), FlopCounterMode(display=False)
        with hookctl.control(self.unet, sizes, rows=BRANCHES), counter, torch.no_grad():
            self.step()
        counts = counter.get_flop_counts()["Global"]
        return (
            float(sum(x for op, x in counts.items() if "scaled_dot_product" not in str(op))),
            sizes.found,
        )

    def work(self, choice: Choice, *, energy: bool = False) -> tuple[float, float]:
        """Operations and bytes that no form of a step can do without.

        A gradient to the latents goes back through every product once, and through both of
        attention twice. Every weight is read; activations may stay in a cache.
        """
        flops = self.products * (2 if energy else 1)
        for rows, heads, n, m, d, of_cross in self.attention:
            edit = choice(n, heads, d, of_cross)
            share = 1.0 if edit is None else edit.work
            flops += 4.0 * rows * heads * n * m * d * share * (3 if energy else 1)
        traffic = sum(x.numel() * x.element_size() for x in self.unet.parameters())
        return flops, float(traffic)

    def step(self, sample: Tensor | None = None) -> Tensor:
        given = self.sample if sample is None else sample
        return self.unet(given, 500, self.text, **self.more).sample

    def once(self, key: Any, make: Callable[[], Edit]) -> Edit:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    # -- what is edited where ------------------------------------------------------------------

    def prompt_to_prompt(self, n: int, heads: int, d: int, is_cross: bool) -> Edit:
        if is_cross:
            return self.once("replace", lambda: cross("replace", self.bench.device))
        return self.once("self", self_replacement)

    def regions(self, count: int, n: int, heads: int, d: int, is_cross: bool) -> Edit | None:
        if is_cross:
            return None
        device = self.bench.device
        return self.once(("regions", count, n), lambda: masked(regions_of(n, count, 0.5), device))

    def adapter(self, n: int, heads: int, d: int, is_cross: bool) -> Edit | None:
        if not is_cross:
            return None
        device, dtype = self.bench.device, self.bench.dtype
        return self.once(("adapter", heads, d), lambda: adapter(heads, d, device, dtype))

    # -- cases ---------------------------------------------------------------------------------

    def edited(self, name: str, choice: Choice, regions: int = 0) -> Case:
        inside = self.inside(Apply(choice), Eager(choice))
        forms: dict[str, Form] = dict.fromkeys((OURS, "eager", PLAIN), self.step)
        return self.case(name, forms, inside, self.work(choice), regions)

    def captured(self, name: str, *, energy: bool) -> Case:
        """Maps of the guided rows, or the gradient of a scalar of them to the latents."""

        capture = Capture()
        maps = capture.maps

        def form() -> Tensor:
            maps.clear()
            with torch.set_grad_enabled(energy):
                sample = self.sample.clone().requires_grad_(energy)
                self.step(sample)
                if not energy:
                    return torch.cat([m.float().flatten() for m in maps])
                scalar = sum((m.float().square().mean() for m in maps), sample.new_zeros(()))
                maps.clear()
                return torch.autograd.grad(scalar, sample)[0]

        inside = self.inside(capture, Eager(lambda *_: None, maps))
        forms = {OURS: form, "eager": form, PLAIN: self.step}
        return self.case(name, forms, inside, self.work(lambda *_: None, energy=energy))

    def named(self, name: str) -> Case:
        """A case by the name of its edit."""
        return {
            "P2P": lambda: self.edited("P2P", self.prompt_to_prompt),
            "regions": lambda: self.edited("masked self-attention", partial(self.regions, 4), 4),
            "adapter": lambda: self.edited("adapter", self.adapter),
            "maps": lambda: self.captured("map capture", energy=False),
            "energy": lambda: self.captured("energy gradient", energy=True),
        }[name]()

    def inside(self, editor: hookctl.Editor, processor: Eager) -> dict[str, Around]:
        """A step with an editor attached, and one under a processor."""

        @contextmanager
        def eagerly() -> Iterator[None]:
            self.unet.set_attn_processor(processor)
            try:
                yield
            finally:
                self.unet.set_attn_processor(dict(self.processors))

        return {OURS: lambda: hookctl.control(self.unet, editor, rows=BRANCHES), "eager": eagerly}

    def case(
        self,
        name: str,
        forms: dict[str, Form],
        inside: Mapping[str, Around],
        work: tuple[float, float],
        regions: int = 0,
    ) -> Case:
        """The eager form is the reference; what it is edited by is put in place beforehand."""

        def truth() -> Tensor:
            with inside["eager"]():
                return forms["eager"]()

        shape = {"pixels": 8 * self.side} | ({"regions": regions} if regions else {})
        tolerance = SLACK * self.bench.tolerance
        flops, traffic = work
        return Case(
            f"step {self.name}", name, shape, forms, truth, tolerance=tolerance,
            flops=flops, traffic=traffic, inside=inside, whole=True,
        )  # fmt: skip


OPTIONS: dict[str, dict[str, Any]] = {
    "reduced SD1.5": {
        "block_out_channels": (64, 128, 256, 256),
        "cross_attention_dim": 256,
        "attention_head_dim": 4,
        "norm_num_groups": 16,
    },
    "tiny": {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    },
    "SD1.5": {"cross_attention_dim": 768},
    "SDXL": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
