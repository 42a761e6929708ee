"""Images and faces as tables of a file: pictures, embeddings, places; and what is refused."""

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
from hookctl.learned.face_id import FaceID
from hookctl.learned.image_prompts import ImagePrompt, image_prompts_of
from hookctl.learned.ip_adapter import IPAdapter
from hookctl.preset.read import read_stack
from tests.families.subjects import error
from tests.hookctl.learned import identity
from tests.hookctl.learned.identity import drawn
from tests.hookctl.learned.test_faces import Analysis
from tests.hookctl.learned.test_ip_adapter import encoder, vector

ANALYSIS = Analysis((20, 10, 60, 50))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A picture, a mask, and embeddings in each form."""
    Image.effect_noise((40, 30), 90).convert("RGB").save(tmp_path / "dog.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    mask.save(tmp_path / "mask.png")
    np.save(tmp_path / "cat.npy", vector(0, 10).numpy())
    save_file({"image": vector(1, 10)}, tmp_path / "cow.safetensors")
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "two.safetensors")
    np.save(tmp_path / "narrow.npy", np.ones(7, np.float32))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "anna.npy", torch.nn.functional.normalize(vector(2, 6), dim=0).numpy())
    return tmp_path


@pytest.fixture(scope="module")
def pipe() -> Any:
    return identity.pipeline()


def read(given: Any, *reads: str, analysis: Any = None) -> Any:
    return image_prompts_of(given, reads or ("embedding",), analysis, "IPAdapter: images")


def test_tables_become_image_prompts(files: Path) -> None:
    dog, cat, cow, own = read(
        [
            {"image": str(files / "dog.png"), "scale": 0.5},
            {"embedding": str(files / "cat.npy"), "region": [0.0, 0.0, 0.5, 1.0]},
            {"embedding": files / "cow.safetensors", "region": str(files / "mask.png")},
            {"embedding": [0.5, 1.0], "region": "box:0,0,0.5,1"},
        ]
    )
    assert dog.image.size == (40, 30) and dog.image.mode == "RGB"
    assert dog.scale == 0.5 and dog.region is None
    assert torch.equal(cat.image, vector(0, 10)) and cat.region == [0.0, 0.0, 0.5, 1.0]
    assert torch.equal(cow.image, vector(1, 10))
    half = region_of(cow.region, "region").coverage(2, 2)
    assert half.tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert own.image.tolist() == [0.5, 1.0] and own.region == "box:0,0,0.5,1"


def test_a_file_alone_and_lists_of_each_prompt(files: Path) -> None:
    one = ImagePrompt(vector(0, 10))
    assert read(one) is one
    assert read(str(files / "dog.png")).image.size == (40, 30)
    [[first], [second, third]] = read([[one], [str(files / "cat.npy"), {"embedding": [1.0]}]])
    assert first is one and torch.equal(second.image, vector(0, 10))
    assert third.image.tolist() == [1.0]


def test_faces(files: Path) -> None:
    given = {"face": str(files / "dog.png"), "image": str(files / "dog.png")}
    found = read(given, "face", "features", analysis=ANALYSIS)
    assert found.image.size == (40, 30)
    assert float(found.face.norm()) == pytest.approx(1.0)  # the network's is 3 everywhere
    anna = read(str(files / "anna.npy"), "face")
    assert anna.image is None and float(anna.face.norm()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"embedding": [1.0], "place": 1}, r"images\[0\]=.*; give a table of image, embedding, f"),
        ({"image": "dog.png", "embedding": "cat.npy"}, r"images\[0\]: give either image, a pictu"),
        ({"image": "gone.png"}, r"images\[0\].image=.*gone.png'.*; give a readable image"),
        ({"image": "cat.npy"}, r"images\[0\].image=.*cat.npy'.*; give a readable image"),
        ({"image": 3}, r"images\[0\].image=3; give a PIL image"),
        ({"embedding": "gone.npy"}, r"images\[0\].embedding: .*gone.npy' can't be read"),
        ({"embedding": "gone.bin"}, r"images\[0\].embedding: .*gone.bin' can't be read"),
        ({"embedding": "objects.npy"}, r"images\[0\].embedding: .* can't be read: Object arrays"),
        ({"embedding": "dog.png"}, r"images\[0\].embedding: .*dog.png"),
        ({"embedding": "two.safetensors"}, "two.safetensors holds 2 tensors; give a file of one"),
        ({"embedding": [["a"]]}, r"images\[0\].embedding=.*; give a list of numbers, or a file"),
        ({"face": "dog.png"}, r"images\[0\].face: find_face: no face found"),
    ],
)
def test_what_is_refused(files: Path, table: dict[str, Any], says: str) -> None:
    of_file = {k: str(files / v) for k, v in table.items() if isinstance(v, str)}
    with pytest.raises(InputError, match=says):
        read([table | of_file], analysis=Analysis())


def test_a_picture_of_a_face_needs_an_analysis(files: Path) -> None:
    with pytest.raises(InputError, match=r"images.face: to find a face .* takes analysis="):
        read({"face": str(files / "dog.png")})


# -- in a stack ------------------------------------------------------------------------------------


def attached(pipe: Any, files: Path, kind: str, lines: str) -> Any:
    """The editor of a stack that names an adapter beside it."""
    torch.save(identity.tensors(kind, pipe.unet), files / "ip-adapter.bin")
    stack = files / "stack.toml"
    stack.write_text(f'[[hook]]\npath = "ip-adapter.bin"\nstrength = 0.7\n{lines}', "utf-8")
    [found] = attach_hooks(pipe, read_stack(stack).hooks, ["a"], None)
    return found.editor


@pytest.mark.slow
def test_images_in_a_stack(pipe: Any, files: Path) -> None:
    """Files beside the stack, and the editor that the same images make in Python."""
    model = encoder()
    model.save_pretrained(files / "image_encoder", safe_serialization=True)
    editor = attached(
        pipe,
        files,
        "base",
        """image_encoder = "./image_encoder"
images = [
    {image = "dog.png", region = [0.0, 0.0, 0.5, 1.0]},
    {embedding = "cat.npy", region = "mask.png", scale = 0.5},
]
""",
    )
    assert isinstance(editor, IPAdapter)
    with Image.open(files / "dog.png") as picture:
        dog = ImagePrompt(picture.convert("RGB"), region=(0.0, 0.0, 0.5, 1.0))
    cat = ImagePrompt(vector(0, 10), scale=0.5, region=f"mask:{files / 'mask.png'}")
    same = IPAdapter(editor.adapter, [dog, cat], scale=0.7, image_encoder=model)
    found = drawn(pipe, editor)
    # An encoder that was read from a file may sum in another order: its weights lie elsewhere.
    assert error(found, drawn(pipe, same)) < 1e-5
    alone = IPAdapter(editor.adapter, [dog], scale=0.7, image_encoder=model)
    assert error(found, drawn(pipe, alone)) > 1e-3


@pytest.mark.slow
def test_faces_in_a_stack(pipe: Any, files: Path) -> None:
    editor = attached(pipe, files, "faceid", 'images = "anna.npy"\nlora_scale = 0.6\n')
    assert isinstance(editor, FaceID)
    face = torch.from_numpy(np.load(files / "anna.npy"))
    same = FaceID(editor.adapter, face, scale=0.7, lora_scale=0.6)
    assert torch.equal(drawn(pipe, editor), drawn(pipe, same))


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (
            'images = ["narrow.npy"]',
            r"\[\[hook\]\] 1.*images\[0\]: a tensor \(7,\) given, .*\[10\]",
        ),
        ('images = ["gone.npy"]', r"\[\[hook\]\] 1.*images\[0\].*'gone.npy' can't be read"),
        ('images = [{image = "gone.png"}]', r"\[\[hook\]\] 1.*images\[0\].image='gone.png'"),
        ('images = [{picture = "dog.png"}]', r"\[\[hook\]\] 1.*; give a table of image, embedd"),
        ("images = [{scale = 0.5}]", r"images\[0\]: nothing given, but this adapter reads an im"),
        ('images = [{embedding = "cat.npy", region = "gone.png"}]', r"images\[0\].region: region"),
        ('images = [{embedding = "cat.npy", scale = "much"}]', r"images\[0\].scale='much'"),
        ('images = "cat.npy"\nimage_encoder = "./gone"', "image_encoder='./gone': there is no con"),
        ('images = "cat.npy"\nnegative = "gone.npy"', "negative: 'gone.npy' can't be read"),
        ('images = "cat.npy"\nanalysis = "x"', "'analysis' is no option of ip-adapter"),
    ],
)
def test_what_is_refused_in_a_stack(pipe: Any, files: Path, lines: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        attached(pipe, files, "base", lines)
