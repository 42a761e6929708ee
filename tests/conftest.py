"""Settings for every test."""

import gc
import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

# Kernels run on the device where there is one, else in Triton's interpreter. Triton reads this
# when it is first imported, by whatever test comes first in this process.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# On tensors this small a second thread only waits for the first, for seconds on a busy machine.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--skip",
        action="append",
        default=[],
        metavar="MARK",
        help="skip the tests of this mark, so that they are counted (see the Makefile)",
    )


def pytest_collection_finish() -> None:
    # All that is imported stays: tests that collect garbage need not look through it each time.
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for mark in config.getoption("--skip"):
        for item in items:
            if mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"{mark}: see the Makefile"))


@pytest.fixture(scope="session", autouse=True)
def watched() -> Iterator[None]:
    """In the interpreter, kernels keep to their tensors and don't race; see sanitizer.py."""
    if torch.cuda.is_available() or find_spec("triton") is None:
        yield
        return
    from tests.kernels import sanitizer

    with sanitizer.watched():
        yield
