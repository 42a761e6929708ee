"""The cheap promises, for every pipeline that can be built offline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hookctl import AttentionCall, Editor, control
from hookctl.address import families
from hookctl.address.families.prove import WORD
from hookctl.address.families.traces import PROMPTS
from hookctl.address.sites import NAMED_ONLY
from hookctl.errors import LayoutError, UnsupportedError
from hookctl.inspect.proved import proved
from tests.families.fingerprint import differences, fingerprint
from tests.zoo.wild import WILD, Wild

WORD_FACT = f"{WORD[0]!r} of {PROMPTS[0]!r}"


class Refused(Exception):
    """The pipeline is refused, with the reason."""


class Shown(Editor):
    """Changes nothing; keeps which sites it was shown and the branches of the rows."""

    def __init__(self) -> None:
        self.paths: set[str] = set()
        self.tags: set[str] = set()

    def attention(self, call: AttentionCall) -> None:
        self.paths.add(call.site.path)
        self.tags |= {row.branch for row in call.rows}


class Halved(Editor):
    """Halves the values of conditional rows."""

    def attention(self, call: AttentionCall) -> None:
        for row in call.rows.where(role="cond"):
            call.replace(row, v=0.5 * call.v[row.index])


def drawn(case: Wild, pipe: Any) -> list[Tensor]:
    """The tensors of what a run returns."""
    return list(_tensors(case.draw(pipe, ["a red cat"], ["blurry"], [0])))


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out.cpu()
    elif isinstance(out, np.ndarray):
        yield torch.from_numpy(out)
    elif isinstance(out, dict):
        for value in out.values():
            yield from _tensors(value)
    elif isinstance(out, list | tuple):
        for value in out:
            yield from _tensors(value)
    elif hasattr(out, "convert"):
        yield torch.from_numpy(np.asarray(out.convert("RGB")).copy())


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(
        x.shape == y.shape and torch.equal(x.nan_to_num(), y.nan_to_num())
        for x, y in zip(a, b, strict=True)
    )


def found(case: Wild) -> None:
    """Every denoiser is found, is declared, and has attention."""
    pipe = case.original
    if families.pipeline_of(pipe) is None:
        raise Refused("not declared: rows= must be given")
    for _, denoiser in families.denoisers_of(pipe):
        assert families.model_of(denoiser) is not None, f"{type(denoiser).__name__} not declared"


@lru_cache(maxsize=1)
def begun(case: Wild) -> tuple[Any, list[Tensor]]:
    """A pipeline that has drawn once, and what; the promises of one case follow each other."""
    pipe = case.make()
    return pipe, drawn(case, pipe)


def idle(case: Wild) -> None:
    """An editor that changes nothing changes nothing, is shown every site, and leaves no trace."""
    pipe, plain = begun(case)
    before, editor = fingerprint(pipe), Shown()
    sites = families.sites_of(pipe)
    wanted = {s.path for s in sites if s.kind not in NAMED_ONLY}
    if not wanted:
        raise Refused("no attention that can be caught")
    try:
        with control(pipe, editor):
            assert same(drawn(case, pipe), plain), "an idle editor changes the result"
    except (UnsupportedError, LayoutError) as reason:
        raise Refused(str(reason)) from reason
    assert editor.paths == wanted, sorted(wanted ^ editor.paths)[:3]
    assert not differences(before, fingerprint(pipe))
    assert same(drawn(case, pipe), plain), "something stays behind"


def edited(case: Wild) -> None:
    """An edit of the conditional rows changes the result."""
    (pipe, plain), editor = begun(case), Shown()
    try:
        with control(pipe, Halved(), editor):
            assert not same(drawn(case, pipe), plain), "the edit does nothing"
    except (UnsupportedError, LayoutError) as reason:
        raise Refused(str(reason)) from reason
    assert "cond" in editor.tags


def facts(case: Wild) -> None:
    """What is declared is what the pipeline shows: rows, kinds, spans and words."""
    pipe = case.make()
    proof = proved(pipe, lambda d: case.draw(pipe, d.prompts, d.negatives, d.seeds))
    if proof.facts[0].what == "a run":
        raise Refused(proof.facts[0].measured)
    # The proof looks for its word in the prompt, not in what the prompt stands in.
    wrong = [fact for fact in proof.wrong if case.form == "{}" or fact.what != WORD_FACT]
    assert not wrong, wrong[:2]


PROMISES: dict[str, Callable[[Wild], None]] = {
    "declared": found,
    "idle exact, shown, restored": idle,
    "edited": edited,
    "facts proved": facts,
}
CASES = list(WILD.values())
_CARD = "needs a published checkpoint or package that is not here: "
_LATER = "not built yet: nothing stands against it"
_FAILS = "diffusers' own call fails: "
LEFT_OUT = {
    "BriaFibo2Pipeline": _LATER,
    "ChromaInpaintPipeline": _FAILS + "it reads `guidance_embeds`, which Chroma's model has not",
    "ConsisIDPipeline": _CARD + "opencv",
    "EasyAnimateControlPipeline": (
        _FAILS + "its `encode_prompt` does not take the argument that it is called with"
    ),
    "FluxPriorReduxPipeline": "it has no denoiser",
    "GlmImagePipeline": "its language model draws tokens of an image first",
    "HunyuanVideoImageToVideoPipeline": (
        "the places of the image's tokens in its template are those of a published processor"
    ),
    "KolorsPipeline, KolorsImg2ImgPipeline, KolorsPAGPipeline": _CARD + "sentencepiece",
    "LLaDA2Pipeline, DiffusionGemmaPipeline": "they write texts",
    "LTXLatentUpsamplePipeline, LTX2LatentUpsamplePipeline, LTX2VideoDiffusionDecodePipeline": (
        "they have no denoiser that a text steers"
    ),
    "RFD4ProteinaPipeline": "it draws proteins",
    "SanaWMLTX2Refiner": _LATER,
    "modular pipelines": "they are put together from blocks, and are no pipelines of a class",
    "pipelines of diffusers' deprecated folder": "diffusers does not test them any more",
}
