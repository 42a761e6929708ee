"""The zoo itself: its animals run, repeat themselves, and are laid out as they say."""

from __future__ import annotations

from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests import zoo
from tests.zoo import text

CASES = list(zoo.PIPELINES.values())
MODULES = list(zoo.MODULES.values())


@pytest.fixture(params=CASES, ids=lambda case: case.name, scope="module")
def case(request: pytest.FixtureRequest) -> zoo.Case:
    return request.param


@pytest.fixture(scope="module")
def pipe(case: zoo.Case) -> Any:
    return case.make()


SAME_NEGATIVES = ("svd", "flux2_klein")  # nothing stands for no image; takes no negatives


def text_rows(
    case: zoo.Case, pipe: Any, prompts: list[str], negatives: list[str], n: int
) -> list[list[Tensor]]:
    """The text of each row, for each denoiser call of one step."""
    seen: list[list[Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[2]
        seen.append([row.clone() for row in given])

    handle = case.denoiser_of(pipe).register_forward_pre_hook(note, with_kwargs=True)
    case.run(pipe, prompts, negatives, n=n)
    handle.remove()
    calls = len(seen) // 2  # there were two steps
    return seen[:calls]


@pytest.mark.slow
def test_runs_and_repeats(case: zoo.Case, pipe: Any) -> None:
    first = case.run(pipe)
    assert first.shape[0] == 1
    assert first.dtype == torch.float32
    assert first.isfinite().all()
    assert torch.equal(first, case.run(pipe))
    assert not torch.equal(first, case.run(pipe, seed=1))
    assert not torch.equal(first, case.run(pipe, "a green dog"))


@pytest.mark.slow  # builds every pipeline twice
def test_make_is_deterministic(case: zoo.Case, pipe: Any) -> None:
    """Built anew or copied; and copies share nothing."""
    before = torch.get_rng_state()
    built, copy = case.built(), case.make()
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(case.run(pipe), case.run(built))
    for model in (m for m in copy.components.values() if isinstance(m, nn.Module)):
        model.requires_grad_(False)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert torch.equal(case.run(pipe), case.run(case.make()))


def test_sites(case: zoo.Case, pipe: Any) -> None:
    modules = zoo.attention_modules(case.denoiser_of(pipe))
    modules = {p: m for p, m in modules.items() if not (case.aside and p.startswith(case.aside))}
    assert len(modules) == sum(case.sites.values())
    assert set(case.examples) <= set(modules)
    assert set(case.examples.values()) <= set(case.sites)


@pytest.mark.slow
def test_rows(case: zoo.Case, pipe: Any) -> None:
    """Rows of one label share their text, and N rows are those that follow the negatives."""
    n = 2 if case.takes_n else 1
    prompts = ["a green dog", "a spaceship"]
    rows = text_rows(case, pipe, prompts, ["blurry", "red"], n)
    others = text_rows(case, pipe, prompts, ["blurry", "blue"], n)
    expected = case.rows(2, n, case.guidance > 1)
    assert len(rows) == len(expected)
    for call, other, labels in zip(rows, others, expected, strict=True):
        if case.name == "animatediff":
            call, other = call[:: case.frames], other[:: case.frames]
        assert len(call) == len(labels)
        # The text alone cannot tell the image's rows from N, or the perturbed ones from P.
        sources = [label.replace("I", "N").replace("X", "P") for label in labels]
        if case.name in SAME_NEGATIVES:
            sources = [source.replace("N2", "N1") for source in sources]
        for i, a in enumerate(sources):
            assert [torch.equal(call[i], row) for row in call] == [a == b for b in sources]
            if case.name not in SAME_NEGATIVES:
                assert torch.equal(call[i], other[i]) == (a != "N2")


@pytest.mark.slow
def test_images_do_not_depend_on_their_neighbours(case: zoo.Case, pipe: Any) -> None:
    alone = case.run(pipe, "a green dog")
    together = case.run(pipe, ["a green dog", "a spaceship"])
    error = (alone[0] - together[0]).norm() / alone.norm()
    assert error < 1e-4  # fp32, other sizes of the matrix products


class Peaks(TorchFunctionMode):
    """The mean of each query's largest probability, in multiples of an even one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            self.note(*args, **kwargs)
        return func(*args, **kwargs)

    def note(self, query: Tensor, key: Tensor, *_: Any, **__: Any) -> None:
        tokens = key.shape[-2]
        if tokens > 1:
            p = (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1)
            self.seen.append(float(p.amax(dim=-1).mean()) * tokens)


def test_attention_is_not_even(case: zoo.Case, pipe: Any) -> None:
    """Fresh weights attend almost evenly, which would hide a wrong edit."""
    hooks, peaks = [], Peaks()
    for module in zoo.attention_modules(case.denoiser_of(pipe)).values():
        hooks.append(module.register_forward_pre_hook(lambda *_: peaks.__enter__() and None))
        hooks.append(module.register_forward_hook(lambda *_: peaks.__exit__(None, None, None)))
    case.run(pipe)
    for hook in hooks:
        hook.remove()
    assert median(peaks.seen) > 1.3


@pytest.mark.parametrize("make", [text.clip_tokenizer, text.t5_tokenizer], ids=["clip", "t5"])
def test_words_of_one_and_of_several_tokens(make: Any) -> None:
    tokenizer = make()
    lengths = {w: len(tokenizer(w, add_special_tokens=False).input_ids) for w in text.WORDS}
    assert set(lengths.values()) == {1}
    assert len(tokenizer("squirrel", add_special_tokens=False).input_ids) == 2
    assert len(tokenizer("zebra", add_special_tokens=False).input_ids) >= 5


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)
def test_bare_modules(module: zoo.ModuleCase) -> None:
    model, inputs = module.make(), module.inputs()
    before = torch.get_rng_state()
    with torch.no_grad():
        output = model(**inputs)
        assert torch.equal(output, module.make()(**inputs))
    assert torch.equal(before, torch.get_rng_state())
    assert output.isfinite().all()
    assert output.shape == inputs["x"].shape
    assert set(module.sites) <= {name for name, _ in model.named_modules()}
