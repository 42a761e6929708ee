"""Every shipped form of every kernel, compiled for GPUs that are not here.

    python -m tests.kernels.aot              compile every form, see that the record holds
    python -m tests.kernels.aot --every 4    all that has changed, and every fourth of the others
    python -m tests.kernels.aot --part 1/8   an eighth of them, in one process
    python -m tests.kernels.aot --update     compile what has changed, and record it

A kernel's module lists its forms in `specimens(arch)`. What each needs of a chip (registers,
spills, shared memory, tensor-core instructions) is compiler output, not speed. It stands in
resources.json, so that no change of it goes unseen; other versions of Triton than the recorded
one must keep the limits, but not the numbers. A form whose source, arguments and compiler are
those of the record need not be compiled again, as the compiler gives the same code; the suite
compiles some of them all the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hookctl.kernels
from hookctl.kernels.common import launch_tables
from hookctl.kernels.common.launch import SHARED_LIMIT, Specimen

RECORD = Path(__file__).with_name("resources.json")
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}

Resources = dict[str, Any]


def specimens() -> Iterator[tuple[str, Specimen]]:
    """(key in the record, form) of all kernels for all chips."""
    for module in pkgutil.walk_packages(hookctl.kernels.__path__, "hookctl.kernels."):
        listed = getattr(import_module(module.name), "specimens", None)
        if listed:
            for arch in TARGETS:
                for one in listed(arch):
                    tile = "x".join(map(str, one.launch[:2]))
                    yield f"{one.name} {tile} w{one.launch.warps} s{one.launch.stages} {arch}", one


def source_of(one: Specimen) -> Any:
    """The kernel with its arguments' types, as Triton's compiler wants it."""
    from triton.compiler import ASTSource

    names = one.kernel.arg_names
    unknown, missing = set(one.arguments) - set(names), set(names) - set(one.arguments)
    assert not unknown and not missing, f"{one.name}: no arguments {unknown}, not given {missing}"
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        given = one.arguments[name]
        if isinstance(given, str):
            signature[name], _, multiple = given.partition(":")
            if multiple:
                attributes[(i,)] = [["tt.divisibility", int(multiple)]]
        else:
            signature[name] = "constexpr"
            constants[(i,)] = given
    return ASTSource(one.kernel, signature, constants, attributes)


def digest(one: Specimen) -> str:
    """Equal for forms that the compiler sees as equal, wherever they stand in their files."""
    import triton

    texts = sorted(texts_of(one.kernel, {}).values())
    seen = (triton.__version__, texts, sorted(one.arguments.items()), one.launch, one.arch)
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


def texts_of(function: Any, found: dict[str, str]) -> dict[str, str]:
    """The text of a compiled function, of all that it calls, and its constants."""
    from triton.language import constexpr
    from triton.runtime.jit import JITFunction

    found[f"{function.fn.__module__}.{function.fn.__name__}"] = function.src
    for name in function.fn.__code__.co_names:
        used = function.fn.__globals__.get(name)
        if isinstance(used, constexpr):
            found[name] = f"{name} = {used.value!r}"
        elif isinstance(used, JITFunction) and used.fn.__module__.startswith("hookctl"):
            if f"{used.fn.__module__}.{used.fn.__name__}" not in found:
                texts_of(used, found)
    return found


def resources(one: Specimen) -> Resources:
    """Compile one form and count what it needs."""
    import triton
    from triton.backends.compiler import GPUTarget

    built = triton.compile(source_of(one), GPUTarget(*TARGETS[one.arch]), one.launch.options)
    counted = _amd(built.asm) if one.arch.startswith("gfx") else _nvidia(built.asm)
    return {**counted, "shared": built.metadata.shared, "digest": digest(one)}


def _amd(asm: Any) -> Resources:
    text = asm["amdgcn"]

    def total(field: str) -> int:
        return sum(map(int, re.findall(rf"\.{field}:\s*(\d+)", text)))

    return {
        "registers": total("vgpr_count"),
        "spills": total("vgpr_spill_count"),
        "tensor": len(re.findall("v_mfma", text)),
    }


def _nvidia(asm: Any) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        spills = 0
        if int(re.findall(r"STACK:(\d+)", usage)[0]):
            spills = len(re.findall(r"\b(?:STL|LDL)\b", _tool("nvdisasm", "-c", file.name)))
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "spills": spills,
        "tensor": len(re.findall(r"wgmma\.mma_async|mma\.sync", asm["ptx"])),
    }


def _tool(name: str, *arguments: str) -> str:
    from triton.backends import nvidia

    tool = Path(nvidia.__path__[0], "bin", name)
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def faults(key: str, one: Specimen, found: Resources) -> list[str]:
    """What no form may do, whatever the record says."""
    wrong = []
    if found["shared"] > SHARED_LIMIT[one.arch]:
        wrong.append(f"{key}: {found['shared']} bytes of shared memory > {SHARED_LIMIT[one.arch]}")
    if found["spills"]:
        wrong.append(f"{key}: {found['spills']} spills")
    if one.dots and not found["tensor"]:
        wrong.append(f"{key}: no tensor-core instruction")
    return wrong


def idle() -> list[str]:
    """Entries of the launch tables that no form takes: nothing would check them."""
    taken: set[tuple[str, str, tuple[int, ...]]] = set()
    tables = launch_tables.shipped()

    class Noted(dict[Any, Any]):
        def __init__(self, name: str, arch: str) -> None:
            super().__init__(tables[name][arch])
            self.at = name, arch

        def __getitem__(self, key: Any) -> Any:
            taken.add((*self.at, key))
            return super().__getitem__(key)

    noted: Any = {name: {arch: Noted(name, arch) for arch in of} for name, of in tables.items()}
    with patch.object(launch_tables, "shipped", lambda: noted):
        list(specimens())
    every = {(n, arch, key) for n, of in tables.items() for arch in of for key in of[arch]}
    return [f"{name} {arch} {key}: no form takes this entry" for name, arch, key in every - taken]


def _compiled(key: str) -> tuple[str, Resources]:
    return key, resources(dict(specimens())[key])


def measure(keys: list[str], jobs: int) -> dict[str, Resources]:
    """The resources of some forms, compiled in so many processes."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        return dict(pool.map(_compiled, keys))


def part(keys: list[str], which: str) -> list[str]:
    """Of "k/n" every n-th key from the k-th on: each part has some forms of every kernel."""
    k, n = map(int, which.split("/"))
    return keys[k - 1 :: n]


def compare(found: dict[str, Resources], kept: dict[str, Resources]) -> list[str]:
    """How compiled forms differ from the record."""
    return [
        f"{key}: {numbers}, recorded {kept[key]}"
        for key, numbers in found.items()
        if key in kept and {**kept[key], "digest": ""} != {**numbers, "digest": ""}
    ]


def main() -> int:
    import triton

    parser = argparse.ArgumentParser(description="Compile the kernels ahead of time.")
    parser.add_argument("--update", action="store_true", help="record what has changed")
    parser.add_argument("--only", default="", help="forms whose key contains this")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="unchanged: each N-th")
    parser.add_argument("--part", default="", metavar="K/N", help="of N parts the K-th")
    chosen = parser.parse_args()
    listed = {key: one for key, one in specimens() if chosen.only in key}
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    kept = {
        key: record["forms"][key]
        for key, one in listed.items()
        if record.get("forms", {}).get(key, {}).get("digest") == digest(one)
    }
    changed = [key for key in listed if key not in kept]
    again = [] if chosen.update else sorted(kept)[:: chosen.every]
    keys = part(sorted(changed + again), chosen.part or "1/1")
    jobs = 1 if chosen.part else len(os.sched_getaffinity(0))
    compiled = measure(keys, jobs)
    for key, numbers in compiled.items():
        print(key, json.dumps(numbers))
    found = kept | compiled
    wrong = idle() + [fault for key in found for fault in faults(key, listed[key], found[key])]
    if chosen.update and not wrong:
        forms = {} if not chosen.only else record.get("forms", {})
        record |= {"triton": triton.__version__, "forms": dict(sorted((forms | found).items()))}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    elif not chosen.update and record.get("triton") == triton.__version__:
        wrong += compare(found, record["forms"])
        wrong += [f"{key}: not as recorded; see --update" for key in changed]
        if not chosen.only:
            wrong += [f"{key}: no longer compiled" for key in record["forms"] if key not in listed]
    print("\n".join(wrong), file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
