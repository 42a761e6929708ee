"""Who looks at whom: text, image and references, both ways, against explicit softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hookctl
from hookctl import Maps, control
from hookctl.attention.call import AttentionCall
from hookctl.errors import InputError, SelectorError, UnsupportedError
from tests import zoo
from tests.zoo.edits import CAT, EDITS

FAMILIES = [name for name in ("flux", "sd3", "z_image", "qwen_image") if name in zoo.PIPELINES]
every_edit = [
    pytest.param(name, marks=pytest.mark.slow) if name == "qwen_edit" else name for name in EDITS
]


class Matrices(hookctl.Editor):
    """The probabilities of every conditional call, averaged over heads, with its spans."""

    sites = "joint"

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Any, Any]] = []

    def attention(self, call: AttentionCall) -> None:
        for row in call.rows.where(branch=hookctl.COND)[:1]:
            q, k = call.q[row.index, 0], call.k[row.index, 0]
            scores = q.double() @ k.mT.double() * call.scale
            if call.mask is not None:
                mask = call.mask[min(row.index, len(call.mask) - 1), 0]
                zero = scores.new_zeros(())
                scores = scores + torch.where(mask, zero, -torch.inf)
            self.seen.append((scores.softmax(-1).mean(0), call.spans, call.references))


def words_of(pipe: Any, prompt: str, tokens: int, word: str) -> tuple[int, ...]:
    return hookctl.address.text.TextLayout(pipe).read(prompt, tokens).find(word)


def check(records: Any, wanted: list[Tensor]) -> None:
    assert len(records) == len(wanted) > 1
    for record, one in zip(records, wanted, strict=True):
        assert record.map.numel() == one.numel()
        torch.testing.assert_close(record.map.flatten().double(), one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_word_looks_at_in_the_image(family: str) -> None:
    case = zoo.PIPELINES[family]
    pipe, explicit = case.make(), Matrices()
    before = case.run(pipe, [CAT])
    reader = Maps("cat", tokens=[2], to="image", mean=False)
    with control(pipe, explicit, reader) as session:
        assert torch.equal(case.run(pipe, [CAT]), before)  # it changes nothing
    from_words, from_token = [], []
    for p, spans, _ in explicit.seen:
        start, stop = spans.text_keys
        of_text = p[start:stop, slice(*spans.image_keys)]
        positions = list(words_of(pipe, CAT, stop - start, "cat"))
        from_words.append(of_text[positions].mean(0))
        from_token.append(of_text[2])
    found = session.maps.word("cat", to="image")
    assert found.key.relation == "text to image" and found.word == "cat to image"
    check(found.records, from_words)
    check(session.maps.token(2, to="image").records, from_token)
    assert "cat" not in session.maps  # what the image pays to the word was not read


@pytest.mark.parametrize("name", every_edit)
def test_what_the_target_looks_at_in_its_references(name: str) -> None:
    model = EDITS[name]
    pipe, explicit = model.make(), Matrices()
    last = model.references - 1
    names = [f"references[{i}]" for i in range(model.references)]
    editors = [
        Maps(*names, mean=False),
        Maps(patches=[(0.4, 0.9)], to=names[last], mean=False),
        Maps(to=names[last], mean=False),
        Maps("cat", to=names[last], mean=False),
    ]
    before = model.draw(pipe)
    with control(pipe, explicit, *editors) as session:
        assert torch.equal(model.draw(pipe), before)
    height, width = model.grids[0]
    cell = int(0.4 * height) * width + int(0.9 * width)
    for i, word in enumerate(names):
        wanted = [
            p[slice(*spans.image_queries), slice(*refs[i].keys)].sum(-1)
            for p, spans, refs in explicit.seen
        ]
        check(session.maps[word].records, wanted)
        assert session.maps.reference(i).grids == (model.grids[0],)
    into = [p[:, slice(*refs[last].keys)] for p, _, refs in explicit.seen]
    of_target = [
        x[slice(*spans.image_queries)] for x, (_, spans, _) in zip(into, explicit.seen, strict=True)
    ]
    found = session.maps.patch(0.4, 0.9, to=names[last])
    assert found.key.relation == "target to reference" and found.grids == (model.grids[last + 1],)
    check(found.records, [x[cell] for x in of_target])
    check(session.maps.target(last).records, [x.mean(0) for x in of_target])
    wanted = []
    for x, (_, spans, _) in zip(into, explicit.seen, strict=True):
        start, stop = spans.text_keys
        positions = words_of(pipe, CAT, stop - start, "cat")
        wanted.append(x[[start + p for p in positions]].mean(0))
    found = session.maps.word("cat", to=names[last])
    assert found.key.relation == "text to reference"
    check(found.records, wanted)


def test_maps_of_references_see_edits() -> None:
    """A reference that nobody may see draws no attention."""
    model = EDITS["kontext"]
    pipe = model.make()

    class Hidden(hookctl.Editor):
        sites = "joint"

        def attention(self, call: AttentionCall) -> None:
            keys = torch.ones(call.k.shape[-2], dtype=torch.int64)
            keys[slice(*call.references[0].keys)] = 2
            call.restrict(call.rows, torch.ones(call.q.shape[-2], dtype=torch.int64), keys)

    with control(pipe, Hidden(), Maps("references[0]")) as session:
        model.draw(pipe)
    assert session.maps["references[0]"].mean().abs().max() == 0


@pytest.mark.parametrize("name", every_edit)
def test_a_reference_beyond_those_given(name: str) -> None:
    model, calls = EDITS[name], list[int]()
    pipe = model.make()
    projection = next(m for n, m in pipe.transformer.named_modules() if n.endswith("to_q"))
    projection.register_forward_hook(lambda *_: calls.append(1))
    many = f"references\\[{model.references}\\] is not among"
    for reader in (Maps("references[7]"), Maps(to=f"references[{model.references}]")):
        with control(pipe, reader), pytest.raises(InputError, match=r"sees \d reference image"):
            model.draw(pipe)
    with control(pipe, Maps(f"references[{model.references}]")):
        with pytest.raises(InputError, match=many):
            model.draw(pipe)
    assert not calls  # before anything was denoised


def test_a_pipeline_without_references() -> None:
    case = zoo.PIPELINES["flux"]
    with control(case.make(), Maps("references[0]")) as session:
        with pytest.raises(InputError, match="sees 0 reference images; call an edit pipeline"):
            case.run(session.target, [CAT])


@pytest.mark.parametrize(
    ("arguments", "words", "text"),
    [
        ({"to": "picture"}, ("cat",), "to='picture'; give 'image'"),
        ({"to": "image"}, ("references[0]",), "among the words"),
        ({"to": "references[x]"}, (), "references\\[0\\]"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], words: tuple[str, ...], text: str) -> None:
    with pytest.raises(InputError, match=text):
        Maps(*words, **arguments)


def test_a_text_that_asks_nothing() -> None:
    """In a UNet the text is looked at and looks at nothing."""
    pipe = zoo.PIPELINES["sd15"].make()
    with pytest.raises(UnsupportedError, match="text and image are one sequence"):
        control(pipe, Maps("cat", to="image")).__enter__()
    pipe = zoo.PIPELINES["sd3"].make()
    with pytest.raises(SelectorError, match="give joint sites"):
        control(pipe, Maps("cat", to="image", sites="self")).__enter__()
