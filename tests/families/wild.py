"""The cheap promises, for every pipeline that can be built offline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hookctl import AttentionCall, Editor, control
from hookctl.address import families
from hookctl.address.sites import NAMED_ONLY
from hookctl.errors import LayoutError, UnsupportedError
from hookctl.inspect.proved import proved
from tests.families.fingerprint import differences, fingerprint
from tests.zoo.wild import WILD, Wild


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
    pipe = case.make()
    if families.pipeline_of(pipe) is None:
        raise Refused("not declared: rows= must be given")
    for _, denoiser in families.denoisers_of(pipe):
        assert families.model_of(denoiser) is not None, f"{type(denoiser).__name__} not declared"


def idle(case: Wild) -> None:
    """An editor that changes nothing changes nothing, is shown every site, and leaves no trace."""
    pipe = case.make()
    plain, before, editor = drawn(case, pipe), fingerprint(pipe), Shown()
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
    pipe = case.make()
    plain, editor = drawn(case, pipe), Shown()
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
    assert not proof.wrong, proof.wrong[:2]


PROMISES: dict[str, Callable[[Wild], None]] = {
    "declared": found,
    "idle exact, shown, restored": idle,
    "edited": edited,
    "facts proved": facts,
}
CASES = list(WILD.values())
_CARD = "needs a published checkpoint or package that is not here: "
LEFT_OUT = {
    "AudioLDM2Pipeline": _CARD + "a feature extractor of CLAP",
    "BriaFiboEditPipeline": "its prompt is a program of edits in JSON, not a text",
    "BriaFiboPipeline": "a run takes over a minute at its smallest",
    "ConsisIDPipeline": _CARD + "opencv",
    "ConsistencyModelPipeline": _CARD + "a tiny model of diffusers' own",
    "Cosmos pipelines (7)": _CARD + "torchvision, a safety checker",
    "GlmImagePipeline": "its language model draws tokens of an image first",
    "HunyuanVideoImageToVideoPipeline, MotifVideoImage2VideoPipeline": (
        "their image encoders' sizes are fixed by their processors"
    ),
    "HunyuanVideoFramepackPipeline": _CARD + "a processor of SigLIP",
    "JoyImageEditPipeline, JoyImageEditPlusPipeline, Kandinsky5I2IPipeline": (
        _CARD + "a processor of Qwen 3 VL or of Qwen 2.5 VL"
    ),
    "LEditsPPPipelineStableDiffusion, LEditsPPPipelineStableDiffusionXL": (
        "they draw only after an inversion of their own"
    ),
    "LTX2ConditionPipeline, LTX2HDRPipeline, LTX2InContextPipeline": (
        "their conditions are objects of their own"
    ),
    "LTXLatentUpsamplePipeline": "it has no denoiser",
    "OmniGenPipeline": _CARD + "torchvision",
    "PRXPipeline": "its text encoder has no configuration that can be made by hand",
    "QwenImageEditPipeline, QwenImageEditPlusPipeline": "they draw a megapixel at the least",
    "SanaPAGPipeline": "its tiny text encoder does not fit its tokenizer",
    "StableAudioPipeline": _CARD + "torchsde",
    "StableDiffusionDepth2ImgPipeline": _CARD + "a processor of DPT",
    "StableDiffusionAdapterPipeline, StableDiffusionXLAdapterPipeline": "not tabulated yet",
    "pipelines of diffusers' deprecated folder": "diffusers does not test them any more",
}
