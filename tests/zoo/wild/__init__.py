"""A tiny random pipeline of every class that can be built offline, from two tables.

    case = WILD["FluxKontextPipeline"]
    pipe = case.make()
    case.draw(pipe, ["a red cat"], ["blurry"], seeds=[0])

`parts.json` has each part once: its class and the arguments of its constructor, or what stands for
a tokenizer. `pipelines.json` says which parts a pipeline is made of and what its call takes beside
prompts and seeds. Where an argument is an image or a tensor, its size stands for it. An entry may
also say which argument the prompt is (`prompt`), what it stands in (`form`), attributes that are
large in the class (`set`), what is called before anything can be drawn (`before`), and that given
images must not follow the seed (`steady`).
"""

from __future__ import annotations

import inspect
import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from ..case import sharpen
from ..mould import Mould
from .around import furnish, smaller
from .parts import made, value

_HERE = Path(__file__).parent
_DENOISERS = ("transformer", "unet", "prior")


@cache
def _table(name: str) -> dict[str, Any]:
    return json.loads((_HERE / f"{name}.json").read_text("utf-8"))


@dataclass(frozen=True)
class Wild:
    """One pipeline; kind: its class, named as in diffusers."""

    name: str
    kind: str

    @cached_property
    def _entry(self) -> dict[str, Any]:
        return _table("pipelines")[self.name]

    @cached_property
    def _mould(self) -> Mould | None:
        try:
            return Mould(_original(self))
        except (AttributeError, TypeError, pickle.PicklingError):  # it holds a function
            return None

    @property
    def seconds(self) -> float:
        """About what building it and drawing five times takes a slow core."""
        return float(self._entry["cpu"])

    @property
    def form(self) -> str:
        """What a prompt stands in."""
        return str(self._entry.get("form", "{}"))

    @property
    def original(self) -> Any:
        """The pipeline that others are copies of: to be looked at only."""
        return _original(self)

    def make(self) -> Any:
        """A new pipeline, the same at each call."""
        return self._built() if self._mould is None else self._mould.copy()

    def _built(self) -> Any:
        kind = getattr(diffusers, self.kind)
        furnish(kind)
        parts = _table("parts")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe = kind(
                **{
                    name: made(parts[part] if isinstance(part, str) and part in parts else part)
                    for name, part in self._entry["parts"].items()
                }
            )
            for part in pipe.components.values():
                if isinstance(part, nn.Module):
                    part.eval()
            _fit(pipe)
            for name, part in pipe.components.items():
                if isinstance(part, nn.Module) and any(n in name for n in _DENOISERS):
                    sharpen(part)
                    for parameter in part.parameters():
                        if parameter.dim() > 1 and not parameter.any():  # a gate that begins shut
                            nn.init.normal_(parameter, std=0.1)
        pipe.set_progress_bar_config(disable=True)
        for name, number in self._entry.get("set", {}).items():
            setattr(pipe, name, number)
        for method, arguments in self._entry.get("before", {}).items():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                getattr(pipe, method)(**{name: value(one) for name, one in arguments.items()})
        return pipe

    def draw(
        self, pipe: Any, prompts: Sequence[str], negatives: Sequence[str], seeds: Sequence[int]
    ) -> Any:
        """Draw an image (or more) of each prompt; what the pipeline returns."""
        known = inspect.signature(type(pipe).__call__).parameters
        call = {name: value(given) for name, given in self._entry["call"].items()}
        texts = [self.form.format(prompt) for prompt in prompts]
        given = {
            self._entry.get("prompt", "prompt"): texts if len(texts) > 1 else texts[0],
            "negative_prompt": list(negatives) if len(negatives) > 1 else negatives[0],
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds]
            if len(seeds) > 1
            else torch.Generator().manual_seed(seeds[0]),
            "seed": seeds[0],
        }
        call |= {name: one for name, one in given.items() if name in known}
        with (
            torch.random.fork_rng(devices=[]),
            smaller(type(pipe), self._entry.get("steady", False)),
        ):
            torch.manual_seed(0)
            return pipe(**call)


@lru_cache(maxsize=1)  # the tests of one pipeline follow each other
def _original(wild: Wild) -> Any:
    return wild._built()


def _fit(pipe: Any) -> None:
    """Text encoders know every token of their tokenizers, image encoders their images' size."""
    side = getattr(getattr(getattr(pipe, "image_encoder", None), "config", None), "image_size", 32)
    for name in ("feature_extractor", "image_processor"):
        if hasattr(getattr(pipe, name, None), "crop_size"):
            getattr(pipe, name).size = {"shortest_edge": side}
            getattr(pipe, name).crop_size = {"height": side, "width": side}
    for suffix in ("", "_2", "_3", "_4"):
        encoder = getattr(pipe, f"text_encoder{suffix}", None)
        tokenizer = getattr(pipe, f"tokenizer{suffix}", None)
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        try:
            embeddings = encoder.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            continue
        if hasattr(encoder.config, "image_token_id") and tokenizer is not None:
            encoder.config.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        if tokenizer is not None and embeddings.num_embeddings < len(tokenizer):
            encoder.resize_token_embeddings(len(tokenizer))


WILD = {name: Wild(name, entry["class"]) for name, entry in _table("pipelines").items()}
