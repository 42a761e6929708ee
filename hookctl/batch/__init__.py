"""Data sets of paired edits, made of prompt pairs: `hookctl batch`, and its parts.

    job = read_job("job.toml")                          a file, checked (spec)
    plan = Plan(job, read_pairs(job.pairs), core)       its tasks, in shards; pure (plan)
    outcome = run(task, pipe, work)                     one task, pure but for its pipeline (run)
    manifest = run_job(plan, work, out, load)           all that is not there yet (engine)

The data go one way: spec -> plan -> run -> shard -> engine -> manifest. The unit of work and of
recovery is a shard, whose side-file is its commit: whenever a job is killed, the next call makes
what is missing, and the bytes are those of a job that was not.
"""

from hookctl.batch.engine import Unwatched, Watch, run_job, serial
from hookctl.batch.filters.specs import FilterSpec, Unmeasured
from hookctl.batch.identity import description, digest, fingerprint
from hookctl.batch.job.pairs import Pair, Pairs, read_pairs
from hookctl.batch.job.spec import Job, read_job
from hookctl.batch.plan import Draw, Plan, Shard, Task, tasks_of
from hookctl.batch.run import Outcome, Record, Work, run
from hookctl.batch.shard import make_shard

__all__ = [
    "Draw",
    "FilterSpec",
    "Job",
    "Outcome",
    "Pair",
    "Pairs",
    "Plan",
    "Record",
    "Shard",
    "Task",
    "Unmeasured",
    "Unwatched",
    "Watch",
    "Work",
    "description",
    "digest",
    "fingerprint",
    "make_shard",
    "read_job",
    "read_pairs",
    "run",
    "run_job",
    "serial",
    "tasks_of",
]
