"""People as tables of a file: pictures, embeddings in files, places; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hookctl.address.regions import region_of
from hookctl.cli.hooks import attach_hooks
from hookctl.errors import InputError
from hookctl.learned.instant_id import InstantID
from hookctl.learned.modules.resampler import Resampler
from hookctl.learned.people import Person, people_of
from hookctl.preset.read import read_stack
from tests.hookctl.learned import identity
from tests.hookctl.learned.identity import drawn, identity_net
from tests.hookctl.learned.test_faces import Analysis
from tests.hookctl.learned.test_ip_adapter import vector

POINTS = [[0.2, 0.3], [0.4, 0.3], [0.3, 0.4], [0.25, 0.5], [0.35, 0.5]]
LARGE = (20, 10, 60, 50)  # of a picture of 80 x 100
ANALYSIS = Analysis((10, 10, 20, 20), LARGE)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A picture, a mask, and embeddings in each form."""
    Image.new("RGB", (80, 100)).save(tmp_path / "anna.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    np.save(tmp_path / "bo.npy", np.full(512, 2.0, np.float32))
    save_file({"face": torch.full((512,), 3.0)}, tmp_path / "cy.safetensors")
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "two.safetensors")
    (tmp_path / "broken.npy").write_text("none")
    (tmp_path / "empty.npy").touch()
    return tmp_path


def read(given: Any, analysis: Any = None) -> Any:
    return people_of(given, analysis, "InstantID: people")


def test_tables_become_people(files: Path) -> None:
    anna, bo, cy = read(
        [
            {"image": str(files / "anna.png"), "keypoints": str(files / "anna.png"), "scale": 0.5},
            {"embedding": str(files / "bo.npy"), "keypoints": POINTS, "region": "box:0,0,0.5,1"},
            {"embedding": files / "cy.safetensors", "region": str(files / "mask.png")},
        ],
        ANALYSIS,
    )
    assert anna.embedding[0] == 4.0 and anna.scale == 0.5 and anna.region is None
    assert anna.keypoints[0].tolist() == pytest.approx([0.25, 0.1])
    assert bo.embedding[0] == 2.0 and bo.keypoints == POINTS and bo.region == "box:0,0,0.5,1"
    assert region_of(cy.region, "region").coverage(4, 4).sum() == 16
    assert cy.embedding[0] == 3.0 and cy.keypoints is None


def test_lists_of_each_prompt_and_people_as_they_are() -> None:
    one = Person(torch.ones(512))
    assert read(one) is one
    [[first], [second]] = read([[one], [{"embedding": [1.0, 2.0]}]])
    assert first is one and second.embedding == [1.0, 2.0]
    assert read({"embedding": [1.0]}).embedding == [1.0]
    assert read({"embedding": [1.0], "region": "x" * 5000}).region == "x" * 5000  # refused later


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"embedding": [1.0], "place": 1}, r"people\[0\]=.*; give a table of image, embedding, k"),
        (
            {"region": "box:0,0,0.5,1"},
            r"people\[0\]: give either image, a picture of the face, or em",
        ),
        ({"image": "anna.png", "embedding": "bo.npy"}, r"people\[0\]: give either image"),
        ({"embedding": "gone.npy"}, r"people\[0\].embedding: .*gone.npy' can't be read"),
        ({"embedding": "broken.npy"}, r"people\[0\].embedding: .*broken.npy' can't be read"),
        ({"embedding": "empty.npy"}, r"people\[0\].embedding: .*empty.npy' can't be read"),
        ({"embedding": "two.safetensors"}, "two.safetensors holds 2 tensors; give a file of one"),
        ({"image": "bo.npy"}, r"people\[0\].image"),
        ({"image": "anna.png"}, r"people\[0\].image: find_face: no face found"),
    ],
)
def test_what_is_refused(files: Path, table: dict[str, Any], says: str) -> None:
    of_file = {k: str(files / v) for k, v in table.items() if k != "region" and isinstance(v, str)}
    with pytest.raises(InputError, match=says):
        read([table | of_file], Analysis())


def test_a_picture_needs_an_analysis(files: Path) -> None:
    with pytest.raises(InputError, match=r"people.image: to find a face .* takes analysis="):
        read({"image": str(files / "anna.png")})
    with pytest.raises(InputError, match=r"face_analysis: no \*.onnx in"):
        read({"image": str(files / "anna.png")}, str(files))


STACK = """
[[hook]]
path = "ip-adapter.bin"
identity_net = "./ControlNetModel"
scale = 0.7
people = [
    {embedding = "bo.npy", keypoints = %s, region = [0.0, 0.0, 0.5, 1.0]},
    {embedding = "cy.safetensors", region = "box:0.5,0,1,1", scale = 0.5},
]
"""


@pytest.mark.slow
def test_several_people_in_a_stack(files: Path) -> None:
    """Files beside the stack, and the editor that the same people make in Python."""
    pipe = identity.pipeline()
    tensors = identity.tensors("base", pipe.unet)
    text = pipe.unet.config.cross_attention_dim
    torch.manual_seed(0)
    face = Resampler(16, text, 512, heads=1, tokens=5).state_dict()
    layers = {name: x for name, x in tensors.items() if name.startswith("ip_adapter.")}
    torch.save(layers | {f"image_proj.{n}": x for n, x in face.items()}, files / "ip-adapter.bin")
    net = identity_net(pipe.unet)
    net.save_pretrained(files / "ControlNetModel", safe_serialization=True)
    (files / "stack.toml").write_text(STACK % POINTS, "utf-8")

    [attached] = attach_hooks(pipe, read_stack(files / "stack.toml").hooks, ["a"], None)
    assert isinstance(attached.editor, InstantID)
    bo = Person(torch.full((512,), 2.0), POINTS, (0.0, 0.0, 0.5, 1.0))
    cy = Person(torch.full((512,), 3.0), None, "box:0.5,0,1,1", 0.5)
    wanted = drawn(pipe, InstantID(attached.editor.adapter, [bo, cy], net, scale=0.7))
    assert torch.equal(drawn(pipe, attached.editor), wanted)
    other = InstantID(attached.editor.adapter, Person(vector(0, 512)), net)
    assert not torch.equal(drawn(pipe, other), wanted)
