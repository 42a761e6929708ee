"""What is promised of every family, each as a function that raises AssertionError if it is broken.

A promise that makes no sense for a subject raises `NotApplicable` with the reason.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from hookctl.address.families import describe_sites
from tests.families.fingerprint import differences, fingerprint
from tests.families.subjects import Borrow, Idle, Subject, borrowed_by_hand, error, kind_of, label

TOLERANCE = 1e-4  # fp32, other order of the same sums; SVD starts from a sigma of 700
Prepare = Callable[[Subject, Any], None]


class NotApplicable(Exception):
    """The subject has nothing that the promise speaks of."""


def need(condition: bool, reason: str) -> None:
    if not condition:
        raise NotApplicable(reason)


# -- found, caught, idle, edited -------------------------------------------------------------------


def sites_found(subject: Subject) -> None:
    """Every attention module is a site with a name, a kind and a place."""
    denoiser = subject.denoiser(subject.make())
    sites = {site.path: site for site, _ in describe_sites(denoiser)}
    modules = {p for p, m in denoiser.named_modules() if hasattr(m, "to_q") or hasattr(m, "qkv")}
    assert set(sites) == modules
    for path, site in sites.items():
        assert site.kind == kind_of(subject, path, denoiser.get_submodule(path)), path
    kinds = [site.kind for site in sites.values()]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == subject.kinds()
    assert len({site.label for site in sites.values()}) == len(sites)


def calls_caught(subject: Subject) -> None:
    """Every site is caught in every denoiser call, with the q, k and v that SDPA gets."""
    target, idle = subject.make(), Idle()
    expected = _tensors_at_the_kernel(subject, subject.make())
    with subject.control(target, idle):
        subject.run(target)
    caught: dict[str, list[tuple[Tensor, ...]]] = {}
    for call in idle.calls:
        tensors = tuple(x.flatten(0, 1) for x in (call.q, call.k, call.v))
        caught.setdefault(call.site.path, []).append(tensors)
    assert caught.keys() == expected.keys()
    for path, calls in expected.items():
        assert len(calls) == len(caught[path]) == 2 * len(subject.calls), path
        for ours, theirs in zip(caught[path], calls, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), path


def _tensors_at_the_kernel(subject: Subject, target: Any) -> dict[str, list[tuple[Tensor, ...]]]:
    """q, k and v of the first kernel call in each forward of each attention module."""
    from tests.zoo import modules as zoo_modules

    denoiser, found, at = subject.denoiser(target), {}, {"path": "", "done": True}
    handles = []
    for path, module in denoiser.named_modules():
        if hasattr(module, "to_q") or hasattr(module, "qkv"):
            handles.append(
                module.register_forward_pre_hook(
                    lambda *_, path=path: at.update(path=path, done=False)
                )
            )
            handles.append(module.register_forward_hook(lambda *_: at.update(done=True)))
    real, einsum = F.scaled_dot_product_attention, torch.einsum
    parts: list[Tensor] = []

    def note(*tensors: Tensor) -> None:
        if not at["done"]:
            found.setdefault(at["path"], []).append(tensors)
            at["done"] = True

    def sdpa(*args: Any, **kwargs: Any) -> Tensor:
        note(*args[:3], *(kwargs[n] for n in ("query", "key", "value")[len(args) :]))
        return real(*args, **kwargs)

    def product(equation: Any, *factors: Any) -> Tensor:
        if equation == "bid,bjd->bij":
            parts[:] = factors
        elif equation == "bij,bjd->bid":
            note(*(x.unflatten(0, (-1, zoo_modules.HEADS)) for x in (*parts, factors[1])))
        return einsum(equation, *factors)

    F.scaled_dot_product_attention = zoo_modules.scaled_dot_product_attention = sdpa
    torch.einsum = product
    try:
        subject.run(target)
    finally:
        F.scaled_dot_product_attention = zoo_modules.scaled_dot_product_attention = real
        torch.einsum = einsum
        for handle in handles:
            handle.remove()
    return found


def check(subject: Subject, prepare: Prepare | None = None, tolerance: float = TOLERANCE) -> None:
    """Idle is bit-identical, an edit is what it should be, and everything is left as found."""
    target = subject.make()
    if prepare is not None:
        prepare(subject, target)
    plain = subject.run(target)
    with borrowed_by_hand(subject, target):
        reference = subject.run(target)
    before = fingerprint(target)
    idle = Idle()
    with subject.control(target, idle):
        assert torch.equal(subject.run(target), plain), "an idle editor changes the result"
    assert {call.site.path for call in idle.calls} == {s.path for s, _ in sites(subject, target)}
    with subject.control(target, Borrow(stop=0.0)):
        assert torch.equal(subject.run(target), plain), "an editor out of its window"
    with subject.control(target, Borrow()) as session:
        edited = subject.run(target)
    assert error(edited, reference) < tolerance, error(edited, reference)
    assert error(edited, plain) > 20 * tolerance, "the edit does nothing"
    assert "borrow" in session.report()
    assert not differences(before, fingerprint(target))
    assert torch.equal(subject.run(target), plain), "something stays behind"


def sites(subject: Subject, target: Any) -> Any:
    return describe_sites(subject.denoiser(target))


def idle_and_edited(subject: Subject) -> None:
    """Idle is bit-identical; an edit agrees with one made by hand; nothing stays behind."""
    check(subject)


def rows_resolved(subject: Subject) -> None:
    """Every row of every denoiser call has its branch, prompt and image."""
    need(subject.is_pipeline, "a bare module has no rows of its own")
    case = subject.case
    for prompts, n, guided in ((1, 1, True), (2, 2, True), (2, 1, False), (1, 2, False)):
        n = n if case.takes_n else 1
        target, idle = case.make(), Idle()
        if case.name == "sd15_pag" and not guided:
            continue  # `unguided` rows of PAG have a test of their own
        guidance = max(case.guidance, 2.0) if guided else 1.0
        with subject.control(target, idle):
            case.run(target, ["a red cat", "a blue dog"][:prompts], n=n, guidance=guidance)
        seen = [call.rows for call in idle.calls]
        first = idle.calls[0].site.path
        rows = [call.rows for call in idle.calls if call.site.path == first]
        expected = case.rows(prompts, n, guided)
        assert [[label(row) for row in one] for one in rows] == 2 * expected
        assert all(row.image < n for one in seen for row in one)


# -- with what else a model may carry --------------------------------------------------------------


def with_lora(subject: Subject) -> None:
    """The edited values are those that the adapter made."""
    from peft import LoraConfig

    need(subject.is_pipeline, "no adapters outside diffusers")
    target = subject.make()
    need(hasattr(subject.denoiser(target), "add_adapter"), "takes no adapters")
    plain = subject.run(target)

    def prepare(subject: Subject, target: Any) -> None:
        config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
        torch.manual_seed(0)
        subject.denoiser(target).add_adapter(config)
        assert error(subject.run(target), plain) > 1e-3

    check(subject, prepare)


def with_ip_adapter(subject: Subject) -> None:
    """The text's attention is edited, the adapter's is left alone."""
    need(subject.name in ("sd15", "controlnet", "animatediff"), "no IP-Adapter made for it here")
    check(subject, add_ip_adapter)


def add_ip_adapter(subject: Subject, target: Any) -> None:
    """A random IP-Adapter, its image embedding given with every call."""
    unet = target.unet
    torch.manual_seed(0)
    dim, width = unet.config.cross_attention_dim, 8
    state: dict[str, dict[str, Tensor]] = {
        "image_proj": {
            "proj.weight": torch.randn(4 * dim, width) * 0.2,
            "proj.bias": torch.zeros(4 * dim),
            "norm.weight": torch.ones(dim),
            "norm.bias": torch.zeros(dim),
        },
        "ip_adapter": {},
    }
    place = 1
    for name in unet.attn_processors:
        if name.endswith("attn1.processor") or "motion_modules" in name:
            continue
        module = unet.get_submodule(name.removesuffix(".processor"))
        for part in ("to_k_ip", "to_v_ip"):
            shape = (module.inner_dim, dim)
            state["ip_adapter"][f"{place}.{part}.weight"] = torch.randn(shape) * 0.2
        place += 2
    unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    target.set_ip_adapter_scale(0.8)
    # [negative | positive] for each picture drawn
    embeds = torch.cat([torch.zeros(1, 1, width), torch.randn(1, 1, width)])
    _always_with(target, ip_adapter_image_embeds=[embeds])


def _always_with(target: Any, **given: Any) -> None:
    """Give a pipeline further arguments at every call."""
    kind = type(target)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.__call__(self, *args, **kwargs, **given)

    target.__class__ = type(kind.__name__, (kind,), {"__call__": call})


def with_fused_projections(subject: Subject) -> None:
    """One projection for q, k and v."""
    need(subject.is_pipeline, "no fusing outside diffusers")
    denoiser = subject.denoiser(subject.make())
    need(hasattr(denoiser, "fuse_qkv_projections"), "has no fuse_qkv_projections")
    need(subject.name != "sd3", "diffusers can't fuse its dual attention")
    check(subject, lambda subject, target: subject.denoiser(target).fuse_qkv_projections())


def with_sliced_attention(subject: Subject) -> None:
    """Untouched calls stay sliced."""
    need(subject.is_pipeline, "no slicing outside diffusers")
    denoiser = subject.denoiser(subject.make())
    need(hasattr(denoiser, "set_attention_slice"), "has no set_attention_slice")
    check(subject, lambda subject, target: subject.denoiser(target).set_attention_slice(1))


def with_eager_processors(subject: Subject) -> None:
    """Processors that form the matrix."""
    need(subject.is_pipeline, "compvis is the eager one among the modules")
    need(subject.name not in ("sd3", "flux", "wan"), "has no eager processor")
    need(subject.name != "sd15_pag", "sets its own processors on the middle block")

    def prepare(subject: Subject, target: Any) -> None:
        for module in subject.denoiser(target).modules():
            if hasattr(module, "to_q"):
                module.set_processor(AttnProcessor())

    check(subject, prepare)


class _Unknown(AttnProcessor):
    """A processor of unknown making that forms the matrix."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states=None,  # type: ignore[no-untyped-def]
                 attention_mask=None) -> Tensor:  # fmt: skip
        rows, residual = len(hidden_states), hidden_states
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], rows)
        parts = (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        q, k, v = (attn.head_to_batch_dim(part) for part in parts)
        p = attn.get_attention_scores(q, k, attention_mask)
        out = attn.to_out[0](attn.batch_to_head_dim(torch.bmm(p, v)))
        return out + residual if attn.residual_connection else out


def with_unknown_processors(subject: Subject) -> None:
    """Processors of somebody else's that form the matrix are followed."""
    need(subject.is_pipeline, "compvis is the eager one among the modules")
    need(subject.name not in ("sd3", "flux", "wan"), "its attention takes no such processor")
    need(subject.name != "sd15_pag", "sets its own processors on the middle block")

    def prepare(subject: Subject, target: Any) -> None:
        for module in subject.denoiser(target).modules():
            if hasattr(module, "to_q"):
                module.set_processor(_Unknown())

    check(subject, prepare)


def _with_backend(subject: Subject, backend: str) -> None:
    need(subject.is_pipeline, "no backends outside diffusers")
    denoiser = subject.denoiser(subject.make())
    need(hasattr(denoiser, "set_attention_backend"), "has no set_attention_backend")
    found = _AttentionBackendRegistry._active_backend
    try:
        check(subject, lambda s, target: s.denoiser(target).set_attention_backend(backend))
    finally:
        _AttentionBackendRegistry._active_backend = found


def with_flex_backend(subject: Subject) -> None:
    """A backend that never calls SDPA."""
    _with_backend(subject, "flex")


def with_math_backend(subject: Subject) -> None:
    """A backend that is SDPA restricted to one kernel."""
    _with_backend(subject, "_native_math")


def with_model_offload(subject: Subject) -> None:
    """The model comes and goes as a whole, its hooks renewed at every call."""
    from accelerate import cpu_offload_with_hook

    check(subject, lambda s, target: cpu_offload_with_hook(s.denoiser(target), "cpu") and None)


def with_sequential_offload(subject: Subject) -> None:
    """Parameters are on the meta device until a layer runs."""
    from accelerate import cpu_offload

    def prepare(subject: Subject, target: Any) -> None:
        denoiser = subject.denoiser(target)
        cpu_offload(denoiser, torch.device("cpu"), offload_buffers=True)
        assert any(p.device.type == "meta" for p in denoiser.parameters())

    check(subject, prepare)


# -- training --------------------------------------------------------------------------------------


def gradients_checkpointed(subject: Subject) -> None:
    """Checkpointing gives equal gradients, with an edit too, in this and another thread."""
    target = subject.make()
    denoiser = subject.denoiser(target)
    need(hasattr(denoiser, "enable_gradient_checkpointing"), "has no checkpointing")
    args, kwargs, rows = denoiser_call(subject, target)

    def gradients(editor: Any, thread: bool = False) -> list[Tensor]:
        denoiser.zero_grad()
        losses = []
        with subject.control(denoiser, editor, rows=rows):
            # Two calls before the backwards: each is recomputed with its own edit.
            for scale in (1.0, 0.5):
                out = denoiser(args[0] * scale, *args[1:], **kwargs)
                out = out[0] if isinstance(out, tuple) else out.sample
                losses.append((out**2).mean())
            if thread:
                worker = threading.Thread(target=sum(losses).backward)
                worker.start()
                worker.join()
            else:
                sum(losses).backward()
        return [p.grad.clone() for p in denoiser.parameters() if p.grad is not None]

    denoiser.requires_grad_(True)
    denoiser.train()
    plain, edited = gradients(Idle()), gradients(FirstHalfBorrow())
    denoiser.enable_gradient_checkpointing()
    before = fingerprint(denoiser)
    for expected, editor in ((plain, Idle), (edited, FirstHalfBorrow)):
        for thread in (False, True):
            found = gradients(editor(), thread)
            assert len(found) == len(expected)
            for a, b in zip(found, expected, strict=True):
                assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9
    assert not all(torch.equal(a, b) for a, b in zip(plain, edited, strict=True))
    assert not differences(before, fingerprint(denoiser))


class FirstHalfBorrow(Borrow):
    """Acts in even turns only, so that two calls meet different edits."""

    def attention(self, call: Any) -> None:
        if call.clock.turn % 2 == 0:
            rows = list(call.rows)
            call.borrow(rows[-1], v=rows[0])


def denoiser_call(subject: Subject, target: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """The arguments of a denoiser call of a run, sample first, and branches for its rows."""
    denoiser, seen = subject.denoiser(target), []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args, dict(kwargs)))

    handle = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    subject.run(target)
    handle.remove()
    args, kwargs = seen[0]
    if not args:
        name = next(n for n in ("sample", "hidden_states", "x") if n in kwargs)
        args = (kwargs.pop(name),)
    rows = tuple(f"{label}" for label in subject.calls[0])
    args = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
    return args, {k: v for k, v in kwargs.items() if k != "return_dict"}, rows


# -- leaving ---------------------------------------------------------------------------------------


class Boom(Exception):
    pass


def exceptions_leave_nothing(subject: Subject) -> None:
    """Whatever raises inside, everything is left as found."""
    target = subject.make()
    denoiser = subject.denoiser(target)
    plain = subject.run(target)
    attention = [m for _, m in describe_sites(denoiser)]
    before = fingerprint(target)

    def raising(*_: Any, **__: Any) -> Any:
        raise Boom

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    def attempt(kind: type[BaseException], *editors: Any, **kwargs: Any) -> None:
        state = torch.get_rng_state()
        try:
            with subject.control(target, *editors):
                subject.run(target, **kwargs)
        except kind:
            pass
        else:
            raise AssertionError(f"{kind.__name__} was lost")
        torch.set_rng_state(state)

    for method in ("attention", "before", "denoise", "after", "combine"):
        if not subject.is_pipeline and method in ("after", "combine"):
            continue
        attempt(Boom, type("Bad", (Borrow,), {method: raising})(), Borrow())
    inside = attention[len(attention) // 2]
    part = getattr(inside, "to_v", None) or inside.qkv
    for action, kind in ((raising, Boom), (interrupted, KeyboardInterrupt)):
        handle = part.register_forward_hook(action)
        attempt(kind, Borrow())
        handle.remove()
    if subject.is_pipeline:
        target.scheduler.__dict__["step"] = raising
        attempt(Boom, Borrow())
        del target.scheduler.__dict__["step"]
        if "callback_on_step_end" in type(target).__call__.__code__.co_varnames:
            attempt(Boom, Borrow(), callback_on_step_end=raising)
    left = [d for d in differences(before, fingerprint(target)) if not _upstream(subject, d)]
    assert not left, left[:5]
    assert torch.equal(subject.run(target), plain)


def _upstream(subject: Subject, difference: str) -> bool:
    """A PAG pipeline leaves its own processors in the middle block after an error."""
    return subject.name == "sd15_pag" and "processor" in difference


def contexts_nest(subject: Subject) -> None:
    """Contexts nest and end in any order."""
    target = subject.make()
    plain = subject.run(target)
    before = fingerprint(target)
    first, second = subject.control(target, Idle()), subject.control(target, Borrow())
    with subject.control(target, Borrow()):
        edited = subject.run(target)
    first.__enter__()
    second.__enter__()
    assert torch.equal(subject.run(target), edited)
    first.__exit__(None, None, None)
    assert torch.equal(subject.run(target), edited)
    second.__exit__(None, None, None)
    assert not differences(before, fingerprint(target))
    assert torch.equal(subject.run(target), plain)
    with second, second:
        assert torch.equal(subject.run(target), edited)
    assert not differences(before, fingerprint(target))


def threads_do_not_meet(subject: Subject) -> None:
    """A pipeline under control in one thread, the same kind without in another."""
    ours, theirs = subject.make(), subject.make()
    plain = subject.run(theirs)
    with subject.control(ours, Borrow()):
        edited = subject.run(ours)
    results: dict[str, list[Tensor]] = {"plain": [], "edited": []}

    def draw(name: str, target: Any) -> None:
        for _ in range(2):
            results[name].append(subject.run(target))

    with subject.control(ours, Borrow()):
        workers = [
            threading.Thread(target=draw, args=("edited", ours)),
            threading.Thread(target=draw, args=("plain", theirs)),
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert len(results["plain"]) == len(results["edited"]) == 2
    assert all(torch.equal(result, plain) for result in results["plain"])
    assert all(torch.equal(result, edited) for result in results["edited"])
