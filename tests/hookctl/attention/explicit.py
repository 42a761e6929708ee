"""The verbs of `AttentionCall` once more, by explicit matrices and nothing else.

Every row is a list of (matrix over the row's own keys, values) pairs plus the same for keys that
an extension brought and for added terms. Nothing of `hookctl` is used here but row numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Pairs = list[tuple[Tensor, Tensor]]

STAGES = ("borrow replace", "extend", "restrict bias", "route", "add", "skip probabilities")


def softmax(scores: Tensor) -> Tensor:
    """Rows of which every score is -inf are 0."""
    e = (scores - scores.amax(-1, keepdim=True).clamp(min=-1e300)).exp()
    return e / e.sum(-1, keepdim=True).clamp(min=1e-300)


def joined(pairs: Pairs) -> Pairs:
    """Matrices over the same values added up."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for p, v in pairs:
        key = v.data_ptr()
        found[key] = (found[key][0] + p if key in found else p, v)
    return list(found.values())


class Explicit:
    """Stands in for an AttentionCall: ask verbs of it, then ask for `output()` and `maps()`."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        mask: Tensor | None = None,
        text: tuple[int, int] | None = None,
        edited: Tensor | None = None,
    ) -> None:
        self.q, self.k, self.v, self.scale = q, k, v, scale
        self.n, self.m = q.shape[-2], k.shape[-2]
        self.text = text or (0, self.m)
        self.edited = q.new_ones(self.n) if edited is None else edited
        self.joint = edited is not None
        bias = q.new_zeros(q.shape[0], 1, 1, 1, self.m) if mask is None else mask
        if bias.dtype == torch.bool:
            bias = torch.zeros(bias.shape, dtype=q.dtype).masked_fill(~bias, -torch.inf)
        self.mask = bias.expand(q.shape[0], *q.shape[1:3], self.n, self.m)
        self.operations: list[tuple[str, Any, dict[str, Any]]] = []

    def __getattr__(self, verb: str) -> Callable[..., None]:
        def operation(rows: Any, *args: Any, **kwargs: Any) -> None:
            names = {
                "extend": ("k", "v"),
                "restrict": ("query_regions", "key_regions"),
                "route": ("source",),
                "add": ("k", "v"),
                "probabilities": ("fn",),
            }.get(verb, ())
            given = dict(zip(names, args, strict=False)) | kwargs
            rows = rows if isinstance(rows, tuple) else (rows,)
            self.operations.append((verb, rows, given | {"rows": rows}))

        return operation

    def verbs(self, stage: str, row: int) -> list[tuple[str, dict[str, Any]]]:
        return [(n, a) for n, rows, a in self.operations if n in stage.split() and row in rows]

    def branches(self, row: int) -> list[dict[str, Any]]:
        """Weight, q, k, v and mask of every form that `borrow` and `replace` made of a row."""
        own = {name: getattr(self, name)[row] for name in "qkv"}
        found = [own | {"w": self.q.new_ones(self.n), "mask": self.mask[row]}]
        for verb, a in self.verbs("borrow replace", row):
            taken = {name: a[name] for name in "qkv" if a.get(name) is not None}
            if verb == "replace":
                taken = {
                    name: x[a["rows"].index(row)] if x.dim() == 5 else x
                    for name, x in taken.items()
                }
            else:
                mask = {"mask": self.mask[taken["k"]]} if "k" in taken else {}
                taken = {name: getattr(self, name)[r] for name, r in taken.items()} | mask
            where = a.get("where")
            if where is None:
                found = [b | taken for b in found]
            else:
                found = [
                    part
                    for b in found
                    for part in (b | taken | {"w": b["w"] * where}, b | {"w": b["w"] * (1 - where)})
                ]
        return found

    def extensions(self, row: int) -> list[tuple[float, list[dict[str, Any]]]]:
        """Weight and extensions of every form that `extend` made of a branch."""
        found: list[tuple[float, list[dict[str, Any]]]] = [(1.0, [])]
        for _, a in self.verbs("extend", row):
            share = a.get("share", 1.0)
            found = [
                form
                for weight, before in found
                for form in ((weight * share, [*before, a]), (weight * (1 - share), before))
                if form[0]
            ]
        return found

    def matrices(self, row: int) -> list[tuple[Tensor, Tensor, Pairs]]:
        """Per branch: weighted probabilities over its own keys, its values, its extensions."""
        found = []
        for b in self.branches(row):
            scores = b["q"] @ b["k"].mT * self.scale + b["mask"]
            bits = torch.ones(self.n, self.m, dtype=torch.bool)
            some = torch.ones(self.n, dtype=torch.bool)
            for verb, a in self.verbs("restrict bias", row):
                if verb == "restrict":
                    bits &= (a["query_regions"][:, None] & a["key_regions"]) != 0
                    some &= a["query_regions"] != 0
                elif a.get("query_factors") is None:
                    scores = scores + a["key_factors"].reshape(self.m, -1).sum(1)
                else:
                    scores = scores + a["query_factors"] @ a["key_factors"].reshape(self.m, -1).mT
            for weight, extensions in self.extensions(row):
                blocks = [scores.masked_fill(~bits, -torch.inf)]
                values = []
                for a in extensions:
                    k, v = a["k"], a["v"]
                    shift = 0.0 if a.get("shift") is None else a["shift"]
                    new = b["q"] @ (self.k[k] if isinstance(k, int) else k).mT * self.scale
                    new = new + shift + (self.mask[k] if isinstance(k, int) else 0.0)
                    blocks.append(new.masked_fill(~some[:, None], -torch.inf))
                    values.append(self.v[v] if isinstance(v, int) else v)
                p = softmax(torch.cat(blocks, -1)) * b["w"][:, None] * weight
                parts = p.split([x.shape[-1] for x in blocks], -1)
                found.append((parts[0], b["v"], list(zip(parts[1:], values, strict=True))))
        return found

    def routed(self, row: int) -> tuple[Pairs, Pairs]:
        """(matrix, values) over the own keys, and over the extensions."""
        plain = self.matrices(row)
        own = [(p, v) for p, v, _ in plain]
        further = [pair for *_, pairs in plain for pair in pairs]
        weights = [b["w"][:, None] * w for b in self.branches(row) for w, _ in self.extensions(row)]
        start, stop = self.text
        for _, a in self.verbs("route", row):
            source = row if a["source"] is None else a["source"]
            theirs = self.matrices(source)
            their_own = sum(p for p, *_ in theirs)
            eye = torch.eye(stop - start, dtype=self.q.dtype)
            t = eye if a.get("token_map") is None else a["token_map"]
            b, g = a.get("blend", 1.0), a.get("gain", 1.0)
            image = bool(a.get("image_from_source")) and self.joint and a["source"] is not None
            new = []
            for (p, v), w, (before, *_) in zip(own, weights, plain, strict=True):
                s = {None: p, row: before}.get(a["source"], their_own * w)
                mixed = (s if image else p).clone()
                text = (s[..., start:stop] @ t * b + p[..., start:stop] * (1 - b)) * g
                mixed[..., start:stop] = text
                e = self.edited[:, None]
                new.append((e * mixed + (1 - e) * p, v))
            own = new
            if image:
                e = self.edited[:, None]
                further = [(p * (1 - e), v) for p, v in further]
                further += [(p * e, v) for *_, pairs in theirs for p, v in pairs]
        return own, further

    def finished(self, row: int) -> tuple[Pairs, Pairs, Pairs]:
        own, further = self.routed(row)
        added = []
        for _, a in self.verbs("add", row):
            p = softmax(self.q[row] @ a["k"].mT * self.scale) * a.get("scale", 1.0)
            if a.get("mask") is not None:
                p = p * a["mask"][:, None]
            added.append((p, a["v"]))
        for verb, a in self.verbs("skip probabilities", row):
            if verb == "skip":
                eye = torch.eye(self.n, dtype=self.q.dtype).expand_as(own[0][0])
                branches = self.branches(row)
                own = [(eye * b["w"][:, None], b["v"]) for b in branches]
                further = []
            else:
                # Branches over the same values are one matrix; with extensions, all must be.
                groups, keys, own = joined(own), joined(further), []
                for p, v in groups:
                    joint = torch.cat([p, *(p for p, _ in keys)], -1)
                    parts = a["fn"](joint).split([self.m, *(x.shape[-1] for x, _ in keys)], -1)
                    own.append((parts[0], v))
                    further = [(x, v) for x, (_, v) in zip(parts[1:], keys, strict=True)]
        return own, further, added

    def output(self) -> Tensor:
        rows = []
        for row in range(self.q.shape[0]):
            own, further, added = self.finished(row)
            rows.append(sum(p @ v for p, v in own + further + added))
        return torch.stack(rows)

    def maps(self, row: int, tokens: list[int]) -> Tensor:
        return self.lines(row)[..., [self.text[0] + t for t in tokens]]

    def lines(self, row: int) -> Tensor:
        """The edited matrix over the own keys, averaged over heads, [sub-batch, N, M]."""
        own, *_ = self.finished(row)
        total: Tensor = sum(p for p, _ in own)
        return total.mean(1)
