"""`hookctl inspect`: what there is to control in a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hookctl.cli import common
from hookctl.cli.draw import Drawing
from hookctl.cli.models import find_model
from hookctl.cli.quiet import quiet
from hookctl.cli.weights import is_weights, show_weights
from hookctl.errors import InputError
from hookctl.inspect import table
from hookctl.learned.reading.located import located

if TYPE_CHECKING:
    from hookctl.inspect import Probed, Survey
    from hookctl.inspect.proved import Proved

_TEXT = """
List the attention sites of a model, what its family does with text and guidance, and which sites
can be caught. Weights are not read unless --run is given: that draws one short image and says
which sites were really caught. --prove changes one prompt, one negative, one seed and one word in
a few short runs and prints what is declared of the family beside what follows. Takes a pipeline
or a bare denoiser folder.

Of a file of weights (GLIGEN, InstanceDiffusion, IP-Adapter, InstantID, ...) it says what they are,
for which base model, what they need and how they are attached. No code in a file is ever run.

A site is selected by kind, place, resolution relative to the latent, or path:
  sites="self up @<=1/2, mid"    self-attention of the up blocks at half the latent or coarser,
                                 and everything in the middle
"""
_EXAMPLES = """
hookctl inspect shapes                        # the embedded pipeline
hookctl inspect ./sd15/unet --json            # one model of it, for programs
hookctl inspect shapes --run                  # what is really caught
hookctl inspect shapes --prove                # declared facts beside measured ones
hookctl inspect ip-adapter_sd15.bin           # what a file of weights is
"""
_RUN_STEPS = 2
_VITAL_STEPS = 15


def add(commands: Any) -> None:
    command = common.add_command(
        commands, "inspect", main, "list what there is to control in a model", _TEXT, _EXAMPLES
    )
    command.add_argument(
        "model", metavar="MODEL", help=f"{common.MODEL_HELP}; or a file of weights"
    )
    command.add_argument("--json", action="store_true", help="print JSON, for programs")
    command.add_argument(
        "--run",
        action="store_true",
        help="draw one image in two steps, and say which sites were caught",
    )
    command.add_argument(
        "--prove", action="store_true", help="measure the declared facts in about 14 short runs"
    )
    command.add_argument(
        "--vital",
        action="append",
        metavar="TEXT",
        help="which blocks matter most: draw this prompt with one block left out at a time, and "
        "list by how much the image changes; may be repeated",
    )
    common.add_machine(command)
    common.add_progress(command)


def main(options: Any) -> None:
    if is_weights(options.model):
        if options.run or options.prove or options.vital:
            raise InputError(
                f"{options.model}: are weights; --vital, --run and --prove take a pipeline, and "
                "hookctl run --hook attaches weights to one"
            )
        located(options.model)
        _inspect_weights(options)
        return
    find_model(options.model, whole=options.run or options.prove or bool(options.vital))
    _inspect(options)


@quiet()
def _inspect_weights(options: Any) -> None:
    show_weights(options.model, options.json)


@quiet()
def _inspect(options: Any) -> None:
    from hookctl.cli.loading import load_for_survey, load_pipeline
    from hookctl.inspect import survey

    if not (options.run or options.prove or options.vital):
        target = load_for_survey(options.model)
    else:
        target = load_pipeline(options.model, options.device, options.dtype)
    found = survey(target)
    probed = _probe(target, options) if options.run else None
    proof = _prove(target, options) if options.prove else None
    alike = _vital(target, options) if options.vital else None
    if options.json:
        data = {"model": options.model, **found.data()}
        data["run"] = None if probed is None else probed.data()
        data["proved"] = None if proof is None else proof.data()
        data["vital"] = alike
        print(json.dumps(data, indent=2, ensure_ascii=False))
        return
    print(f"{options.model}\n")
    print("\n".join(found.lines()))
    if probed is not None:
        print()
        print("\n".join(run_lines(found, probed)))
    if proof is not None:
        print()
        print("\n".join(proof.lines()))
    if alike is not None:
        print()
        print("\n".join(vital_lines(alike)))


def _vital(pipe: Any, options: Any) -> dict[str, float]:
    from hookctl.recipes.common.vital_layers import layer_similarities

    arguments = Drawing(steps=_VITAL_STEPS).arguments(pipe, options.vital)
    for name in ("prompt", "negative_prompt", "generator"):
        arguments.pop(name, None)
    pipe.set_progress_bar_config(disable=True)
    with common.bar("blocks", common.wants_progress(options)) as shown:
        return layer_similarities(pipe, options.vital, progress=shown, **arguments)


def _probe(pipe: Any, options: Any) -> Probed:
    from hookctl.inspect import probe

    return probe(pipe, **_arguments(pipe, options, ["a photo"]))


def _prove(pipe: Any, options: Any) -> Proved:
    import torch

    from hookctl.address.families.traces import Drawn
    from hookctl.inspect import pipeline_arguments
    from hookctl.inspect.proved import proved

    def run(drawn: Drawn) -> None:
        arguments = _arguments(pipe, options, list(drawn.prompts))
        if "negative_prompt" in pipeline_arguments(pipe):
            arguments["negative_prompt"] = list(drawn.negatives)
        if "generator" in pipeline_arguments(pipe):
            arguments["generator"] = [torch.Generator().manual_seed(s) for s in drawn.seeds]
        pipe(**arguments)

    return proved(pipe, run)


def _arguments(pipe: Any, options: Any, prompts: list[str]) -> dict[str, Any]:
    """Those of a short run."""
    from PIL import Image

    from hookctl.inspect import pipeline_arguments

    pipe.set_progress_bar_config(disable=not common.wants_progress(options), leave=False)
    arguments = Drawing(steps=_RUN_STEPS).arguments(pipe, prompts)
    if "output_type" in pipeline_arguments(pipe):
        arguments["output_type"] = "latent"
    if "image" in pipeline_arguments(pipe):  # what else it is conditioned on does not matter
        factor = getattr(pipe, "vae_scale_factor", 8)
        size = getattr(getattr(pipe, "unet", None), "config", {}).get("sample_size", 64)
        arguments["image"] = Image.new("RGB", (size * factor, size * factor), "grey")
    return arguments


def vital_lines(alike: Mapping[str, float]) -> Iterator[str]:
    """The blocks by their sites, those first without which another image is drawn."""
    yield "Without a block the image is so like the whole model's (1: the same):"
    rows = sorted(alike.items(), key=lambda pair: pair[1])
    yield table([(path, f"{value:.3f}") for path, value in rows], ("block of", "likeness"))


def run_lines(found: Survey, probed: Probed) -> Iterator[str]:
    """What the run showed, site by site where there is something to say."""
    total = len(found.sites)
    yield f"In a run of {_RUN_STEPS} steps {len(probed.seen)} of {total} sites were caught:"
    labels = {fact.site.path: fact.site.label for fact in found.sites}
    rows = [
        (labels[path], seen.calls, seen.rows, seen.queries, seen.keys, "caught")
        for path, seen in probed.seen.items()
    ]
    rows += [(labels[path], 0, 0, 0, 0, f"NOT CAUGHT: {why}") for path, why in probed.holes.items()]
    rows += [(labels[path], 0, 0, 0, 0, "never ran") for path in probed.silent]
    yield table(rows, ("site", "calls", "rows", "queries", "keys", ""))
