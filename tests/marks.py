"""Marks of many values that are much alike."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def examples(values: Iterable[Any], everyday: Collection[Any]) -> list[Any]:
    """Values of a dear test: `make test` takes those of every day, `make long` the others."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=pytest.mark.slow if value in everyday else pytest.mark.long,
        )
        for value in values
    ]
