"""Says where the packages are.

The links hookctl/recipes -> ../recipes (and so on) make the checkout a plain package, which an
editable install puts on the path as it stands, so that type checkers and editors find everything.
Where links were checked out as files (Windows), the folders they stand for are mapped by name.
"""

from pathlib import Path

from setuptools import find_packages, setup

LINKS = {
    "hookctl.demos": "demos",
    "hookctl.kernels": "triton_kernels",
    "hookctl.recipes": "recipes",
}

packages = find_packages(include=["hookctl", "hookctl.*"])
folders = {"": "."}
for name, folder in LINKS.items():
    if not Path(name.replace(".", "/")).is_dir():
        packages += [name, *(f"{name}.{sub}" for sub in find_packages(folder))]
        folders[name] = folder

setup(packages=packages, package_dir=folders)
