"""One task, from its draws to what is kept of them: a function of the task and the pipeline."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hookctl.batch.filters.perceptual import pair_hash
from hookctl.batch.filters.specs import FilterSpec, Measure, judged, measure_of
from hookctl.batch.plan import Draw, Task
from hookctl.batch.settings import settled
from hookctl.errors import InputError, UnsupportedError
from hookctl.preset import Drawing, Preset

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from hookctl.batch.filters.drawn import Drawn
    from hookctl.batch.job.pairs import Pair
    from hookctl.batch.job.spec import Job
    from hookctl.editor import Editor
    from hookctl.maps import WordMaps

Attach = Callable[[Any, Sequence[str]], "list[Editor]"]


@dataclass(frozen=True)
class Work:
    """What all tasks of a job have in common; it can be pickled.

    core_id: of `Plan`; further: measures by name besides those of `filters`; attach: from a
    pipeline and prompts to editors beside the stack's, such as those of learned weights.
    """

    job: Job
    preset: Preset
    core_id: str
    further: Mapping[str, Measure] = field(default_factory=dict)
    attach: Attach | None = None

    @cached_property
    def filters(self) -> list[tuple[FilterSpec, Measure]]:
        return [(spec, measure_of(spec, self.further)) for spec in self.job.filters]

    @property
    def reads_maps(self) -> bool:
        wanting = {"background", "overlap", "change"}
        return self.job.maps or any(
            spec.measure in wanting or ":" in spec.measure for spec in self.job.filters
        )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "filters"}  # functions are found anew


@dataclass(frozen=True)
class Record:
    """A pair that is kept: files by their ending, bytes of each; data: what is known of it; hash:
    of both images (`perceptual`)."""

    id: str
    files: Mapping[str, bytes]
    data: Mapping[str, Any]
    hash: str


@dataclass(frozen=True)
class Outcome:
    """What came of a task: records, the best first; why others were not kept, counted; errors."""

    records: tuple[Record, ...] = ()
    rejects: Mapping[str, int] = field(default_factory=dict)
    errors: tuple[Mapping[str, str], ...] = ()


def run(task: Task, pipe: Any, work: Work) -> Outcome:
    """Draw the candidates of a task and keep the best of those that pass the filters.

    An error of a candidate is kept, and does not end the others; interrupts do.
    """
    passed: list[tuple[float, Record]] = []
    rejects: Counter[str] = Counter()
    errors = []
    for one in task.draws:
        if work.job.best is None and len(passed) == work.job.keep:
            break  # the first that pass are kept
        name = f"{task.id}-{one.candidate}"
        try:
            drawn, final = draw(task, one, pipe, work)
            scores, fault = judged(drawn, work.filters)
            if fault is not None:
                rejects[fault] += 1
                continue
            score = scores[work.job.best] if work.job.best else 0.0
            passed.append((score, _record(name, task, one, drawn, final, scores, work)))
        except Exception as error:
            errors.append({"id": name, "error": said(error)})
    passed.sort(key=lambda one: -one[0])  # stable: of equals the first
    if len(passed) > work.job.keep:
        rejects["not the best"] += len(passed) - work.job.keep
    records = tuple(record for _, record in passed[: work.job.keep])
    return Outcome(records, dict(rejects), tuple(errors))


def draw(task: Task, one: Draw, pipe: Any, work: Work) -> tuple[Drawn, dict[str, Any]]:
    """The two images of a draw from one noise, and the settings of the call."""
    import hookctl
    from hookctl.batch.filters.drawn import Drawn

    prompts = list(task.pair.prompts)
    settings, preset = settled(one, work.job.run, work.preset)
    drawing = Drawing(seed=one.seed, **settings)
    editors = preset.editors(prompts)
    if work.attach is not None:
        editors += work.attach(pipe, prompts)
    words = words_of(task.pair, pipe, work)
    every = list(dict.fromkeys([*words[0], *words[1]]))
    maps = [hookctl.Maps(*every, mean=True)] if every else []
    with hookctl.control(pipe, *editors, *maps) as session:
        images = _images(pipe, drawing.arguments(pipe, prompts))
    source, edited = (
        {word: _map(session.maps[word].where(prompt=n)) for word in found}
        for n, found in enumerate(words)
    )
    drawn = Drawn(task.pair.prompts, images, (source, edited), task.pair.columns, one.seed)
    return drawn, settings


def words_of(pair: Pair, pipe: Any, work: Work) -> tuple[list[str], list[str]]:
    """The words of either prompt whose places may change: of its columns, else those that differ;
    none if nobody asks."""
    if not work.reads_maps:
        return [], []
    if work.job.words is None:
        return changed(pipe, pair.prompts)
    source, edited = (
        [given] if isinstance(given, str) else list(given)
        for given in map(pair.columns.__getitem__, work.job.words)
    )
    return source, edited


def _map(maps: WordMaps) -> NDArray[np.float32]:
    """The mean over the sites that hold the layout: those of coarser ones are of other things."""
    from hookctl.address.latent import LAYOUT_CELLS, LAYOUT_RESOLUTION

    side = max(max(grid) for grid in maps.grids)
    bound = max(float(side * LAYOUT_RESOLUTION), float(min(side, LAYOUT_CELLS)))
    fitting = [grid for grid in maps.grids if max(grid) <= bound]
    grid = max(fitting) if fitting else min(maps.grids)
    return maps.where(grid=grid).mean().detach().float().cpu().numpy()


def changed(pipe: Any, prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of either prompt that stand for others in the other one; none without words."""
    from hookctl.address.text import TextLayout
    from hookctl.address.words import changed_words

    try:
        layout = TextLayout(pipe)
    except UnsupportedError:
        return [], []
    source, edited = (layout.read(prompt).streams[0][1] for prompt in prompts)
    edits = changed_words(source, edited)
    return (
        list(dict.fromkeys(source.words[i].text for edit in edits for i in edit.source)),
        list(dict.fromkeys(edited.words[i].text for edit in edits for i in edit.target)),
    )


def _images(pipe: Any, arguments: Mapping[str, Any]) -> tuple[Image, Image]:
    drawn = getattr(pipe(**arguments), "images", None)
    if drawn is None or len(drawn) != 2:
        raise UnsupportedError(f"{type(pipe).__name__} makes no image of each prompt")
    return drawn[0], drawn[1]


def _record(
    name: str,
    task: Task,
    one: Draw,
    drawn: Drawn,
    settings: Mapping[str, Any],
    scores: Mapping[str, float],
    work: Work,
) -> Record:
    data = {
        "id": name,
        "task": task.id,
        "source": task.pair.source,
        "edited": task.pair.edited,
        "columns": dict(task.pair.columns),
        "candidate": one.candidate,
        "seed": one.seed,
        "settings": {owner: dict(table) for owner, table in one.settings.items()},
        "run": dict(settings),
        "words": [list(maps) for maps in drawn.maps],
        "scores": dict(scores),
        "job": work.core_id,
    }
    data = json.loads(json.dumps(data, default=str))  # as it will be read
    hash = pair_hash(drawn.source, drawn.edited)
    return Record(name, files_of(drawn, work.job), data, hash)


def files_of(drawn: Drawn, job: Job) -> dict[str, bytes]:
    """What is written of a draw, by ending."""
    files = {"source.png": png(drawn.source), "edited.png": png(drawn.edited)}
    return files | (_places(drawn) if job.maps else {})


def _places(drawn: Drawn) -> dict[str, bytes]:
    """The mask of the words, and their maps as an array [words, h, w] of float16, those
    of the source first."""
    import numpy as np
    from PIL import Image

    if drawn.mask is None:
        return {}
    maps = io.BytesIO()
    every = [map for of_prompt in drawn.maps for map in of_prompt.values()]
    np.save(maps, np.stack(every).astype(np.float16), allow_pickle=False)
    mask = Image.fromarray(drawn.mask.astype(np.uint8) * 255)
    return {"mask.png": png(mask), "maps.npy": maps.getvalue()}


def png(image: Image) -> bytes:
    held = io.BytesIO()
    image.save(held, "PNG")
    return held.getvalue()


def said(error: BaseException) -> str:
    """An error in one line; what the library tells needs no class before it."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, InputError) and text else f"{type(error).__name__}: {text}"


@contextmanager
def calm(pipe: Any, threads: int) -> Iterator[None]:
    """No progress bars of the pipeline; on a CPU as many threads of torch as the job says."""
    import torch

    before = torch.get_num_threads()
    if getattr(pipe, "device", torch.device("cpu")).type == "cpu":
        torch.set_num_threads(threads)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        torch.set_num_threads(before)
