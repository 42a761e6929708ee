"""NAG: as the published processors do it, and what it promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hookctl
from hookctl.errors import InputError
from hookctl.loop.prompts import encode
from hookctl.recipes import NAG, PAG
from hookctl.recipes.nag import NORMS
from tests import zoo
from tests.families.fingerprint import differences, fingerprint
from tests.families.subjects import error
from tests.recipes.literal_nag import drawn_in_rows, drawn_with, guided
from tests.recipes.runs import TWO, draw_two, made

NEGATIVES = ["an old green bird", "a dog"]
# Family -> where the image stands in a joint sequence, None for cross-attention; denoiser calls in
# a guided step.
FAMILIES: dict[str, tuple[str | None, int]] = {
    "sd15": (None, 1),
    "sdxl": (None, 1),
    "pixart": (None, 1),
    "wan": (None, 2),
    "sd3": ("first", 1),
    "flux": ("last", 2),
}


def literal(name: str, guidance: float, *settings: Any) -> Tensor:
    """The run of a family under the published lines."""
    case, pipe = zoo.PIPELINES[name], made(name, torch.float64)
    place, calls = FAMILIES[name]
    kept: dict[str, Any] = {}
    model = case.denoiser_of(pipe)
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: kept.update(kwargs), with_kwargs=True
    )
    case.run(pipe, TWO, guidance=guidance)
    handle.remove()
    lengths = {"max_sequence_length": kept["encoder_hidden_states"].shape[1]}
    if name == "sd3":
        lengths = {"max_sequence_length": kept["encoder_hidden_states"].shape[1] - 77}
    found = encode(pipe, NEGATIVES, lengths)
    image = None
    if place:
        tokens = kept["hidden_states"].shape[1]
        if name == "sd3":
            tokens = kept["hidden_states"][0, 0].numel() // 4
        text = found.sequence.shape[1]
        image = (0, tokens) if place == "first" else (text, text + tokens)
    guides = guidance > 1
    cond = slice(2, 4) if guides and calls == 1 else slice(0, 2)
    every = calls if guides else 1
    with drawn_with(model, found.sequence, found.mask, image, cond, *settings, calls=every):
        return case.run(pipe, TWO, guidance=guidance)


@pytest.mark.slow  # several runs in float64 of each family
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_as_published(name: str, guidance: float) -> None:
    case, pipe = zoo.PIPELINES[name], made(name, torch.float64)
    plain = case.run(pipe, TWO, guidance=guidance)
    published = 2 if FAMILIES[name][0] else 1
    for scale, tau, alpha in ((5.0, 2.5, 0.25), (3.0, 1.2, 0.5)):
        for options, p in (({"paper": True}, published), ({"norm": "l1"}, 1), ({"norm": "l2"}, 2)):
            editor = NAG(NEGATIVES, scale=scale, tau=tau, alpha=alpha, **options)
            got = draw_two(case, pipe, editor, guidance=guidance)
            want = literal(name, guidance, scale, tau, alpha, p)
            assert error(got, want) < 1e-10, (options, scale)
            assert error(got, plain) > 1e-4


LONG = "an old green bird " * 12


@pytest.mark.slow
@pytest.mark.skipif("z_image" not in zoo.PIPELINES, reason="diffusers has no Z-Image")
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("negatives", [NEGATIVES, ["a dog", LONG]], ids=["alike", "longer"])
def test_where_the_image_begins_behind_the_text(guidance: float, negatives: list[str]) -> None:
    """The image stands beside the negative text as in a run of its own, at positions that follow
    from the length of that text."""
    case, pipe = zoo.PIPELINES["z_image"], made("z_image", torch.float64)
    asked = {"guidance": guidance, "max_sequence_length": 96}
    texts = [encode(pipe, [one], {"max_sequence_length": 96}).sequence[0] for one in negatives]
    assert (max(map(len, texts)) > 32) == (negatives is not NEGATIVES)
    plain = case.run(pipe, TWO, **asked)
    tokens = plain[0, 0].numel() // 4
    for scale, tau, alpha in ((5.0, 2.5, 0.25), (3.0, 1.2, 0.5)):
        settings = scale, tau, alpha, 2
        with drawn_in_rows(pipe.transformer, texts, (tokens, -(-tokens // 32) * 32), *settings):
            want = case.run(pipe, TWO, **asked)
        editor = NAG(negatives, scale=scale, tau=tau, alpha=alpha, paper=True)
        assert error(draw_two(case, pipe, editor, **asked), want) < 1e-6
        assert error(want, plain) > 1e-4


@pytest.mark.parametrize("norm", NORMS)
def test_weights(norm: str) -> None:
    """The two weights against the published lines, clamped and not; at most tau times own."""
    own, other = torch.randn(2, 1, 3, 7, 4, dtype=torch.float64)
    other[..., :2, :] = 0.9 * own[..., :2, :]  # alike, so that nothing is cut
    p, merged = NORMS[norm], [z.transpose(1, 2).flatten(2) for z in (own, other)]
    for scale, tau, alpha in ((5.0, 2.5, 0.25), (3.0, 1.0, 1.0), (1.0, 2.5, 0.25)):
        w = NAG("x", scale=scale, tau=tau, alpha=alpha).weights({"own": own, "negative": other}, p)
        got = w["own"][..., None] * merged[0] + w["negative"][..., None] * merged[1]
        assert error(got, guided(merged[0], merged[1], scale, tau, alpha, p)) < 1e-12
        if alpha == 1:
            bound = tau * merged[0].norm(p=p, dim=-1)
            assert bool((got.norm(p=p, dim=-1) <= bound * (1 + 1e-12)).all())
    zero = torch.zeros_like(own)
    w = NAG("x").weights({"own": zero, "negative": other}, p)
    assert all(bool(one.isfinite().all()) for one in w.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        n
        for n in ("sd15", "sd3", "flux", "pixart", "flux2_klein", "qwen_image", "z_image")
        if n in zoo.PIPELINES
    ],
)
def test_nothing_to_do(name: str) -> None:
    case = zoo.PIPELINES[name]
    pipe = case.make()
    for guidance in (1.0, 4.0):
        plain, before = case.run(pipe, TWO, guidance=guidance), fingerprint(pipe)
        for idle in (NAG("x", scale=1.0), NAG("x", alpha=0.0), NAG(NEGATIVES, start=0.5, stop=0.5)):
            with hookctl.control(pipe, idle, strict=False):
                assert torch.equal(case.run(pipe, TWO, guidance=guidance), plain)
        assert error(draw_two(case, pipe, NAG(TWO), guidance=guidance), plain) < 1e-4
        assert not differences(before, fingerprint(pipe))


def test_one_text_for_all_and_its_embeddings() -> None:
    pipe, case = made("sd15"), zoo.PIPELINES["sd15"]
    text = encode(pipe, ["a dog"]).sequence[0]
    found = [draw_two(case, pipe, NAG(one)) for one in ("a dog", ["a dog"] * 2, text)]
    assert error(found[0], found[1]) < 1e-5
    assert error(found[0], found[2]) < 1e-5
    both = [draw_two(case, pipe, NAG("a dog"), PAG(sites="self @1/2")), draw_two(case, pipe, PAG())]
    assert error(both[0], both[1]) > 1e-4


def test_texts_of_several_lengths() -> None:
    """As each prompt would be drawn alone."""
    case, pipe = zoo.PIPELINES["qwen_image"], made("qwen_image")
    together = draw_two(case, pipe, NAG(["a dog", "an old green bird"]))
    for i, negative in enumerate(("a dog", "an old green bird")):
        with hookctl.control(pipe, NAG(negative)):
            alone = case.run(pipe, [TWO[i]], seed=i)
        assert error(together[i], alone[0]) < 1e-4


def test_bad_input() -> None:
    for arguments, match in (
        ({"negative": 3}, "NAG: negative=3"),
        ({"negative": []}, "NAG: negative"),
        ({"negative": "x", "scale": 0.5}, "NAG: scale=0.5"),
        ({"negative": "x", "tau": 0.9}, "NAG: tau=0.9"),
        ({"negative": "x", "alpha": 1.5}, "NAG: alpha=1.5"),
        ({"negative": "x", "norm": "max"}, "NAG: norm='max'"),
    ):
        with pytest.raises(InputError, match=match):
            NAG(**arguments)
    pipe, case = made("sd15"), zoo.PIPELINES["sd15"]
    with pytest.raises(InputError, match="NAG was made for 1 prompts, but the pipeline draws 2"):
        draw_two(case, pipe, NAG(["a dog"]))
    with pytest.raises(InputError, match="NAG: sites='self'"):
        draw_two(case, pipe, NAG("a dog", sites="self"))


def test_sites_are_those_that_were_asked_for() -> None:
    """The text is kept apart at every site, and guides at the chosen ones."""
    case, pipe = zoo.PIPELINES["sd15"], made("sd15")
    some = NAG("a dog", sites="cross up")
    with hookctl.control(pipe, some) as session:
        few = case.run(pipe, TWO)
    assert error(few, draw_two(case, pipe, NAG("a dog"))) > 1e-4
    down = [site.path for site in session.sites if site.place == "down"]
    assert down and not any(path in session.report() for path in down)
