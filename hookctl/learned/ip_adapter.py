"""IP-Adapter: images as prompts, by a second cross-attention beside that to the text.

Ye et al., "IP-Adapter", arXiv 2308.06721. At every cross-attention, with image tokens p,

    out = W_o (Attn(q, W_k c, W_v c) + sum_j s_j M_j * Attn(q, W'_k p_j, W'_v p_j)) + b_o

each Attn with a softmax of its own; s_j, M_j: the strength of image j and where it acts. Rows
without the prompt see the tokens of nothing (of a zero embedding, or of an image of zeros).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hookctl.address.families import denoiser_of, sites_of, uncompiled
from hookctl.address.rows import IMAGE, UNCOND, Row, Rows
from hookctl.arguments import checked
from hookctl.attention.call import AttentionCall
from hookctl.editor import WHOLE_IMAGE, Claim, Editor
from hookctl.errors import InputError
from hookctl.learned.adapter import Adapter, check_fit, fitting
from hookctl.learned.image_encoder import ImageEncoder
from hookctl.learned.image_prompts import (
    ImagePrompt,
    Part,
    Place,
    check_prompts,
    features_at,
    for_each_prompt,
    image_in,
    image_prompts_of,
    parts_of,
    read_prompt,
    vectors,
)
from hookctl.learned.modules.resampler import Resampler
from hookctl.learned.names import adapter_layers
from hookctl.learned.strength import Strength
from hookctl.learned.tables import with_files
from hookctl.learned.weights import Weights
from hookctl.loop.state import State
from hookctl.run_state import RunState

T = TypeVar("T")
Inputs = tuple[Tensor, ...]  # of the projection, each with one row


class IPAdapter(Editor):
    """Show images to a denoiser beside its prompt.

        edit = hookctl.learned.load("ip-adapter_sd15.safetensors", pipe, images=picture, scale=0.6)

    adapter: the trained modules. images: an image, or several; or a list of lists, one for each
    prompt of the run. Each is a PIL image, the tensor that the adapter reads of one (the embedding
    [channels], or the features [tokens, channels]), or an `ImagePrompt` with a scale and a region.
    Images of one scale without a region share a softmax; the others have one of their own, and add.
    scale: strength at every site, or {site selector: strength}, whose first that holds counts, and
    0 elsewhere: for SDXL {"up_blocks.0.attentions.1.*": 1} takes the style alone,
    {"down_blocks.2.attentions.1.*": 1} the layout (InstantStyle, arXiv 2404.02733).
    schedule: factors of it over the run, at equal distances from the first step to the last, with
    straight lines between.
    negative: what unguided rows see in place of an image's features: those of an image of zeros,
    which the image encoder makes if there is one. image_encoder: reads the images, the pipeline's
    by default; crop: cut out their middle, as it was trained, rather than squeeze them.

    A scale of 0 leaves a run bit for bit as it was. Several adapters at once add.
    """

    sites = "cross"
    argument = "images"

    _layers: RunState[dict[str, str]] = RunState(factory=dict)  # number of each site, by path
    _encoder: RunState[ImageEncoder | None] = RunState(None)
    _inputs: RunState[dict[int, Inputs]] = RunState(factory=dict)  # of each image prompt, by id
    _found: RunState[dict[Any, Any]] = RunState(factory=dict)  # tokens, keys, values and shares

    @checked(own=("images",))
    def __init__(
        self,
        adapter: Adapter,
        images: Any,
        *,
        scale: float | Mapping[str, float] = 1.0,
        schedule: Sequence[float] | None = None,
        negative: Any = None,
        image_encoder: Any = None,
        crop: bool = True,
        start: float = 0.0,
        stop: float = 1.0,
    ) -> None:
        self.adapter, self.scale = adapter, scale
        self.reads, self.widths = adapter.image_proj.reads, adapter.image_proj.widths
        self.strength = Strength(scale, schedule, self.name)
        self.image_encoder, self.crop = image_encoder, crop
        self.start, self.stop = start, stop
        self.prompts = for_each_prompt(images, self._read, f"{self.name}: {self.argument}")
        self.parts = [list(parts_of(own)) for own in self.prompts]
        self._negative = None
        if negative is not None:
            name = f"{self.name}: negative"
            self._negative = self._tensor(negative, features_at(self.reads, name), name)
        self._projection = Weights(adapter.image_proj)
        self._weights = tuple(adapter.image_proj.parameters())
        adapter.requires_grad_(False)

    # -- what is given -------------------------------------------------------------------------

    def _read(self, given: Any, name: str) -> ImagePrompt:
        prompt = read_prompt(given, name, self.reads)
        for at, kind in enumerate(self.reads):
            value = prompt.face if kind == "face" else prompt.image
            if kind == "face" or image_in(value, name) is None:
                self._tensor(value, at, name)
        return prompt

    def _tensor(self, given: Any, at: int, name: str) -> Tensor:
        """What the projection reads at one of its inputs."""
        return vectors(given, name, self.widths[at], several=self._several(at))

    def _several(self, at: int) -> bool:
        return self.reads[at] == "features" or isinstance(self.adapter.image_proj, Resampler)

    # -- before anything runs ------------------------------------------------------------------

    def neutral(self) -> bool:
        return self.strength.is_zero or not any(part.scale for own in self.parts for part in own)

    def claims(self) -> Sequence[Claim]:
        if all(part.place is None for own in self.parts for part in own):
            return ()
        return [Claim(WHOLE_IMAGE, window=self.window(), shared=True)]

    def attach(self, target: Any) -> None:
        denoiser = uncompiled(denoiser_of(target))
        check_fit(self.adapter, denoiser, self.name)
        self._layers = {path: str(i) for i, path in adapter_layers(denoiser).items()}
        self.strength.check(site for site in sites_of(denoiser) if site.path in self._layers)
        model = self.image_encoder
        if model is None:
            model = getattr(target, "image_encoder", None)
        self._encoder = None if model is None else ImageEncoder(model, crop=self.crop)
        for name, prompt in (item for own in self.prompts for item in own):
            for kind, channels in zip(self.reads, self.widths, strict=True):
                if kind != "face" and image_in(prompt.image, name) is not None:
                    self._check_encoder(kind, channels, name)

    def _check_encoder(self, kind: str, channels: int, name: str) -> None:
        if self._encoder is None:
            raise InputError(
                f"{name}: an image given, but the pipeline has no image encoder; give "
                f"image_encoder= (a CLIPVisionModelWithProjection), or the image's {kind}"
            )
        self._encoder.check(kind, channels, name)

    # -- a run ---------------------------------------------------------------------------------

    def begin(self, state: State) -> None:
        if self.neutral():
            return
        check_prompts(self.prompts, state.rows, f"{self.name}: {self.argument}")
        for place in (part.place for own in self.parts for part in own):
            if place is not None and state.grid:
                place.check_canvas(*state.grid[-2:])
        for name, prompt in (item for own in self.prompts for item in own):
            if id(prompt) not in self._inputs:
                self._inputs[id(prompt)] = tuple(self._encoded(prompt, name))
        if any(is_unguided(row) for row in state.rows):
            self._nothing()

    def _encoded(self, prompt: ImagePrompt, name: str) -> Iterator[Tensor]:
        for at, kind in enumerate(self.reads):
            value = prompt.face if kind == "face" else prompt.image
            image = None if kind == "face" else image_in(value, name)
            if image is None:
                yield self._tensor(value, at, name)
            else:
                assert self._encoder is not None  # `attach` looked
                yield self._encoder.read(self._encoder.pixels(image), kind)

    def _nothing(self) -> Inputs:
        """What rows without the prompt are shown: no image, no face."""
        found = []
        for at, (kind, channels) in enumerate(zip(self.reads, self.widths, strict=True)):
            if kind == "features":
                found.append(self._features_of_zeros())
            else:
                found.append(torch.zeros(*([1, 1] if self._several(at) else [1]), channels))
        return tuple(found)

    def _features_of_zeros(self) -> Tensor:
        if self._negative is not None:
            return self._negative
        encoder = self._encoder
        if encoder is None:
            raise InputError(
                f"{self.name}: negative=None, but rows without the prompt are shown the features "
                "of an image of zeros, and the pipeline has no image encoder to make them; give "
                "negative=, or image_encoder="
            )
        zeros = torch.zeros(1, 3, encoder.size, encoder.size)
        return self._kept("zeros", lambda: encoder.read(zeros, "features"))

    # -- the attention -------------------------------------------------------------------------

    def attention(self, call: AttentionCall) -> None:
        # Further calls of a layer are those of other adapters, which the pipeline has.
        strength = 0.0 if call.index else self.strength.at(call.site, call.clock)
        if strength == 0.0:
            return
        for rows, parts, unguided in self._whose(call.rows):
            for part in parts:
                if part.scale != 0.0:
                    k, v = self._keys_values(call, None if unguided else part)
                    mask = None if part.place is None else self._share(part.place, call)
                    call.add(rows, k, v, scale=strength * part.scale, mask=mask)

    def _whose(self, rows: Rows) -> Iterator[tuple[list[Row], list[Part], bool]]:
        """Rows that see the same: which they are, what they see, whether it is nothing."""
        groups: dict[tuple[int, bool], list[Row]] = {}
        for row in rows:
            groups.setdefault((self.prompt_of(row), is_unguided(row)), []).append(row)
        for (own, unguided), members in groups.items():
            yield members, self.parts[own], unguided

    def prompt_of(self, row: Row) -> int:
        """Which list of images a row's prompt has."""
        return row.prompt if len(self.parts) > 1 else 0

    def tokens(self, like: Tensor, part: Part | None) -> Tensor:
        """The tokens of a part's images, or of nothing, [1, tokens, channels] like a tensor."""

        def made() -> Tensor:
            project = self._projection.like(like)
            prompts = () if part is None else part.prompts
            shown = [self._inputs[id(prompt)] for _, prompt in prompts] or [self._nothing()]
            return torch.cat([project(*(x.to(like) for x in inputs)) for inputs in shown], 1)

        key = "tokens", id(part), like.device, like.dtype
        return self._kept(key, made, *self._weights)

    def _keys_values(self, call: AttentionCall, part: Part | None) -> tuple[Tensor, Tensor]:
        """k and v of the tokens at a site, [heads, tokens, channels]."""
        like, path = call.q, call.site.path
        layer = self.adapter.layer(self._layers[path])
        weights = layer["to_k_ip"].weight, layer["to_v_ip"].weight

        def made() -> tuple[Tensor, Tensor]:
            tokens = self.tokens(like, part)[0]
            k, v = (F.linear(tokens, weight.to(tokens)) for weight in weights)
            heads = like.shape[2]
            k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1).contiguous() for x in (k, v))
            return k, v

        key = path, id(part), like.device, like.dtype
        return self._kept(key, made, *weights, *self._weights)

    def _share(self, place: Place, call: AttentionCall) -> Tensor:
        """How much a place is in at each query, [N]."""
        grid = call.require_grid(self.name)
        return self._kept(
            ("queries", id(place), grid),
            lambda: self._share_on(place, *grid).flatten().repeat(grid.frames),
        )

    def _share_on(self, place: Place, height: int, width: int) -> Tensor:
        return self._kept((id(place), height, width), lambda: place.share(height, width))

    def _kept(self, key: Any, make: Callable[[], T], *weights: Tensor) -> T:
        """What was made once, of weights: images and weights stay, so it holds for the session."""
        if any(w.requires_grad for w in weights):  # the adapter is being trained
            return make()
        if key not in self._found:
            with torch.inference_mode(False), torch.no_grad():
                self._found[key] = make()
        found: T = self._found[key]
        return found


def is_unguided(row: Row) -> bool:
    """Whether a row is to be drawn without the prompt."""
    return row.role in (UNCOND, IMAGE)


def from_checkpoint(checkpoint: Any, pipe: Any, *, images: Any, **options: Any) -> IPAdapter:
    """The editor of a file. Raises InputError if it does not fit.

    images: also tables of a file, and files (`image_prompts_of`). options: of `IPAdapter`, whose
    image_encoder is also a folder of one, and negative a file of one tensor.
    """
    adapter, who = fitting(checkpoint, pipe, IPAdapter.__name__), IPAdapter.__name__
    images = image_prompts_of(images, adapter.image_proj.reads, None, f"{who}: images")
    return IPAdapter(adapter, images, **with_files(options, who))
