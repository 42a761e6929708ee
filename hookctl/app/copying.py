"""A run as a text to take along: a file, a program, a command. Each draws the same picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hookctl.cli.inverting import takes_inside
from hookctl.cli.models import EMBEDDED, SHAPES, SHAPES_FLOW
from hookctl.preset import (
    FILLED,
    EditorSpec,
    HookSpec,
    ImageSpec,
    Preset,
    dump_preset,
    parameters,
)

PICTURE = "picture.png"  # what a text calls the picture that was given


def as_toml(preset: Preset) -> str:
    """The file that `hookctl run` reads."""
    return dump_preset(preset).rstrip() + "\n"


def as_command(preset: Preset, device: str = "cpu", dtype: str = "float32") -> str:
    """Lines for a shell: the file is written, then run."""
    image = f" --image {PICTURE}" if preset.takes_image else ""
    where = f" --device {device} --dtype {dtype}"
    return (
        f"cat > stack.toml <<'END'\n{as_toml(preset)}END\n"
        f"hookctl run stack.toml{image}{where} --out out/page\n"
    )


def as_python(preset: Preset, device: str = "cpu", dtype: str = "float32") -> str:
    """A program; the picture ends up in `edited`."""
    run = preset.run
    edits = [run["edit"]] if "edit" in run else []
    recipes = [spec.recipe for spec in preset.specs if spec.recipe != "Maps"]
    recipes += [one.recipe for one in (preset.inversion, preset.program) if one is not None]
    lines = ["import torch"]
    lines += ["from PIL import Image"] * preset.takes_image
    lines += ["", "import hookctl"]
    if recipes:
        lines.append(f"from hookctl.recipes import {', '.join(sorted(set(recipes)))}")
    lines += ["", *_pipeline(preset.model or SHAPES, device, dtype)]
    lines.append(f"prompts = {[run['prompt'], *edits]!r}")
    if preset.takes_image:
        lines.append(f'image = Image.open("{PICTURE}").convert("RGB")')
    editors = [*map(_editor, preset.specs), *map(_hook, preset.hooks)]
    lines += (
        ["editors = [", *(f"    {one}," for one in editors), "]"] if editors else ["editors = []"]
    )
    if preset.program is not None:
        lines += _by_program(preset, preset.program)
    else:
        lines += _inverted(preset) if preset.inversion else _drawn(run)
    lines.append('edited.save("edited.png")')
    return "\n".join(lines) + "\n"


def _pipeline(model: str, device: str, dtype: str) -> list[str]:
    if model in EMBEDDED:
        given = ["flow=True"] if model == SHAPES_FLOW else []
        if (device, dtype) != ("cpu", "float32"):
            given.append(f'device="{device}", dtype=torch.{dtype}')
        return [f"pipe = hookctl.load_shapes({', '.join(given)})"]
    path = str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else model
    return [
        "from diffusers import DiffusionPipeline",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({path!r}, torch_dtype=torch.{dtype})",
        f'pipe.to("{device}")',
    ]


def _drawn(run: Mapping[str, object]) -> list[str]:
    guidance = f"guidance_scale={run['guidance']!r}, " if "guidance" in run else ""
    return [
        f'noise = [torch.Generator("cpu").manual_seed({run["seed"]}) for _ in prompts]',
        "with hookctl.control(pipe, *editors, strict=False) as session:",
        f"    images = pipe(prompt=prompts, num_inference_steps={run['steps']}, {guidance}"
        "generator=noise).images",
        "edited = images[-1]",
    ]


def _inverted(preset: Preset) -> list[str]:
    assert preset.inversion is not None
    run = preset.run
    further = {"steps": run["steps"], **preset.inversion.arguments}
    given = ", ".join(f"{name}={value!r}" for name, value in further.items())
    guidance = f", guidance={run['guidance']!r}" if "guidance" in run else ""
    return [
        f"inverted = {preset.inversion.recipe}(pipe, image, prompts[0], {given}).run()",
        "with hookctl.control(pipe, *editors, strict=False) as session:",
        f"    images = inverted.edit(pipe, prompts=prompts{guidance})",
        "edited = images[-1]",
    ]


def _by_program(preset: Preset, program: ImageSpec) -> list[str]:
    run, taken = preset.run, parameters(program.cls)
    further = {name: run[name] for name in ("steps", "guidance", "seed") if name in run}
    given = [f"{name}={value!r}" for name, value in {**further, **program.arguments}.items()]
    if "source_prompt" in taken and "edit" in run:
        given.insert(0, "source_prompt=prompts[0]")
    prompt = "prompts" if program.takes_prompts else "prompts[-1]"
    lines = [f"program = {program.recipe}(pipe, image, {prompt}, {', '.join(given)})"]
    if takes_inside(program.cls):
        lines += ["images = program.run(*editors)"]
    else:
        lines += [
            "with hookctl.control(pipe, *editors, strict=False) as session:",
            "    images = program.run()",
        ]
    return [*lines, "edited = images[-1]"]


def _editor(spec: EditorSpec) -> str:
    if spec.recipe == "Maps":
        return "hookctl.Maps()"
    filled = [name for name in parameters(spec.cls) if name in FILLED["editor"]]
    given = [f"{name}={name}" for name in filled]
    given += [f"{name}={value!r}" for name, value in spec.arguments.items()]
    return f"{spec.recipe}({', '.join(given)})"


def _hook(hook: HookSpec) -> str:
    said = "".join(f", {name}={value!r}" for name, value in hook.arguments.items())
    return f"hookctl.learned.load({hook.path!r}, pipe{said})"


def as_texts(preset: Preset, device: str, dtype: str) -> dict[str, str]:
    """All of them, by what they are called on the page."""
    return {
        "TOML": as_toml(preset),
        "Python": as_python(preset, device, dtype),
        "Command line": as_command(preset, device, dtype),
    }
