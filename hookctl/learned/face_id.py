"""IP-Adapter FaceID: a face's embedding as a prompt, and low-rank deltas of every attention layer.

Ye et al., "IP-Adapter", arXiv 2308.06721, and its files. Beside the image tokens, to_q, to_k, to_v
and to_out of self- and cross-attention become W x + s B A x, in all rows.
"""

from __future__ import annotations

from typing import Any

from hookctl.arguments import number
from hookctl.errors import InputError
from hookctl.learned.adapter import Adapter, fitting, low_rank_of
from hookctl.learned.faces import check_length
from hookctl.learned.image_prompts import ImagePrompt, image_prompts_of
from hookctl.learned.ip_adapter import IPAdapter
from hookctl.learned.tables import with_files
from hookctl.learned.weights import Weights
from hookctl.loop.inserting import LinearCall


class FaceID(IPAdapter):
    """Show faces to a denoiser beside its prompt.

    images: the embedding of a face [512], normalised, or for FaceID-Plus
    `ImagePrompt(face=embedding, image=picture)`, the picture being the face, aligned and cut out.
    lora_scale: of the deltas, which act in every step of the window whatever the scale is at a
    site or step; a scale of 0 altogether turns them off, too. The rest is as in `IPAdapter`.
    """

    def __init__(
        self, adapter: Adapter, images: Any, *, lora_scale: float = 1.0, **options: Any
    ) -> None:
        self.lora_scale = number(lora_scale, f"{self.name}: lora_scale")
        super().__init__(adapter, images, **options)
        deltas = low_rank_of(adapter)
        if not len(deltas):
            raise InputError(f"{self.name}: the adapter has no low-rank deltas; use IPAdapter")
        self._deltas = Weights(deltas)
        self._names = {
            f"{i}.{name}"
            for i, layer in deltas.named_children()
            for name, _ in layer.named_children()
        }

    def _read(self, given: Any, name: str) -> ImagePrompt:
        prompt = super()._read(given, name)
        if prompt.face is not None:
            check_length(prompt.face, name, normalised=True)
        return prompt

    def linears(self, path: str) -> bool:
        return self._delta_of(path) is not None

    def linear(self, call: LinearCall) -> None:
        name = self._delta_of(call.name)
        if name is None or self.lora_scale == 0.0 or self.neutral():
            return
        delta: Any = self._deltas.like(call.input).get_submodule(name)
        call.add(delta["down"].weight, delta["up"].weight, self.lora_scale)

    def _delta_of(self, path: str) -> str | None:
        """The name of a linear layer's delta in the adapter, such as "0.to_q_lora"."""
        site, _, layer = path.removesuffix(".0").rpartition(".")  # to_out.0
        name = f"{self._layers.get(site)}.{layer}_lora"
        return name if name in self._names else None


def from_checkpoint(
    checkpoint: Any,
    pipe: Any,
    *,
    images: Any,
    shortcut: bool | None = None,
    strength: float = 1.0,
    lora_scale: float = 1.0,
    analysis: Any = None,
    **options: Any,
) -> IPAdapter:
    """The editor of a file.

    images: also tables of a file, and files (`image_prompts_of`), in whose pictures analysis finds
    faces: the folder of insightface's models, or what is made of it.
    shortcut: True for FaceID-Plus v2, False for its v1, which can't be told apart by their files;
    strength: of what v2 reads in the picture. lora_scale: of the deltas, where the file has any
    (that of FaceID-Portrait, which is shown several faces, has none). options: of `IPAdapter`, with
    files as there.
    """
    who = FaceID.__name__
    strength = number(strength, "FaceID: strength")
    adapter = fitting(checkpoint, pipe, who, shortcut=shortcut, strength=strength)
    images = image_prompts_of(images, adapter.image_proj.reads, analysis, f"{who}: images")
    options = with_files(options, who)
    if len(low_rank_of(adapter)):
        return FaceID(adapter, images, lora_scale=lora_scale, **options)
    if lora_scale != 1.0:
        raise InputError(f"FaceID: lora_scale={lora_scale}; this file has no low-rank deltas")
    return IPAdapter(adapter, images, **options)
