"""A wheel holds every module, weight and table of the checkout, and its links no second time."""

from __future__ import annotations

from distutils.core import run_setup
from pathlib import Path

import pytest
import setuptools  # noqa: F401  (its distutils is the one that reads pyproject.toml)

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "hookctl": "hookctl",
    "demos": "hookctl/demos",
    "recipes": "hookctl/recipes",
    "triton_kernels": "hookctl/kernels",
}
# What a gallery shows is for readers of the checkout.
UNPACKED = {".jpg", ".png", ".pyc"}


def shipped() -> list[str]:
    """Paths in the wheel, by setuptools' configuration; nothing is built."""
    build = run_setup("setup.py", stop_after="config").get_command_obj("build_py")
    build.ensure_finalized()
    modules = [
        f"{package.replace('.', '/')}/{Path(file).name}"
        for package, _, file in build.find_all_modules()
    ]
    return modules + [
        f"{package.replace('.', '/')}/{name}"
        for package, _, _, names in build.data_files
        for name in names
    ]


def present() -> set[str]:
    """What the folders hold, by the path it should have in the wheel."""
    found = set()
    for folder, package in FOLDERS.items():
        links = [path for path in (ROOT / folder).iterdir() if path.is_symlink()]
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and not any(link in path.parents for link in links):
                found.add(f"{package}/{path.relative_to(ROOT / folder).as_posix()}")
    # Images that presets name come along; those of the gallery don't.
    return {n for n in found if Path(n).suffix not in UNPACKED or Path(n).parent.name == "presets"}


def test_the_wheel_holds_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    every = shipped()
    names = set(every)
    assert len(every) == len(names)
    assert present() - names == {"hookctl/demos/gallery.md"}
    assert names <= present()
    assert {
        "hookctl/py.typed",
        "hookctl/recipes/prompt_to_prompt.py",
        "hookctl/demos/presets/prompt_to_prompt.toml",
        "hookctl/demos/presets/striped.safetensors",
        "hookctl/demos/shapes/weights/unet/diffusion_pytorch_model.safetensors",
        "hookctl/kernels/common/launches.json",
        "hookctl/kernels/sum_of_terms/forward.py",
    } <= names


def test_an_editable_install_is_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Type checkers and editors follow a path, and no import hook; setuptools writes the one
    instead of the other where all packages lie under the same folder by their own names."""
    monkeypatch.chdir(ROOT)
    found = run_setup("setup.py", stop_after="config")
    assert found.package_dir == {"": "."}
    assert {
        "hookctl.recipes",
        "hookctl.recipes.common",
        "hookctl.kernels",
        "hookctl.demos.shapes",
    } <= {*found.packages}
    for package in found.packages:
        assert (ROOT / package.replace(".", "/") / "__init__.py").is_file()


def test_links_that_were_checked_out_as_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As git does on Windows, unless it is told otherwise."""
    for folder in ("hookctl", "recipes/common", "triton_kernels", "demos"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("hookctl", "recipes", "recipes/common", "triton_kernels", "demos"):
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "hookctl" / "recipes").write_text("../recipes")
    (tmp_path / "setup.py").write_text((ROOT / "setup.py").read_text("utf-8"), "utf-8")
    monkeypatch.chdir(tmp_path)
    assert {
        "hookctl/__init__.py",
        "hookctl/recipes/__init__.py",
        "hookctl/recipes/common/__init__.py",
        "hookctl/kernels/__init__.py",
        "hookctl/demos/__init__.py",
    } == set(shipped())
