"""The syntax of prompt schedules, step by step."""

from __future__ import annotations

import pytest

from hookctl.address.schedules import ScheduledPrompt, is_scheduled
from hookctl.errors import InputError


def steps(text: str, count: int = 4) -> list[str]:
    return ScheduledPrompt.read(text).of_steps(count)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", ["a cat"] * 4),
        ("a [cat:dog:0.5]", ["a cat", "a cat", "a dog", "a dog"]),
        ("a [cat:dog:3]!", ["a cat!", "a cat!", "a cat!", "a dog!"]),
        ("a [cat:dog:.25]", ["a cat", "a dog", "a dog", "a dog"]),
        ("a [cat: dog : 0.5 ]", ["a cat", "a cat", "a  dog ", "a  dog "]),
        ("a [big :2]dog", ["a dog", "a dog", "a big dog", "a big dog"]),
        ("a [big ::2]dog", ["a big dog", "a big dog", "a dog", "a dog"]),
        ("[cow|horse|]", ["cow", "horse", "", "cow"]),
        ("[[red|blue] cat:dog:0.5]", ["red cat", "blue cat", "dog", "dog"]),
        ("[a:[b:c:3]:1]", ["a", "b", "b", "c"]),
        ("[a:b:0.5] and [c:d:0.75]", ["a and c", "a and c", "b and c", "b and d"]),
        ("[a:b:0.0]", ["b"] * 4),
        ("[a:b:1.0]", ["a"] * 4),
        ("[a:b:9]", ["a"] * 4),
        ("[(cat:1.2):dog:0.5]", ["(cat:1.2)", "(cat:1.2)", "dog", "dog"]),
        # brackets that are text
        ("a [cat]", ["a [cat]"] * 4),
        ("a [sign: open]", ["a [sign: open]"] * 4),
        ("a (cat:1.2)", ["a (cat:1.2)"] * 4),
        ("a [cat", ["a [cat"] * 4),
        ("a cat]", ["a cat]"] * 4),
        (r"a \[cat:dog:0.5\]", ["a [cat:dog:0.5]"] * 4),
        (r"[a\|b:c:2]", ["a|b", "a|b", "c", "c"]),
        (r"a \(cat\)", [r"a \(cat\)"] * 4),
        ("[very [big:small:2] cat]", ["[very big cat]"] * 2 + ["[very small cat]"] * 2),
        ("", [""] * 4),
    ],
)
def test_what_each_step_is_told(text: str, expected: list[str]) -> None:
    assert steps(text) == expected
    assert ScheduledPrompt.read(text).changes == (len(set(steps(text, 1000))) > 1)


def test_whole_steps_as_the_published_rule_counts_them() -> None:
    assert steps("[a:b:0.29]", 100).count("a") == 29
    assert steps("[a:b:0.4]", 7).count("a") == 2


@pytest.mark.parametrize(
    ("text", "start"), [("a", 1.0), ("[a:b:0.4]", 0.4), ("[a:b:3]", 0.0), ("[a|b]", 0.0)]
)
def test_until_when_it_is_surely_the_first(text: str, start: float) -> None:
    assert ScheduledPrompt.read(text).start == start


def test_which_are_scheduled() -> None:
    assert is_scheduled("[a|b]") and is_scheduled("[[a:b:1]]")
    assert not is_scheduled("a [b] (c:1.2) \\[d|e\\]")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a:b:soon]", r"'soon' is no time; give a fraction of the steps such as 0\.4"),
        ("[a:b:1.5]", "'1.5' is no time"),
        ("[a:b:-1]", "'-1' is no time"),
        ("[a:b:c:2]", r"give \[from:to:when\]"),
    ],
)
def test_refusals(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        ScheduledPrompt.read(text)
