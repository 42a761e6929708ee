"""From a job to tasks: which draws of which pairs, in which shard. Pure: the same job, the same
plan, on any machine and in any order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hookctl.batch.identity import digest
from hookctl.batch.job.pairs import Pair, Pairs

if TYPE_CHECKING:
    from hookctl.batch.job.spec import Job

_SEEDS = 2**32  # of noises whose seeds the pairs make


@dataclass(frozen=True)
class Draw:
    """One call of the pipeline: which candidate of its task it is, the seed of its noise, and the
    settings that are its own, by editor (or "run") and name."""

    candidate: int
    seed: int
    settings: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Task:
    """A pair and a noise, drawn once or several times.

    id: 16 hex digits of the hash of all that determines what it makes; number: its place in the
    plan, which does not.
    """

    id: str
    number: int
    pair: Pair
    draws: tuple[Draw, ...]


@dataclass(frozen=True)
class Shard:
    """A part of a plan, small enough to be sent.

    rank: which of `of` parts; plan: the id; first, last: its tasks' numbers, the last exclusive;
    pairs: that these tasks need.
    """

    rank: int
    of: int
    plan: str
    first: int
    last: int
    pairs: tuple[Pair, ...]

    @property
    def name(self) -> str:
        """Of its files, without ending: another plan's shards have other names."""
        return f"{self.plan[:12]}-{self.rank:05d}-of-{self.of:05d}"


@dataclass(frozen=True)
class Plan:
    """All tasks of a job.

    core: `identity.description`; pairs: in their order, of which each has `seeds` tasks.
    """

    job: Job
    pairs: Pairs
    core: Mapping[str, Any]

    @cached_property
    def core_id(self) -> str:
        return digest(self.core)

    @cached_property
    def id(self) -> str:
        """The hash of the plan: of what its tasks make, of its pairs, seeds and shards."""
        job = self.job
        columns = [job.source, job.edited]
        return digest([self.core, self.pairs.sha256, columns, job.seeds, job.tasks, job.near])

    @property
    def shards(self) -> int:
        return -(-len(self) // self.job.tasks)

    def __len__(self) -> int:
        return len(self.pairs.rows) * seeds_of(self.job)

    def shard(self, rank: int) -> Shard:
        first = rank * self.job.tasks
        last = min(first + self.job.tasks, len(self))
        each = seeds_of(self.job)
        pairs = self.pairs.rows[first // each : -(-last // each)]
        return Shard(rank, self.shards, self.id, first, last, pairs)


def seeds_of(job: Job) -> int:
    """How many noises a pair has."""
    return job.seeds if isinstance(job.seeds, int) else len(job.seeds)


def tasks_of(job: Job, core_id: str, shard: Shard) -> list[Task]:
    """The tasks of a shard, in their order."""
    each = seeds_of(job)
    start = shard.first // each
    return [
        task_of(job, core_id, shard.pairs[n // each - start], n % each, n)
        for n in range(shard.first, shard.last)
    ]


def task_of(job: Job, core_id: str, pair: Pair, place: int, number: int = 0) -> Task:
    """The task of a pair and of its seed number `place`."""
    first = _seed(pair, place) if isinstance(job.seeds, int) else job.seeds[place]
    said = [core_id, *pair.prompts, {name: pair.columns.get(name) for name in job.columns}]
    draws = tuple(
        Draw(n, seed, _settings(job, pair, seed, n))
        for n in range(job.candidates)
        for seed in [first if n == 0 else _number([first, "candidate", n])]
    )
    decided = [[draw.seed, draw.settings] for draw in draws]
    return Task(digest([*said, decided])[:16], number, pair, draws)


def _settings(job: Job, pair: Pair, seed: int, candidate: int) -> dict[str, dict[str, Any]]:
    told = digest([*pair.prompts, seed, candidate])
    return {
        owner: {key: one.of(f"{told}/{owner}/{key}", pair.columns) for key, one in table.items()}
        for owner, table in job.vary.items()
    }


def _seed(pair: Pair, place: int) -> int:
    return _number([*pair.prompts, "seed", place])


def _number(said: list[Any]) -> int:
    return int(digest(said)[:8], 16) % _SEEDS
