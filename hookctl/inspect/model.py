"""What there is to control in a model: its sites, its family's facts, what can be caught.

Looks only; `probe` runs the model and notes what was really caught.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from hookctl.address import families, pipelines
from hookctl.address.rows import Layout
from hookctl.address.sites import Site
from hookctl.errors import UnsupportedError
from hookctl.inspect.tables import table


@dataclass(frozen=True)
class SiteFacts:
    """One site; grid: (height, width) of its tokens at the model's own image size, if known.

    caught: whether its calls can be edited; how: by which way, or why not.
    """

    site: Site
    processor: str
    grid: tuple[int, int] | None
    caught: bool
    how: str

    def data(self) -> dict[str, Any]:
        site = self.site
        return {
            "path": site.path,
            "label": site.label,
            "kind": site.kind,
            "place": site.place,
            "block": site.block,
            "resolution": None if site.resolution is None else str(site.resolution),
            "grid": self.grid,
            "heads": site.heads,
            "processor": self.processor,
            "caught": self.caught,
            "how": self.how,
        }


@dataclass(frozen=True)
class Survey:
    """What there is in a pipeline or a bare denoiser.

    pipeline, scheduler: None for a bare denoiser; latent: its own size (height, width), if known;
    text: (tokenizer, first position, length) of each stretch, or why there is none;
    elsewhere: (path, processor) of attention without a softmax, which can't be edited.
    """

    denoiser: str
    pipeline: str | None
    scheduler: str | None
    latent: tuple[int, int] | None
    joint_order: str | None
    layout: Layout | None
    text: tuple[tuple[str, int, int | None], ...] | str
    sites: tuple[SiteFacts, ...]
    elsewhere: tuple[tuple[str, str], ...]

    @property
    def caught(self) -> tuple[SiteFacts, ...]:
        return tuple(fact for fact in self.sites if fact.caught)

    def counts(self) -> dict[str, dict[str, int]]:
        """How many sites there are by kind, by place and by resolution."""
        sites = [fact.site for fact in self.sites]
        known = sorted({s.resolution for s in sites if s.resolution is not None}, reverse=True)
        return {
            "kinds": dict(Counter(site.kind for site in sites)),
            "places": dict(Counter(f"{site.place}{site.block}" for site in sites)),
            "resolutions": {str(r): sum(s.resolution == r for s in sites) for r in known},
        }

    def data(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        text = self.text
        return {
            "pipeline": self.pipeline,
            "denoiser": self.denoiser,
            "scheduler": self.scheduler,
            "latent": self.latent,
            "joint_order": self.joint_order,
            "guidance": None
            if self.layout is None
            else {
                "one_call": {str(n): list(names) for n, names in self.layout.groups.items()},
                "calls_of_a_step": list(self.layout.sequential),
            },
            "text": None
            if isinstance(text, str)
            else [{"tokenizer": t, "start": s, "length": n} for t, s, n in text],
            "no_text_because": text if isinstance(text, str) else None,
            "summary": {
                "sites": len(self.sites),
                "caught": len(self.caught),
                "without_softmax": len(self.elsewhere),
                **self.counts(),
            },
            "sites": [fact.data() for fact in self.sites],
            "without_softmax": [{"path": p, "processor": c} for p, c in self.elsewhere],
        }

    def lines(self) -> Iterator[str]:
        """The same for people."""
        names = (self.pipeline or "a bare denoiser", self.denoiser, self.scheduler)
        yield ", ".join(name for name in names if name)
        yield ""
        yield from _facts(self)
        yield ""
        yield table([_row(fact) for fact in self.sites], _HEADERS)
        if self.elsewhere:
            yield ""
            yield "Attention without a softmax, which no edit can reach:"
            yield table(self.elsewhere, ("path", "processor"))


_HEADERS = ("site", "kind", "place", "resolution", "grid", "heads", "how it is caught", "path")


def _row(fact: SiteFacts) -> tuple[object, ...]:
    site = fact.site
    grid = None if fact.grid is None else "x".join(map(str, fact.grid))
    how = fact.how if fact.caught else f"NOT CAUGHT: {fact.how}"
    place = f"{site.place}{site.block}"
    resolution = None if site.resolution is None else str(site.resolution)
    return (site.label, site.kind, place, resolution, grid, site.heads, how, site.path)


def _facts(survey: Survey) -> Iterator[str]:
    """The summary: counts first, then what the family does."""
    counts = survey.counts()
    total, caught = len(survey.sites), len(survey.caught)
    kinds = ", ".join(f"{n} {kind}" for kind, n in counts["kinds"].items())
    yield f"sites        {total} ({kinds or 'none'}); {caught} can be caught, {total - caught} not"
    for name, title in (("places", "places"), ("resolutions", "resolutions")):
        if counts[name]:
            yield f"{title:12s} " + ", ".join(f"{key} ({n})" for key, n in counts[name].items())
    if survey.latent:
        height, width = survey.latent
        yield f"latent       {height} x {width} at the model's own image size"
    order = {
        "image_text": "image before text in one sequence",
        "text_image": "text before image in one sequence",
        None: "attended to separately (cross-attention)",
    }
    if survey.sites:
        yield f"text         {order[survey.joint_order]}"
    if isinstance(survey.text, str):
        yield f"words        none: {survey.text}"
    else:
        for name, start, length in survey.text:
            span = f"{start}..{start + length - 1}" if length else f"{start} onwards"
            yield f"words        {name} fills text positions {span}"
    if survey.pipeline:
        yield f"guidance     {_guidance(survey.layout)}"


def _guidance(layout: Layout | None) -> str:
    if layout is None:
        return "not declared; give rows= to control()"
    if layout.sequential:
        return f"a call each, in this order: {', '.join(layout.sequential)}"
    return "rows of one call: " + "; or ".join(", ".join(g) for g in layout.groups.values())


def survey(target: Any) -> Survey:
    """Look at a pipeline or a bare denoiser, without running it."""
    denoiser = families.uncompiled(families.denoiser_of(target))
    pipe = None if isinstance(target, nn.Module) else target
    latent = _latent(denoiser)
    described = families.describe_sites(denoiser)
    facts = tuple(_site_facts(site, module, latent) for site, module in described)
    return Survey(
        denoiser=type(denoiser).__name__,
        pipeline=None if pipe is None else type(pipe).__name__,
        scheduler=None if pipe is None else type(getattr(pipe, "scheduler", None)).__name__,
        latent=latent,
        joint_order=families.joint_order(denoiser),
        layout=_layout(pipe),
        text=_text(pipe),
        sites=facts,
        elsewhere=tuple(
            (path, type(families.processor_of(denoiser.get_submodule(path))).__name__)
            for path in families.softmax_free(denoiser)
        ),
    )


def _site_facts(site: Site, module: nn.Module, latent: tuple[int, int] | None) -> SiteFacts:
    grid = None
    if latent and site.resolution is not None and site.kind not in ("temporal", "gated"):
        # Strided convolutions round up.
        height, width = (-(-side * site.resolution // 1) for side in latent)
        grid = (int(height), int(width))
    processor = type(getattr(module, "processor", module)).__name__
    caught, how = _catch(module, processor)
    return SiteFacts(site, processor, grid, caught, how)


def _catch(module: nn.Module, processor: str) -> tuple[bool, str]:
    """Whether a module's calls can be caught, and how or why not."""
    reason = families.uncatchable(module)
    if reason is not None:
        return False, reason
    try:
        form = families.sdpa_form(module)
    except UnsupportedError as error:
        return False, str(error)
    if form is not None:
        backend = families.bypasses_sdpa(module)
        what = f"the backend of {processor}" if backend else processor
        return True, f"{what} bypasses SDPA; {form[0].__name__} stands in"
    if families.spells_out(module):
        return True, "its own softmax is followed"
    return True, "SDPA"


def _latent(denoiser: nn.Module) -> tuple[int, int] | None:
    """(height, width) of the latent that the model was made for, if its configuration says."""
    config: Any = getattr(denoiser, "config", None)
    size = config.get("sample_size") if hasattr(config, "get") else None
    if isinstance(size, int):
        return (size, size)
    if isinstance(size, list | tuple) and len(size) >= 2:
        return (int(size[-2]), int(size[-1]))
    return None


def _layout(pipe: Any) -> Layout | None:
    """The layout of a pipeline that is declared."""
    return None if families.pipeline_of(pipe) is None else pipelines.layout_of(pipe)


def _text(pipe: Any) -> tuple[tuple[str, int, int | None], ...] | str:
    if pipe is None:
        return "a bare denoiser has no tokenizer"
    try:
        streams = pipelines.text_streams(pipe)
    except UnsupportedError as error:
        return str(error)
    found = []
    for stream in streams:
        limit = getattr(stream.tokenizer, "model_max_length", None)
        # Tokenizers without a limit report one of about 1e30.
        known = limit if isinstance(limit, int) and limit < 1_000_000 else None
        found.append((type(stream.tokenizer).__name__, stream.start, stream.length or known))
    return tuple(found)


def pipeline_arguments(pipe: Any) -> set[str]:
    """The names that a pipeline's call takes."""
    return set(inspect.signature(type(pipe).__call__).parameters)
