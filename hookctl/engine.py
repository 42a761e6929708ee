"""One owner per denoiser: its sites, its editors, and the call in progress.

Contexts nest and end in any order; each adds its editors here and removes exactly those. When the
last one goes, everything is as it was found.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hookctl.address import families
from hookctl.address.rows import PERTURBED, Row, Rows
from hookctl.address.sites import Site, select
from hookctl.attention import plan
from hookctl.attention.call import AttentionCall
from hookctl.attention.intercept import SitePort
from hookctl.attention.stack import check_conflicts
from hookctl.editor import Editor, overrides
from hookctl.errors import HoleError, InputError, UnsupportedError
from hookctl.loop.denoise import DenoiserPort, Inner, PipelinePort, SchedulerPort
from hookctl.loop.exchange import Exchange
from hookctl.loop.features import Concat, ConcatPort, FeatureCall, concats
from hookctl.loop.run import Run
from hookctl.loop.state import Predictions, State, check_finite, split_branches


@dataclass(eq=False)
class Attached:
    """One editor in one session, with the sites it was resolved to."""

    editor: Editor
    session: Any
    sites: frozenset[str]


@dataclass(eq=False)
class _Current:
    """The denoiser call in progress in one thread."""

    state: State
    acting: tuple[Attached, ...]
    by_site: dict[str, tuple[Attached, ...]]
    ran: set[str] = field(default_factory=set)


_engines: weakref.WeakKeyDictionary[nn.Module, Engine] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


class Engine:
    """Owner of a denoiser's hooks."""

    def __init__(self, denoiser: nn.Module, pipe: Any) -> None:
        self.denoiser, self.pipe = denoiser, pipe
        self.model = families.uncompiled(denoiser)
        self.modules = dict(
            (site.path, (site, module)) for site, module in families.describe_sites(denoiser)
        )
        self.order = families.joint_order(denoiser)
        self.attached: list[Attached] = []
        self._ports: dict[str, SitePort] = {}
        self._concat_ports: list[ConcatPort] = []
        self._local = threading.local()
        self._acting: dict[Any, tuple[tuple[Attached, ...], dict[str, tuple[Attached, ...]]]] = {}
        self._denoiser_port: DenoiserPort | None = None
        self._pipeline_port: PipelinePort | None = None
        self._scheduler_port: SchedulerPort | None = None
        self._predictions: dict[str, Tensor] = {}
        self._turn_state: State | None = None
        self._exchange = Exchange()
        self._moved: Tensor | None = None
        self._expected: set[str] = set()
        self._ran: set[str] = set()

    @classmethod
    def of(cls, denoiser: nn.Module, pipe: Any) -> Engine:
        """The engine that owns the denoiser now, or a new one."""
        with _lock:
            key = families.uncompiled(denoiser)
            engine = _engines.get(key)
            if engine is None or not engine.attached:
                engine = _engines[key] = cls(denoiser, pipe)
            if pipe is not None and engine.pipe is None:
                raise UnsupportedError(
                    "control(pipe) inside control(pipe.unet): wrap the pipeline in both contexts"
                )
            return engine

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for site, _ in self.modules.values())

    # -- in and out ----------------------------------------------------------------------------

    def add(self, session: Any, editors: Sequence[Editor], rows: tuple[str, ...] | None) -> None:
        """Attach a session's editors; on any error nothing has changed."""
        with _lock:
            new = [Attached(editor, session, self._resolve(editor)) for editor in editors]
            check_conflicts([(a.editor, self.sites) for a in self.attached + new])
            first = not self.attached
            if first:
                self.run = Run(self.pipe, self.denoiser, rows)
            elif rows is not None:
                self.run.branches = rows
            self.attached += new
            self._acting = {}
            try:
                if first:
                    self._install()
                self._sync_ports()
            except BaseException:
                self.remove(session)
                raise

    def remove(self, session: Any) -> None:
        """Detach a session's editors, and everything when none is left."""
        with _lock:
            self.attached = [a for a in self.attached if a.session is not session]
            self._acting = {}
            self._sync_ports()
            if not self.attached and self._denoiser_port is not None:
                self._uninstall()

    def _resolve(self, editor: Editor) -> frozenset[str]:
        """The sites whose calls the editor must be shown."""
        editor.window()
        paths: set[str] = set()
        if overrides(editor, "attention"):
            if not self.modules:
                raise UnsupportedError(
                    f"{type(self.model).__name__} has no attention that can be caught (softmax "
                    f"attention), so {editor.name} can't act on it"
                )
            paths |= {site.path for site in select(self.sites, editor.sites, who=editor.name)}
        if overrides(editor, "features") and not any(True for _ in concats(self.model)):
            raise UnsupportedError(
                f"{editor.name} edits skip connections, and {type(self.model).__name__} has none"
            )
        if overrides(editor, "context"):
            if self.order is not None:
                raise UnsupportedError(
                    f"{editor.name} widens the text, which {type(self.model).__name__} holds in "
                    "one sequence with the image"
                )
            paths |= {site.path for site in self.sites if site.kind == "cross"}
        return frozenset(paths)

    def _install(self) -> None:
        self._denoiser_port = DenoiserPort(self.denoiser, self._around_denoiser)
        if self.pipe is not None:
            self._pipeline_port = PipelinePort(self.pipe, self.run.restart, self.run.texts)
            self._hook_scheduler()

    def _hook_scheduler(self) -> None:
        scheduler = getattr(self.pipe, "scheduler", None)
        port = self._scheduler_port
        if port is not None and port.scheduler is scheduler and port.installed:
            return
        if port is not None:
            port.remove()
        self._scheduler_port = (
            SchedulerPort(scheduler, self._around_step) if hasattr(scheduler, "step") else None
        )

    def _uninstall(self) -> None:
        for port in (self._denoiser_port, self._pipeline_port, self._scheduler_port):
            if port is not None:
                port.remove()
        self._denoiser_port = self._pipeline_port = self._scheduler_port = None
        self._predictions, self._turn_state = {}, None

    def _sync_ports(self) -> None:
        """Hook exactly the sites that an editor wants."""
        wanted = set().union(*(a.sites for a in self.attached)) if self.attached else set()
        changed = wanted != set(self._ports)
        for path in set(self._ports) - wanted:
            self._ports.pop(path).remove()
            self._exchange.restore(path)
        for path in wanted - set(self._ports):
            site, module = self.modules[path]
            self._exchange.watch(path, module)
            spelled_out = families.spells_out(module)
            self._ports[path] = SitePort(site, module, self, spelled_out=spelled_out)
        features = any(overrides(a.editor, "features") for a in self.attached)
        if features and not self._concat_ports:
            self._concat_ports = [ConcatPort(c, self._edit_features) for c in concats(self.model)]
        elif not features:
            for port in self._concat_ports:
                port.remove()
            self._concat_ports = []
        if (changed or self._concat_ports) and _compiled(self.denoiser):
            # Code compiled before would never notice hooks that came or went.
            torch._dynamo.reset()

    def silent_sites(self, session: Any) -> tuple[str, ...]:
        """Sites that an editor of the session was to be shown, but that never ran."""
        return tuple(
            sorted(
                path
                for path in self._expected - self._ran
                if any(path in a.sites for a in self.attached if a.session is session)
            )
        )

    # -- the denoiser call ---------------------------------------------------------------------

    def _current(self) -> _Current | None:
        return getattr(self._local, "current", None)

    def _around_denoiser(self, inner: Inner, args: Any, kwargs: Any) -> Any:
        outer = self._current()
        port = self._denoiser_port
        state = self.run.state(args, kwargs, port.branch if port else None, outer is not None)
        if self.pipe is not None:
            self._hook_scheduler()
        self._exchange.refresh()
        if self.run.fresh and outer is None:
            self.run.fresh = False
            check_finite(state.kwargs[state.sample])
            for attached in self.attached:
                attached.session.maps.clear()
            for attached in self.attached:
                state.maps = attached.session.maps
                attached.editor.begin(state)
        acting, by_site = self._acting_at(state)
        current = _Current(state, acting, by_site)
        self._local.current = current
        try:
            out = self._call(inner, current, args, kwargs)
            if current.by_site and not current.ran:
                raise HoleError(
                    "none of the edited attention sites ran in a denoiser call: a compiled graph "
                    "or a cache is bypassing the model. Call torch._dynamo.reset(), or compile "
                    "inside control()"
                )
            self._expected |= set(current.by_site)
            self._ran |= current.ran
        finally:
            self._local.current = outer
            # Gradient checkpointing recomputes after the call: it must meet the same edits.
            self._local.last = current
        if outer is None:
            self._remember(state, out)
        return out

    def _call(self, inner: Inner, current: _Current, args: Any, kwargs: Any) -> Any:
        state = current.state
        changed = False
        if not state.nested:
            for a in current.acting:
                if overrides(a.editor, "before"):
                    a.editor.before(state)
            if state.changed:
                self._moved = state.latents
                changed = True
        changed = self._widen(current) or changed
        around = [
            a.editor for a in current.acting if not state.nested and overrides(a.editor, "denoise")
        ]
        if not changed and not around:
            return inner(*args, **kwargs)

        def proceed(rest: tuple[Editor, ...] = tuple(around)) -> Any:
            if rest:
                return rest[0].denoise(state, lambda: proceed(rest[1:]))
            new_args, new_kwargs = self.run.arguments(state)
            return inner(*new_args, **new_kwargs)

        return proceed()

    def _widen(self, current: _Current) -> bool:
        """Append the extra texts of `context` editors to what the denoiser sees."""
        state = current.state
        extra: dict[str, Tensor] = {}
        for a in current.acting:
            if overrides(a.editor, "context"):
                extra |= dict(a.editor.context(state) or {})
        if not extra:
            return False
        own = state.kwargs.get(state.text) if state.text else None
        if not isinstance(own, Tensor):
            raise UnsupportedError("this denoiser call has no text embeddings to widen")
        parts, end = [own], own.shape[1]
        for name, text in extra.items():
            if text.dim() != 3 or text.shape[2] != own.shape[2]:
                raise InputError(
                    f"context {name!r} is {tuple(text.shape)}; give [1 or {own.shape[0]}, tokens, "
                    f"{own.shape[2]}]"
                )
            parts.append(text.to(own).expand(own.shape[0], -1, -1))
            state.extra_text[name] = (end, end + text.shape[1])
            end += text.shape[1]
        mask = state.kwargs.get("encoder_attention_mask")
        if isinstance(mask, Tensor):
            state.kwargs["encoder_attention_mask"] = F.pad(mask, (0, end - own.shape[1]), value=1)
        state.kwargs[str(state.text)] = torch.cat(parts, 1)
        return True

    def _acting_at(
        self, state: State
    ) -> tuple[tuple[Attached, ...], dict[str, tuple[Attached, ...]]]:
        """The editors that act now, and per site those that are shown its calls."""
        key = tuple(a.editor.active(state.clock) for a in self.attached)
        if key not in self._acting:
            acting = tuple(a for a, on in zip(self.attached, key, strict=True) if on)
            shown: dict[str, tuple[Attached, ...]] = {}
            for path in self._ports:
                here = tuple(a for a in acting if path in a.sites)
                if here:
                    shown[path] = here
            self._acting[key] = (acting, shown)
        return self._acting[key]

    # -- attention -----------------------------------------------------------------------------

    def watching(self, site: Site) -> bool:
        current = self._current() or getattr(self._local, "last", None)
        if current is None:
            return False
        current.ran.add(site.path)
        return site.path in current.by_site

    def batch(self) -> int:
        current = self._current() or self._local.last
        return len(current.state.rows)

    def attend(
        self, site: Site, index: int, q: Tensor, k: Tensor, v: Tensor, rest: dict[str, Any]
    ) -> Tensor:
        """Show one caught call to its editors and evaluate what they made of it."""
        current: _Current = self._current() or self._local.last
        state = current.state
        attached = current.by_site.get(site.path, ())
        mask, k, v = rest["attn_mask"], *_ungrouped(q, k, v, rest["enable_gqa"])
        full = (k, v)
        if state.extra_text and site.kind == "cross" and state.own_text:
            k, v = k[..., : state.own_text, :], v[..., : state.own_text, :]
            mask = mask[..., : state.own_text] if mask is not None else None

        def original() -> Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, mask, rest["dropout_p"], rest["is_causal"], scale=rest["scale"]
            )

        own = families.text_call(self.modules[site.path][1])
        if not attached or (index != own and not _per_sample(q, state.rows)):
            return original()
        rows, batch_rows = _rows_of(q, state.rows, index)
        if rest["is_causal"]:
            mask = plan.causal_mask(q.shape[-2], k.shape[-2], q.device)
        call = AttentionCall(
            site,
            *(plan.stack_rows(x, batch_rows) for x in (q, k, v)),
            rows=rows,
            clock=state.clock,
            scale=q.shape[-1] ** -0.5 if rest["scale"] is None else rest["scale"],
            mask=plan.stack_mask(mask, batch_rows),
            latent=state.grid,
            text_tokens=state.own_text,
            joint_order=self.order,
            index=index,
            context=state.extra_text,
            prompts=state.prompts,
        )
        if state.extra_text:
            call.set_context_source(*(plan.stack_rows(x, batch_rows) for x in full))
        for a in attached:
            call.editor = a.editor
            a.editor.attention(call)
        if not call.operations:
            if call.read_outs:
                plan.read_only(call)
            self._log(attached, call, plan.PASS_THROUGH, site, state)
            return original()
        backend = attached[0].session.backend
        out, chosen = plan.evaluate(call, backend)
        self._log(attached, call, chosen, site, state)
        return out.flatten(0, 1)

    def _log(
        self,
        attached: Iterable[Attached],
        call: AttentionCall,
        chosen: plan.Plan,
        site: Site,
        state: State,
    ) -> None:
        for a in attached:
            verbs = {o.verb for o in call.operations if o.editor is a.editor}
            if call.read_outs and not verbs:
                verbs = {"read"}
            if verbs:
                a.session.log.note(a.editor, site, state.clock.turn, verbs, chosen)

    # -- features ------------------------------------------------------------------------------

    def _edit_features(
        self, concat: Concat, backbone: Tensor, skip: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        current = self._current() or getattr(self._local, "last", None)
        if current is None:
            return None
        call = FeatureCall(
            backbone,
            skip,
            current.state.rows,
            current.state.clock,
            concat.block,
            concat.place,
            concat.order,
            concat.resolution,
        )
        for a in current.acting:
            if overrides(a.editor, "features"):
                a.editor.features(call)
        if call.backbone is backbone and call.skip is skip:
            return None
        return call.backbone, call.skip

    # -- the scheduler's step ------------------------------------------------------------------

    def _remember(self, state: State, out: Any) -> None:
        """Keep the turn's predictions for `combine`, until the scheduler steps."""
        if any(overrides(a.editor, "combine") for a in self.attached):
            prediction = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
            if isinstance(prediction, Tensor):
                self._predictions |= split_branches(state.rows, prediction)
        self._turn_state = state

    def _around_step(
        self,
        step: Inner,
        model_output: Any,
        timestep: Any,
        sample: Any,
        args: Any,
        kwargs: Any,
    ) -> Any:
        state, self._turn_state = self._turn_state, None
        predictions, self._predictions = self._predictions, {}
        moved, self._moved = self._moved, None
        if state is None:
            self.run.keeper.step()
            return step(model_output, timestep, sample, *args, **kwargs)
        acting, _ = self._acting_at(state)
        if moved is not None:
            sample = moved.to(sample)
        for a in acting:
            if overrides(a.editor, "combine"):
                model_output = a.editor.combine(Predictions(model_output, predictions, state))
        out = step(model_output, timestep, sample, *args, **kwargs)
        self.run.keeper.step()
        after = [a.editor for a in acting if overrides(a.editor, "after")]
        if not after:
            return out
        state._stepped = stepped = out[0] if isinstance(out, tuple) else out.prev_sample
        for editor in after:
            editor.after(state)
        if state._stepped is stepped:
            return out
        if isinstance(out, tuple):
            return (state._stepped, *out[1:])
        out.prev_sample = state._stepped
        return out


def _ungrouped(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> tuple[Tensor, Tensor]:
    """Keys and values with as many heads as the queries (grouped-query attention)."""
    if not grouped or q.shape[-3] == k.shape[-3]:
        return k, v
    repeats = q.shape[-3] // k.shape[-3]
    return k.repeat_interleave(repeats, -3), v.repeat_interleave(repeats, -3)


def _per_sample(q: Tensor, rows: Rows) -> bool:
    return q.shape[0] == 1 and len(rows) > 1


def _rows_of(q: Tensor, rows: Rows, index: int) -> tuple[Rows, int]:
    """The rows of this call: all; one, where a model loops over its samples; or those that the
    pipeline's own perturbed guidance leaves, which attends to its perturbed rows apart."""
    if _per_sample(q, rows):
        row = rows[index % len(rows)]
        return Rows([Row(0, row.branch, row.prompt, row.image)]), 1
    kept = [row for row in rows if row.branch != PERTURBED]
    if q.shape[0] % len(rows) and q.shape[0] == len(kept):
        return Rows(kept), len(kept)
    return rows, len(rows)


def _compiled(denoiser: nn.Module) -> bool:
    """Whether any code of the denoiser may have been compiled already."""
    return hasattr(denoiser, "_orig_mod") or any(
        getattr(m, "_compiled_call_impl", None) is not None
        for m in denoiser.modules()
        if m is not denoiser
    )
