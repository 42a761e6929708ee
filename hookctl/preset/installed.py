"""An editor that a file names as `package.module:Class`, or a function: of an installed package.

A file must not bring code of its own. Importing a module runs it, so nothing is imported that was
not installed: that belongs to a distribution known to pip, wherever the file or the command stands.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from importlib import metadata
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hookctl.errors import InputError
from hookctl.preset.check import near

if TYPE_CHECKING:
    from hookctl.editor import Editor

_FORM = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def class_of(name: str, where: str) -> type[Editor]:
    """The class of `package.module:Class`; InputError, led by `where`, if it is no editor's."""
    lead = f"{where}: recipe={name!r}"
    module = _module(name, lead, "Class")
    from hookctl.editor import Editor

    _, _, class_name = name.partition(":")
    found = getattr(module, class_name, None)
    classes = {n: v for n, v in vars(module).items() if isinstance(v, type) and v is not Editor}
    editors = [n for n, v in classes.items() if issubclass(v, Editor)]
    if found is None:
        raise InputError(
            f"{lead}: {module.__name__} has no {class_name}{near(class_name, editors)}"
        )
    if not isinstance(found, type) or not issubclass(found, Editor):
        raise InputError(
            f"{lead}: {class_name} is no subclass of hookctl.Editor; there are: "
            f"{', '.join(editors) or 'none'}"
        )
    return found


def function_of(name: str, where: str) -> Callable[..., Any]:
    """The function of `package.module:function`; InputError, led by `where`, if there is none."""
    module = _module(name, where, "function")
    _, _, function_name = name.partition(":")
    found = getattr(module, function_name, None)
    if not callable(found):
        known = [n for n, v in vars(module).items() if callable(v)]
        hint = near(function_name, known)
        raise InputError(f"{where}: {module.__name__} has no function {function_name}{hint}")
    return found


def _module(name: str, lead: str, kind: str) -> ModuleType:
    """The module of `package.module:Name`, imported."""
    if not _FORM.fullmatch(name):
        raise InputError(f"{lead} is no {kind.lower()}; write package.module:{kind}")
    module_name, _, _ = name.partition(":")
    package = module_name.partition(".")[0]
    if not _is_installed(package):
        raise InputError(
            f"{lead}: no installed package holds {package!r}; install it with pip, since code that "
            "lies beside a file is never run"
        )
    try:
        return importlib.import_module(module_name)
    except Exception as error:  # whatever a module does when it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{lead}: {module_name} can't be imported ({reason[:300]})") from error


def _is_installed(package: str) -> bool:
    """Whether a distribution holds a package or module of this name, which is what is imported."""
    here = Path.cwd()
    # An empty entry, and that of `python -m`, is the folder in which the command stands.
    paths = [path for path in sys.path if path and Path(path).resolve() != here]
    if not any(package in _names(one) for one in metadata.distributions(path=paths)):
        return False
    installed, found = PathFinder.find_spec(package, paths), find_spec(package)
    return installed is None or (found is not None and found.origin == installed.origin)


def _names(distribution: metadata.Distribution) -> set[str]:
    """The packages and modules at the top level of a distribution."""
    if listed := distribution.read_text("top_level.txt"):
        return {*listed.split()}
    return {
        PurePosixPath(str(file)).parts[0].removesuffix(".py") for file in distribution.files or ()
    }
