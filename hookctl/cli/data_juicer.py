"""A data-juicer operator: a sample's prompts are drawn as a row of the job file `job` is. Paths of
its images, source and edited in turn, go to `image_key`; what was kept of each seed to `pairs`."""

import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from data_juicer.ops.base_op import OPERATORS, Mapper

from hookctl.batch import Pair, digest, run
from hookctl.batch.plan import seeds_of, task_of
from hookctl.batch.run import calm
from hookctl.cli.batch_job import checked_job, prepared, working
from hookctl.cli.common import usable_device
from hookctl.errors import InputError


@OPERATORS.register_module("hookctl_pair_mapper")
class PairMapper(Mapper):
    """job, model, device, dtype: as `hookctl batch` has them; output_dir: where images go."""

    def __init__(self, job, output_dir, model=None, device=None, dtype=None, **others):
        super().__init__(**others)
        self.job, self.folder = checked_job(job, model), Path(output_dir)
        self.place = device, dtype

    @cached_property
    def opened(self) -> tuple[Any, Any]:
        preset, load, core = prepared(self.job, usable_device(self.place[0]), self.place[1])
        return working(self.job, preset, digest(core)), load()

    def process_single(self, sample: dict[str, Any], rank: int | None = None) -> dict[str, Any]:
        job, rest = self.job, {k: v for k, v in sample.items() if k != self.image_key}
        if missing := {job.source, job.edited, *job.columns} - set(rest):
            raise InputError(f"{job.path}: a sample has no {', '.join(sorted(missing))}")
        pair = Pair(rest.pop(job.source), rest.pop(job.edited), rest)
        (work, pipe), images, pairs = self.opened, [], []
        self.folder.mkdir(parents=True, exist_ok=True)
        with calm(pipe, job.threads):
            for place in range(seeds_of(job)):
                outcome = run(task_of(job, work.core_id, pair, place), pipe, work)
                for record in outcome.records:
                    for name, held in record.files.items():
                        (self.folder / f"{record.id}.{name}").write_bytes(held)
                    images += [f"{self.folder / record.id}.{n}.png" for n in ("source", "edited")]
                made = {"records": [record.data for record in outcome.records]}
                pairs.append(json.dumps(asdict(outcome) | made))
        return sample | {self.image_key: images, "pairs": pairs}
