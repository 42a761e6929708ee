"""Editors are copied and pickled outside of a session, and a copy does what the original does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hookctl
from hookctl import Editor, learned, recipes
from hookctl.address.families import sites_of
from hookctl.address.sites import matcher
from hookctl.learned.collaborative import CollaborativeDiffusion, Collaborator
from hookctl.learned.face_id import FaceID
from hookctl.learned.instant_id import InstantID
from hookctl.learned.ip_adapter import IPAdapter
from hookctl.learned.people import Person
from tests.hookctl.drawing import SD15, TWO
from tests.hookctl.learned.gated_models import gated_unet, network_of
from tests.hookctl.learned.identity import adapter, identity_net
from tests.hookctl.learned.test_collaborative import network, tokens
from tests.hookctl.learned.test_instance_diffusion import edit
from tests.hookctl.learned.test_ip_adapter import vector
from tests.hookctl.learned.test_lora import factors_of, made, of_attention
from tests.recipes.test_pairs import RECIPES

POINTS = [(0.35, 0.4), (0.65, 0.4), (0.5, 0.55), (0.4, 0.7), (0.6, 0.7)]
HALVES = {"up": 0.5, "down, mid": 1.0}

LEARNED: dict[str, Callable[[Any], Editor]] = {
    "CollaborativeDiffusion": lambda pipe: CollaborativeDiffusion(
        [Collaborator("text", network(1)), Collaborator("more", network(2), condition=tokens(1))]
    ),
    "FaceID": lambda pipe: FaceID(adapter("faceid", pipe.unet), vector(0, 6), scale=HALVES),
    "GLIGEN": lambda pipe: learned.GLIGEN(
        network_of(gated_unet()), boxes=[(0, 0, 0.5, 1)], phrases=["cat"], stop=1.0, blocks=HALVES
    ),
    "InstanceDiffusion": lambda pipe: edit(scaled=True, blocks=HALVES, sites="self !mid"),
    "IPAdapter": lambda pipe: IPAdapter(
        adapter("base", pipe.unet),
        learned.ImagePrompt(vector(0, 10), region=(0.0, 0.0, 0.5, 1.0)),
        scale=HALVES,
    ),
    "InstantID": lambda pipe: InstantID(
        adapter("instantid", pipe.unet), Person(vector(0, 6) * 10, POINTS), identity_net(pipe.unet)
    ),
    "LoRA": lambda pipe: learned.LoRA(
        made(factors_of(pipe.unet, of_attention)), region=(0, 0, 0.5, 1)
    ),
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "copied": copy.deepcopy,
    "pickled": lambda editor: pickle.loads(pickle.dumps(editor)),
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return SD15.make()


def test_every_learned_editor_is_in_the_table() -> None:
    made = [getattr(learned, name) for name in learned.__all__]
    editors = {c.__name__ for c in made if isinstance(c, type) and issubclass(c, Editor)}
    assert editors <= set(LEARNED)


@pytest.mark.slow  # a run with the editor and one with its copy
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", LEARNED)
def test_a_copy_of_a_learned_editor_acts_alike(pipe: Any, name: str, how: str) -> None:
    editor = LEARNED[name](pipe)
    made = COPIES[how](editor)
    runs = []
    for one in (editor, made):
        with hookctl.control(pipe, one):
            runs.append(SD15.run(pipe, TWO, steps=2))
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], SD15.run(pipe, TWO, steps=2))


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_copied(pipe: Any, name: str, how: str) -> None:
    editor = RECIPES[name](recipes)
    made = COPIES[how](editor)
    assert type(made) is type(editor) and made is not editor
    assert made.neutral() == editor.neutral()
    chosen, again = ([matcher(e.sites)(site) for site in sites_of(pipe)] for e in (editor, made))
    assert chosen == again


@pytest.mark.parametrize(
    "selector", [None, "all", "self up1 @<=1/2, mid", "!cross", "up_blocks.*", ["mid", "up"]]
)
def test_a_predicate_of_sites_is_pickled(pipe: Any, selector: Any) -> None:
    test = matcher(selector)
    again = pickle.loads(pickle.dumps(test))
    assert [test(site) for site in sites_of(pipe)] == [again(site) for site in sites_of(pipe)]
