"""Costs: live memory is that of the tensors, whatever the machine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hookctl.demos.cost import Live, drawing_mib, peak_mib
from hookctl.recipes import AttendAndExcite, PromptToPrompt
from tests.families.fingerprint import differences, fingerprint
from tests.recipes.images import PROMPT, TARGET, pipeline

KIB = 256  # floats


def test_views_and_writes_in_place_count_once_and_the_dead_no_more() -> None:
    with Live() as live:
        a = torch.ones(8, KIB)
        assert live.now == 8 * 1024
        b = a[:2].mul_(2)
        assert live.now == 8 * 1024
        c = a + 1
        del a, b
        assert live.now == 8 * 1024
        c = c @ torch.ones(KIB, KIB)
    assert live.most == (8 + 256 + 8) * 1024 and live.now == 8 * 1024


def test_what_was_there_before_is_free() -> None:
    layer, x = nn.Linear(KIB, KIB), torch.ones(4, KIB)
    assert peak_mib(lambda: (layer.weight.T, x.view(-1), x.add_(1))) == 0
    with torch.no_grad():
        assert peak_mib(lambda: layer(layer(x))) == round(8 / 1024, 2)


def test_what_backward_needs_is_held() -> None:
    """The squares of three layers, and a gradient as large as one."""
    x = torch.ones(16, 64 * KIB, requires_grad=True)
    with torch.no_grad():
        plain = peak_mib(lambda: x.exp().exp().exp().sum())
    held = peak_mib(lambda: x.exp().exp().exp().sum().backward())
    assert plain == pytest.approx(2, abs=0.1) and held >= 3


def test_energies_cost_memory_and_editors_leave_nothing() -> None:
    pipe = pipeline()
    before = fingerprint(pipe)
    plain = drawing_mib(pipe, [PROMPT, TARGET], guidance=3.0)
    assert plain == drawing_mib(pipe, [PROMPT, TARGET], guidance=3.0)
    edit = PromptToPrompt([PROMPT, TARGET])
    assert drawing_mib(pipe, edit.prompts, edit, guidance=3.0) < 1.5 * plain
    one = drawing_mib(pipe, PROMPT, guidance=3.0)
    excited = AttendAndExcite([PROMPT.split()[-1]])
    assert drawing_mib(pipe, PROMPT, excited, guidance=3.0) > one
    assert not differences(before, fingerprint(pipe))
