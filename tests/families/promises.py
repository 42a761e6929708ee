"""What is promised of every family, each as a function that raises AssertionError if it is broken.

A promise that makes no sense for a subject raises `NotApplicable` with the reason.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
    every = {site.path: site for site, _ in describe_sites(denoiser)}
    sites = {path: site for path, site in every.items() if site.kind != "text"}
    aside = getattr(subject.case, "aside", None)
    assert all(aside is not None and p.startswith(aside) for p in set(every) - set(sites))
    assert set(sites) == set(subject.attention(denoiser))
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
    for path, module in subject.attention(denoiser).items():
        handles.append(
            module.register_forward_pre_hook(lambda *_, path=path: at.update(path=path, done=False))
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


def check(
    subject: Subject,
    prepare: Prepare | None = None,
    tolerance: float = TOLERANCE,
    by_hand: Any = borrowed_by_hand,
) -> None:
    """Idle is bit-identical, an edit is what it should be, and everything is left as found."""
    target = subject.make()
    if prepare is not None:
        prepare(subject, target)
    plain = subject.run(target)
    with by_hand(subject, target):
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
        assert torch.equal(subject.run(target), edited), "a second run differs from the first"
    assert error(edited, reference) < tolerance, error(edited, reference)
    assert error(edited, plain) > 20 * tolerance, "the edit does nothing"
    assert "borrow" in session.report()
    assert not differences(before, fingerprint(target))
    assert torch.equal(subject.run(target), plain), "something stays behind"


def sites(subject: Subject, target: Any) -> Any:
    """Those that a selector picks unasked."""
    return [pair for pair in describe_sites(subject.denoiser(target)) if pair[0].kind != "text"]


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
    part = next(p for n, p in inside.named_children() if n in ("to_v", "qkv", "to_qkv_mlp_proj"))
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
    left = differences(before, fingerprint(target))
    assert not left, left[:5]
    assert torch.equal(subject.run(target), plain)


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
        editors = [Borrow()] if name == "edited" else []
        for _ in range(2):
            with subject.control(target, *editors) if editors else nullcontext():
                results[name].append(subject.run(target))

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
