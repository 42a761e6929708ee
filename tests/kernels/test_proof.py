"""A kernel proves itself where it runs: wrong ones are found out, right ones remembered."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hookctl.attention.call import AttentionCall
from hookctl.evaluate import plan
from hookctl.evaluate import triton as fused
from hookctl.kernels.common import proof
from tests.hookctl.attention.calls import Case, random


@pytest.fixture(autouse=True)
def unproved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As in the first process on a device."""
    monkeypatch.setenv("HOOKCTL_CACHE", str(tmp_path))
    monkeypatch.setattr(proof, "interpreted_too", True)
    _forget(monkeypatch)
    yield


def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_known", {}), ("_read", set()), ("_warned", False)):
        monkeypatch.setattr(proof, name, value)


def edited(learns: bool = False, kind: str = "borrow") -> AttentionCall:
    given = [random(4, 2, n, 8, seed=n).float().unsqueeze(1) for n in (6, 5, 7)]
    given[2] = given[2][..., :5, :].contiguous()
    call = Case("cross", *[x.requires_grad_(learns) for x in given], 0.5).call()
    if kind == "add":
        call.add(3, given[1][2].detach(), given[2][2].detach(), scale=0.5)
    else:
        call.borrow(3, q=2, k=2)
    return call


@pytest.fixture
def auto(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Tensor, plan.Plan]]:
    """Evaluates as on a GPU whose tables say that the kernel wins."""
    monkeypatch.setattr(fused, "_gains", lambda call, finished: "the table says so")
    return lambda *of, **given: plan.evaluate(edited(*of, **given))


def files(folder: Path) -> list[Path]:
    return list(folder.rglob("*"))[1:]


def test_agreement_is_remembered(
    auto: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, _ = plan.evaluate(edited(), "sdpa")
    for _ in range(2):
        out, chosen = auto()
        assert chosen.name == "triton"
        torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)
    (path,) = files(tmp_path)
    said = json.loads(path.read_text())
    assert "torch" in said["place"] and said["proved"] == [next(iter(proof._known))[1]]
    _forget(monkeypatch)  # the next process
    monkeypatch.setattr(proof, "_difference", lambda *_: pytest.fail("compared again"))
    assert auto()[1].name == "triton"


def test_every_form_is_another_proof(auto: Any, tmp_path: Path) -> None:
    auto()
    auto(kind="add")
    auto(learns=True)
    (path,) = files(tmp_path)
    assert len(json.loads(path.read_text())["proved"]) == 3


def wrong(by: float) -> Callable[..., Any]:
    def change(evaluate: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: [(rows, part * by) for rows, part in evaluate(*given)]

    return change


def broken(evaluate: Callable[..., Any]) -> Callable[..., Any]:
    def fails(*given: Any) -> Any:
        raise RuntimeError("out of resource:\nshared memory")

    return fails


@pytest.mark.parametrize(
    ("change", "said"),
    [(wrong(1.1), "1.0e-01 from torch's own"), (wrong(float("nan")), "nan from torch's own"),
     (broken, "RuntimeError: out of resource: shared memory")],
    ids=["wrong", "nan", "raises"],
)  # fmt: skip
def test_a_kernel_that_is_wrong_or_fails(
    auto: Any, change: Any, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    exact, _ = plan.evaluate(edited(), "sdpa")
    monkeypatch.setattr(fused, "evaluate", change(fused.evaluate))
    with pytest.warns(RuntimeWarning, match="Please report this line") as seen:
        out, chosen = auto()
    assert len(seen) == 1 and said in str(seen[0].message) and "fp32" in str(seen[0].message)
    assert torch.equal(out, exact) and chosen.name == "sdpa" and "failed here" in chosen.reason
    assert not files(tmp_path)
    with warnings.catch_warnings():  # and of other forms nothing is said
        warnings.simplefilter("error")
        torch.testing.assert_close(auto()[0], exact, rtol=1e-5, atol=1e-5)
        auto(kind="add")
    with pytest.raises(RuntimeError, match=r"the kernel for fp32, 8 channels.* failed on"):
        plan.evaluate(edited(), "triton")


def test_a_gradient_that_is_wrong(auto: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0] / 2

    evaluate = fused.evaluate
    monkeypatch.setattr(
        fused, "evaluate", lambda *of: [(r, Half.apply(x)) for r, x in evaluate(*of)]
    )
    with pytest.warns(RuntimeWarning, match="a gradient is 5.0e-01 from torch's own"):
        out, _ = auto(learns=True)
    assert out.requires_grad


def test_one_that_was_right_and_fails_later(auto: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another size may need more memory than a block has."""
    assert auto()[1].name == "triton"
    monkeypatch.setattr(fused, "evaluate", broken(fused.evaluate))
    with pytest.warns(RuntimeWarning, match="out of resource"):
        assert auto()[1].name == "sdpa"


@pytest.mark.parametrize("content", ["", "[]", '{"place": 1, "proved": 2}', "{" * 99])
def test_a_file_that_says_nothing(content: str, auto: Any, tmp_path: Path) -> None:
    path = proof._file(proof.place_of(torch.device("cpu")))
    path.parent.mkdir()
    path.write_text(content)
    assert auto()[1].name == "triton"
    assert len(json.loads(path.read_text())["proved"]) == 1


def test_a_folder_that_can_not_be_written(
    auto: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOOKCTL_CACHE", str(tmp_path / "file"))
    calls = []
    difference = proof._difference
    monkeypatch.setattr(proof, "_difference", lambda *of: calls.append(1) or difference(*of))
    for _ in range(2):
        assert auto()[1].name == "triton"
    assert len(calls) == 1


def test_where_it_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert proof.folder() == tmp_path / "kernels"
    monkeypatch.delenv("HOOKCTL_CACHE")
    assert proof.folder() == tmp_path / "xdg" / "hookctl" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert proof.folder() == tmp_path / ".cache" / "hookctl" / "kernels"


@pytest.mark.parametrize("script", ["read", "marginals"])
def test_maps_prove_themselves(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hookctl.kernels import map_readout as kernels

    name = "map_readout" if script == "read" else "key_marginals"
    right = getattr(kernels, name)
    found: list[Tensor] = []

    def call() -> AttentionCall:
        x = random(4, 2, 6, 8, seed=1).float().unsqueeze(1)
        made = Case("self", x, x, x, 0.5).call()
        into = lambda row, values: found.append(values)  # noqa: E731
        made.read(3, [0, 2], into) if script == "read" else made.marginals(3, into)
        return made

    plan.read_only(call(), "sdpa")
    plan.read_only(call(), "triton")
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    _forget(monkeypatch)
    monkeypatch.setattr(proof, "folder", lambda: Path("/dev/null/none"))
    monkeypatch.setattr(kernels, name, lambda *of: 2 * right(*of))
    with pytest.raises(RuntimeError, match="from torch's own"):
        plan.read_only(call(), "triton")


def test_kernels_round_the_attention_prove_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    from hookctl.kernels import fourier_gain, latent_mixing

    for operator in (fourier_gain, latent_mixing):
        monkeypatch.setattr(operator, "fused", lambda *_: True)
    x = random(2, 3, 4, 4, seed=2).float()
    exact = fourier_gain.reference.fourier_gain(x, 0.5)
    torch.testing.assert_close(fourier_gain.fourier_gain(x, 0.5), exact, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(latent_mixing.forward, "merge_instances", lambda x, masks: x[0])
    with pytest.warns(RuntimeWarning, match="the kernel for merge_instances"):
        merged = latent_mixing.merge_instances(x)
    assert torch.equal(merged, x.mean(0))
