"""`hookctl batch`: data sets of paired edits from a job file."""

from __future__ import annotations

import tomllib
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from hookctl.batch.engine import JOB, check_folder, run_job, serial
from hookctl.batch.files import read_json
from hookctl.batch.job.pairs import Pairs, read_pairs
from hookctl.batch.job.spec import Job
from hookctl.batch.plan import Plan, task_of
from hookctl.batch.ray_engine import RayEngine, check_ray
from hookctl.batch.replay import Found, differing, find, replay
from hookctl.batch.run import Work, calm
from hookctl.batch.settings import settled
from hookctl.cli import common
from hookctl.cli.batch_job import attaching, checked_job, loader, prepared, working
from hookctl.cli.batch_shown import Progress, preview, say, say_cost
from hookctl.cli.known import editors_by_name
from hookctl.cli.quiet import quiet
from hookctl.errors import HookctlError, InputError
from hookctl.preset import Preset, dump_preset, preset_of, stack_of
from hookctl.preset.read import RawStack

_OF_REPLAY = ("model", "device", "dtype", "versions", "loras", "hooks")
_TRIED = 8  # pairs, of which one must fit the stack
_TEXT = """
Make a data set of paired edits: prompt pairs x seeds x candidates with sampled settings, drawn
under a stack of editors, filtered, and written as WebDataset shards with a manifest. A job that
is killed goes on where it was, and its bytes are those of a job that was not. The least that a job
file says (the manual, docs/batch.md, has the rest):

  stack = "prompt_to_prompt"      # one that comes with hookctl, a file, or [[editor]] tables here
  [pairs]
  file = "pairs.jsonl"            # {"source": "a red cat", "edited": "a blue cat"} in each line
  seeds = 4                       # noises of each pair

writes to --out (default: out/batch-JOB):
  PLAN-RANK-of-N.tar   ID.source.png, ID.edited.png, ID.mask.png, ID.maps.npy, ID.json of each
  PLAN-RANK-of-N.json  the commit of a shard: what is in it, what was not kept and why
  manifest.parquet     a row for each record (with pyarrow installed); manifest.jsonl: the same
  manifest.json        what was made of what, and all counts; written last
  errors.jsonl         tasks that failed, and why
  preview.png          the first records
"""
_EXAMPLES = """
hookctl batch job.toml --plan                    # what it would take
hookctl batch job.toml                           # once more after a kill: goes on
hookctl batch job.toml --engine ray --workers 8 --gpus 1
hookctl batch replay 0f3a5c7e9b1d2f40-0          # a record drawn again, and compared bit by bit
"""


def add(commands: Any) -> None:
    command = common.add_command(
        commands, "batch", main, "make a data set of paired edits", _TEXT, _EXAMPLES
    )
    command.add_argument("job", help="a TOML file; or the word replay, to draw one record again")
    command.add_argument(
        "id", nargs="?", metavar="ID", help="of the record: its key in the shards and the manifest"
    )
    command.add_argument("--model", metavar="MODEL", help=common.MODEL_HELP)
    common.add_out(command, "out/batch-JOB")
    command.add_argument(
        "--plan",
        action="store_true",
        help="make nothing: measure a few steps here, and say what time and space it takes",
    )
    command.add_argument(
        "--price",
        type=common.positive,
        metavar="X",
        help="what a worker costs an hour, in any currency, for --plan",
    )
    command.add_argument(
        "--retry", action="store_true", help="make the shards anew in which tasks failed"
    )
    command.add_argument(
        "--verify", action="store_true", help="read the shards that are done: are they whole?"
    )
    group = command.add_argument_group("engine")
    group.add_argument(
        "--engine",
        choices=("serial", "ray"),
        default="serial",
        help="this process (default), or Ray, of the extra [ray]",
    )
    group.add_argument(
        "--workers",
        type=common.whole(1),
        metavar="N",
        help="processes of Ray, each with a pipeline of its own (default: 1)",
    )
    group.add_argument(
        "--gpus",
        type=common.number,
        metavar="X",
        help="of each worker, a fraction is possible (default: 0)",
    )
    common.add_machine(command)
    common.add_progress(command)


def main(options: Any) -> None:
    if options.job == "replay":
        _replay(options)
        return
    if options.id is not None:
        raise InputError(f"{options.id!r} is one too many; give a job, or: replay ID")
    job, pairs = _check(options)
    with common.out_folder(options.out, "batch", job.path.stem) as out:
        _run(job, pairs, out, options)


def _check(options: Any) -> tuple[Job, Pairs]:
    """Read all that needs neither torch nor the model."""
    job = checked_job(options.job, options.model)
    ray = options.engine == "ray"
    for name in ("workers", "gpus"):
        if getattr(options, name) is not None and not ray:
            raise InputError(f"--{name} is for --engine ray; the serial engine is this one process")
    if options.price is not None and not options.plan:
        raise InputError("--price is for --plan; give both, or neither")
    if ray:
        check_ray()
    return job, read_pairs(job.pairs, job.source, job.edited, job.columns)


@quiet()
def _run(job: Job, pairs: Pairs, out: Path, options: Any) -> None:
    preset, load, core = prepared(job, _device(options), options.dtype)
    _check_editors(job, pairs, preset)
    plan = Plan(job, pairs, core)
    work = working(job, preset, plan.core_id)
    check_folder(plan, out)
    if options.plan:
        say_cost(plan, work, out, load, options.price)
        return
    engine = serial
    if options.engine == "ray":
        engine = RayEngine(options.workers or 1, options.gpus or 0.0)
    about = {
        "job": job.path.name,
        "model": load.model,
        "maps": job.maps,
        "words": job.words,
        "threads": job.threads,
        "stack": dump_preset(_placed(preset)),
    }
    asked = {"verify": options.verify, "retry": options.retry}
    with Progress(job.path.stem, options.progress) as watch:
        manifest = run_job(plan, work, out, load, engine=engine, watch=watch, about=about, **asked)
    preview(plan, out)
    say(manifest, watch, out)


def _placed(preset: Preset) -> Preset:
    """The stack, with whole paths: it will be read from another folder."""
    loras = tuple(replace(one, path=one.path.resolve()) for one in preset.loras)
    hooks = tuple(
        replace(one, path=str(Path(one.path).resolve())) if Path(one.path).exists() else one
        for one in preset.hooks
    )
    return replace(preset, loras=loras, hooks=hooks)


def _check_editors(job: Job, pairs: Pairs, preset: Preset) -> None:
    """InputError if the stack fits none of the first pairs; single ones are their tasks' errors."""
    error = None
    for pair in pairs.rows[:_TRIED]:
        try:
            one = task_of(job, "", pair, 0).draws[0]
            settled(one, job.run, preset)[1].editors(pair.prompts)
            return
        except InputError as raised:
            error = raised
    assert error is not None  # there is a pair
    raise error


def _device(options: Any) -> Any:
    """Where the images are made: with Ray by its workers, which have what this process may lack."""
    import torch

    if options.device is None and options.engine == "ray":
        return torch.device("cuda" if options.gpus else "cpu")
    if options.engine == "ray":
        return torch.device(options.device)
    return common.usable_device(options.device)


# -- replay ----------------------------------------------------------------------------------------


def _replay(options: Any) -> None:
    if options.id is None:
        raise InputError("which record? Give hookctl batch replay ID, an id of a manifest")
    folders = [options.out] if options.out else sorted(Path("out").glob("batch-*"))
    found = find(options.id, folders)
    with ExitStack() as stack:
        stack.enter_context(quiet())
        again, changes = _drawn_again(found, options)
    unlike = [name for name in found.files if found.files[name] != again.get(name)]
    if not unlike:
        print(f"{options.id}: {', '.join(found.files)} are bit-equal to those of {found.folder}")
        return
    why = f"; since it was made there changed: {'; '.join(changes)}" if changes else ""
    raise HookctlError(
        f"{options.id}: {', '.join(unlike)} differ from those of {found.folder}{why}"
    )


def _drawn_again(found: Found, options: Any) -> tuple[dict[str, bytes], list[str]]:
    """The files of a record, and what has changed since it was made."""
    said = read_json(found.folder / JOB)
    path = found.folder / JOB
    raw = stack_of(RawStack(path, tomllib.loads(said["stack"]), ""))
    preset = preset_of(raw, editors_by_name())
    core = said["core"]
    words = said["words"] and (said["words"][0], said["words"][1])
    kept = {key: said[key] for key in ("maps", "threads")}
    job = Job(path, raw, said["model"], path, run=found.data["run"], words=words, **kept)
    options.device = options.device or core["device"]
    options.dtype = options.dtype or core["dtype"]
    load, now = loader(options.model or said["model"], preset, job, _device(options), options.dtype)
    changes = differing({key: core[key] for key in _OF_REPLAY}, now)
    pipe = load()
    with calm(pipe, job.threads):
        work = Work(job, preset, found.data["job"], attach=attaching(preset.hooks))
        return replay(found, pipe, work), changes
