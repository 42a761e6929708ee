"""In and out: bad input is refused before any denoising, holes are loud, nothing stays behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from torch import Tensor, nn

import hookctl
from hookctl import Branch, Claim, Editor, FeatureCall, Predictions, State
from hookctl.editor import Window
from hookctl.errors import (
    ConflictError,
    HoleError,
    InputError,
    LayoutError,
    SelectorError,
    UnsupportedError,
)
from tests import zoo
from tests.families.fingerprint import differences, fingerprint
from tests.families.subjects import Borrow, Idle

SD15 = zoo.PIPELINES["sd15"]
PIXART = zoo.PIPELINES["pixart"]  # the quickest
TWO = ["a red cat", "a blue dog"]


@pytest.fixture
def pipe() -> Any:
    return PIXART.make()


class Denoised(Editor):
    """Notes whether the denoiser ran."""

    ran = False

    def denoise(self, state: Any, proceed: Any) -> Any:
        self.ran = True
        return proceed()


class Substitution(Idle):
    def __init__(self, sites: Any = None, start: float = 0.0, stop: float = 1.0) -> None:
        super().__init__()
        self.sites, self.start, self.stop = sites, start, stop

    def claims(self) -> list[Claim]:
        return [Claim("substitution", self.sites, Window(self.start, self.stop))]


# -- bad input -------------------------------------------------------------------------------------


def refused(target: Any, *editors: Any, error: type[Exception], match: str, **kwargs: Any) -> None:
    before = fingerprint(target)
    with pytest.raises(error, match=match):
        with hookctl.control(target, *editors, **kwargs):
            raise AssertionError("it was let in")
    assert not differences(before, fingerprint(target))


def test_conflicting_claims(pipe: Any) -> None:
    match = "Substitution and Substitution both claim the substitution"
    refused(pipe, Substitution("self"), Substitution("self"), error=ConflictError, match=match)
    with hookctl.control(pipe, Substitution("self"), Substitution("cross")):
        refused_too = hookctl.control(pipe, Substitution("self"))
        with pytest.raises(ConflictError):
            refused_too.__enter__()
    with hookctl.control(pipe, Substitution(stop=0.5), Substitution(start=0.5)):
        pass


def test_selector_without_sites(pipe: Any) -> None:
    editor = Substitution("temporal")
    refused(pipe, editor, error=SelectorError, match="matches none of the 4 sites. Kinds: cross")


@pytest.mark.parametrize("window", [(-0.1, 1.0), (0.0, 1.5), (0.8, 0.2), ("a", 1.0)])
def test_window_outside_the_schedule(pipe: Any, window: Any) -> None:
    refused(pipe, Borrow(*window), error=InputError, match="start, stop")


def test_no_editor(pipe: Any) -> None:
    refused(pipe, "masactrl", error=InputError, match=r"editors\[0\] is 'masactrl'")
    refused(
        pipe, Borrow, error=InputError, match=r"editors\[0\] is the class Borrow; give an instance"
    )


def test_bad_backend(pipe: Any) -> None:
    refused(pipe, Borrow(), error=InputError, match="backend='cuda'; give one of", backend="cuda")


def test_no_denoiser() -> None:
    with pytest.raises(InputError, match="holds no denoiser"):
        hookctl.control(DDIMScheduler())


def test_model_without_attention() -> None:
    model = zoo.MODULES["no_attention"].make()
    refused(model, Borrow(), error=UnsupportedError, match="ConvNet has no attention")


def test_attention_that_cannot_be_caught() -> None:
    model = zoo.MODULES["mha"].make()
    match = "MultiheadAttention computes its attention where nothing can be caught"
    refused(model, Idle(), error=UnsupportedError, match=match)


def test_features_and_context_where_there_are_none(pipe: Any) -> None:
    features = type("Features", (Editor,), {"features": lambda self, call: None})()
    refused(pipe, features, error=UnsupportedError, match="skip connections")
    context = type("Context", (Editor,), {"context": lambda self, state: None})()
    flux = zoo.PIPELINES["flux"].make()
    own = type(flux.transformer)
    flux.transformer.__class__ = type("AuraFlowTransformer2DModel", (own,), {})
    refused(flux, context, error=UnsupportedError, match="one sequence with the image")


def test_nan_latents(pipe: Any) -> None:
    latents = torch.randn(1, 4, 16, 16)
    latents[0, 0, 0, 0] = float("nan")
    before, seen = fingerprint(pipe), Denoised()
    with pytest.raises(InputError, match="latents hold 2 values that are NaN or infinite"):
        with hookctl.control(pipe, seen):
            PIXART.run(pipe, latents=latents)
    assert not seen.ran
    assert not differences(before, fingerprint(pipe))


def test_batch_that_fits_no_layout() -> None:
    pipe = SD15.make()
    seen, unet = Denoised(), pipe.unet

    def triple(module: Any, args: Any, kwargs: Any) -> Any:
        raise AssertionError("the denoiser ran")

    with pytest.raises(LayoutError, match="a denoiser call has 3 rows"):
        with hookctl.control(pipe, seen):
            SD15.run(pipe, steps=1, callback_on_step_end=lambda *_: {})
            seen.ran = False
            pipe.check_inputs = lambda *a, **k: None
            handle = unet.register_forward_pre_hook(triple, with_kwargs=True)
            try:
                unet(torch.randn(3, 4, 16, 16), 10, torch.randn(3, 77, 32))
            finally:
                handle.remove()
    assert not seen.ran


def test_rows_that_do_not_divide() -> None:
    case = zoo.MODULES["plain_sdpa"]
    model = case.make()
    with pytest.raises(LayoutError, match="has 3 rows"):
        with hookctl.control(model, Idle(), rows=("uncond", "cond")):
            model(**case.inputs(rows=3))


# -- holes -----------------------------------------------------------------------------------------


class Quiet(nn.Module):
    """Says scaled_dot_product_attention in its source, and computes something else."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.attn = Loud(kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


class Loud(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "softmax":
            return (x @ x.mT).softmax(-1) @ x  # not scaled_dot_product_attention
        if self.kind == "mha":
            layer = nn.MultiheadAttention(x.shape[-1], 1, batch_first=True)
            return layer(x, x, x, need_weights=False)[0]
        return x * 2


@pytest.mark.parametrize(
    ("kind", "match"),
    [("softmax", "softmax of its own"), ("mha", "MultiheadAttention"), ("", "neither")],
)
def test_site_that_runs_uncaught(kind: str, match: str) -> None:
    model = Quiet(kind)
    before = fingerprint(model)
    with torch.no_grad(), pytest.raises(HoleError, match=match):
        with hookctl.control(model, Idle(), rows=("uncond", "cond")):
            model(torch.randn(2, 3, 4))
    after = fingerprint(model)
    before.pop("rng"), after.pop("rng")  # a layer was made
    assert not differences(before, after)


def test_expected_site_that_never_runs() -> None:
    pipe = SD15.make()
    bypassed = pipe.unet.mid_block
    bypassed.forward = lambda hidden_states, *args, **kwargs: hidden_states
    with pytest.raises(HoleError, match="2 edited sites never ran .* 'mid_block"):
        with hookctl.control(pipe, Idle()):
            SD15.run(pipe, steps=1)
    with hookctl.control(pipe, Idle(), strict=False):
        SD15.run(pipe, steps=1)


def test_denoiser_that_bypasses_every_site() -> None:
    """As a stale compiled graph does."""
    case = zoo.MODULES["plain_sdpa"]
    model, other = case.make(), case.make()
    model.forward = other.forward
    with pytest.raises(HoleError, match=r"torch\._dynamo\.reset"):
        with hookctl.control(model, Idle(), rows=("uncond", "cond")):
            model(**case.inputs())


def test_backward_after_the_end_with_checkpointing() -> None:
    pipe = SD15.make()
    unet = pipe.unet.requires_grad_(True).train()
    unet.enable_gradient_checkpointing()
    with hookctl.control(unet, Idle(), rows=("cond",)):
        out = unet(torch.randn(1, 4, 16, 16), 10, torch.randn(1, 77, 32)).sample
    with pytest.raises(HoleError, match="after its control"):
        out.mean().backward()


# -- sessions --------------------------------------------------------------------------------------


def test_what_is_set_inside_is_respected(pipe: Any) -> None:
    pipe = SD15.make()
    plain = SD15.run(pipe, TWO)
    with hookctl.control(pipe, Borrow()):
        edited = SD15.run(pipe, TWO)
        pipe.unet.set_attention_slice(1)
        sliced = SD15.run(pipe, TWO)
        assert (edited - sliced).abs().max() < 1e-4 * plain.abs().max()
    kinds = {type(p).__name__ for p in pipe.unet.attn_processors.values()}
    assert kinds == {"SlicedAttnProcessor"}
    assert (SD15.run(pipe, TWO) - plain).abs().max() < 1e-4 * plain.abs().max()


def test_scheduler_exchanged_inside() -> None:
    pipe, seen = SD15.make(), []
    old = pipe.scheduler
    stepped = type("After", (Editor,), {"after": lambda self, state: seen.append(state.clock)})()
    with hookctl.control(pipe, stepped):
        SD15.run(pipe)
        pipe.scheduler = DDIMScheduler.from_config(old.config)
        SD15.run(pipe)
        copied = copy.deepcopy(pipe.scheduler)
        assert copied.step.__self__ is copied
    assert [clock.step for clock in seen] == [0, 1, 0, 1]
    assert "step" not in old.__dict__ and "step" not in pipe.scheduler.__dict__


def test_one_denoiser_through_two_pipelines() -> None:
    pipe = SD15.make()
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    before = fingerprint(pipe)
    with hookctl.control(pipe, Idle()):
        with hookctl.control(other, Idle()), hookctl.control(pipe.unet, Idle()):
            pass
    with hookctl.control(pipe.unet, Idle()):
        with pytest.raises(UnsupportedError, match="wrap the pipeline in both"):
            hookctl.control(pipe, Idle()).__enter__()
    assert not differences(before, fingerprint(pipe))


def test_given_rows_end_with_their_session() -> None:
    case = zoo.MODULES["plain_sdpa"]
    model, outer = case.make(), Idle()
    with torch.no_grad(), hookctl.control(model, outer, rows=("uncond", "cond")):
        model(**case.inputs())
        with hookctl.control(model, rows=("cond",)):
            model(**case.inputs())
        model(**case.inputs())
    branches = [repr(call.rows) for call in outer.calls[::2]]
    assert branches == ["uncond[0.0] cond[0.0]", "cond[0.0] cond[1.0]", "uncond[0.0] cond[0.0]"]


def test_report_names_editor_site_and_steps(pipe: Any) -> None:
    with hookctl.control(pipe, Borrow(stop=0.5)) as session:
        assert session.report() == "Borrow never acted: the denoiser was not called"
        PIXART.run(pipe, TWO, steps=4)
    lines = session.report().splitlines()
    assert lines[0].split() == ["editor", "where", "what", "steps", "plan", "reason"]
    assert all("Borrow" in line and "0-1" in line for line in lines[2:])
    assert len(lines) == 2 + 2


class Around(Editor):
    """Acts by every hook but `attention`."""

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength

    def branches(self, state: State) -> dict[str, Branch]:
        return {"again": Branch()} if self.strength else {}

    def context(self, state: State) -> dict[str, Tensor]:
        return {"text": torch.zeros(1, 3, 32)} if self.strength else {}

    def features(self, call: FeatureCall) -> None:
        if self.strength:
            call.skip.mul_(0.5)  # in place

    def before(self, state: State) -> None:
        if self.strength:
            state.latents = state.latents * 0.9

    def combine(self, predictions: Predictions) -> Tensor:
        return predictions.guided * 0.9 if self.strength else predictions.guided

    def after(self, state: State) -> None:
        if self.strength:
            state.latents = state.latents * 0.9


class Standing(Editor):
    def denoise(self, state: State, proceed: Any) -> Any:
        return proceed()


class Late(Borrow):
    name = "late"


class Weak(Around):
    name = "weak"


def test_report_tells_of_every_hook_and_of_those_that_did_nothing() -> None:
    pipe = SD15.make()
    editors = Around(), Standing(), Late(start=1.0), Weak(0.0)
    with hookctl.control(pipe, *editors) as session:
        SD15.run(pipe, TWO, steps=2)
    log = session.log
    rows = {
        (name, hook): (where, steps, what) for name, where, hook, steps, _, what in log.hook_rows()
    }
    step, call = "step", "denoiser call"
    assert rows.pop(("Around", "features"))[1:] == ("0-1", "changed the skip connection")
    assert rows == {
        ("Around", "before"): (step, "0-1", "assigned the latents"),
        ("Around", "branches"): (call, "0-1", "added again"),
        ("Around", "context"): (call, "0-1", "added text"),
        ("Standing", "denoise"): (call, "0-1", "stood round the call"),
        ("Around", "combine"): (step, "0-1", "changed the prediction"),
        ("Around", "after"): (step, "0-1", "assigned the latents"),
    }
    silent = session.report().partition("\n\n")[2].splitlines()
    assert silent == [
        "late never acted: its window, 1 to 1 of the schedule, holds none of the steps that ran, "
        "0-1 of 2",
        "weak never acted: it was active at steps 0-1 and changed nothing: its strength is 0, or "
        "no row, word or site of the run is its own",
    ]
    html = session._repr_html_()
    assert html.count("<tr>") == 1 + len(log.rows()) + len(log.hook_rows())
    assert "late never acted" in html and "<img" not in html and "&lt;Session" in html


def test_a_session_in_one_line(pipe: Any) -> None:
    session = hookctl.control(pipe, Borrow(), hookctl.Maps("red"))
    kind = type(pipe).__name__
    assert repr(session) == f"<Session {kind}: Borrow, Maps; 4 sites; not run yet>"
    with session:
        PIXART.run(pipe, TWO, steps=3)
    assert repr(session).endswith("4 sites; last step 2 of 3>")
    html = session._repr_html_()
    assert "Borrow" in html and 'alt="red"' in html and "data:image/png;base64," in html
    assert repr(hookctl.control(pipe)).endswith(": no editors; 4 sites; not run yet>")
    assert hookctl.control(pipe).report() == "no editors"


def test_clock_of_the_call_in_progress(pipe: Any) -> None:
    """The session tells the time from outside: in another hook, and after the run."""
    inside: list[int] = []
    session = hookctl.control(pipe, Idle())
    assert session.clock is None

    def note(*_: Any) -> None:
        assert session.clock is not None
        inside.append(session.clock.step)

    handle = pipe.transformer.register_forward_pre_hook(note)
    try:
        with session:
            PIXART.run(pipe, TWO, steps=3)
    finally:
        handle.remove()
    assert inside == [0, 1, 2]
    assert (
        session.clock is not None and session.clock.steps == 3 and session.clock.fraction == 2 / 3
    )
