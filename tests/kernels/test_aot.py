"""Forms of the launch tables, compiled for sm_80, sm_90 and gfx942: see aot.py."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


PARTS = 4  # so that every worker of the suite has its share
EVERY = "16"  # of the forms that are known not to have changed; `make aot` takes all


@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, PARTS + 1))
def test_the_launch_tables_compile_and_need_what_is_recorded(part: int) -> None:
    """In a process without the interpreter, which can't be left once it was chosen."""
    compiler = pytest.importorskip("triton.compiler")
    if "constexprs" not in inspect.signature(compiler.ASTSource).parameters:
        pytest.skip("Triton 3.2 takes the source of a kernel in a form of its own")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot", "--every", EVERY, "--part", f"{part}/{PARTS}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
