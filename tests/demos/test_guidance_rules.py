"""Rules of guidance and NAG over a few steps of the embedded pipeline: every figure is there."""

from __future__ import annotations

import pytest

import hookctl
from hookctl.demos import guidance_rules
from hookctl.demos.models import opened
from hookctl.recipes import TCFG


@pytest.mark.slow  # a dozen short runs
def test_every_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guidance_rules, "STEPS", 8)
    monkeypatch.setattr(guidance_rules, "GUIDANCES", (3.0,))
    monkeypatch.setattr(
        guidance_rules, "RULES", {"plain": lambda g: None, "TCFG": lambda g: TCFG()}
    )
    pipe = hookctl.load_shapes()
    pipe.set_progress_bar_config(disable=True)
    rules = guidance_rules.of_rules(pipe, 2)
    assert list(rules) == ["plain", "TCFG"]
    assert all(0 <= figures["strict 3"] <= 1 for figures in rules.values())
    words = guidance_rules.of_words(pipe, 4)
    assert "NAG" in words and "NAG of another colour" in words
    assert all(0 <= of["shape"] <= of["gone"] <= 1 <= of["cases"] for of in words.values())


@pytest.mark.slow  # half a dozen short runs
def test_the_flow_matching_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guidance away from disturbed predictions, and colours named in sentences."""
    monkeypatch.setattr(guidance_rules, "STEPS", 8)
    monkeypatch.setattr(guidance_rules, "GUIDANCES", (3.0,))
    pipe = opened("shapes-flow")
    pipe.set_progress_bar_config(disable=True)
    rules = guidance_rules.of_rules(pipe, 1, guidance_rules.DISTURBED)
    assert list(rules) == ["SkipLayerGuidance", "STG", "TPG", "PAG"]
    with_own = guidance_rules.of_words(pipe, 2, say=True)
    assert with_own["NAG"]["cases"] and all(
        0 <= of["shape"] <= of["gone"] <= 1 for of in with_own.values()
    )
