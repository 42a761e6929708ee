"""Collects the packages: real folders at the top level become subpackages of hookctl.

The links hookctl/recipes -> ../recipes (and so on) make a checkout importable as it stands;
they are left out here, so that no file enters a wheel twice.
"""

from pathlib import Path

from setuptools import find_packages, setup

MAPPED = {
    "hookctl.demos": "demos",
    "hookctl.kernels": "triton_kernels",
    "hookctl.recipes": "recipes",
}

folders = {name: folder for name, folder in MAPPED.items() if Path(folder, "__init__.py").exists()}
packages = [
    name
    for name in find_packages(include=["hookctl", "hookctl.*"])
    if not any(name == mapped or name.startswith(f"{mapped}.") for mapped in MAPPED)
]
for name, folder in folders.items():
    packages += [name, *(f"{name}.{sub}" for sub in find_packages(folder))]

setup(packages=packages, package_dir={"hookctl": "hookctl", **folders})
